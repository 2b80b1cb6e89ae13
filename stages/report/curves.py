"""Metrics over steps: what evaluations and logs say along each method's way, as tidy rows and as figures.

`step` counts RL steps from the base. RLoop has two policies at the end of an iteration, RL's endpoint and the
fine-tuned policy that the next iteration starts from (`after_rft`); the line between them is the reset.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.core import metrics
from stages.core.figures import Figure, Series, file_name, lines
from stages.core.runs import BASE, RL, RLOOP, Evaluation, Place, num_steps, read_log, way

Row = dict[str, Any]  # {"set", "method", "step", "after_rft", "metric", "value", "low", "high", "policy"}, in percent

TRAINING = {  # column of log.tsv: (title, axis, the paper's figure)
    "pass_rate": ("Training pass rate", "share correct", "1"),
    "reward": ("Training reward (shaped)", "mean reward", "1"),
    "entropy": ("Entropy of the policy", "nats a token", "5c"),
    "grad_norm": ("Gradient norm", "norm before clipping", "6"),
    "mean_tokens": ("Length of completions", "mean tokens", ""),
    "truncated": ("Truncated completions", "share", ""),
    "mismatch": ("Trainer against engine", "mean log-prob difference", ""),
}


def rows(
    evaluations: Mapping[str, Evaluation], found: Sequence[Place], ks: Sequence[int], num_samples: int, seed: int = 0
) -> list[Row]:
    """Every metric of every evaluated policy on the way of every method, with its interval; the base is on each."""
    methods = [method for method in dict.fromkeys(place.method for place in found) if method != BASE]
    tidy = []
    for name, evaluation in evaluations.items():
        summaries: dict[str, dict[str, metrics.Interval]] = {}
        for method in methods:
            for place in way(found, method):
                if (results := evaluation.results.get(place.policy)) is None:
                    continue
                if place.policy not in summaries:
                    values = metrics.per_problem(results, ks, num_samples)
                    summaries[place.policy] = {metric: metrics.interval(v, seed) for metric, v in values.items()}
                tidy += [_row(name, method, place, *item) for item in summaries[place.policy].items()]
    return tidy


def _row(name: str, method: str, place: Place, metric: str, found: metrics.Interval) -> Row:
    scale = 1 if metric == "mean_tokens" else 100
    value, low, high = (scale * figure for figure in (found["value"], found["low"], found["high"]))
    after_rft = int(place.fine_tuned)
    row = {"set": name, "method": method, "step": place.step, "after_rft": after_rft, "metric": metric}
    return row | {"value": value, "low": low, "high": high, "policy": place.policy}


def best_on(tidy: Sequence[Row], valid: str, order: Sequence[str]) -> dict[str, str]:
    """For each method its best policy on the set `valid` by the metrics in `order`, the earliest of equals."""
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for row in tidy:
        if row["set"] == valid:
            scores.setdefault(row["method"], {}).setdefault(row["policy"], {})[row["metric"]] = row["value"]
    return {
        method: max(policies, key=lambda policy: [policies[policy][metric] for metric in order])
        for method, policies in scores.items()
    }


def of_evaluations(tidy: Sequence[Row], resets: Sequence[int], wanted: Sequence[str]) -> list[Figure]:
    """RLoop against RL over steps (the paper's figure 4), a panel for each set and each metric `wanted`."""
    drawn = []
    for name in dict.fromkeys(row["set"] for row in tidy):
        for metric in wanted:
            chosen = [row for row in tidy if (row["set"], row["metric"]) == (name, metric)]
            series = _by_method(chosen)
            if max((len(line.x) for line in series), default=0) < 2:
                continue
            title = f"{metric} on {name}"
            caption = f"{title} over RL steps; band: 95 % interval. Dotted: RLoop starts anew from a fine-tuned policy."
            file = f"steps_{file_name(name)}_{metric.replace('@', '')}"
            drawn.append(lines(file, title, caption, series, y_label=f"{metric} (%)", resets=resets, number="4"))
    return drawn


def _by_method(chosen: Sequence[Row]) -> list[Series]:
    series = []
    for method in dict.fromkeys(row["method"] for row in chosen):
        on_way = [row for row in chosen if row["method"] == method]
        series.append(_series(method, [row["step"] for row in on_way], on_way, [row["after_rft"] for row in on_way]))
    return series


def _series(label: str, x: Sequence[float], points: Sequence[Row], hollow: Sequence[bool] = ()) -> Series:
    value, low, high = ([row[part] for row in points] for part in ("value", "low", "high"))
    return Series(label, x, value, low, high, hollow)


def of_iterations(tidy: Sequence[Row]) -> list[Figure]:
    """Metrics of RLoop's start policies over iterations (the paper's figure 3), a panel for each set."""
    drawn = []
    for name in dict.fromkeys(row["set"] for row in tidy):
        chosen = [row for row in tidy if (row["set"], row["method"]) == (name, RLOOP)]
        chosen = [row for row in chosen if row["after_rft"] or row["step"] == 0]
        order = {step: iteration for iteration, step in enumerate(sorted({row["step"] for row in chosen}))}
        series = []
        for metric in dict.fromkeys(row["metric"] for row in chosen if "@" in row["metric"]):
            points = [row for row in chosen if row["metric"] == metric]
            series.append(_series(metric, [order[row["step"]] for row in points], points))
        if len(order) > 1:
            title = f"RLoop over iterations on {name}"
            caption = f"Metrics of the policy fine-tuned after each iteration on {name}; 0 is the base."
            file = f"iterations_{file_name(name)}"
            drawn.append(lines(file, title, caption, series, y_label="%", x_label="iteration", number="3"))
    return drawn


def logs(runs: Path, iterations: Sequence[int], counts: Callable[[Path], bool]) -> dict[str, list[dict[str, float]]]:
    """Log rows of RL alone and of RLoop's iterations end to end, by global step; methods that have one.

    `counts` says of an rl run whether it is asked for.
    """
    alone = read_log(runs / "vanilla" / "rl" / "log.tsv") if counts(runs / "vanilla" / "rl") else []
    joined: list[dict[str, float]] = []
    offset = 0
    for iteration in iterations:
        run = runs / str(iteration) / "rl"
        if not counts(run):
            continue
        joined += [row | {"step": row["step"] + offset} for row in read_log(run / "log.tsv") if "step" in row]
        offset += num_steps(run)
    return {method: found for method, found in ((RL, alone), (RLOOP, joined)) if found}


def of_logs(found: Mapping[str, Sequence[Mapping[str, float]]], resets: Sequence[int]) -> list[Figure]:
    """A panel for each known column of log.tsv over steps, both methods."""
    drawn = []
    for column, (title, axis, number) in TRAINING.items():
        series = []
        for method, log in found.items():
            points = [(row["step"], row[column]) for row in log if column in row and "step" in row]
            if points:
                series.append(Series(method, [x for x, _ in points], [y for _, y in points]))
        if series:
            caption = f"{title} at each RL step, from log.tsv."
            heights = [y for line in series for y in line.y]
            explodes = column == "grad_norm" and 0 < 100 * min(heights) < max(heights)
            drawn.append(
                lines(
                    f"training_{column}",
                    title,
                    caption,
                    series,
                    y_label=axis,
                    resets=resets,
                    number=number,
                    log_scale=explodes,
                )
            )
    return drawn


def overfitting(
    tidy: Sequence[Row], found: Mapping[str, Sequence[Mapping[str, float]]], valid: str, wanted: Sequence[str]
) -> list[Figure]:
    """Training pass rate against the metrics `wanted` on the validation set for RL alone (the paper's figure 1)."""
    points = [(row["step"], 100 * row["pass_rate"]) for row in found.get(RL, ()) if "pass_rate" in row]
    steps, rates = [step for step, _ in points], [rate for _, rate in points]
    series = [Series("training pass rate", steps, rates, colour="#7d838c")] if points else []
    for metric in wanted:
        key = (valid, RL, metric)
        chosen = [row for row in tidy if (row["set"], row["method"], row["metric"]) == key]
        if len(chosen) > 1:
            series.append(_series(f"{metric} on {valid}", [row["step"] for row in chosen], chosen))
    if len(series) < 2:
        return []
    caption = f"RL alone: the pass rate that it trains on, and what it is worth on {valid}."
    return [lines("overfitting", "RL alone: training and validation", caption, series, y_label="%", number="1")]
