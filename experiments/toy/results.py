"""Tables and figures of the runs that experiments/toy/run.py has made so far.

    python experiments/toy/results.py

Writes experiments/toy/results/: measurements.tsv (one number a line: seed, method, set, metric), results.md, and
methods.png and .svg. Figures are percent. An interval is the 95 % Student interval of the mean over seeds, so it says
how far the mean would move with other policies, other problems and other draws of the same kind; two seeds have none.
A difference is taken within each seed, where both methods began from the same policy and answered the same problems.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure
from run import HERE, ITERATIONS, RUNS, SETS, STEPS
from scipy.stats import t as student

from stages.core import figures, metrics, records
from stages.core.outputs import read_json
from stages.rl.rundir import step_name

OUT = HERE / "results"
MIN_SEEDS = 3  # fewer have no interval worth the name
TOTAL = ITERATIONS * STEPS
LONG, LONGER = (f"vanilla/rl/checkpoints/{step_name(steps)}" for steps in (TOTAL, 2 * TOTAL))
METHODS = {  # name: (eval, policy, what it is)
    "Base": ("loop", "0/policy", "the policy before any RL"),
    "RL": ("loop", LONG, f"one DAPO run of {TOTAL} steps"),
    "RLoop": ("loop", f"{ITERATIONS}/policy", f"{ITERATIONS} iterations of {STEPS} steps"),
    "RLoop, RL endpoint": ("loop", f"{ITERATIONS}/rl/checkpoints/{step_name(STEPS)}", "end of its last exploration"),
    "RL, twice the steps": ("loop", LONGER, f"{2 * TOTAL} steps"),
    "RL, stopped early": ("early", "", "the checkpoint with the best avg@16 on other problems like valid"),
    "No RL: rejection": ("rejection", f"rejection/{ITERATIONS}/policy", "as many rollouts, drawn without updates"),
    "All successes": ("all", f"all/{ITERATIONS}/policy", "fine-tuned on easy problems too"),
    "From the endpoint": ("endpoint", f"endpoint/{ITERATIONS}/policy", "fine-tuned the end of the exploration"),
    "Hard below 10 %": ("paper", f"paper/{ITERATIONS}/policy", "the paper's threshold, no cap"),
    "RLoop, static": ("static", f"static/{ITERATIONS}/policy", "without dynamic sampling"),
    "RL, static": ("static", f"static/{LONG}", "without dynamic sampling"),
    "RLoop, mixed": ("mixed", f"mixed/{ITERATIONS}/policy", "trained where the short-cut fails on 40 %"),
    "RL, mixed": ("mixed", f"mixed/{LONG}", "trained where the short-cut fails on 40 %"),
}
OUTSIDE = SETS[1:]  # the sets out of distribution
MEASURES = ("avg@32", "pass@8", "pass@16", "pass@32")
COLUMNS = (("valid", "avg@32"), ("valid", "pass@32"), ("outside", "avg@32"), ("outside", "pass@32"))
MAIN_HEAD = (*(" ".join(column) for column in COLUMNS), "seeds")
PAIRS = (
    ("RLoop", "RL"),
    ("RLoop", "Base"),
    ("RL", "Base"),
    ("RLoop", "RL, stopped early"),
    ("RLoop", "RL, twice the steps"),
    ("RLoop", "No RL: rejection"),
    ("RLoop", "All successes"),
    ("RLoop", "From the endpoint"),
    ("RLoop", "Hard below 10 %"),
    ("No RL: rejection", "RL"),
    ("All successes", "RL"),
    ("From the endpoint", "RL"),
    ("RLoop", "RLoop, static"),
    ("RL", "RL, static"),
    ("RLoop, mixed", "RL, mixed"),
)

Values = Mapping[tuple[str, str, str], Mapping[str, float]]  # (method, set, metric): by seed, in percent


class Mean(NamedTuple):
    """A mean over seeds with half the width of its interval; NaN where there are fewer than MIN_SEEDS."""

    value: float
    half: float
    count: int


def mean(values: Iterable[float]) -> Mean:
    """The mean over seeds and its 95 % Student interval."""
    numbers = list(values)
    if len(numbers) < MIN_SEEDS:
        return Mean(fmean(numbers), float("nan"), len(numbers))
    half = student.ppf(0.975, len(numbers) - 1) * stdev(numbers) / len(numbers) ** 0.5
    return Mean(fmean(numbers), float(half), len(numbers))


@cache
def evaluated(file: Path) -> Mapping[str, Sequence[records.Result]]:
    """The results of an eval by policy; none where it is not there yet."""
    return metrics.by_policy(list(records.read(file, records.Result))) if file.exists() else {}


def measured() -> Values:
    """What the evals hold, and per method the plain averages over the sets `outside` and over `all`."""
    values: dict[tuple[str, str, str], dict[str, float]] = {}
    for root in sorted(RUNS.glob("[0-9]*")):
        for method, (place, policy, _) in METHODS.items():
            for name in SETS:
                found = evaluated(root / "eval" / place / name / "results.jsonl")
                results = found.get(policy or next(iter(found), ""), [])
                for metric, by_problem in metrics.per_problem(results).items() if results else ():
                    if metric in MEASURES:
                        values.setdefault((method, name, metric), {})[root.name] = 100 * float(by_problem.mean())
    for method in METHODS:
        for metric in MEASURES:
            for whole, sets in (("outside", OUTSIDE), ("all", SETS)):
                parts = [values.get((method, name, metric), {}) for name in sets]
                values[method, whole, metric] = {seed: fmean(part[seed] for part in parts) for seed in parts[0]}
    return {key: by_seed for key, by_seed in values.items() if by_seed}


def differences(values: Values, first: str, second: str, name: str, metric: str, relative: bool = False) -> list[float]:
    """First minus second, seed by seed, in points; or in percent of the second."""
    one, other = values.get((first, name, metric), {}), values.get((second, name, metric), {})
    scale = {seed: other[seed] / 100 if relative else 1.0 for seed in other}
    return [(one[seed] - other[seed]) / scale[seed] for seed in one if scale.get(seed)]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def cell(found: Mean, signed: bool = False) -> str:
    """`47.1 ± 4.9`; a difference whose interval excludes zero is bold."""
    text = f"{found.value:{'+' if signed else ''}.1f}" + ("" if found.half != found.half else f" ± {found.half:.1f}")
    return f"**{text}**" if signed and abs(found.value) > found.half else text


def sections(values: Values) -> Iterator[str]:
    """The parts of results.md."""
    present = [method for method in METHODS if (method, "all", "avg@32") in values]
    yield "## Methods\n\nMean over seeds; *outside* is the plain average of prec, paren and long."
    yield table(["Method", *MAIN_HEAD], [methods_line(values, method) for method in present])
    yield "\n".join(f"- *{method}*: {METHODS[method][2]}" for method in present)
    yield "## Differences\n\nPoints, within each seed; bold where the interval excludes zero."
    pairs = [(one, other) for one, other in PAIRS if one in present and other in present]
    yield table(["Difference", *MAIN_HEAD], [differences_line(values, one, other) for one, other in pairs])
    yield "## Set by set"
    yield table(
        ["Set", "Method", *MEASURES],
        (
            [name, method, *(cell(mean(values[method, name, metric].values())) for metric in MEASURES)]
            for name in SETS
            for method in present
        ),
    )
    yield "## Beside the paper\n\nRelative change of the average over all four sets, percent."
    wanted = (("RLoop", "RL"), ("RLoop, RL endpoint", "RL"), ("RL", "Base"), ("RLoop", "Base"))
    pairs = [(one, other) for one, other in wanted if one in present and other in present]
    paper = ["RLoop over RL in the paper (Qwen2.5-Math-7B)", "+9", "+15"]
    yield table(["", "avg@32", "pass@32"], [paper, *(relative_line(values, one, other) for one, other in pairs)])
    yield (
        "## Forgetting and similarity\n\nPercent, on 30 problems of each set, a checkpoint every 15 steps. Forgetting "
        "is the share of problems solved at one checkpoint and not at a later one, learning the reverse, averaged over "
        "all pairs; *lost* is the share that the base solves and the end does not. Similarity is the Jaccard index of "
        "bigrams between the completions of two checkpoints, and within one."
    )
    head = ["", "lost", "forgetting", "learning", "similarity", "within"]
    yield table(head, (dynamics_line(name, method) for name in ("valid", "prec") for method in ("RL", "RLoop")))


def methods_line(values: Values, method: str) -> list[str]:
    """A method's means."""
    cells = [cell(mean(values[method, *column].values())) for column in COLUMNS]
    return [method, *cells, str(len(values[method, *COLUMNS[0]]))]


def differences_line(values: Values, one: str, other: str) -> list[str]:
    """What one method has over another."""
    found = [mean(differences(values, one, other, *column)) for column in COLUMNS]
    return [f"{one} − {other}", *(cell(each, signed=True) for each in found), str(found[0].count)]


def relative_line(values: Values, one: str, other: str) -> list[str]:
    """What one method has over another on all sets, relative to the other."""
    found = (mean(differences(values, one, other, "all", metric, relative=True)) for metric in ("avg@32", "pass@32"))
    return [f"{one} over {other} here", *(cell(each, signed=True) for each in found)]


def dynamics_line(problems: str, method: str) -> list[str]:
    """What `analyze` found on the way of a method."""
    places = sorted(path.parent for path in RUNS.glob(f"[0-9]*/analysis/{problems}/metrics.json"))
    if not places:
        return [f"{problems}, {method}", *["-"] * 5]
    lost = (100 * read_json(place / f"forgetting_{method}.json")["values"][0][-1] for place in places)
    found = [read_json(place / "metrics.json")[method] for place in places]
    names = ("mean_forgetting", "mean_learning", "mean_similarity", "mean_similarity_within")
    cells = [cell(mean(100 * each[name] for each in found)) for name in names]
    return [f"{problems}, {method}", cell(mean(lost)), *cells]


def draw(values: Values, path: Path) -> None:
    """One panel a measure: a dot a seed, the mean and its interval; methods from top to bottom."""
    present = [method for method in METHODS if (method, "all", "avg@32") in values]
    with matplotlib.rc_context(figures.STYLE | {"figure.facecolor": "white", "svg.hashsalt": "rloop"}):
        canvas = Figure(figsize=(11, 0.34 * len(present) + 1), layout="constrained")
        panels = canvas.subplots(1, len(COLUMNS), sharey=True)
        for panel, (name, metric) in zip(panels, COLUMNS, strict=True):
            for row, method in enumerate(present):
                seeds = list(values[method, name, metric].values())
                found = mean(seeds)
                colour = figures.COLOURS.get(method, "#6b7380")
                panel.plot(seeds, [row] * len(seeds), "o", color=colour, alpha=0.35, markersize=4, markeredgewidth=0)
                half = 0.0 if found.half != found.half else found.half
                panel.errorbar(found.value, row, xerr=half, fmt="D", color=colour, markersize=5, capsize=3)
            panel.set_title(f"{name} {metric}")
            panel.set_xlim(-3, 103)
            panel.grid(axis="x", alpha=0.25)
        panels[0].set_yticks(range(len(present)), present)
        panels[0].invert_yaxis()
        canvas.supxlabel("percent; outside: average of prec, paren and long", fontsize=9)
        canvas.savefig(path.with_suffix(".png"), dpi=110, metadata={"Software": None})
        canvas.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    """Write all."""
    values = measured()
    if not values:
        print(f"{RUNS} holds no evaluation yet: python experiments/toy/run.py")
        return
    OUT.mkdir(exist_ok=True)
    with (OUT / "measurements.tsv").open("w", newline="") as file:
        writer = csv.writer(file, "excel-tab", lineterminator="\n")
        writer.writerow(["seed", "method", "set", "metric", "percent"])
        for (method, name, metric), by_seed in values.items():
            writer.writerows([seed, method, name, metric, f"{value:.4f}"] for seed, value in by_seed.items())
    text = "\n\n".join(sections(values)) + "\n"
    (OUT / "results.md").write_text("# The toy over seeds\n\n" + text)
    draw(values, OUT / "methods")
    print(text)


if __name__ == "__main__":
    main()
