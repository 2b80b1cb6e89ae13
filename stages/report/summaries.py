"""The long table of all measurements, and what is read off it: results, differences, the headline, costs, settings.

    table     a row a set, policy and metric: set, policy, metric, num_problems, num_samples, value, low, high
    results   rows of the table for the one policy that stands for each method; percent and best besides
    apart     a table of differences: its policies are named "RLoop − RL"

Figures are fractions here and percent on the page.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from stages.core.study import metrics
from stages.core.study.runs import BASE, RL, RLOOP, Position
from stages.report.study import AVERAGE, KEYS

RLOOP_ENDPOINT = "RLoop, last RL endpoint"
PAIRS = ((BASE, RL), (BASE, RLOOP), (RL, RLOOP), (RL, RLOOP_ENDPOINT))
COLUMNS = ["set", "policy", "metric", "num_problems", "num_samples", "value", "low", "high"]
SECONDS = ["seconds", "generate_s", "verify_s", "update_s", "handover_s"]
COSTS = ["steps", "num_rollouts", "rollout_tokens", "update_tokens", *SECONDS]
MIN_SECONDS = 1.0  # a ratio of shorter times would be noise


def methods(placed: Sequence[Position]) -> dict[str, str]:
    """The policy that represents each method: the base, the last checkpoint of RL and other runs, RLoop's last policy.

    RLoop's output is the policy fine-tuned after the last iteration (Algorithm 1); if its last RL phase has a
    checkpoint, that one is a row of its own. Any other policy is a method of its own.
    """
    chosen: dict[str, str] = {}
    for position in placed:  # ordered by step within a method, so the last one stays
        is_endpoint = position.method == RLOOP and not position.ends_iteration
        chosen[RLOOP_ENDPOINT if is_endpoint else position.method] = position.policy
    order = [name for name in (BASE, RL, RLOOP, RLOOP_ENDPOINT) if name in chosen]
    return {name: chosen[name] for name in order + sorted(chosen.keys() - order)}


def summarise(scores: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """The long table of `scores`, set by set, and the average over sets as one more.

    Only a policy that was evaluated on all sets has an average.
    """
    rows: list[dict[str, Any]] = []
    num_sets = len(scores["set"].cat.categories) - 1
    for policy, of_policy in scores.groupby("policy", sort=False):
        parts = {str(name): [of_set] for name, of_set in of_policy.groupby("set", observed=True)}
        if len(parts) == num_sets > 1:
            parts[AVERAGE] = [of_set for (of_set,) in parts.values()]
        for name, sets in parts.items():
            num_samples = min(each["num_samples"].min() for each in sets)
            counts = {"num_problems": sum(map(len, sets)), "num_samples": num_samples}
            for metric in scores.columns.difference(KEYS, sort=False):
                if all(each[metric].notna().all() for each in sets):
                    interval = metrics.average_interval([each[metric].to_numpy(float) for each in sets], seed)
                    rows.append({"set": name, "policy": policy, "metric": metric} | counts | interval)
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"set": scores["set"].dtype})
    return table.sort_values("set", kind="stable", ignore_index=True)


def results(table: pd.DataFrame, chosen: Mapping[str, str]) -> pd.DataFrame:
    """The accuracy and coverage of each method on each set, set by set, and whether it is the best there."""
    rated = table[table["metric"].isin(metrics.accuracies(table["metric"].unique()))]
    of_methods = [rated[rated["policy"] == policy].assign(method=method) for method, policy in chosen.items()]
    rows = pd.concat([rated[:0], *of_methods]).sort_values("set", kind="stable", ignore_index=True)
    rows["percent"] = (100 * rows["value"]).round(2)
    best = rows.groupby(["set", "metric"], observed=True)["percent"].transform("max")
    return rows.assign(best=rows["percent"] == best)


def nested(rows: pd.DataFrame) -> dict[str, Any]:
    """{set: {method: {metric: row}}}, all in the order of the rows.

    Every method has all metrics, None for one that it was not measured by.
    """
    cells: dict[str, Any] = {}
    names = metrics.in_order(rows["metric"].unique())
    for record in rows.to_dict("records"):
        of_set = cells.setdefault(record["set"], {})
        of_set.setdefault(record["method"], dict.fromkeys(names))[record["metric"]] = record
    return cells


def markdown(rows: pd.DataFrame) -> str:
    """The results as a Markdown table in percent, the best method of a set in bold; - where a method has no figure."""
    names = metrics.in_order(rows["metric"].unique())
    lines = ["| Set | Method | " + " | ".join(names) + " |", "|---|---|" + "---:|" * len(names)]
    for name, of_set in nested(rows).items():
        for index, (method, cells) in enumerate(of_set.items()):
            texts = " | ".join(map(_percent, cells.values()))
            lines.append(f"| {'' if index else name} | {method} | {texts} |")
    return "\n".join(lines) + "\n"


def _percent(cell: Mapping[str, Any] | None) -> str:
    text = f"{cell['percent']:.2f}" if cell else "-"
    return f"**{text}**" if cell and cell["best"] else text


def tsv(rows: pd.DataFrame) -> str:
    """The results with their intervals, a line a set and method, in percent: avg@32, avg@32_low, avg@32_high, ..."""
    keys = ["set", "method", "policy", "num_problems", "num_samples"]
    lines: dict[Any, dict[str, Any]] = {}
    for row in rows.to_dict("records"):
        line = lines.setdefault((row["set"], row["method"]), {key: row[key] for key in keys})
        line |= {row["metric"] + end: 100 * row[end.strip("_") or "value"] for end in ("", "_low", "_high")}
    return pd.DataFrame(list(lines.values())).to_csv(sep="\t", index=False, float_format="%.2f")


def for_dvc(rows: pd.DataFrame) -> dict[str, Any]:
    """The results without intervals, in percent, for `dvc metrics`: {"RLoop": {"valid": {"avg@32": 48.0, ...}}}."""
    percents: dict[str, Any] = {}
    for row in rows.to_dict("records"):
        percents.setdefault(row["method"], {}).setdefault(row["set"], {})[row["metric"]] = row["percent"]
    return percents


def differences(
    scores: pd.DataFrame, chosen: Mapping[str, str], pairs: Sequence[tuple[str, str]] = PAIRS, seed: int = 0
) -> pd.DataFrame:
    """The long table of second minus first of each pair, problem by problem, on each set whose problems they share.

    `real` says that the interval excludes zero.
    """
    rated = scores[[*KEYS, *metrics.accuracies(scores)]].set_index(["set", "problem_id"]).sort_index()
    apart = [scores[:0]]
    for first, second in pairs:
        one, other = (rated[rated["policy"] == chosen.get(method)].drop(columns="policy") for method in (first, second))
        difference = other - one  # not a number where only one was asked, and then the set has none
        apart.append(difference.reset_index().assign(policy=f"{second} − {first}"))
    table = summarise(pd.concat(apart), seed)
    return table.assign(real=(table["low"] > 0) | (table["high"] < 0))


def unlike(scores: pd.DataFrame, chosen: Mapping[str, str]) -> list[str]:
    """A line for every method that was not asked all the problems that the first method in the table was asked."""
    asked = scores.groupby(["set", "policy"], observed=True)["problem_id"].agg(frozenset)
    lines = []
    for name in scores["set"].unique():
        ids = {method: asked.get((name, policy), frozenset()) for method, policy in chosen.items()}
        first = next((method for method in ids if ids[method]), "")
        for method in ids:
            if not ids[method]:
                lines.append(f"{method} on {name}: not evaluated, so no difference and no average over the sets")
            elif ids[method] != ids[first]:
                counts = f"{len(ids[method])} and {len(ids[first])}"
                lines.append(f"{method} and {first} on {name}: asked different problems ({counts}), so no difference")
    return lines


def overall(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the average over sets, or of the first set if there is none."""
    return rows[rows["set"] == (AVERAGE if (rows["set"] == AVERAGE).any() else rows["set"].min())]


def headline(rows: pd.DataFrame, apart: pd.DataFrame, wanted: Sequence[str]) -> list[str]:
    """For each metric in words: which method leads, and what RLoop has over RL."""
    whole = overall(rows)
    name = "".join(whole["set"].unique())
    where = f"on average over {rows['set'].nunique() - 1} sets" if name == AVERAGE else f"on {name}"
    of_pair = apart[(apart["policy"] == f"{RLOOP} − {RL}") & (apart["set"] == name)]
    return [
        _leads(of_metric, f"{metric} {where}")
        + "".join(map(_ahead, of_pair[of_pair["metric"] == metric].to_dict("records")))
        for metric in wanted
        if len(of_metric := whole[whole["metric"] == metric]) > 1
    ]


def _leads(rows: pd.DataFrame, what: str) -> str:
    best = rows[rows["value"].round(9) == rows["value"].max().round(9)]
    value, low, high = (100 * best[part].iloc[0] for part in ("value", "low", "high"))
    leads = f"{' and '.join(best['method'])} {'leads' if len(best) == 1 else 'lead'}"
    return f"{leads} in {what}: {value:.1f} % ({low:.1f} to {high:.1f})."


def _ahead(row: Mapping[str, Any]) -> str:
    value, low, high = (f"{100 * row[part]:+.1f}".replace("-", "−") for part in ("value", "low", "high"))
    return f" {RLOOP} against {RL}: {value} points ({low} to {high}){'' if row['real'] else ', which may be chance'}."


def costs(logs: pd.DataFrame) -> pd.DataFrame:
    """A row a phase, a total a method and RLoop's total over RL's; only what the logs tell, NaN for the rest."""
    phases = logs.groupby("phase", sort=False)[[name for name in COSTS if name in logs]].sum(min_count=1)
    of_rloop, alone = (phases[phases.index.str.startswith(start)] for start in (f"{RLOOP} ", f"{RL},"))
    total = of_rloop.sum(min_count=1)
    tuning = of_rloop[of_rloop.index.str.endswith("RFT")].sum(min_count=1)
    rows = dict(of_rloop.iterrows()) | {f"{RLOOP}, total": total} | dict(alone.iterrows())
    rows |= {f"{RLOOP} / {RL}": _quotient(total, alone.sum(min_count=1))}
    rows |= {f"RFT's share of {RLOOP}": _quotient(tuning, total)}
    return pd.DataFrame(rows).T.rename_axis("phase").dropna(axis="columns", how="all").dropna(how="all").reset_index()


def _quotient(above: "pd.Series[Any]", below: "pd.Series[Any]") -> "pd.Series[Any]":
    least = pd.Series({name: MIN_SECONDS if name in SECONDS else 1 for name in above.index})
    return (above / below).where((above >= least) & (below >= least))


def settings(frame: pd.DataFrame) -> dict[str, list[dict[str, str]]]:
    """Stage -> a line a parameter: {"parameter", "value"}; if runs differ it names them: "30 (1/rl), 90 (2/rl)"."""
    brief = frame.assign(value=frame["value"].str.replace(r"^([0-9a-f]{12})[0-9a-f]{52}$", r"\1…", regex=True))
    lines = (
        brief.groupby(["stage", "parameter", "value"], sort=False)["run"].agg(runs=", ".join, num="size").reset_index()
    )
    everywhere = lines["num"] == lines["stage"].map(frame.groupby("stage")["run"].nunique())
    lines["value"] = lines["value"].where(everywhere, lines["value"] + " (" + lines["runs"] + ")")
    lines = lines.groupby(["stage", "parameter"], sort=False)["value"].agg(", ".join).reset_index("parameter")
    return {stage: of_stage.to_dict("records") for stage, of_stage in lines.groupby("stage", sort=False)}
