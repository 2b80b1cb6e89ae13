"""The long table of all measurements, and what is read off it: results, differences, the headline, costs, settings.

    table     a row a set, policy and metric: set, policy, metric, num_problems, num_samples, value, low, high
    results   rows of the table for the one policy that stands for each method; percent and best besides
    apart     a table of differences: its policies are named "RLoop − RL"

Figures are fractions here and percent on the page.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from stages.core import tabular
from stages.core.study import metrics
from stages.core.study.runs import BASE, RL, RLOOP, Position
from stages.report.curves import in_words
from stages.report.study import AVERAGE, KEYS, WITHOUT, Study, listed

RLOOP_ENDPOINT = f"{RLOOP}, last RL endpoint"
CHOSEN = ", chosen"
PAIRS = (
    *((BASE, RL), (BASE, RLOOP), (RL, RLOOP), (RL, RLOOP_ENDPOINT), (RL + CHOSEN, RLOOP + CHOSEN)),
    *((RL + CHOSEN, RL), (RLOOP + CHOSEN, RLOOP)),  # what a method loses after the checkpoint that was chosen
)
COMPARED = {  # in words, on top of the page
    f"{RLOOP}{CHOSEN} − {RL}{CHOSEN}": "chosen",
    f"{RLOOP} − {RL}": "last",
}
DECLINES = {f"{method} − {method}{CHOSEN}": method for method in (RL, RLOOP)}
COLUMNS = ["set", "policy", "metric", "num_problems", "num_samples", "value", "low", "high"]
SECONDS = ["seconds", "generate_s", "verify_s", "update_s", "handover_s"]
COSTS = ["steps", "num_rollouts", "rollout_tokens", "update_tokens", *SECONDS]
WORDS = {  # for columns of log.tsv
    "num_rollouts": "rollouts",
    "rollout_tokens": "tokens drawn",
    "update_tokens": "tokens trained on",
    "generate_s": "drawing, s",
    "verify_s": "grading, s",
    "update_s": "updates, s",
    "handover_s": "handing over weights, s",
}
SHARES = ("truncated",)  # beside the accuracies
MIN_SECONDS = 1.0  # a ratio of shorter times would be noise


class Summary(NamedTuple):
    """What a study's evaluations say: the scores, the long table, each row's policy, the rows, and `peaks`.

    `metric` is that by which checkpoints are chosen.
    """

    scores: pd.DataFrame
    table: pd.DataFrame
    chosen: dict[str, str]
    rows: pd.DataFrame
    peaks: list[dict[str, Any]]
    metric: str


def sum_up(study: Study, ks: Sequence[int], seed: int) -> Summary:
    """Sum up a study: which policies stand for the methods, and their results."""
    scores, select = study.scores(ks), study.select
    metric = select if select in scores else f"avg@{study.num_samples}"
    table = summarise(scores, study.averages, seed)
    of_valid = table[(table["set"] == study.valid) & (table["metric"] == metric)].set_index("policy")["value"]
    best = chosen_by(of_valid, study.positions)
    chosen = methods(study.positions, best)
    rows = results(table, chosen)
    rows["temperature"] = rows["set"].astype(str).map(study.temperatures)
    return Summary(scores, table, chosen, rows, peaks(of_valid, study.positions, best), metric)


def methods(positions: Sequence[Position], best: Mapping[str, Position]) -> dict[str, str]:
    """The policies that represent each method: the base, the last of RL and other runs, RLoop's last, and the chosen.

    RLoop's output is the policy fine-tuned after the last iteration (Algorithm 1); if its last RL phase has a
    checkpoint, that one is a row of its own. The paper's protocol is `best`, see `chosen_by`. Any other policy is a
    method of its own.
    """
    rows: dict[str, str] = {}
    for position in positions:  # ordered by step within a method, so the last one stays
        is_endpoint = position.method == RLOOP and not position.ends_iteration
        rows[RLOOP_ENDPOINT if is_endpoint else position.method] = position.policy
    rows |= {f"{method}{CHOSEN}": position.policy for method, position in best.items()}
    return {name: rows[name] for name in in_order(rows)}


def in_order(names: Iterable[str]) -> list[str]:
    """Names of methods in the order of the tables, each once."""
    known = (BASE, RL, RL + CHOSEN, RLOOP, RLOOP_ENDPOINT, RLOOP + CHOSEN)
    return sorted(set(names), key=lambda name: (known.index(name) if name in known else len(known), name))


def chosen_by(values: "pd.Series[float]", positions: Sequence[Position]) -> dict[str, Position]:
    """For each method the policy on its path with the largest of the `values` by policy, the earliest of equals.

    The base is none of the candidates, and a method with a single one has nothing to choose.
    """
    values = values.round(9)
    best: dict[str, Position] = {}
    for method in dict.fromkeys(position.method for position in positions if position.method != BASE):
        candidates = [each for each in positions if each.method == method and each.policy in values.index]
        if len(candidates) > 1:
            best[method] = max(candidates, key=lambda position: values[position.policy])
    return best


def peaks(
    values: "pd.Series[float]", positions: Sequence[Position], best: Mapping[str, Position]
) -> list[dict[str, Any]]:
    """What each method loses from its best checkpoint to its end by the `values` by policy, in percent and points."""
    rows = []
    for method, position in best.items():
        last = [each for each in positions if each.method == method and each.policy in values.index][-1]
        most, least = (100 * float(values[each.policy]) for each in (position, last))
        row = {"method": method, "best at step": position.label, "ends at step": last.label}
        rows.append({**row, "best": most, "at its end": least, "lost": most - least})
    return rows


def summarise(
    scores: pd.DataFrame, averages: Mapping[str, Sequence[str]], seed: int = 0, of_differences: bool = False
) -> pd.DataFrame:
    """The long table of `scores`, set by set, and each of the `averages` over sets as one more.

    Only a policy that was evaluated on all sets of an average has it.
    """
    rows: list[dict[str, Any]] = []
    for policy, of_policy in scores.groupby("policy", sort=False):
        parts = {str(name): [of_set] for name, of_set in of_policy.groupby("set", observed=True)}
        parts |= {name: [parts[each][0] for each in sets] for name, sets in averages.items() if set(sets) <= set(parts)}
        for name, sets in parts.items():
            num_samples = min(each["num_samples"].min() for each in sets)
            counts = {"num_problems": sum(map(len, sets)), "num_samples": num_samples}
            for metric in scores.columns.difference(KEYS, sort=False):
                if all(each[metric].notna().all() for each in sets):
                    bounds = metrics.difference_bounds(metric) if of_differences else metrics.named(metric).bounds
                    interval = metrics.average_interval([each[metric].to_numpy(float) for each in sets], seed, bounds)
                    rows.append({"set": name, "policy": policy, "metric": metric} | counts | interval)
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"set": scores["set"].dtype})
    return table.sort_values("set", kind="stable", ignore_index=True)


def results(table: pd.DataFrame, chosen: Mapping[str, str]) -> pd.DataFrame:
    """The accuracy and coverage of each method on each set, set by set, and whether it is the best there.

    Beside them the SHARES, which know no best.
    """
    rated = metrics.accuracies(table["metric"].unique())
    table = table[table["metric"].isin([*rated, *SHARES])]
    of_methods = [table[table["policy"] == policy].assign(method=method) for method, policy in chosen.items()]
    rows = pd.concat([table[:0], *of_methods]).sort_values("set", kind="stable", ignore_index=True)
    rows["percent"] = (100 * rows["value"]).round(2)
    best = rows.groupby(["set", "metric"], observed=True)["percent"].transform("max")
    return rows.assign(best=(rows["percent"] == best) & rows["metric"].isin(rated))


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


def markdown(rows: pd.DataFrame, valid: str) -> str:
    """The results as a Markdown table in percent, the best method of a set in bold; - where a method has no figure.

    The set `valid` is marked if a checkpoint was chosen on it.
    """
    mark = {valid: f"{valid} (chosen on it)"} if rows["method"].str.endswith(CHOSEN).any() else {}
    rows = rows[rows["metric"].isin(metrics.accuracies(rows["metric"].unique()))]
    names = metrics.in_order(rows["metric"].unique())
    lines = ["| Set | Method | " + " | ".join(names) + " |", "|---|---|" + "---:|" * len(names)]
    for name, of_set in nested(rows).items():
        for index, (method, cells) in enumerate(of_set.items()):
            name_of_method = tabular.one_line(method).replace("|", "\\|")
            texts = " | ".join(map(_percent, cells.values()))
            lines.append(f"| {'' if index else mark.get(name, name)} | {name_of_method} | {texts} |")
    at = listed(rows["temperature"]) if "temperature" in rows else ""
    return "\n".join([*lines, *([f"\nIn percent; samples drawn at temperature {at}."] if at else [])]) + "\n"


def markdown_of_peaks(summary: Summary, valid: str) -> str:
    """`peaks` as a Markdown table."""
    rows = summary.peaks
    head = [*list(rows[0])[:3], f"best {summary.metric} on {valid}", "at its end", "lost"]
    lines = [[f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---", *["---:"] * 5], *lines]) + "\n"


def _percent(cell: Mapping[str, Any] | None) -> str:
    text = f"{cell['percent']:.2f}" if cell else "-"
    return f"**{text}**" if cell and cell["best"] else text


def tsv(rows: pd.DataFrame) -> str:
    """The results with their intervals, a line a set and method, in percent: avg@32, avg@32_low, avg@32_high, ..."""
    keys = ["set", "method", "policy", "num_problems", "num_samples", "temperature"]
    lines: dict[Any, dict[str, Any]] = {}
    for row in rows.to_dict("records"):
        line = lines.setdefault((row["set"], row["method"]), {key: row[key] for key in keys})
        line |= {row["metric"] + end: 100 * row[end.strip("_") or "value"] for end in ("", "_low", "_high")}
    return pd.DataFrame(list(lines.values())).to_csv(sep="\t", index=False, float_format="%.2f")


def for_dvc(rows: pd.DataFrame) -> dict[str, Any]:
    """The results without intervals, in percent, for `dvc metrics`: {"RLoop": {"valid": {"avg@32": 48.0, ...}}}."""
    percents: dict[str, Any] = {}
    for row in rows[~rows["metric"].isin(SHARES)].to_dict("records"):
        percents.setdefault(row["method"], {}).setdefault(row["set"], {})[row["metric"]] = row["percent"]
    return percents


def differences(
    scores: pd.DataFrame,
    averages: Mapping[str, Sequence[str]],
    chosen: Mapping[str, str],
    pairs: Sequence[tuple[str, str]] = PAIRS,
    seed: int = 0,
) -> pd.DataFrame:
    """The long table of second minus first of each pair, problem by problem, on each set whose problems they share.

    `real` says that the interval excludes zero.
    """
    rated = scores[[*KEYS, *metrics.accuracies(scores)]].set_index(["set", "problem_id"]).sort_index()
    apart = [scores[:0]]
    for first, second in pairs:
        one, other = (rated[rated["policy"] == chosen.get(method)].drop(columns="policy") for method in (first, second))
        difference = other - one  # not a number where only one was evaluated, and then the set has none
        apart.append(difference.reset_index().assign(policy=f"{second} − {first}"))
    table = summarise(pd.concat(apart), averages, seed, of_differences=True)
    return table.assign(real=(table["low"] > 0) | (table["high"] < 0))


def unlike(scores: pd.DataFrame, chosen: Mapping[str, str]) -> list[str]:
    """A line for every method that was not evaluated on the problems of the first method in the table."""
    problems = scores.groupby(["set", "policy"], observed=True)["problem_id"].agg(frozenset)
    lines = []
    for name in scores["set"].unique():
        ids = {method: problems.get((name, policy), frozenset()) for method, policy in chosen.items()}
        first = next((method for method in ids if ids[method]), "")
        for method in ids:
            if not ids[method]:
                lines.append(f"{method} on {name}: not evaluated, so no difference and no average over the sets")
            elif ids[method] != ids[first]:
                counts = f"{len(ids[method])} and {len(ids[first])}"
                lines.append(
                    f"{method} and {first} on {name}: evaluated on different problems ({counts}), so no difference"
                )
    return lines


def overall(rows: pd.DataFrame, start: str = AVERAGE) -> pd.DataFrame:
    """The rows of the first average that begins with `start`, else of that over all sets, else of the first set."""
    averages = [name for name in rows["set"].unique() if str(name).startswith(AVERAGE)]
    wanted = [name for name in averages if str(name).startswith(start)] or averages
    return rows[rows["set"] == (wanted[0] if wanted else rows["set"].min())]


def compared(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows by which methods are compared: where several other sets are left, without the one chosen on."""
    return overall(rows, WITHOUT)


def averaged(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of every average, those by which methods are compared first; of the first set if there is none."""
    averages = rows[rows["set"].map(lambda name: str(name).startswith(AVERAGE)).astype(bool)]
    is_first = averages["set"].isin(compared(rows)["set"])
    return pd.concat([averages[is_first], averages[~is_first]]) if len(averages) else overall(rows)


def headline(rows: pd.DataFrame, apart: pd.DataFrame, wanted: Sequence[str]) -> list[str]:
    """For each metric in words: what RLoop has over RL, by the chosen policies and by the last ones, and who leads."""
    whole = compared(rows)
    name = "".join(whole["set"].unique())
    where = in_words(name)
    here = apart[apart["policy"].isin(COMPARED) & (apart["set"] == name)]
    lines = []
    for metric in wanted:
        of_metric = whole[whole["metric"] == metric]
        if len(of_metric) > 1:
            rows_of = {row["policy"]: row for row in here[here["metric"] == metric].to_dict("records")}
            ahead = [f"{words} {_ahead(rows_of[pair])}" for pair, words in COMPARED.items() if pair in rows_of]
            against = f"{RLOOP} against {RL}: {'; '.join(ahead)}. " if ahead else ""
            lines.append(f"{metric} on {where}. {against}{_leads(of_metric)}.")
    return lines


def _leads(rows: pd.DataFrame) -> str:
    best = rows[rows["value"].round(9) == rows["value"].max().round(9)]
    value, low, high = (100 * best[part].iloc[0] for part in ("value", "low", "high"))
    *others, last = (f"“{name}”" if "," in name else name for name in best["method"])
    leads = f"{', '.join(others)} and {last} lead" if others else f"{last} leads"
    return f"{leads} with {value:.1f} % ({low:.1f} to {high:.1f})"


def _ahead(row: Mapping[str, Any]) -> str:
    if row["value"] == row["low"] == row["high"] == 0:
        return "the same on every problem"
    value, low, high = (f"{100 * row[part]:+.1f}".replace("-", "−") for part in ("value", "low", "high"))
    return f"{value} points ({low} to {high}){'' if row['real'] else ', which may be chance'}"


def decline(summary: Summary, valid: str) -> list[str]:
    """What `peaks` says, in words."""
    lost = [
        f"{row['method']} {row['lost']:.1f} points (best at step {row['best at step']} of {row['ends at step']})"
        for row in summary.peaks
    ]
    return [f"Lost after the best checkpoint, in {summary.metric} on {valid}: {', '.join(lost)}."] if lost else []


def costs(logs: pd.DataFrame) -> pd.DataFrame:
    """A row a phase, a total a method and RLoop's total over RL's; only what the logs tell, NaN for the rest."""
    phases = logs.groupby("phase", sort=False)[[name for name in COSTS if name in logs]].sum(min_count=1)
    of_rloop, alone = (phases[phases.index.str.startswith(start)] for start in (f"{RLOOP} ", f"{RL},"))
    total = of_rloop.sum(min_count=1)
    tuning = of_rloop[of_rloop.index.str.endswith("RFT")].sum(min_count=1)
    rows = dict(of_rloop.iterrows()) | {f"{RLOOP}, total": total} | dict(alone.iterrows())
    rows |= {f"{RLOOP} / {RL}": _quotient(total, alone.sum(min_count=1))}
    rows |= {f"RFT's share of {RLOOP}": _quotient(tuning, total)}
    table = pd.DataFrame(rows).T.rename_axis("phase").dropna(axis="columns", how="all").dropna(how="all").reset_index()
    return table.rename(columns=WORDS)


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
