"""Metrics over steps: evaluations and logs along each method's training, as tidy rows and as figures.

`step` counts RL steps from the base. RLoop has two policies at the end of an iteration, RL's endpoint and the
one that the next iteration starts from (`after_rft`); the line between them is the reset.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import pandas as pd

from stages.core.study import metrics
from stages.core.study.figures import Figure, Panel, file_name, lines, points
from stages.core.study.runs import BASE, RL, RLOOP, Position, at_temperature, drawn_at, iteration_of, path_of
from stages.report.study import AVERAGE

COLUMNS = ["set", "method", "step", "after_rft", "metric", "value", "low", "high", "temperature", "policy"]
TRAINING = {  # column of log.tsv: (title, axis, the paper's figure)
    "pass_rate": ("Training pass rate", "share correct", "1"),
    "reward": ("Training reward (shaped)", "mean reward", "1"),
    "valid": ("Validation while it trains", "avg@k", ""),
    "entropy_drawn": ("Entropy of the policy", "nats a token", "5c"),
    "entropy": ("Entropy along what is trained on", "nats a token", "5c"),
    "grad_norm": ("Gradient norm", "norm before clipping", "6"),
    "mean_tokens": ("Length of completions", "mean tokens", ""),
    "truncated": ("Truncated completions", "share", ""),
    "mismatch": ("Trainer against engine", "mean log-prob difference", ""),
}


def tidy(table: pd.DataFrame, positions: Sequence[Position], temperatures: Mapping[str, str]) -> pd.DataFrame:
    """Every metric of every policy on the path of every method, set by set; the base is on each path.

    In percent, but for tokens and nats. `temperatures` are those of the sets.
    """
    methods = dict.fromkeys(position.method for position in positions if position.method != BASE)
    steps = [
        (method, position.step, int(position.ends_iteration), position.policy)
        for method in methods
        for position in path_of(positions, method)
    ]
    rows = pd.DataFrame(steps, columns=["method", "step", "after_rft", "policy"]).merge(table, on="policy")
    scale = rows["metric"].map(lambda name: 100 if metrics.named(name).unit == metrics.SHARE else 1)
    rows[["value", "low", "high"]] = rows[["value", "low", "high"]].mul(scale, axis="index")
    rows["temperature"] = rows["set"].astype(str).map(temperatures)
    return rows.sort_values("set", kind="stable", ignore_index=True)[COLUMNS]


def of_evaluations(
    rows: pd.DataFrame, resets: Sequence[int], wanted: Sequence[str], over: str = "problems"
) -> Iterator[Figure]:
    """RLoop against RL over steps (the paper's figure 4): a panel a set and metric `wanted`, all on one scale.

    Intervals are `over` what varies.
    """
    rows = rows[rows["metric"].isin(wanted)]
    top = rows[["value", "high"]].max(axis=None)
    for name, metric in product(rows["set"].unique(), wanted):
        panel = rows[(rows["set"] == name) & (rows["metric"] == metric)]
        if panel["method"].value_counts().max() > 1:
            title = f"{metric} on {in_words(name)}"
            at, known = drawn_at(panel["temperature"].iloc[0]), panel["high"].notna().any()
            band = f"; band: 95 % interval over {over}" if known else f"; mean over {over}"
            caption = f"{title} over RL steps{at}{band}. Dotted: RLoop's next iteration starts."
            style = Panel(f"{metric} (%)", resets=resets, number="4", top=top)
            file = f"steps_{file_name(name)}_{metric.replace('@', '')}"
            yield lines(file, title, caption, _series(panel, "method"), style)


def frontier(rows: pd.DataFrame, axes: tuple[str, str], over: str) -> Iterator[Figure]:
    """Accuracy against coverage of every method, with intervals `over` what varies; none of a single method."""
    parts = [rows[rows["metric"] == metric].set_index("method")[["value", "low", "high"]] for metric in axes]
    names = ([axis + end for end in ("", "_low", "_high")] for axis in "xy")
    both = pd.concat([part.set_axis(name, axis="columns") for part, name in zip(parts, names, strict=True)], axis=1)
    table = both.dropna(subset=["x", "y"]).rename_axis("series").reset_index().astype({"series": str})
    if len(table) > 1:
        title = f"Accuracy and coverage on {in_words(rows['set'].iloc[0])}"
        known = table[["x_low", "y_low"]].notna().any(axis=None)
        lines_are = f" Thin lines: 95 % intervals over {over}." if known else ""
        at = drawn_at(rows["temperature"].iloc[0])
        caption = f"{title}{at}. Further up and to the right is better; dashed: the frontier.{lines_are}"
        table["ahead"] = leads(table["x"], table["y"])
        yield points("frontier", title, caption, table, (f"{axes[0]} (%)", f"{axes[1]} (%)"))


def leads(accuracy: pd.Series, coverage: pd.Series) -> list[bool]:
    """Whether each is on the frontier: no other has as much of both and more of one."""
    both = [*zip(accuracy.round(9), coverage.round(9), strict=True)]
    return [not any(x >= own[0] and y >= own[1] and (x, y) != own for x, y in both) for own in both]


def in_words(name: str) -> str:
    """A set or an average within a sentence."""
    own, temperature = at_temperature(name)
    average = "average over the sets" if own == AVERAGE else own.replace(AVERAGE, AVERAGE.lower(), 1)
    return average + temperature


def of_iterations(rows: pd.DataFrame) -> Iterator[Figure]:
    """Metrics of RLoop's start policies over iterations (the paper's figure 3), a panel for each set, on one scale."""
    starts = rows[(rows["method"] == RLOOP) & rows["metric"].isin(metrics.accuracies(rows["metric"].unique()))]
    starts = starts[(starts["after_rft"] == 1) | (starts["step"] == 0)]
    starts = starts.assign(iteration=starts["policy"].map(iteration_of))
    style = Panel("%", x_label="iteration", number="3", top=starts["high"].max())
    for name, panel in starts.groupby("set", observed=True):
        if panel["iteration"].nunique() > 1:
            title = f"RLoop over iterations on {name}"
            at = drawn_at(panel["temperature"].iloc[0])
            caption = f"Metrics of the policy that each iteration ended with on {name}; 0 is the base{at}."
            series = _series(panel, "metric", x="iteration")
            yield lines(f"iterations_{file_name(name)}", title, caption, series, style)


def of_divergence(rows: pd.DataFrame, resets: Sequence[int]) -> Iterator[Figure]:
    """KL to the base over steps, a panel for each set on which eval measured it (--kl-to)."""
    for name, panel in rows[rows["metric"] == "kl"].groupby("set", observed=True):
        if panel["method"].value_counts().max() > 1:
            title = f"KL to the base on {name}"
            at = drawn_at(panel["temperature"].iloc[0])
            caption = f"{title}, along completions that each policy drew, over RL steps{at}; band: 95 % interval."
            style = Panel("nats a completion", resets=resets)
            yield lines(f"kl_{file_name(str(name))}", title, caption, _series(panel, "method"), style)


def of_logs(logs: pd.DataFrame, resets: Sequence[int]) -> Iterator[Figure]:
    """A panel for each known column of the logs, and each of one's own rewards, over steps, both methods."""
    of_rl = logs[logs["method"] != ""].sort_values("method", kind="stable")  # RL before RLoop
    own = {name: (name, "mean where it applies", "") for name in logs if name.startswith("rewards/")}
    for column, (title, axis, number) in {**TRAINING, **own}.items():
        known = of_rl.reindex(columns=["method", "step", column]).dropna()
        if len(known):
            explodes = column == "grad_norm" and bool(0 < 100 * known[column].min() < known[column].max())
            style = Panel(axis, resets=resets, number=number, log_scale=explodes)
            caption = f"{title} at each RL step, from log.tsv."
            yield lines(f"training_{file_name(column)}", title, caption, _series(known, "method", y=column), style)


def overfitting(rows: pd.DataFrame, logs: pd.DataFrame, valid: str, wanted: Sequence[str]) -> Iterator[Figure]:
    """Training pass rate against the metrics `wanted` on the validation set for RL alone (the paper's figure 1)."""
    trained = logs[logs["method"] == RL].reindex(columns=["step", "pass_rate"]).dropna()
    rates = trained.assign(metric="training pass rate", value=100 * trained["pass_rate"])
    here = rows[(rows["set"] == valid) & (rows["method"] == RL) & rows["metric"].isin(wanted)]
    measured = here.assign(metric=here["metric"] + f" on {valid}")
    both = pd.concat([rates, measured]).groupby("metric", sort=False).filter(lambda line: len(line) > 1)
    if both["metric"].nunique() > 1:
        at = drawn_at(next(iter(measured["temperature"]), ""))
        caption = f"RL alone: the pass rate that it trains on, and what it is worth on {valid}{at}."
        title = "RL alone: training and validation"
        yield lines("overfitting", title, caption, _series(both, "metric"), Panel("%", number="1"))


def _series(rows: pd.DataFrame, by: str, x: str = "step", y: str = "value") -> pd.DataFrame:
    """`rows` as `figures.lines` takes them, a line for each value of the column `by`; only methods have RFT."""
    known = ["series", "x", "y", "low", "high", *(["after_rft"] if by == "method" else [])]
    named = rows.rename(columns={by: "series", x: "x", y: "y"})
    return named[[name for name in known if name in named]]
