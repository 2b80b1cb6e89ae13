"""From rollouts to results and metrics.json, their tables for the terminal, and the regrading of stored rollouts.

    {"policies": {"runs/1/policy": {"num_problems": 30, "num_samples": 32, "avg@32": {"value": 0.25, "low": 0.19,
                                    "high": 0.31}, "pass@8": ..., "truncated": ..., "no_answer": ...,
                                    "mean_tokens": ..., "verdicts": {"correct": 240, "wrong": 700, "no_answer": 20}}},
     "differences": {"runs/1/policy - runs/0/policy": {"avg@32": {"value", "low", "high", "real"}, ...}},
     "selected": {"policy": "runs/1/policy", "metric": "pass@32", "value": 0.5}}

With --maj there are `maj@8` and so on, too (see votes.py), and with --greedy `greedy`, the share of problems that the
completion at temperature 0 gets right. With --kl-to there are `kl` and `kl_per_token`, in nats a completion and a token
(see divergence.py). Everything is computed from counts by problem (results.jsonl), and those from rollouts.jsonl,
greedy.jsonl and kl.jsonl.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations, islice
from pathlib import Path
from typing import Any

from stages.core import records
from stages.core.errors import InputError
from stages.core.grading.verifier import Verifier
from stages.core.ranks import Ranks
from stages.core.records import Divergence, Result, Rollout, Verdict
from stages.core.study import metrics
from stages.core.tabular import aligned

BATCH = 4096  # rollouts given to the verifier at once when they are graded again


class Tally:
    """Counts rollouts into Results by policy and problem, in the order of their appearance."""

    def __init__(self) -> None:
        self._results: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, rollout: Rollout) -> Rollout:
        """Count one rollout, and return it; one that is marked `greedy` is none of the samples."""
        key = rollout["policy"], rollout["problem_id"]
        if (result := self._results.get(key)) is None:
            result = self._results[key] = {
                "problem_id": rollout["problem_id"],
                "policy": rollout["policy"],
                "num_samples": 0,
                "num_correct": 0,
                "num_truncated": 0,
                "num_no_answer": 0,
                "num_tokens": 0,
                "verdicts": Counter(),
            }
        if "greedy" in rollout:
            result["num_greedy_correct"] = int(rollout["verdict"] == "correct")
            return rollout
        result["num_samples"] += 1
        result["num_correct"] += rollout["verdict"] == "correct"
        result["num_truncated"] += rollout["finish_reason"] == "length"
        result["num_no_answer"] += rollout["verdict"] == "no_answer"
        result["num_tokens"] += rollout["num_tokens"]
        result["verdicts"][rollout["verdict"]] += 1
        return rollout

    def add_divergence(self, divergence: Divergence) -> Divergence:
        """Add one completion's divergence to the Result of its problem, and return it."""
        result = self._results[divergence["policy"], divergence["problem_id"]]
        for name, value in (("samples", 1), ("tokens", divergence["num_tokens"])):
            result[f"num_kl_{name}"] = result.get(f"num_kl_{name}", 0) + value
        result["kl_nats"] = result.get("kl_nats", 0.0) + divergence["kl_nats"]
        return divergence

    @property
    def results(self) -> list[Any]:
        """The Results, with `num_no_answer`, `num_tokens` (of all samples) and `verdicts` beside the usual fields."""
        return list(self._results.values())


def measure(results: Sequence[Result], ks: Sequence[int], select: str = "") -> dict[str, Any]:
    """What metrics.json holds, see above; `selected` only if a metric is named."""
    policies = metrics.by_policy(results)
    measured: dict[str, Any] = {"policies": {name: _summary(own, ks) for name, own in policies.items()}}
    measured["differences"] = {
        f"{second} - {first}": metrics.compare(policies[first], policies[second], ks)
        for first, second in combinations(policies, 2)
    }
    if select:
        measured["selected"] = selected(measured["policies"], select)
    return measured


def _summary(results: Sequence[Any], ks: Sequence[int]) -> dict[str, Any]:
    verdicts: Counter[str] = Counter()
    for result in results:
        verdicts.update(result["verdicts"])
    return metrics.summarise(results, ks) | {"verdicts": dict(verdicts.most_common())}


def selected(summaries: dict[str, Any], metric: str) -> dict[str, Any]:
    """The best policy by `metric`, of equals that with the best avg@k, of those the first: as the report chooses.

    Raises InputError for an unknown metric.
    """
    if metric not in (choices := metrics.accuracies(next(iter(summaries.values())))):
        raise InputError(f"--select {metric} is none of the metrics: {', '.join(choices)}")
    order = [metric, *(name for name in choices if name.startswith("avg@"))]
    best = max(summaries, key=lambda name: [summaries[name][of_order]["value"] for of_order in order])
    return {"policy": best, "metric": metric, "value": summaries[best][metric]["value"]}


def check_metrics(num_samples: int, ks: Sequence[int], select: str, maj: bool, greedy: bool) -> None:
    """Raise InputError for a k that `num_samples` cannot give, or a selection by an unknown metric."""
    for k in ks:
        if not 1 <= k <= num_samples:
            raise InputError(f"--k {k} needs 1 to {num_samples} (--num-samples): name other --k, or draw more samples")
    counted = {*metrics.ALWAYS, *(["wrong_votes"] if maj else []), *(["num_greedy_correct"] if greedy else [])}
    choices = metrics.accuracies(name for name, *_ in metrics.available(counted, ks, num_samples))
    if select and select not in choices:
        raise InputError(f"--select {select} is none of the metrics: {', '.join(choices)}")


def overview(by_set: dict[str, Any]) -> dict[str, Any]:
    """Several sets in one: {"sets": {set: {policy: {metric: value}}}, "selected": that of the first set}."""
    sets = {
        name: {policy: {key: summary[key]["value"] for key in _metrics(summary)} for policy, summary in own.items()}
        for name, own in ((name, measured["policies"]) for name, measured in by_set.items())
    }
    first = next(iter(by_set.values()))
    return {"sets": sets} | ({"selected": first["selected"]} if "selected" in first else {})


class Changes:
    """What regrading changed: verdicts by (policy, old, new), and the results before."""

    def __init__(self) -> None:
        self.before = Tally()
        self.verdicts: Counter[tuple[str, str, str]] = Counter()

    def add(self, old: Rollout, new: Rollout) -> None:
        """Count one rollout."""
        self.before.add(old)
        if old["verdict"] != new["verdict"]:
            self.verdicts[old["policy"], old["verdict"], new["verdict"]] += 1


def grade(file: Path, verifier: Verifier, ranks: Ranks) -> list[list[Verdict]]:
    """The verdicts of the rollouts of `file` as `verifier` gives them now, by rank: each grades a share."""
    return ranks.gather(ranks.together(lambda: _grade_share(file, verifier, ranks)))


def _grade_share(file: Path, verifier: Verifier, ranks: Ranks) -> list[Verdict]:
    own = (rollout for rank, rollout in _shared_out(file, ranks.num_ranks) if rank == ranks.rank)
    verdicts: list[Verdict] = []
    while batch := list(islice(own, BATCH)):
        if any("rewards" in rollout for rollout in batch):
            raise InputError(
                f"--regrade {file}: its rewards are not math-verify's (--reward): draw anew to change them"
            )
        scores = verifier.submit([(rollout["completion"], rollout["answer"]) for rollout in batch]).result()
        verdicts += (score.verdict for score in scores)
    return verdicts


def regraded(file: Path, verdicts: Sequence[Sequence[Verdict]], changes: Changes) -> Iterator[Rollout]:
    """The rollouts of `file` with the `verdicts` of `grade`; `changes` counts the differences."""
    by_rank = list(map(iter, verdicts))
    for rank, old in _shared_out(file, len(verdicts)):
        verdict = next(by_rank[rank])
        new: Rollout = {**old, "verdict": verdict, "reward": 1.0 if verdict == "correct" else 0.0}
        changes.add(old, new)
        yield new


def _shared_out(file: Path, num_ranks: int) -> Iterator[tuple[int, Rollout]]:
    """Each rollout of `file` with the rank that grades it: all of a problem have one, which knows its answers then."""
    numbers: dict[str, int] = {}
    for rollout in records.read(file, Rollout):
        yield numbers.setdefault(rollout["problem_id"], len(numbers)) % num_ranks, rollout


def summary_table(measured: dict[str, Any]) -> str:
    """A line a policy: each metric in per cent with its interval; the divergence, if it was measured, in nats."""
    first = next(iter(measured["policies"].values()))
    names, divergence = metrics.accuracies(first), ["kl_per_token"] if "kl_per_token" in first else []
    rows = [["policy", *names, "truncated", "no answer", "tokens", *("nats a token" for _ in divergence)]]
    for policy, summary in measured["policies"].items():
        figures = [_percent(summary[name]) for name in names]
        shares = [f"{100 * summary[name]['value']:.1f}" for name in ("truncated", "no_answer")]
        nats = ["{value:.4f} [{low:.4f}, {high:.4f}]".format(**summary[name]) for name in divergence]
        rows.append([policy, *figures, *shares, f"{summary['mean_tokens']['value']:.0f}", *nats])
    return aligned(rows)


def difference_table(measured: dict[str, Any]) -> str:
    """A line a pair of policies: the paired difference of each metric; a star marks those that are real."""
    pairs = measured["differences"]
    names = metrics.accuracies(next(iter(pairs.values())))
    rows = [["difference", *names]]
    for pair, differences in pairs.items():
        cells = (differences[name] for name in names)
        rows.append([pair, *(_percent(cell, sign="+") + (" *" if cell["real"] else "  ") for cell in cells)])
    note = "* real: the 95 % interval of the paired difference excludes zero (each pair on its own)"
    return f"{aligned(rows)}\n{note}"


def change_table(changes: Changes, after: dict[str, Any], ks: Sequence[int]) -> str:
    """The verdicts that changed, and every metric that moved with them."""
    if not changes.verdicts:
        return "no verdict changed"
    before = measure(changes.before.results, ks)["policies"]
    rows = [["policy", "verdict", "rollouts"]]
    rows += [[policy, f"{old} -> {new}", str(count)] for (policy, old, new), count in changes.verdicts.most_common()]
    moved = [["policy", "metric", "before", "after"]]
    for policy, summary in after["policies"].items():
        pairs = ((name, before[policy][name], summary[name]) for name in _metrics(before[policy]))
        moved += [[policy, name, _percent(old), _percent(new)] for name, old, new in pairs if old != new]
    return "\n".join([f"{sum(changes.verdicts.values())} verdicts changed", aligned(rows), "", aligned(moved)])


def _metrics(summary: dict[str, Any]) -> list[str]:
    """The names of a summary's metrics, among its counts."""
    return [name for name, value in summary.items() if isinstance(value, dict) and "value" in value]


def _percent(cell: dict[str, Any], sign: str = "") -> str:
    """31.2 [27.0, 35.4]: the figure and its interval in per cent."""
    value, low, high = (format(100 * cell[key], f"{sign}.1f") for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
