"""The results table (the paper's Table 1), the differences that are real, and both as Markdown, TSV and HTML.

A row is a method on a set with an interval for every metric. Figures are fractions inside and percent on paper.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stages.core import metrics
from stages.core.metrics import Difference, Interval
from stages.core.records import Result
from stages.core.runs import BASE, RL, RLOOP, Evaluation, Place

AVERAGE = "Average"
RLOOP_ENDPOINT = "RLoop, last RL endpoint"


class Row(NamedTuple):
    """One line of the results table: a method's metrics on a set, each an Interval in fractions."""

    problem_set: str
    method: str
    policy: str
    num_problems: int
    num_samples: int
    metrics: dict[str, Interval]


class Compared(NamedTuple):
    """One line of the table of differences: second minus first on the same problems of a set."""

    problem_set: str
    first: str
    second: str
    metrics: dict[str, Difference]


def methods(found: Sequence[Place]) -> dict[str, str]:
    """Which policy stands for which method: the base, the last checkpoint of RL and other runs, RLoop's last policy.

    RLoop's output is the policy fine-tuned after the last iteration (Algorithm 1); where its last RL phase has a
    checkpoint, that one is a row of its own. Policies on no known way stand for themselves.
    """
    chosen: dict[str, str] = {}
    for place in found:  # ordered by step within a method, so the last one stays
        endpoint = place.method == RLOOP and not place.fine_tuned
        chosen[RLOOP_ENDPOINT if endpoint else place.method] = place.policy
    order = [name for name in (BASE, RL, RLOOP, RLOOP_ENDPOINT) if name in chosen]
    return {name: chosen[name] for name in order + sorted(chosen.keys() - order)}


def results_rows(
    evaluations: Mapping[str, Evaluation], chosen: Mapping[str, str], ks: Sequence[int], seed: int = 0
) -> list[Row]:
    """A row for every set and method that was evaluated on it, then the average of each method that has all sets."""
    num_samples = smallest_num_samples(evaluations)
    rows: list[Row] = []
    everywhere: dict[str, list[dict[str, Any]]] = {method: [] for method in chosen}
    for name, evaluation in evaluations.items():
        for method, policy in chosen.items():
            if (results := evaluation.results.get(policy)) is None:
                continue
            values = _table_metrics(results, ks, num_samples)
            everywhere[method].append(values)
            found = {metric: metrics.interval(of_metric, seed) for metric, of_metric in values.items()}
            rows.append(Row(name, method, policy, len(results), min(r["num_samples"] for r in results), found))
    for method, sets in everywhere.items():
        if len(sets) == len(evaluations) > 1:
            means = {name: metrics.average_interval([values[name] for values in sets], seed) for name in sets[0]}
            num_problems = sum(len(next(iter(values.values()))) for values in sets)
            rows.append(Row(AVERAGE, method, chosen[method], num_problems, num_samples, means))
    return rows


def differences(
    evaluations: Mapping[str, Evaluation],
    chosen: Mapping[str, str],
    pairs: Sequence[tuple[str, str]],
    ks: Sequence[int],
    seed: int = 0,
) -> list[Compared]:
    """Second minus first of each pair on each set where both were asked the same problems, then over all sets."""
    num_samples = smallest_num_samples(evaluations)
    found: list[Compared] = []
    for first, second in pairs:
        everywhere: list[dict[str, Any]] = []
        for name, evaluation in evaluations.items():
            both = [evaluation.results.get(chosen.get(method, "")) for method in (first, second)]
            before, after = (sorted(results or [], key=lambda result: result["problem_id"]) for results in both)
            if not before or [r["problem_id"] for r in before] != [r["problem_id"] for r in after]:
                continue
            values = [_table_metrics(results, ks, num_samples) for results in (before, after)]
            everywhere.append({metric: values[1][metric] - values[0][metric] for metric in values[0]})
            of_set = {metric: metrics.judged(metrics.interval(by, seed)) for metric, by in everywhere[-1].items()}
            found.append(Compared(name, first, second, of_set))
        if len(everywhere) == len(evaluations) > 1:
            average = {
                metric: metrics.judged(metrics.average_interval([by[metric] for by in everywhere], seed))
                for metric in everywhere[0]
            }
            found.append(Compared(AVERAGE, first, second, average))
    return found


def incomparable(evaluations: Mapping[str, Evaluation], chosen: Mapping[str, str]) -> list[str]:
    """A line for every method that was asked other problems of a set than the first method in the table."""
    found = []
    for name, evaluation in evaluations.items():
        asked = [
            (method, {result["problem_id"] for result in evaluation.results[policy]})
            for method, policy in chosen.items()
            if policy in evaluation.results
        ]
        for method, problems in asked[1:]:
            if problems != asked[0][1]:
                counts = f"{len(problems)} and {len(asked[0][1])}"
                pair = f"{method} and {asked[0][0]} on {name}"
                found.append(f"{pair}: asked different problems ({counts}), so no difference")
    return found


def smallest_num_samples(evaluations: Mapping[str, Evaluation]) -> int:
    """The fewest samples that any problem of any evaluation has: the n of avg@n, and the bound of k."""
    counts = [r["num_samples"] for e in evaluations.values() for results in e.results.values() for r in results]
    return min(counts, default=0)


def _table_metrics(results: Sequence[Result], ks: Sequence[int], num_samples: int) -> dict[str, Any]:
    values = metrics.per_problem(results, ks, num_samples)
    return {name: of_metric for name, of_metric in values.items() if name.startswith(("avg@", "pass@"))}


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table in percent, the best method of a set in bold; nothing for no rows."""
    names = _metric_names(rows)
    lines = ["| Set | Method | " + " | ".join(names) + " |", "|---|---|" + "---:|" * len(names)]
    best = {(r.problem_set, name): max(_percents(rows, r.problem_set, name)) for r in rows for name in names}
    for row, first in _with_first(rows):
        cells = []
        for name in names:
            text = f"{100 * row.metrics[name]['value']:.2f}"
            cells.append(f"**{text}**" if text == f"{best[row.problem_set, name]:.2f}" else text)
        lines.append(f"| {row.problem_set if first else ''} | {row.method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _percents(rows: Sequence[Row], problem_set: str, name: str) -> list[float]:
    return [100 * row.metrics[name]["value"] for row in rows if row.problem_set == problem_set]


def _metric_names(rows: Sequence[Row] | Sequence[Compared]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def _with_first(rows: Sequence[Any]) -> list[tuple[Any, bool]]:
    """Each row with whether it is the first of its set."""
    before = [None, *(row.problem_set for row in rows)]
    return [(row, row.problem_set != previous) for row, previous in zip(rows, before, strict=False)]


def records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as flat records for a TSV, in percent: avg@32, avg@32_low, avg@32_high, ..."""
    flat = []
    for row in rows:
        record: dict[str, Any] = {"set": row.problem_set, "method": row.method, "policy": row.policy}
        record |= {"num_problems": row.num_problems, "num_samples": row.num_samples}
        flat.append(record | {name: value for name, found in row.metrics.items() for name, value in _flat(name, found)})
    return flat


def nested(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """The rows without intervals, in percent, for `dvc metrics`: {"RLoop": {"valid": {"avg@32": 48.0, ...}}}."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        values = {name: round(100 * metric["value"], 2) for name, metric in row.metrics.items()}
        found.setdefault(row.method, {})[row.problem_set] = values
    return found


def _flat(name: str, found: Interval) -> list[tuple[str, float]]:
    return [(f"{name}{end}", 100 * found[part]) for end, part in (("", "value"), ("_low", "low"), ("_high", "high"))]  # type: ignore[literal-required]


def tsv(flat: Sequence[Mapping[str, Any]]) -> str:
    """Flat records as tab-separated text, numbers with two decimals."""
    columns = list(dict.fromkeys(name for record in flat for name in record))
    cells = [[_cell(record.get(name, "")) for name in columns] for record in flat]
    return "".join("\t".join(line) + "\n" for line in [columns, *cells])


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def results_html(rows: Sequence[Row]) -> str:
    """The results table for a page: percent, the interval small beneath."""
    lines = [(row.problem_set, row.method, [_html_cell(found) for found in row.metrics.values()]) for row in rows]
    return _html("Method", _metric_names(rows), lines)


def differences_html(rows: Sequence[Compared]) -> str:
    """The table of differences for a page: percentage points, those that are real marked."""
    sets = list(dict.fromkeys(row.problem_set for row in rows))
    ordered = sorted(rows, key=lambda row: (row.problem_set == AVERAGE, sets.index(row.problem_set)))
    lines = [
        (row.problem_set, f"{row.second} − {row.first}", [_html_difference(found) for found in row.metrics.values()])
        for row in ordered
    ]
    return _html("Difference", _metric_names(rows), lines)


def _html_cell(found: Interval) -> str:
    value, low, high = (100 * figure for figure in (found["value"], found["low"], found["high"]))
    return f"<td>{value:.2f}<small>{low:.1f} … {high:.1f}</small></td>"


def _html_difference(found: Difference) -> str:
    value, low, high = (_signed(100 * figure, 1) for figure in (found["value"], found["low"], found["high"]))
    kind = "open" if not found["real"] else "up" if found["value"] > 0 else "down"
    return f'<td class="{kind}">{value}<small>{low} … {high}</small></td>'


def _signed(number: float, digits: int) -> str:
    number = round(number, digits)
    return f"{'−' if number < 0 else '+' if number > 0 else ''}{abs(number):.{digits}f}"


def _html(head: str, names: Sequence[str], lines: Sequence[tuple[str, str, list[str]]]) -> str:
    """A table in groups, from (group, row's name, cells); a group's name is a line of its own, for narrow screens."""
    heads = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in (head, *names))
    body, before = [], None
    for group, name, cells in lines:
        if group != before:
            body.append(f"<tr class=group><th colspan={len(cells) + 1} scope=rowgroup>{html.escape(group)}</th></tr>")
        body.append(f"<tr><th scope=row>{html.escape(name)}</th>{''.join(cells)}</tr>")
        before = group
    return f"<div class=wide><table><thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def plain_html(rows: Sequence[Mapping[str, Any]]) -> str:
    """Flat records as a table for a page; the first column names the row."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in columns)
    lines = (_plain_line([row.get(name, "") for name in columns]) for row in rows)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _plain_line(values: Sequence[Any]) -> str:
    cells = "".join(f"<td>{html.escape(_plain(value))}</td>" for value in values[1:])
    return f"<tr><th scope=row>{html.escape(_plain(values[0]))}</th>{cells}</tr>"


def _plain(value: Any) -> str:
    if isinstance(value, float) and abs(value) < 100:
        return f"{value:.4g}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)
