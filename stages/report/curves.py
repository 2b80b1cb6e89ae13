"""Metrics over steps: evaluations and logs along each method's training, as tidy rows and as figures.

`step` counts RL steps from the base. RLoop has two policies at the end of an iteration, RL's endpoint and the
fine-tuned policy that the next iteration starts from (`after_rft`); the line between them is the reset.
"""

from collections.abc import Sequence

import pandas as pd

from stages.core.figures import Figure, Series, file_name, lines
from stages.core.runs import BASE, RL, RLOOP, Place, way
from stages.report.summaries import AVERAGE

COLUMNS = ["set", "method", "step", "after_rft", "metric", "value", "low", "high", "policy"]
TRAINING = {  # column of log.tsv: (title, axis, the paper's figure)
    "pass_rate": ("Training pass rate", "share correct", "1"),
    "reward": ("Training reward (shaped)", "mean reward", "1"),
    "valid": ("Validation while it trains", "avg@k", ""),
    "entropy": ("Entropy of the policy", "nats a token", "5c"),
    "grad_norm": ("Gradient norm", "norm before clipping", "6"),
    "mean_tokens": ("Length of completions", "mean tokens", ""),
    "truncated": ("Truncated completions", "share", ""),
    "mismatch": ("Trainer against engine", "mean log-prob difference", ""),
}


def tidy(summary: pd.DataFrame, places: Sequence[Place]) -> pd.DataFrame:
    """Every metric of every policy on the way of every method, set by set, in percent; the base is on each way."""
    ways = pd.DataFrame(
        [
            (method, place.step, int(place.fine_tuned), place.policy)
            for method in dict.fromkeys(place.method for place in places)
            for place in way(places, method)
            if method != BASE
        ],
        columns=["method", "step", "after_rft", "policy"],
    )
    rows = ways.merge(summary, on="policy")
    order = {name: index for index, name in enumerate(summary["set"].unique())}
    rows = rows.sort_values("set", key=lambda sets: sets.map(order), kind="stable", ignore_index=True)
    scale = rows["metric"].map(lambda metric: 1 if metric == "mean_tokens" else 100)
    for part in ("value", "low", "high"):
        rows[part] *= scale
    return rows[COLUMNS]


def best_on(rows: pd.DataFrame, valid: str, order: Sequence[str]) -> dict[str, str]:
    """For each method its best policy on the set `valid` by the metrics in `order`, the earliest of equals."""
    best = {}
    for method, on_way in rows[rows["set"] == valid].groupby("method", sort=False):
        scores = on_way.pivot(index="policy", columns="metric", values="value").loc[on_way["policy"].unique()]
        best[method] = scores.sort_values(list(order), ascending=False, kind="stable").index[0]
    return best


def of_evaluations(rows: pd.DataFrame, resets: Sequence[int], wanted: Sequence[str]) -> list[Figure]:
    """RLoop against RL over steps (the paper's figure 4): a panel a set and metric `wanted`, all on one scale."""
    plotted = []
    rows = rows[rows["metric"].isin(wanted)]
    top = rows["high"].max()
    for name in rows["set"].unique():
        for metric in wanted:
            series = _series(rows[(rows["set"] == name) & (rows["metric"] == metric)], "method")
            if max((len(line.x) for line in series), default=0) < 2:
                continue
            title = f"{metric} on {'average over the sets' if name == AVERAGE else name}"
            caption = f"{title} over RL steps; band: 95 % interval. Dotted: RLoop starts anew from a fine-tuned policy."
            file = f"steps_{file_name(name)}_{metric.replace('@', '')}"
            axis = f"{metric} (%)"
            plotted.append(lines(file, title, caption, series, y_label=axis, resets=resets, number="4", top=top))
    return plotted


def _series(rows: pd.DataFrame, by: str, x: str = "step") -> list[Series]:
    """A line for each value of the column `by`; along a method's way its fine-tuned policies are marked."""
    columns = [x, "value", "low", "high", *(["after_rft"] if by == "method" else [])]
    return [
        Series(str(label), *(list(of_line[column]) for column in columns))  # type: ignore[arg-type]
        for label, of_line in rows.groupby(by, sort=False)
    ]


def of_iterations(rows: pd.DataFrame) -> list[Figure]:
    """Metrics of RLoop's start policies over iterations (the paper's figure 3), a panel for each set, on one scale."""
    plotted = []
    starts = rows[(rows["method"] == RLOOP) & ((rows["after_rft"] == 1) | (rows["step"] == 0))]
    starts = starts[starts["metric"].str.contains("@")]
    for name, of_set in starts.groupby("set", sort=False):
        numbered = of_set.assign(iteration=of_set["step"].rank(method="dense").astype(int) - 1)
        if numbered["iteration"].max() > 0:
            title = f"RLoop over iterations on {name}"
            caption = f"Metrics of the policy fine-tuned after each iteration on {name}; 0 is the base."
            series, top = _series(numbered, "metric", x="iteration"), starts["high"].max()
            file = f"iterations_{file_name(name)}"
            plotted.append(lines(file, title, caption, series, y_label="%", x_label="iteration", number="3", top=top))
    return plotted


def of_logs(logs: pd.DataFrame, resets: Sequence[int]) -> list[Figure]:
    """A panel for each known column of the logs over steps, both methods."""
    plotted = []
    of_rl = logs[logs["method"] != ""]
    for column, (title, axis, number) in TRAINING.items():
        known = of_rl.dropna(subset=[column]) if column in of_rl else of_rl[:0]
        methods = sorted(known["method"].unique())  # RL before RLoop
        by_method = {method: known[known["method"] == method] for method in methods}
        series = [Series(method, list(rows["step"]), list(rows[column])) for method, rows in by_method.items()]
        if series:
            caption = f"{title} at each RL step, from log.tsv."
            explodes = column == "grad_norm" and bool(0 < 100 * known[column].min() < known[column].max())
            style = {"y_label": axis, "resets": resets, "number": number, "log_scale": explodes}
            plotted.append(lines(f"training_{column}", title, caption, series, **style))  # type: ignore[arg-type]
    return plotted


def overfitting(rows: pd.DataFrame, logs: pd.DataFrame, valid: str, wanted: Sequence[str]) -> list[Figure]:
    """Training pass rate against the metrics `wanted` on the validation set for RL alone (the paper's figure 1)."""
    trained = logs[logs["method"] == RL].dropna(subset=["pass_rate"]) if "pass_rate" in logs else logs[:0]
    rates = [Series("training pass rate", list(trained["step"]), list(100 * trained["pass_rate"]), colour="#7d838c")
             ] if len(trained) else []  # fmt: skip
    here = rows[(rows["set"] == valid) & (rows["method"] == RL) & rows["metric"].isin(wanted)]
    measured = [
        line for line in _series(here.assign(metric=here["metric"] + f" on {valid}"), "metric") if len(line.x) > 1
    ]
    if len(rates) + len(measured) < 2:
        return []
    caption = f"RL alone: the pass rate that it trains on, and what it is worth on {valid}."
    title = "RL alone: training and validation"
    return [lines("overfitting", title, caption, rates + measured, y_label="%", number="1")]
