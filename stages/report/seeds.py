"""Several directories of runs together, such as one study with five seeds: means with intervals over the runs.

An interval is Student's, 95 %, so it says how far a mean would move with other policies, problems and draws of the same
kind; fewer than MIN_RUNS have none. A difference is taken within each run, where both methods began from the same
policy and were evaluated on the same problems.

    measured   a row a run, set, method and metric: run, set, method, metric, value (percent)
    means      a row a set, method and metric: value, low, high (NaN if there are too few runs), num_runs
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pandas as pd

from stages.core.study import metrics
from stages.core.study.figures import Figure
from stages.report import curves, summaries
from stages.report.study import AVERAGE, COST, WITHOUT, Study

MIN_RUNS = 3
KEYS = ["set", "method", "metric"]


@dataclass
class Seeds:
    """What the directories say together; `costs` has a row a run and method."""

    names: list[str]
    measured: pd.DataFrame
    costs: pd.DataFrame
    left_out: list[str]


def read(studies: Sequence[Study], ks: Sequence[int], seed: int) -> Seeds:
    """The results of every study, with the costs of each method."""
    num_samples = min(study.num_samples for study in studies)
    rows, costs, left_out = [], [], []
    for study in studies:
        study.num_samples = num_samples
        summary, logs, name = summaries.sum_up(study, ks, seed), study.logs(), str(study.runs)
        rows.append(summary.rows.assign(run=name, value=100 * summary.rows["value"])[["run", *KEYS, "value"]])
        at = {position.policy: position for position in study.positions}
        costs += [{"run": name, "method": m} | study.cost(at[policy], logs) for m, policy in summary.chosen.items()]
        left_out += [f"{name}: {line}" for line in [*study.left_out, *summaries.unlike(summary.scores, summary.chosen)]]
    measured = pd.concat(rows, ignore_index=True)
    sets = dict.fromkeys(chain.from_iterable(study.scores([])["set"].cat.categories for study in studies))
    order = sorted(sets, key=lambda name: name.startswith(AVERAGE))
    measured["set"] = pd.Categorical(measured["set"].astype(str), order, ordered=True)
    measured["method"] = pd.Categorical(measured["method"], summaries.in_order(measured["method"]), ordered=True)
    return Seeds([str(study.runs) for study in studies], measured, pd.DataFrame(costs), left_out)


def means(measured: pd.DataFrame) -> pd.DataFrame:
    """The mean over runs of each set, method and metric, with its interval; sets and methods in their order."""
    from scipy.stats import t

    rows = measured.groupby(KEYS, observed=True, sort=False)["value"].agg(["mean", "std", "count"]).reset_index()
    half = t.ppf((1 + metrics.COVERAGE) / 2, rows["count"].clip(2) - 1) * rows["std"] / rows["count"] ** 0.5
    half = half.where(rows["count"] >= MIN_RUNS)
    rows = rows.assign(value=rows["mean"], low=rows["mean"] - half, high=rows["mean"] + half, num_runs=rows["count"])
    return rows.sort_values(["set", "method"], kind="stable")[[*KEYS, "value", "low", "high", "num_runs"]]


def differences(measured: pd.DataFrame) -> pd.DataFrame:
    """`measured` for second minus first of each pair, in points, of the runs that have both; methods are the pairs."""
    values = measured.astype({"method": str}).set_index(["run", "set", "metric"]).sort_index()
    apart = []
    for first, second in summaries.PAIRS:
        one, other = (values.loc[values["method"] == method, "value"] for method in (first, second))
        both = (other - one).dropna().reset_index()
        apart.append(both.assign(method=f"{second} − {first}"))
    table = pd.concat(apart, ignore_index=True)
    pairs = [f"{second} − {first}" for first, second in summaries.PAIRS]
    return table.assign(
        method=pd.Categorical(table["method"], pairs, ordered=True),
        set=pd.Categorical(table["set"], measured["set"].cat.categories, ordered=True),
    )


def frontier(rows: pd.DataFrame, costs: pd.DataFrame, axes: tuple[str, str]) -> list[dict[str, Any]]:
    """A row a method: accuracy and coverage, whether no other has more of both, and its costs, means over runs."""
    whole = overall(rows)
    table = whole[whole["metric"].isin(axes)].pivot_table(
        index="method", columns="metric", values="value", observed=True
    )
    paid = costs.groupby("method")[list(COST)].mean()
    cells = _cells(whole, is_difference=False)
    lines = []
    for method, own in table.dropna().iterrows():
        is_behind = bool(((table[list(axes)] > own[list(axes)]).all(axis="columns")).any())
        figures_of = {metric: cells[method][metric] for metric in axes}
        cost = {name: _counted(name, paid.loc[method, name]) for name in COST}
        lines.append({"method": method, **figures_of, "on the frontier": "" if is_behind else "yes", **cost})
    return lines


def overall(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the average without the set that checkpoints are chosen on, or of what stands for all if that lacks.

    What was chosen on a set is favoured there, so that set is in no comparison of methods.
    """
    without = [name for name in rows["set"].unique() if str(name).startswith(WITHOUT)]
    return rows[rows["set"] == without[0]] if without else summaries.overall(rows)


def _counted(name: str, value: float) -> float:
    """A mean of rollouts or tokens as a whole number."""
    return value if name == "hours" or value != value else round(value)


def _cells(rows: pd.DataFrame, is_difference: bool) -> dict[str, dict[str, str]]:
    cells: dict[str, dict[str, str]] = {}
    for row in rows.to_dict("records"):
        cells.setdefault(row["method"], {})[row["metric"]] = _text(row, is_difference)
    return cells


def _text(row: Mapping[str, Any], is_difference: bool) -> str:
    """`47.1 ± 4.9`; a difference whose interval excludes zero is marked by a star."""
    text = f"{row['value']:+.1f}".replace("-", "−") if is_difference else f"{row['value']:.1f}"
    text += "" if row["high"] != row["high"] else f" ± {row['high'] - row['value']:.1f}"
    return f"{text} *" if is_difference and (row["low"] > 0 or row["high"] < 0) else text


def lines_of(rows: pd.DataFrame, is_difference: bool = False) -> list[dict[str, Any]]:
    """A line a set and method with a text a metric, and of how many runs."""
    names = metrics.in_order(rows["metric"].unique())
    sets = [str(name) for name in rows["set"].unique()]
    marks = {own: f"{own} (chosen on it)" for name in sets if (own := name.removeprefix(WITHOUT)) != name}
    lines = []
    for (name, method), own in rows.groupby(["set", "method"], observed=True):
        cells = _cells(own, is_difference)[str(method)]
        head = {"set": marks.get(name, name), "difference" if is_difference else "method": method}
        lines.append(head | {each: cells.get(each, "-") for each in names} | {"runs": int(own["num_runs"].max())})
    return lines


def headline(rows: pd.DataFrame, axes: tuple[str, str]) -> list[str]:
    """RLoop against RL in words, last against last and chosen against chosen."""
    whole = overall(rows)
    wanted = whole[whole["method"].isin(summaries.COMPARED) & whole["metric"].isin(axes)]
    return [_sentence(row) for row in wanted.to_dict("records")]


def _sentence(row: Mapping[str, Any]) -> str:
    second, _, first = row["method"].partition(" − ")
    is_known, is_real = row["high"] == row["high"], row["low"] > 0 or row["high"] < 0
    doubt = "" if is_real else ", which may be chance" if is_known else ", too few for an interval"
    points = _text(row, is_difference=True).rstrip(" *")
    what = f"{row['metric']} on {str(row['set']).replace(AVERAGE, AVERAGE.lower(), 1)}"
    return f"{second} against {first} in {what}: {points} points over {row['num_runs']} runs{doubt}."


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """Lines as a Markdown table."""
    texts = [
        [f"{v:,.2f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v for v in line.values()]
        for line in lines
    ]
    rows = [list(lines[0]), ["---"] * 2 + ["---:"] * (len(lines[0]) - 2), *texts]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def content(seeds: Seeds, ks: Sequence[int], num_samples: int) -> tuple[dict[str, Any], dict[str, str], list[Figure]]:
    """What the page shows, the texts of the files beside it, and the figures."""
    axes = (f"avg@{num_samples}", f"pass@{max(ks)}")
    table, apart = means(seeds.measured), means(differences(seeds.measured))
    plotted = [*curves.frontier(overall(table), axes, f"{len(seeds.names)} runs")]
    sections: dict[str, Any] = {
        "Means over runs": lines_of(table),
        "Differences within runs": lines_of(apart, is_difference=True),
        "Accuracy, coverage and what they cost": frontier(table, seeds.costs, axes),
        "Frontier": plotted,
        "Runs": [{"runs": name} for name in seeds.names],
    }
    page = {
        "name": f"{len(seeds.names)} runs",
        "headline": headline(apart, axes),
        **dict.fromkeys(("under_way", "watch", "temperatures", "whole", "first", "valid", "peaks"), ()),  # none of it
        "sections": sections | {"Left out": seeds.left_out},
    }
    tables = [f"## {title}\n\n{markdown(lines)}" for title, lines in [*sections.items()][:3] if lines]
    texts = {
        "results.md": "\n".join([*tables, *(f"Left out: {line}.\n" for line in seeds.left_out)]),
        "results.tsv": seeds.measured.to_csv(sep="\t", index=False, float_format="%.4f"),
    }
    return page, texts, plotted
