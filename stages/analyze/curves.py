"""Curves along the path of a run: retention, turnover and temporal sampling, each with intervals over problems."""

from collections.abc import Mapping, Sequence

from stages.analyze import dynamics, temporal
from stages.core.records import Curve, Point, Result
from stages.core.study.metrics import Interval, interval
from stages.core.study.runs import BASE, Evaluation, Position

DEFINITIONS = {
    "retention": "of the problems that the base solves, the share that each later policy solves",
    "turnover": "of the problems that each policy solves, the share that the base doesn't",
    "temporal": "pass@{0} if the {0} samples are spread over the latest 1, 2, ... policies of a run, back to the base",
}


def measure(
    evaluation: Evaluation, paths: Mapping[str, list[Position]], min_correct: int, ks: Sequence[int]
) -> list[Curve]:
    """Retention, turnover and temporal sampling, a line a run; those that no run has are left out."""
    rows: dict[str, list[Point]] = {name: [] for name in ("retention", "turnover", *(f"temporal_pass@{k}" for k in ks))}
    for run, path in paths.items():
        results = [evaluation.results[position.policy] for position in path]
        is_solved = dynamics.solved(results, min_correct)
        if path[0].method == BASE:
            rows["retention"] += _steps(run, path, dynamics.retention(is_solved))
            rows["turnover"] += _steps(run, path, dynamics.turnover(is_solved))
        for k in dict.fromkeys(ks):
            rows[f"temporal_pass@{k}"] += _spread(run, path, results, k)
    return [_curve(evaluation.problem_set, name, of_curve) for name, of_curve in rows.items() if of_curve]


def _curve(problem_set: str, name: str, rows: list[Point]) -> Curve:
    kind, _, k = name.partition("_pass@")
    return {
        "name": name,
        "set": problem_set,
        "definition": DEFINITIONS[kind].format(k),
        "x_label": "RL steps" if kind != "temporal" else "policies sampled from, the latest first",
        "rows": rows,
    }


def _steps(run: str, path: Sequence[Position], values: Sequence[Interval]) -> list[Point]:
    """A point for each policy on the path of a run."""
    return [
        {**_point(run, position.step, value, position.policy), "after_rft": int(position.ends_iteration)}
        for position, value in zip(path, values, strict=True)
    ]


def _spread(run: str, path: Sequence[Position], results: Sequence[Sequence[Result]], k: int) -> list[Point]:
    """pass@k of the latest 1, 2, ... policies of a run together, if they have samples enough, up to k of them."""
    n, c = (dynamics.counts(results, field)[::-1] for field in ("num_samples", "num_correct"))
    rows = []
    for t in range(1, min(k, len(path)) + 1):
        if n[:t].min() >= max(temporal.quotas(k, t)):
            policies = " | ".join(position.policy for position in path[: -t - 1 : -1])
            rows.append(_point(run, t, interval(temporal.pass_at_k(n[:t], c[:t], k), bounds=(0, 1)), policies))
    return rows


def _point(run: str, x: int, value: Interval, policy: str) -> Point:
    return {"series": run, "x": x, "y": value["value"], "low": value["low"], "high": value["high"], "policy": policy}
