"""Several directories of runs together, such as one study with five seeds: means with intervals over the runs.

An interval is Student's, 95 %, so it says how far a mean would move with other policies, problems and draws of the same
kind; fewer than MIN_RUNS have none. A difference is taken within each run, where both methods began from the same
policy and were evaluated on the same problems. Only the sets that all runs have count, so that each average is over the
same sets in every run.

    measured   a row a run, set, method and metric: run, set, method, metric, value (percent), temperature
    way        a row a run, method, step and metric on the set that checkpoints are chosen on
    means      a row a set, method and metric: value, low, high (NaN if there are too few runs), num_runs
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pandas as pd

from stages.core.errors import InputError
from stages.core.study import lineage, metrics
from stages.core.study.figures import Figure
from stages.report import curves, summaries
from stages.report.study import AVERAGE, COST, WITHOUT, Study, listed

MIN_RUNS = 3
KEYS = ["set", "method", "metric"]
ON_WAY = [*KEYS, "step", "after_rft"]
NOTE = (
    "Means over runs, in percent, with 95 % intervals (Student's t) from three runs on. RLoop: the policy after its "
    "last fine-tuning; chosen: a method's best checkpoint on the validation set, never the base. On the frontier no "
    "other method has as much of both and more of one. Rollouts, tokens (drawn and trained on) and hours are what it "
    "took."
)


@dataclass
class Seeds:
    """What the directories say together; `costs` has a row a run and method."""

    names: list[str]
    valid: str
    measured: pd.DataFrame
    way: pd.DataFrame
    costs: pd.DataFrame
    left_out: list[str]
    unequal: list[str]

    @property
    def temperatures(self) -> str:
        return listed(self.measured["temperature"])


def read(studies: Sequence[Study], ks: Sequence[int], seed: int) -> Seeds:
    """The results of every study, with the costs of each method; InputError if no set was evaluated in all."""
    num_samples = min(study.num_samples for study in studies)
    left_out = _keep_common(studies)
    rows, way, costs = [], [], []
    for study in studies:
        study.num_samples = num_samples
        summary, logs, name = summaries.sum_up(study, ks, seed), study.logs(), str(study.runs)
        own = summary.rows.assign(run=name, value=100 * summary.rows["value"])
        rows.append(own[["run", *KEYS, "value", "temperature"]])
        tidy = curves.tidy(summary.table, study.positions, study.temperatures)
        way.append(tidy[tidy["set"] == study.valid].assign(run=name)[["run", *ON_WAY, "value", "temperature"]])
        at = {position.policy: position for position in study.positions}
        costs += [{"run": name, "method": m} | study.cost(at[policy], logs) for m, policy in summary.chosen.items()]
        left_out += [f"{name}: {line}" for line in [*study.left_out, *summaries.unlike(summary.scores, summary.chosen)]]
    measured = pd.concat([each.astype({"set": str}) for each in rows], ignore_index=True)
    order = sorted(measured["set"].unique(), key=_turn)
    measured["set"] = pd.Categorical(measured["set"], order, ordered=True)
    measured["method"] = pd.Categorical(measured["method"], summaries.in_order(measured["method"]), ordered=True)
    names, valid = [str(study.runs) for study in studies], studies[0].valid
    return Seeds(names, valid, measured, pd.concat(way), pd.DataFrame(costs), left_out, unequal(studies))


def _turn(name: str) -> int:
    """Averages first, and of them those without the set that checkpoints are chosen on."""
    return 0 if name.startswith(WITHOUT) else 1 if name.startswith(AVERAGE) else 2


def _keep_common(studies: Sequence[Study]) -> list[str]:
    """Keep the sets that all studies have; a line for each other. InputError if none is left."""
    having: dict[str, int] = {}
    for name in chain.from_iterable(study.evaluations for study in studies):
        having[name] = having.get(name, 0) + 1
    common = [name for name, count in having.items() if count == len(studies)]
    if not common:
        sets = "; ".join(f"{study.runs}: {', '.join(study.evaluations)}" for study in studies)
        raise InputError(f"--runs: no problem set was evaluated in all of them ({sets})")
    for study in studies:
        study.evaluations = {name: each for name, each in study.evaluations.items() if name in common}
    of_all = f"of {len(studies)} runs"
    return [f"{name}: evaluated in {count} {of_all}" for name, count in having.items() if name not in common]


def unequal(studies: Sequence[Study]) -> list[str]:
    """A line for each thing in which the runs differ, or in which the methods of one do."""
    settings: lineage.BySetting = {}
    for study in studies:
        counts = {
            (name, "number of problems"): str(max(map(len, each.results.values())))
            for name, each in study.evaluations.items()
        }
        counts |= {(study.valid, "select"): study.select} if study.select else {}
        own = {key: list(values) for key, values in study.lineage.settings(study.homes).items()}
        for key, values in (own | {key: [count] for key, count in counts.items()}).items():
            for value in values:
                settings.setdefault(key, {}).setdefault(value, []).append(str(study.runs))
    steps = {str(study.runs): "{} of RL and {} of RLoop".format(*study.num_steps) for study in studies}
    differ = "runs differ in their steps: " + ", ".join(f"{steps[run]} ({run})" for run in steps)
    lines = [*lineage.differing(settings), *([differ] if len({*steps.values()}) > 1 else [])]
    return lines + [f"{study.runs}: {line}" for study in studies for line in study.unequal() if line not in lines]


def means(measured: pd.DataFrame, keys: Sequence[str] = KEYS) -> pd.DataFrame:
    """The mean over runs of each set, method and metric, with its interval; sets and methods in their order."""
    from scipy.stats import t

    groups = measured.groupby([*keys], observed=True, sort=False)
    rows = groups["value"].agg(["mean", "std", "count"]).reset_index()
    half = t.ppf((1 + metrics.COVERAGE) / 2, rows["count"].clip(2) - 1) * rows["std"] / rows["count"] ** 0.5
    half = half.where(rows["count"] >= MIN_RUNS)
    rows = rows.assign(value=rows["mean"], low=rows["mean"] - half, high=rows["mean"] + half, num_runs=rows["count"])
    return rows.sort_values(["set", "method"], kind="stable")[[*keys, "value", "low", "high", "num_runs"]]


def differences(measured: pd.DataFrame) -> pd.DataFrame:
    """`measured` for second minus first of each pair, in points, of the runs that have both; methods are the pairs."""
    rated = measured[measured["metric"].isin(metrics.accuracies(measured["metric"].unique()))]
    values = rated.astype({"method": str}).set_index(["run", "set", "metric"]).sort_index()
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


def frontier(rows: pd.DataFrame, costs: pd.DataFrame, axes: Sequence[str]) -> list[dict[str, Any]]:
    """A row a method, means over its runs: accuracy and coverage, whether it is on the frontier, and its costs."""
    whole = summaries.compared(rows)
    table = whole[whole["metric"].isin(axes)].pivot_table(
        index="method", columns="metric", values="value", observed=True
    )
    table = table.dropna()
    paid = costs.groupby("method")[list(COST)].mean()
    cells = _cells(whole, is_difference=False)
    num_runs = whole.groupby("method", observed=True)["num_runs"].max()
    ahead = curves.leads(table[axes[0]], table[axes[1]]) if len(axes) > 1 else []
    lines = []
    for index, method in enumerate(table.index):
        is_ahead = {"frontier": "yes" if ahead[index] else ""} if ahead else {}
        cost = {name: _counted(name, paid.loc[method, name]) for name in COST}
        runs = {"runs": int(num_runs[method])}
        lines.append({"method": method, **{axis: cells[method][axis] for axis in axes}, **is_ahead, **cost, **runs})
    return lines


def _counted(name: str, value: float) -> float | str:
    """A mean of rollouts or tokens as a whole number, of hours to two digits at least."""
    if value != value:
        return value
    if not value:
        return 0
    return round(value) if name != "hours" else f"{value:.3f}" if value < 1 else f"{value:.1f}"


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


def nested(rows: pd.DataFrame, valid: str, is_difference: bool = False) -> dict[str, dict[str, dict[str, str]]]:
    """Set -> method -> metric -> text, "runs" among the metrics; the set `valid` is marked as chosen on."""
    names = metrics.in_order(rows["metric"].unique())
    sets: dict[str, dict[str, dict[str, str]]] = {}
    for (name, method), own in rows.groupby(["set", "method"], observed=True):
        cells = _cells(own, is_difference)[str(method)]
        of_set = sets.setdefault(f"{name} (chosen on it)" if name == valid else str(name), {})
        of_set[str(method)] = {each: cells.get(each, "-") for each in names} | {"runs": str(own["num_runs"].max())}
    return sets


def headline(rows: pd.DataFrame, axes: Sequence[str]) -> list[str]:
    """RLoop against RL in words, by the chosen and by the last policies; then what each has lost after its chosen."""
    whole = summaries.compared(rows)
    where = curves.in_words(str(whole["set"].iloc[0]))
    against, lost = [], []
    for axis in axes:
        own = {row["method"]: row for row in whole[whole["metric"] == axis].to_dict("records")}
        parts = [f"{words} {_judged(own[pair])}" for pair, words in summaries.COMPARED.items() if pair in own]
        against += [f"{axis} on {where}. RLoop against RL: {'; '.join(parts)}."] if parts else []
        parts = [f"{method} {_judged(own[pair])}" for pair, method in summaries.DECLINES.items() if pair in own]
        lost += [f"{', '.join(parts)} of {axis}"] if parts else []
    return against + ([f"The last policy against the chosen one: {'; '.join(lost)}."] if lost else [])


def _judged(row: Mapping[str, Any]) -> str:
    is_known, is_real = row["high"] == row["high"], row["low"] > 0 or row["high"] < 0
    doubt = "" if is_real else " (may be chance)" if is_known else " (too few runs for an interval)"
    return f"{_text(row, is_difference=True).rstrip(' *')} points{doubt}"


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """Lines as a Markdown table."""
    texts = [[f"{v:,}" if isinstance(v, int | float) else v for v in line.values()] for line in lines]
    rows = [list(lines[0]), ["---"] + ["---:"] * (len(lines[0]) - 1), *texts]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _markdown_of_sets(sets: Mapping[str, Mapping[str, Mapping[str, str]]], title: str) -> str:
    names = [*next(iter(next(iter(sets.values())).values()))]
    rows = [["set", title, *names], ["---"] * 2 + ["---:"] * len(names)]
    for name, of_set in sets.items():
        rows += [["" if index else name, method, *of_set[method].values()] for index, method in enumerate(of_set)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _over_steps(seeds: Seeds, axes: Sequence[str], resets: Sequence[int]) -> list[Figure]:
    """Means over the runs of what each method has on the set that checkpoints are chosen on, over steps."""
    if seeds.way.empty:
        return []
    rows = means(seeds.way.astype({"set": str}), ON_WAY).sort_values(["method", "step", "after_rft"], kind="stable")
    rows = rows[rows["num_runs"] == len(seeds.names)].assign(temperature=listed(seeds.way["temperature"]))
    return [*curves.of_evaluations(rows, resets, axes, f"{len(seeds.names)} runs")]


def content(
    seeds: Seeds, ks: Sequence[int], num_samples: int, resets: Sequence[int]
) -> tuple[dict[str, Any], dict[str, str], list[Figure]]:
    """What the page shows, the texts of the files beside it, and the figures."""
    axes = [f"avg@{num_samples}", *(f"pass@{k}" for k in ks[-1:])]
    table, apart = means(seeds.measured), means(differences(seeds.measured))
    over, glance = f"{len(seeds.names)} runs", frontier(table, seeds.costs, axes)
    whole = summaries.compared(table)
    at_of_set = dict(zip(seeds.measured["set"].astype(str), seeds.measured["temperature"], strict=True))
    whole = whole.assign(temperature=whole["set"].astype(str).map(at_of_set))
    plotted = [*(curves.frontier(whole, (axes[0], axes[1]), over) if len(axes) > 1 else ())]
    plotted += _over_steps(seeds, axes, resets)
    in_sets = {
        "Means over runs": nested(table, seeds.valid),
        "Differences within runs": nested(apart, seeds.valid, is_difference=True) if len(apart) else {},
    }
    where = curves.in_words(str(whole["set"].iloc[0]))
    page = {
        "name": over,
        "headline": headline(apart, axes) if len(apart) else [],
        **dict.fromkeys(("under_way", "watch", "whole", "apart", "valid", "peaks", "select"), ()),  # none of it
        "temperatures": seeds.temperatures,
        "first": plotted,
        "glance": glance,
        "note": f"{where[:1].upper()}{where[1:]}. {NOTE}",
        "sections": {
            **in_sets,
            "Runs": [{"runs": name} for name in seeds.names],
            "Not like for like": seeds.unequal,
            "Left out": seeds.left_out,
        },
    }
    at = f"Samples drawn at temperature {seeds.temperatures}. " if seeds.temperatures else ""
    title = f"Accuracy, coverage and what they cost, {where}"
    tables = [f"## {title}\n\n{markdown(glance)}\n{at}{NOTE}\n"] if glance else []
    titles = zip(in_sets.items(), ("method", "difference"), strict=True)
    tables += [f"## {name}\n\n{_markdown_of_sets(sets, title)}" for (name, sets), title in titles if sets]
    notes = [*(f"Left out: {line}.\n" for line in seeds.left_out), *(f"{line}\n" for line in seeds.unequal)]
    texts = {
        "results.md": "\n".join([*tables, *notes]),
        "results.tsv": seeds.measured.to_csv(sep="\t", index=False, float_format="%.4f"),
    }
    return page, texts, plotted
