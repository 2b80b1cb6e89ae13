"""What an evaluation writes, from its rollouts: results.jsonl, metrics.json, and tables for the terminal.

    rollouts.jsonl   every completion         metrics.json    see below
    results.jsonl    counts by problem        manifest.json   how it came about
    greedy.jsonl     if asked for: a completion of temperature 0 for each problem, none of the samples
    kl.jsonl         if asked for: the KL divergence to a base along some of the completions

Of several sets each has these in a directory of its name, and metrics.json beside them sums them up. metrics.json holds

    {"temperature": 1.0,
     "policies": {"runs/1/policy": {"num_problems": 30, "num_samples": 32, "avg@32": {"value": 0.25, "low": 0.19,
                                    "high": 0.31}, "pass@8": ..., "truncated": ..., "no_answer": ...,
                                    "mean_tokens": ..., "verdicts": {"correct": 240, "wrong": 700, "no_answer": 20}}},
     "differences": {"runs/1/policy - runs/0/policy": {"avg@32": {"value", "low", "high", "real"}, ...}},
     "selected": {"policy": "runs/1/policy", "metric": "avg@32", "value": 0.25}}

and the metrics (see metrics.py) of whatever else was counted. Everything is computed from counts by problem
(results.jsonl), and those from rollouts.jsonl, greedy.jsonl and kl.jsonl.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from stages.core import jsonl, outputs
from stages.core.errors import InputError
from stages.core.records import Divergence, Result, Rollout
from stages.core.study import metrics
from stages.core.tabular import aligned

MAX_POLICIES = 4  # with more of them not every pair is shown
ROLLOUTS, GREEDY, KL = "rollouts.jsonl", "greedy.jsonl", "kl.jsonl"


class ResultCounter:
    """Counts rollouts into Results by policy and problem, in the order of their appearance."""

    def __init__(self, temperature: float | None = None) -> None:
        """`temperature` is that of the samples, if it is known."""
        self._known = {} if temperature is None else {"temperature": temperature}
        self._results: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, rollout: Rollout) -> Rollout:
        """Count one rollout, and return it; one that is marked `greedy` is none of the samples."""
        key = rollout["policy"], rollout["problem_id"]
        if (result := self._results.get(key)) is None:
            result = self._results[key] = {
                "problem_id": rollout["problem_id"],
                "policy": rollout["policy"],
                **self._known,
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
        return list(self._results.values())


class Voting(Protocol):
    """Counts the votes for maj@k: see grading.ballots."""

    def add(self, rollout: Rollout) -> Rollout:
        """Take one rollout's answer, and return the rollout."""

    def count(self, results: Sequence[Any]) -> None:
        """Give each Result its `wrong_votes`."""


class Drawn(NamedTuple):
    """What was drawn of a set: its rollouts, and the Divergences along them, by the names of their files."""

    files: Mapping[str, Iterator[Any]]
    temperature: float | None
    voting: Voting | None


def write(
    out: Path, sets: Mapping[str, Drawn], manifest: Mapping[str, Any], ks: Sequence[int], select: str, started: float
) -> dict[str, Any]:
    """Write `out` whole, by sets if there are several; return what each set's metrics.json holds.

    `started` is time.monotonic() at the start.
    """
    summaries = {}
    with outputs.whole_dir(out) as beside:
        for name, drawn in sets.items():
            directory = beside if len(sets) == 1 else beside / name
            results = _counted(directory, drawn)
            jsonl.write(directory / "results.jsonl", results)
            at = {} if drawn.temperature is None else {"temperature": drawn.temperature}
            summaries[name] = at | measure(results, ks, select)
            outputs.write_json(directory / "metrics.json", summaries[name])
            sums = {name: sum(result[f"num_{name}"] for result in results) for name in ("samples", "tokens")}
            counts = {"rollouts": sums["samples"], "tokens": sums["tokens"]}
            own = {**at, "set": name, "counts": counts, "seconds": _since(started)}
            if at:
                own["parameters"] = {**manifest["parameters"], "temperature": [drawn.temperature]}
            outputs.write_json(directory / "manifest.json", {**manifest, **own})
        if len(sets) > 1:
            outputs.write_json(beside / "metrics.json", overview(summaries))
            outputs.write_json(beside / "manifest.json", {**manifest, "seconds": _since(started)})
    return summaries


def _since(started: float) -> float:
    return round(time.monotonic() - started, 3)


def _counted(directory: Path, drawn: Drawn) -> list[Any]:
    """Write the files of a set, and return its Results."""
    counter, rollouts = ResultCounter(drawn.temperature), drawn.files[ROLLOUTS]
    jsonl.write(directory / ROLLOUTS, map(counter.add, map(drawn.voting.add, rollouts) if drawn.voting else rollouts))
    if GREEDY in drawn.files:
        jsonl.write(directory / GREEDY, map(counter.add, drawn.files[GREEDY]))
    if KL in drawn.files:
        jsonl.write(directory / KL, map(counter.add_divergence, drawn.files[KL]))
    results = counter.results
    if drawn.voting:
        drawn.voting.count(results)
    return results


def print_tables(summaries: Mapping[str, Any]) -> None:
    """Show every set's figures, which differences are real, and the policy that was selected."""
    for name, measured in summaries.items():
        at = f", temperature {measured['temperature']:g}" if "temperature" in measured else ""
        print(f"{name}{at}\n{summary_table(measured)}\n")
        if measured["differences"]:
            print(f"{difference_table(measured)}\n")
    if chosen := next(iter(summaries.values())).get("selected"):
        print(f"best on {next(iter(summaries))} by {chosen['metric']}: {chosen['policy']}")


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
        name: {policy: {key: summary[key]["value"] for key in metric_names(summary)} for policy, summary in own.items()}
        for name, own in ((name, measured["policies"]) for name, measured in by_set.items())
    }
    first = next(iter(by_set.values()))
    return {"sets": sets} | ({"selected": first["selected"]} if "selected" in first else {})


def summary_table(measured: dict[str, Any]) -> str:
    """A line a policy: each metric in per cent with its interval; the divergence, if it was measured, in nats."""
    first = next(iter(measured["policies"].values()))
    names, divergence = metrics.accuracies(first), ["kl_per_token"] if "kl_per_token" in first else []
    rows = [["policy", *names, "truncated", "no answer", "tokens", *("nats a token" for _ in divergence)]]
    for policy, summary in measured["policies"].items():
        figures = [percent(summary[name]) for name in names]
        shares = [f"{100 * summary[name]['value']:.1f}" for name in ("truncated", "no_answer")]
        nats = ["{value:.4f} [{low:.4f}, {high:.4f}]".format(**summary[name]) for name in divergence]
        rows.append([policy, *figures, *shares, f"{summary['mean_tokens']['value']:.0f}", *nats])
    return aligned(rows)


def difference_table(measured: dict[str, Any]) -> str:
    """A line a pair of policies: the paired difference of each metric; a star marks those that are real.

    Of more than MAX_POLICIES only the pairs with the first policy, such as the base, and with the best.
    """
    pairs, policies = measured["differences"], measured["policies"]
    names = metrics.accuracies(next(iter(pairs.values())))
    best = max(policies, key=lambda name: policies[name][names[0]]["value"])
    told = {next(iter(policies)), best} if len(policies) > MAX_POLICIES else set(policies)
    rows = [["difference", *names]]
    for both, (pair, differences) in zip(combinations(policies, 2), pairs.items(), strict=True):
        if told.intersection(both):
            cells = (differences[name] for name in names)
            rows.append([pair, *(percent(cell, sign="+") + (" *" if cell["real"] else "  ") for cell in cells)])
    note = "* real: the 95 % interval of the paired difference excludes zero (each pair on its own)"
    more = len(pairs) + 1 - len(rows)
    return f"{aligned(rows)}\n{note}" + (f"\n{more} more differences are in metrics.json" if more else "")


def metric_names(summary: Mapping[str, Any]) -> list[str]:
    """The names of a summary's metrics, among its counts."""
    return [name for name, value in summary.items() if isinstance(value, dict) and "value" in value]


def percent(cell: dict[str, Any], sign: str = "") -> str:
    """31.2 [27.0, 35.4]: the figure and its interval in per cent."""
    value, low, high = (format(100 * cell[key], f"{sign}.1f") for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
