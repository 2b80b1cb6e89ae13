"""Frames to tables: means with their intervals, the results table (the paper's Table 1), differences, costs, settings.

Everything comes from the frames of study.py. Figures are fractions here and percent on the page.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from stages.core import metrics
from stages.core.runs import BASE, RL, RLOOP, Place
from stages.report.study import KEYS

AVERAGE = "Average"
RLOOP_ENDPOINT = "RLoop, last RL endpoint"
PAIRS = ((BASE, RL), (BASE, RLOOP), (RL, RLOOP), (RL, RLOOP_ENDPOINT))
COUNTS = ["steps", "num_rollouts", "rollout_tokens", "update_tokens"]
SECONDS = ["seconds", "generate_s", "verify_s", "update_s", "handover_s"]
MIN_SECONDS = 1.0  # a ratio of shorter times would be noise


def methods(places: Sequence[Place]) -> dict[str, str]:
    """The policy that represents each method: the base, the last checkpoint of RL and other runs, RLoop's last policy.

    RLoop's output is the policy fine-tuned after the last iteration (Algorithm 1); if its last RL phase has a
    checkpoint, that one is a row of its own. Any other policy is a method of its own.
    """
    chosen: dict[str, str] = {}
    for place in places:  # ordered by step within a method, so the last one stays
        endpoint = place.method == RLOOP and not place.fine_tuned
        chosen[RLOOP_ENDPOINT if endpoint else place.method] = place.policy
    order = [name for name in (BASE, RL, RLOOP, RLOOP_ENDPOINT) if name in chosen]
    return {name: chosen[name] for name in order + sorted(chosen.keys() - order)}


def summarise(scores: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """A row a set, policy and metric: num_problems, num_samples, value, low, high; the average over sets as one more.

    Only a policy that was evaluated on all sets has an average.
    """
    rows: list[dict[str, Any]] = []
    everywhere: dict[str, list[pd.DataFrame]] = {}
    for (name, policy), of_policy in scores.groupby(["set", "policy"], sort=False):
        values = _measured(of_policy)
        everywhere.setdefault(policy, []).append(values)
        counts = {"num_problems": len(of_policy), "num_samples": of_policy["num_samples"].min()}
        for metric in values:
            interval = metrics.interval(values[metric], seed)
            rows.append({"set": name, "policy": policy, "metric": metric} | counts | interval)
    num_sets, num_samples = scores["set"].nunique(), scores["num_samples"].min()
    for policy, sets in everywhere.items():
        counts = {"num_problems": sum(map(len, sets)), "num_samples": num_samples}
        for metric in sets[0] if len(sets) == num_sets > 1 else ():
            interval = metrics.average_interval([values[metric] for values in sets], seed)
            rows.append({"set": AVERAGE, "policy": policy, "metric": metric} | counts | interval)
    return pd.DataFrame(
        rows, columns=["set", "policy", "metric", "num_problems", "num_samples", "value", "low", "high"]
    )


def _measured(scores: pd.DataFrame) -> pd.DataFrame:
    """The columns of `scores` that are metrics and were measured."""
    return scores.drop(columns=KEYS, errors="ignore").dropna(axis="columns")


def results(summary: pd.DataFrame, chosen: Mapping[str, str]) -> pd.DataFrame:
    """The results table: the accuracy and coverage of each method on each set, set by set."""
    names = pd.DataFrame(list(chosen.items()), columns=["method", "policy"], dtype=object)
    rows = names.merge(summary[summary["metric"].str.contains("@")], on="policy")
    order = {name: index for index, name in enumerate(summary["set"].unique())}
    return rows.sort_values("set", key=lambda sets: sets.map(order), kind="stable", ignore_index=True)


def nested(table: pd.DataFrame, row: str = "method") -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """{set: {method: {metric: {"value", "low", "high", ...}}}}, all in the order of the table."""
    cells: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for record in table.to_dict("records"):
        cells.setdefault(record["set"], {}).setdefault(record[row], {})[record["metric"]] = record
    return cells


def markdown(table: pd.DataFrame) -> str:
    """The results as a Markdown table in percent, the best method of a set in bold."""
    names = list(table["metric"].unique())
    lines = ["| Set | Method | " + " | ".join(names) + " |", "|---|---|" + "---:|" * len(names)]
    for name, rows in nested(table).items():
        texts = {method: [f"{100 * cells[metric]['value']:.2f}" for metric in names] for method, cells in rows.items()}
        best = [max(column, key=float) for column in zip(*texts.values(), strict=True)]
        for index, (method, row) in enumerate(texts.items()):
            cells = [f"**{cell}**" if cell == top else cell for cell, top in zip(row, best, strict=True)]
            lines.append(f"| {'' if index else name} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def tsv(table: pd.DataFrame) -> str:
    """The results with their intervals, a line a set and method, in percent: avg@32, avg@32_low, avg@32_high, ..."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in table.to_dict("records"):
        start = {name: row[name] for name in ("set", "method", "policy", "num_problems", "num_samples")}
        line = lines.setdefault((row["set"], row["method"]), start)
        line |= {
            f"{row['metric']}{end}": 100 * row[part]
            for end, part in (("", "value"), ("_low", "low"), ("_high", "high"))
        }
    return pd.DataFrame(list(lines.values())).to_csv(sep="\t", index=False, float_format="%.2f") if lines else "\n"


def for_dvc(table: pd.DataFrame) -> dict[str, dict[str, dict[str, float]]]:
    """The results without intervals, in percent, for `dvc metrics`: {"RLoop": {"valid": {"avg@32": 48.0, ...}}}."""
    percents: dict[str, dict[str, dict[str, float]]] = {}
    for row in table.to_dict("records"):
        percents.setdefault(row["method"], {}).setdefault(row["set"], {})[row["metric"]] = round(100 * row["value"], 2)
    return percents


def differences(
    scores: pd.DataFrame, chosen: Mapping[str, str], pairs: Sequence[tuple[str, str]] = PAIRS, seed: int = 0
) -> pd.DataFrame:
    """Second minus first of each pair, problem by problem, on each set whose problems they share, then over all.

    A row a set, pair and metric: set, first, second, metric, value, low, high, real; the average comes last.
    """
    rows = []
    groups = scores.groupby(["set", "policy"], sort=False)
    by_policy = {key: _measured(group.set_index("problem_id")).sort_index() for key, group in groups}
    sets = list(scores["set"].unique())
    for first, second in pairs:
        both = [(name, *(by_policy.get((name, chosen.get(method))) for method in (first, second))) for name in sets]
        apart = {n: b - a for n, a, b in both if a is not None and b is not None and a.index.equals(b.index)}
        parts = [(name, [values]) for name, values in apart.items()]
        parts += [(AVERAGE, list(apart.values()))] if len(apart) == len(sets) > 1 else []
        for name, values in parts:
            for metric in (metric for metric in values[0] if "@" in metric):
                interval = metrics.judged(metrics.average_interval([each[metric] for each in values], seed))
                rows.append({"set": name, "first": first, "second": second, "metric": metric} | interval)
    table = pd.DataFrame(rows, columns=["set", "first", "second", "metric", "value", "low", "high", "real"])
    order = {name: index for index, name in enumerate([*sets, AVERAGE])}
    return table.sort_values("set", key=lambda names: names.map(order), kind="stable", ignore_index=True)


def incomparable(scores: pd.DataFrame, chosen: Mapping[str, str]) -> list[str]:
    """A line for every method whose problems of a set differ from those of the first method in the table."""
    lines = []
    for name, of_set in scores.groupby("set", sort=False):
        asked = of_set.groupby("policy")["problem_id"].agg(frozenset)
        (first, problems), *others = [(m, asked[policy]) for m, policy in chosen.items() if policy in asked] or [
            ("", 0)
        ]
        for method, theirs in others:
            if theirs != problems:
                counts = f"{len(theirs)} and {len(problems)}"
                lines.append(f"{method} and {first} on {name}: asked different problems ({counts}), so no difference")
    return lines


def overall(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the average over sets, or of the first set if there is none."""
    sets = list(table["set"].unique())
    return table[table["set"] == (AVERAGE if AVERAGE in sets else sets[0])] if sets else table


def headline(table: pd.DataFrame, compared: pd.DataFrame, wanted: Sequence[str]) -> list[str]:
    """For each metric in words: which method leads, and what RLoop has over RL."""
    rows = overall(table)
    averaged = AVERAGE in set(rows["set"])
    where = f"on average over {table['set'].nunique() - 1} sets" if averaged else f"on {''.join(rows['set'].unique())}"
    apart = compared[(compared["first"] == RL) & (compared["second"] == RLOOP) & compared["set"].isin(rows["set"])]
    return [
        _leads(rows[rows["metric"] == metric], f"{metric} {where}")
        + "".join(map(_apart, apart[apart["metric"] == metric].to_dict("records")))
        for metric in wanted
        if (rows["metric"] == metric).sum() > 1
    ]


def _leads(rows: pd.DataFrame, what: str) -> str:
    best = rows[rows["value"].round(9) == rows["value"].max().round(9)]
    value, low, high = (100 * best[part].iloc[0] for part in ("value", "low", "high"))
    leads = f"{' and '.join(best['method'])} {'leads' if len(best) == 1 else 'lead'}"
    return f"{leads} in {what}: {value:.1f} % ({low:.1f} to {high:.1f})."


def _apart(row: Mapping[str, Any]) -> str:
    value, low, high = (f"{100 * row[part]:+.1f}".replace("-", "−") for part in ("value", "low", "high"))
    return f" {RLOOP} against {RL}: {value} points ({low} to {high}){'' if row['real'] else ', which may be chance'}."


def costs(logs: pd.DataFrame) -> pd.DataFrame:
    """A row a phase, a total a method and RLoop's total over RL's; only what the logs tell, NaN for the rest."""
    known = [name for name in COUNTS[1:] + SECONDS if name in logs]
    phases = logs.groupby("phase", sort=False)[known].sum(min_count=1)
    steps = logs[logs["method"] != ""].groupby("phase", sort=False).size()
    phases.insert(0, "steps", steps.reindex(phases.index))
    of_rloop = phases[phases.index.str.startswith(RLOOP)]
    tuning = of_rloop[of_rloop.index.str.endswith("RFT")]
    total, alone = of_rloop.sum(min_count=1), phases[phases.index.str.startswith(f"{RL},")]
    rows = dict(of_rloop.iterrows())
    if len(of_rloop):
        rows[f"{RLOOP}, total"] = total
    rows |= dict(alone.iterrows())
    if len(of_rloop) and len(alone):
        rows[f"{RLOOP} / {RL}"] = _quotient(total, alone.iloc[0])
    if len(tuning):
        rows[f"RFT's share of {RLOOP}"] = _quotient(tuning.sum(min_count=1), total)
    return pd.DataFrame(rows).T.rename_axis("phase").dropna(axis="columns", how="all").reset_index()


def _quotient(above: pd.Series, below: pd.Series) -> pd.Series:
    least = pd.Series({name: MIN_SECONDS if name in SECONDS else 1e-9 for name in below.index})
    return (above / below).where((below >= least) & ((above >= least) | ~above.index.isin(SECONDS)))


def settings(frame: pd.DataFrame) -> dict[str, list[dict[str, str]]]:
    """Stage -> a line a parameter: {"parameter", "value"}; if runs differ it names them: "30 (1/rl), 90 (2/rl)"."""
    stages: dict[str, list[dict[str, str]]] = {}
    brief = frame.assign(value=[re.sub(r"^([0-9a-f]{12})[0-9a-f]{52}$", r"\1…", text) for text in frame["value"]])
    for stage, of_stage in brief.groupby("stage", sort=False):
        for name, rows in of_stage.groupby("parameter", sort=False):
            runs = rows.groupby("value", sort=False)["run"].agg(list)
            everywhere = len(runs) == 1 and len(rows) == of_stage["run"].nunique()
            text = ", ".join(
                value if everywhere else f"{value} ({', '.join(of_value)})" for value, of_value in runs.items()
            )
            stages.setdefault(stage, []).append({"parameter": name, "value": text})
    return stages
