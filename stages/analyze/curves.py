"""Curves along the way of a run: retention, turnover and temporal sampling, each with intervals over problems."""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.analyze import dynamics, temporal
from stages.core.records import Result
from stages.core.study.metrics import Interval, interval
from stages.core.study.runs import BASE, Evaluation, Place

DEFINITIONS = {
    "retention": "of the problems that the base solves, the share that each later policy solves",
    "turnover": "of the problems that each policy solves, the share that the base doesn't",
    "temporal": "pass@{0} if the {0} samples are spread over the latest 1, 2, ... policies of a run, back to the base",
}

# {"name", "set", "definition", "x_label", "rows": [{"series", "x", "y", "low", "high", "policy", ...}]}
Curve = dict[str, Any]


def measure(
    evaluation: Evaluation, ways: Mapping[str, list[Place]], min_correct: int, ks: Sequence[int]
) -> list[Curve]:
    """Retention, turnover and temporal sampling, a line a run; those that no run has are left out."""
    rows: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("retention", "turnover", *(f"temporal_pass@{k}" for k in ks))
    }
    for run, on_way in ways.items():
        results = [evaluation.results[place.policy] for place in on_way]
        is_solved = dynamics.solved(results, min_correct)
        if on_way[0].method == BASE:
            rows["retention"] += _steps(run, on_way, dynamics.retention(is_solved))
            rows["turnover"] += _steps(run, on_way, dynamics.turnover(is_solved))
        for k in dict.fromkeys(ks):
            rows[f"temporal_pass@{k}"] += _spread(run, on_way, results, k)
    return [_curve(evaluation.problem_set, name, of_curve) for name, of_curve in rows.items() if of_curve]


def _curve(problem_set: str, name: str, rows: list[dict[str, Any]]) -> Curve:
    kind, _, k = name.partition("_pass@")
    x_label = "RL steps" if kind != "temporal" else "policies sampled from, the latest first"
    return {
        "name": name,
        "set": problem_set,
        "definition": DEFINITIONS[kind].format(k),
        "x_label": x_label,
        "rows": rows,
    }


def _steps(run: str, on_way: Sequence[Place], values: Sequence[Interval]) -> list[dict[str, Any]]:
    """A row a policy on the way of a run, as `figures.lines` takes them."""
    return [
        _row(run, place.step, value) | {"after_rft": int(place.ends_iteration), "policy": place.policy}
        for place, value in zip(on_way, values, strict=True)
    ]


def _spread(run: str, on_way: Sequence[Place], results: Sequence[Sequence[Result]], k: int) -> list[dict[str, Any]]:
    """pass@k of the latest 1, 2, ... policies of a run together, if they have samples enough, up to k of them."""
    n, c = (dynamics.counts(results, field)[::-1] for field in ("num_samples", "num_correct"))
    rows = []
    for t in range(1, min(k, len(on_way)) + 1):
        if n[:t].min() >= max(temporal.quotas(k, t)):
            policies = " | ".join(place.policy for place in on_way[: -t - 1 : -1])
            rows.append(_row(run, t, interval(temporal.pass_at_k(n[:t], c[:t], k))) | {"policy": policies})
    return rows


def _row(run: str, x: int, value: Interval) -> dict[str, Any]:
    return {"series": run, "x": x, "y": value["value"], "low": value["low"], "high": value["high"]}
