"""Tables of what experiments/run.py has made so far.

    python experiments/results.py experiments/words/runs/cpu --out experiments/words/results

Writes into --out: measurements.tsv (one number a line: seed, method, set, metric, with its interval),
over_steps.tsv (entropy, gradient norm and pass rate at each RL step) and results.md. Figures are percent; an interval
is the 95 % bootstrap interval over problems of one seed's policy. A difference is taken problem by problem within a
seed; its mean over seeds has no interval, since a few seeds give none worth the name.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml
from tabulate import tabulate

from stages.core import outputs, tabular
from stages.core.errors import InputError
from stages.core.records import Result
from stages.core.study import metrics, runs
from stages.report import summaries

COLUMNS = ("entropy", "grad_norm", "pass_rate")
AVERAGE = "average"  # the set in the place of all sets
PAPER = ("RLoop over RL in the paper (Qwen2.5-Math-7B)", "+9", "+15")


class Policy(NamedTuple):
    """A policy at the end of its way: "RLoop balanced4" of seed 0, and its results by set."""

    seed: str
    method: str
    results: Mapping[str, Sequence[Result]]


def policies(directory: Path) -> list[Policy]:
    """Base, RL, RLoop and its last RL endpoint of every project in `directory`; base and RL once a seed."""
    found: dict[tuple[str, str], Policy] = {}
    for project in projects(directory):
        seed, _, arm = project.name.partition("-")
        for method, results in ends(project / "runs").items():
            name = method.replace(runs.RLOOP, f"{runs.RLOOP} {arm}")
            found.setdefault((seed, name), Policy(seed, name, results))
    return [found[key] for key in sorted(found)]


def projects(directory: Path) -> list[Path]:
    """The projects with an evaluation in them, by seed and arm."""
    return sorted(path for path in directory.glob("[0-9]*-*") if runs.evals_below(path / "runs/eval"))


def ends(directory: Path) -> dict[str, dict[str, Sequence[Result]]]:
    """Method to its last policy's results by set, as the report chooses it; none that is still on its way."""
    evaluations = runs.read_evals(runs.find_evals([directory / "eval"]))
    placed = runs.positions({policy for each in evaluations.values() for policy in each.results}, directory)
    steps = yaml.safe_load((directory.parent / "params.yaml").read_text())["vanilla"]["steps"]
    last = summaries.methods([each for each in placed if each.method == runs.BASE or each.step == steps])
    return {
        method: {name: each.results[policy] for name, each in evaluations.items() if policy in each.results}
        for method, policy in last.items()
    }


def ks(directory: Path) -> list[int]:
    """The k of pass@k that were asked."""
    params = yaml.safe_load((projects(directory)[0] / "params.yaml").read_text())
    return list(params["eval"]["k"])


def measurements(found: Sequence[Policy], ks: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each policy, set and metric, and for the average over sets."""
    num_sets = count_sets(found)
    rows: list[dict[str, Any]] = []
    for policy in found:
        values = {name: metrics.per_problem(results, ks) for name, results in policy.results.items()}
        rows += ({"seed": policy.seed, "method": policy.method, **row} for row in figures(values, num_sets))
    return rows


def differences(found: Sequence[Policy], ks: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each RLoop and RL, each against RL and base, of one seed, set by set and metric by metric."""
    by_name = {(policy.seed, policy.method): policy for policy in found}
    num_sets = count_sets(found)
    rows: list[dict[str, Any]] = []
    for policy in found:
        for other in (runs.RL, runs.BASE):
            before = by_name.get((policy.seed, other))
            if before is None or policy.method in (other, runs.BASE):
                continue
            both = policy.results.keys() & before.results.keys()
            gains = {name: metrics.gains(before.results[name], policy.results[name], ks) for name in sorted(both)}
            key = {"seed": policy.seed, "pair": f"{policy.method} − {other}"}
            rows += (key | metrics.judged(row) for row in figures(gains, num_sets))
    return sorted(rows, key=lambda row: (row["set"] != AVERAGE, row["set"], row["pair"], row["seed"]))


def count_sets(found: Sequence[Policy]) -> int:
    """How many sets there are; only a policy that was asked all has an average."""
    return len({name for policy in found for name in policy.results})


def figures(values: Mapping[str, Mapping[str, Any]], num_sets: int) -> Iterator[dict[str, Any]]:
    """A row for each set and metric, and for the plain average over sets if they are all, in percent.

    `values` holds arrays [problems] by set and metric.
    """
    parts = {name: [name] for name in values}
    if len(values) == num_sets > 1:
        parts = {AVERAGE: list(values)} | parts
    for name, sets in parts.items():
        for metric in (metric for metric in values[sets[0]] if "@" in metric):
            arrays = [values[each][metric] for each in sets]
            shown = {part: 100 * value for part, value in metrics.average_interval(arrays).items()}
            yield {"set": name, "problems": sum(map(len, arrays)), "metric": metric, **shown}


def over_steps(directory: Path) -> list[dict[str, Any]]:
    """Entropy, gradient norm and pass rate at each RL step, of every run."""
    rows = []
    for project in projects(directory):
        for log in sorted((project / "runs").glob("*/rl/log.tsv")):
            for row in tabular.read_tsv(log):
                measured = {name: row[name] for name in COLUMNS if name in row}
                rows.append({"project": project.name, "run": log.parents[1].name, "step": int(row["step"]), **measured})
    return rows


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)


def cell(row: Mapping[str, Any]) -> str:
    """`12.5 (9.1 to 16.3)`."""
    return f"{row['value']:.1f} ({row['low']:.1f} to {row['high']:.1f})"


def pivot(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """A Markdown table with a column a metric; a difference that excludes zero is bold."""
    names = list(dict.fromkeys(row["metric"] for row in rows))
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        text = f"**{cell(row)}**" if row.get("real") else cell(row)
        lines.setdefault(tuple(str(row[key]) for key in keys), {})[row["metric"]] = text
    return table([*keys, *names], [[*line, *(cells.get(name, "-") for name in names)] for line, cells in lines.items()])


def over_seeds(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """The plain means over seeds, and of how many."""
    names = list(dict.fromkeys(row["metric"] for row in rows))
    groups: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), {}).setdefault(row["metric"], []).append(row["value"])
    lines = [
        [*key, *(f"{fmean(group[name]):.1f}" if name in group else "-" for name in names),
         str(max(map(len, group.values())))]
        for key, group in groups.items()
    ]  # fmt: skip
    return table([*keys, *names, "seeds"], lines)


def beside_the_paper(rows: Sequence[Mapping[str, Any]]) -> str:
    """How one method's plain average over sets and seeds stands to another's, in percent.

    Sets and seeds count of which both have a figure.
    """
    names = list(dict.fromkeys(row["metric"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    pairs = [(method, runs.RL) for method in methods if method.startswith(runs.RLOOP)] + [(runs.RL, runs.BASE)]
    lines = [
        [f"{one} over {other} here", *(relative(rows, one, other, metric) for metric in (names[0], names[-1]))]
        for one, other in pairs
    ]
    return table(["", names[0], names[-1]], [PAPER, *lines])


def relative(rows: Sequence[Mapping[str, Any]], one: str, other: str, metric: str) -> str:
    """`+12.3`: one method's average in percent of the other's, minus 100; - if there is nothing to divide by."""
    values: dict[str, dict[tuple[str, str], float]] = {one: {}, other: {}}
    for row in rows:
        if row["method"] in values and row["metric"] == metric:
            values[row["method"]][row["seed"], row["set"]] = row["value"]
    both = values[one].keys() & values[other].keys()
    above, below = (sum(values[method][key] for key in both) for method in (one, other))
    return f"{100 * (above / below - 1):+.1f}" if below else "-"


def dynamics(directory: Path) -> list[list[str]]:
    """A line for each project and method of what `analyze` found: forgetting, learning, similarity."""
    names = ("mean_forgetting", "mean_learning", "mean_similarity", "mean_similarity_within")
    lines = []
    for project in projects(directory):
        for method, figures in outputs.read_json(project / "runs/analysis/metrics.json").items():
            if isinstance(figures, dict) and "mean_forgetting" in figures:
                shown = (f"{100 * figures[name]:.1f}" if figures.get(name) is not None else "-" for name in names)
                lines.append([project.name, method, *shown])
    return lines


def training(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A line for each run: entropy, gradient norm and pass rate, averaged over its first and its last fifth."""
    lines = []
    for key in dict.fromkeys((row["project"], row["run"]) for row in rows):
        run = [row for row in rows if (row["project"], row["run"]) == key]
        fifth = max(1, len(run) // 5)
        cells = (f"{_mean(run[:fifth], name)} → {_mean(run[-fifth:], name)}" for name in COLUMNS)
        lines.append([*key, str(len(run)), *cells])
    return lines


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [row[name] for row in rows if name in row]
    return f"{fmean(values):.3f}" if values else "-"


def sections(directory: Path) -> Iterator[str]:
    """The parts of results.md."""
    found, wanted = policies(directory), ks(directory)
    rows, apart = measurements(found, wanted), differences(found, wanted)
    steps = over_steps(directory)
    yield f"# {directory.parent.parent.name}: the loop over seeds and arms\n\nPercent."
    yield f"## Means over seeds\n\n{over_seeds(rows, ('set', 'method'))}"
    yield "## Each seed\n\nWith the 95 % interval over problems; for the average each set is resampled on its own."
    yield pivot(rows, ("set", "seed", "method"))
    if apart:
        yield "## Differences\n\nPoints, on the same problems; bold where the 95 % interval excludes zero."
        yield pivot(apart, ("set", "pair", "seed"))
    yield "## Beside the paper\n\nRelative change of the average over all sets and seeds."
    yield beside_the_paper([row for row in rows if row["set"] != AVERAGE])
    yield "## Over steps\n\nMeans of a run's first and of its last fifth; each step is in over_steps.tsv."
    yield table(["project", "run", "steps", *COLUMNS], training(steps))
    if lines := dynamics(directory):
        head = ("project", "method", "forgetting", "learning", "similarity", "within")
        yield f"## Forgetting and similarity\n\nOn the validation set, over checkpoints.\n\n{table(head, lines)}"


def write(directory: Path, out: Path) -> str:
    """Write all tables; the text of results.md. InputError if there is no evaluation yet."""
    if not projects(directory):
        raise InputError(f"{directory} holds no evaluation yet: python experiments/run.py")
    out.mkdir(parents=True, exist_ok=True)
    tabular.write_tsv(out / "measurements.tsv", measurements(policies(directory), ks(directory)))
    tabular.write_tsv(out / "over_steps.tsv", over_steps(directory))
    text = "\n\n".join(sections(directory)) + "\n"
    (out / "results.md").write_text(text)
    return text


def main() -> int:
    """Write the tables and show them; 2 with one line if there is nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="directory of projects, <seed>-<arm> each")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        print(write(options.runs, options.out))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
