"""What RLoop gained and lost, problem by problem, and the data of the report's browser of completions.

A policy solves a problem if at least one of its samples is correct. Gained is what the last policy of RLoop solves and
that of RL, or the base, does not; lost is the reverse. The browser has a few problems of each set, those gained or lost
first, then those on which the policies' pass rates differ most, with completions of every policy. Of a policy's samples
a mix of correct and wrong ones is kept, and of a very long completion its beginning and its end, so that the page stays
small.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, zip_longest
from typing import Any

import pandas as pd

from stages.core.records import Rollout, accepted
from stages.core.study.runs import BASE, RL, RLOOP, Evaluation, Position, read_rollouts
from stages.report.page import embedded

MAX_BYTES = 6 * 2**20
HEAD, TAIL = 1500, 2500  # characters kept of a long completion
SHOWN = ("sample", "completion", "verdict", "num_tokens", "finish_reason")

OTHERS = (RL, BASE)


def build(
    evaluations: Mapping[str, Evaluation],
    positions: Sequence[Position],
    chosen: Mapping[str, str],
    max_problems: int,
    max_samples: int,
) -> list[dict[str, Any]]:
    """One entry a set: {"name", "policies": [{"label", "method", "step"}], "problems": [{"id", "rates", ...}]}.

    Of every set the same number of problems is kept, at least one and as many as fit into MAX_BYTES.
    """
    with_rollouts = [each for each in evaluations.values() if each.rollouts]
    sets = [_of_set(each, positions, chosen, max_problems, max_samples) for each in with_rollouts]
    ranks = zip_longest(*(of_set["problems"] for of_set in sets))
    sizes = [sum(len(embedded(problem)) for problem in rank if problem) for rank in ranks]
    num_problems = max(1, sum(total <= MAX_BYTES for total in accumulate(sizes)))
    return [of_set | {"problems": of_set["problems"][:num_problems]} for of_set in sets if of_set["problems"]]


def gains(evaluations: Mapping[str, Evaluation], chosen: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row a set and method that RLoop is held against: problems gained, lost, solved by both and by neither."""
    rows = []
    for name, evaluation in evaluations.items():
        for other in OTHERS:
            changes = pd.Series(_changes(evaluation, chosen, other))
            if len(changes):
                counts = {kind: int((changes == kind).sum()) for kind in ("gained", "lost", "both", "neither")}
                rows.append({"set": name, "RLoop against": other, **counts})
    return rows


def _changes(evaluation: Evaluation, chosen: Mapping[str, str], other: str) -> dict[str, str]:
    """Problem id -> "gained", "lost", "both" or "neither", of those that both policies were evaluated on."""
    results = (evaluation.results.get(chosen.get(method, ""), []) for method in (RLOOP, other))
    mine, its = ({result["problem_id"]: result["num_correct"] > 0 for result in own} for own in results)
    words = {(True, False): "gained", (False, True): "lost", (True, True): "both", (False, False): "neither"}
    return {problem: words[solved, its[problem]] for problem, solved in mine.items() if problem in its}


def _of_set(
    evaluation: Evaluation,
    positions: Sequence[Position],
    chosen: Mapping[str, str],
    max_problems: int,
    max_samples: int,
) -> dict[str, Any]:
    its = evaluation.results
    here = [position for position in positions if position.policy in its]
    correct = {p.policy: {r["problem_id"]: r["num_correct"] / r["num_samples"] for r in its[p.policy]} for p in here}
    rates = pd.DataFrame(correct).round(4).sort_index()
    changes = {other: _changes(evaluation, chosen, other) for other in OTHERS}
    order = pd.DataFrame({"spread": rates.max(axis="columns") - rates.min(axis="columns")})
    order["changed"] = [any(of[p] in ("gained", "lost") for of in changes.values() if p in of) for p in order.index]
    shown = order.sort_values(["changed", "spread"], ascending=False, kind="stable").index[:max_problems]
    samples = _samples(evaluation, set(shown))
    problems = []
    for problem in shown:
        drawn = [samples.get((problem, position.policy), []) for position in here]
        for one in list(chain(*drawn))[:1]:
            about = {"id": problem, "prompt": _short(one["prompt"]), "answer": " or ".join(accepted(one))}
            about |= {"changes": {other: of.get(problem, "") for other, of in changes.items()}}
            about |= {"truncated": any(rollout["finish_reason"] == "length" for rollout in chain(*drawn))}
            kept = [_mix(rollouts, max_samples) for rollouts in drawn]
            problems.append(about | {"rates": rates.loc[problem].tolist(), "rollouts": kept})
    policies = [{"label": _label(p), "method": p.method, "step": p.step, "after_rft": p.ends_iteration} for p in here]
    return {"name": evaluation.problem_set, "policies": policies, "problems": problems}


def _label(position: Position) -> str:
    is_alone = position.method == BASE or position.label == position.policy
    return position.method if is_alone else f"{position.method} {position.label}"


def _samples(evaluation: Evaluation, chosen: set[str]) -> dict[tuple[str, str], list[Rollout]]:
    samples: dict[tuple[str, str], list[Rollout]] = {}
    for rollout in read_rollouts(evaluation):
        if rollout["problem_id"] in chosen:
            rollout["completion"] = _short(rollout["completion"])
            samples.setdefault((rollout["problem_id"], rollout["policy"]), []).append(rollout)
    return samples


def _mix(rollouts: Sequence[Rollout], count: int) -> list[dict[str, Any]]:
    """Up to `count` of the samples, half of them correct if there are enough, in the order of drawing."""
    right = [rollout for rollout in rollouts if rollout["verdict"] == "correct"]
    wrong = [rollout for rollout in rollouts if rollout["verdict"] != "correct"]
    num_right = min(len(right), max((count + 1) // 2, count - len(wrong)))
    kept = sorted(right[:num_right] + wrong[: count - num_right], key=lambda rollout: rollout["sample"])
    return [{key: r[key] for key in SHOWN} | {"correct": r["verdict"] == "correct"} for r in kept]  # type: ignore[literal-required]


def _short(text: str) -> str:
    num_left_out = len(text) - HEAD - TAIL
    return text if num_left_out <= 0 else f"{text[:HEAD]}\n[... {num_left_out} characters left out ...]\n{text[-TAIL:]}"
