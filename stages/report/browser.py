"""The data of the report's rollout browser: for each set a few problems with completions of every policy.

Problems on which the policies' pass rates differ most come first. Of a policy's samples a mix of correct and wrong
ones is kept, and of a very long completion its beginning and its end, so that the page stays small.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.core.records import Rollout
from stages.core.runs import BASE, Evaluation, Place, read_rollouts
from stages.report.page import embedded

MAX_BYTES = 6 * 2**20
HEAD, TAIL = 1500, 2500  # characters kept of a long completion

Browser = list[dict[str, Any]]


def build(
    evaluations: Mapping[str, Evaluation], places: Sequence[Place], max_problems: int, max_samples: int
) -> Browser:
    """One entry a set: {"name", "policies": [{"label", "method", "step"}], "problems": [{"id", "rates", ...}]}.

    Problems are cut from the end of the longest list until the whole is below MAX_BYTES.
    """
    sets = [
        _of_set(
            evaluation, [place for place in places if place.policy in evaluation.results], max_problems, max_samples
        )
        for evaluation in evaluations.values()
        if evaluation.rollouts
    ]
    sizes = [[len(embedded(problem)) for problem in of_set["problems"]] for of_set in sets]
    while sum(map(sum, sizes)) > MAX_BYTES:
        longest = max(range(len(sets)), key=lambda index: len(sizes[index]))
        sizes[longest].pop()
        sets[longest]["problems"].pop()
    return [of_set for of_set in sets if of_set["problems"]]


def _of_set(evaluation: Evaluation, places: Sequence[Place], max_problems: int, max_samples: int) -> dict[str, Any]:
    places = sorted(places, key=lambda place: (place.method != BASE, place.method, place.step, place.fine_tuned))
    rates = _rates(evaluation, places)
    chosen = sorted(rates, key=lambda problem: (-_spread(rates[problem]), problem))[:max_problems]
    samples = _samples(evaluation, set(chosen))
    problems = []
    for problem in chosen:
        drawn = [samples.get((problem, place.policy), []) for place in places]
        if (one := next((rollouts[0] for rollouts in drawn if rollouts), None)) is None:
            continue
        problems.append(
            {
                "id": problem,
                "prompt": _short(one["prompt"]),
                "answer": one["answer"],
                "rates": rates[problem],
                "rollouts": [[_shown(rollout) for rollout in _mix(rollouts, max_samples)] for rollouts in drawn],
            }
        )
    policies = [
        {"label": _label(place), "method": place.method, "step": place.step, "after_rft": place.fine_tuned}
        for place in places
    ]
    return {"name": evaluation.problem_set, "policies": policies, "problems": problems}


def _label(place: Place) -> str:
    return (
        BASE
        if place.method == BASE
        else place.method
        if place.label == place.policy
        else f"{place.method} {place.label}"
    )


def _rates(evaluation: Evaluation, places: Sequence[Place]) -> dict[str, list[float | None]]:
    """Problem id -> the pass rate of each policy, None if it was not evaluated on it."""
    rates: dict[str, list[float | None]] = {}
    for index, place in enumerate(places):
        for result in evaluation.results[place.policy]:
            of_problem = rates.setdefault(result["problem_id"], [None] * len(places))
            of_problem[index] = round(result["num_correct"] / result["num_samples"], 4)
    return rates


def _spread(rates: Sequence[float | None]) -> float:
    known = [rate for rate in rates if rate is not None]
    return max(known) - min(known)


def _samples(evaluation: Evaluation, chosen: set[str]) -> dict[tuple[str, str], list[Rollout]]:
    samples: dict[tuple[str, str], list[Rollout]] = {}
    for rollout in read_rollouts(evaluation):
        if rollout["problem_id"] in chosen:
            rollout["completion"] = _short(rollout["completion"])
            samples.setdefault((rollout["problem_id"], rollout["policy"]), []).append(rollout)
    return samples


def _mix(rollouts: Sequence[Rollout], count: int) -> list[Rollout]:
    """Up to `count` of the samples, half of them correct if there are enough, in the order of drawing."""
    right = [rollout for rollout in rollouts if rollout["reward"] > 0]
    wrong = [rollout for rollout in rollouts if rollout["reward"] <= 0]
    num_right = min(len(right), max((count + 1) // 2, count - len(wrong)))
    return sorted(right[:num_right] + wrong[: count - num_right], key=lambda rollout: rollout["sample"])


def _shown(rollout: Rollout) -> dict[str, Any]:
    keys = ("sample", "completion", "verdict", "num_tokens", "finish_reason")
    return {key: rollout[key] for key in keys} | {"correct": rollout["reward"] > 0}  # type: ignore[literal-required]


def _short(text: str) -> str:
    if len(text) <= HEAD + TAIL:
        return text
    return f"{text[:HEAD]}\n[... {len(text) - HEAD - TAIL} characters left out ...]\n{text[-TAIL:]}"
