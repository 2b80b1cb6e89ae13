"""Tables and figures of the runs that experiments/toy/run.py has made so far.

    python experiments/toy/results.py

Writes experiments/toy/results/: measurements.tsv (one number a line: seed, method, set, metric), results.md, and the
figures methods and frontier, each as .png and .svg. Figures are percent. An interval is the 95 % Student interval of
the mean over seeds, so it says how far the mean would move with other policies, other problems and other draws of the
same kind; two seeds have none. A difference is taken within each seed, where both methods began from the same policy
and answered the same problems. What a method cost is read from the logs of the runs that its policy came out of, by the
manifests.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from run import HERE, ITERATIONS, RUNS, SETS, STEPS
from scipy.stats import t as student

from stages.analyze import temporal
from stages.core import records
from stages.core.outputs import read_json
from stages.core.study import figures, metrics
from stages.rl.rundir import step_name

OUT = HERE / "results"
MIN_SEEDS = 3  # fewer have no interval worth the name
TOTAL = ITERATIONS * STEPS
LONG, LONGER = (f"vanilla/rl/checkpoints/{step_name(steps)}" for steps in (TOTAL, 2 * TOTAL))
SPREAD = range(STEPS, TOTAL + 1, STEPS)  # the steps of the checkpoints that temporal sampling takes turns with
HARD = f"hard/rl/checkpoints/{step_name(TOTAL - STEPS)}"
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
    "RL, temporal": ("loop", LONG, f"its samples spread over the checkpoints at {', '.join(map(str, SPREAD))} steps"),
    "Merge, .25": ("merge25", f"merge25/{ITERATIONS}/policy", "a quarter of the way from start to endpoint, no tuning"),
    "Merge, .5": ("merge50", f"merge50/{ITERATIONS}/policy", "half of the way"),
    "Merge, .75": ("merge75", f"merge75/{ITERATIONS}/policy", "three quarters of the way"),
    "Balanced, 1": ("balanced1", f"balanced1/{ITERATIONS}/policy", "of every problem, easy or hard, one success"),
    "Balanced, 2": ("balanced2", f"balanced2/{ITERATIONS}/policy", "two distinct successes of every problem"),
    "Balanced, 4": ("balanced4", f"balanced4/{ITERATIONS}/policy", "four"),
    "RL, hard only": ("hard", HARD, f"after {STEPS} steps only on the problems below 30 %"),
}
BALANCED = ("Balanced, 1", "Balanced, 2", "Balanced, 4")
RIVALS = ("RL, temporal", "Merge, .25", "Merge, .5", "Merge, .75", *BALANCED, "RL, hard only")
OUTSIDE = SETS[1:]  # the sets out of distribution
MEASURES = ("avg@32", "pass@8", "pass@16", "pass@32")
COLUMNS = tuple((name, metric) for name in ("valid", "outside", "all") for metric in ("avg@32", "pass@32"))
BOTH = ("avg@32", "pass@32")
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
    *((rival, other) for rival in RIVALS for other in ("RL", "RLoop")),
)

LABELS = {  # where a name stands in the figure of the frontier, in points from its dot, if not on the right above it
    **dict.fromkeys(("Balanced, 1", "RL, stopped early", "Base", "RL, temporal", "Hard below 10 %"), (-5, 4, "right")),
    **dict.fromkeys(("Balanced, 2", "RL", "RLoop, RL endpoint", "RLoop, static"), (-6, -4, "right")),
    **dict.fromkeys(("Merge, .25", "RL, static"), (-5, -10, "right")),
    **dict.fromkeys(("Balanced, 4", "No RL: rejection"), (5, -10, "left")),
}

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
                by_metric = metrics.per_problem(results) if results else {}
                if method == "RL, temporal":
                    by_metric = spread(found)
                for metric, by_problem in by_metric.items():
                    if metric in MEASURES:
                        values.setdefault((method, name, metric), {})[root.name] = 100 * float(by_problem.mean())
    for method in METHODS:
        for metric in MEASURES:
            for whole, sets in (("outside", OUTSIDE), ("all", SETS)):
                parts = [values.get((method, name, metric), {}) for name in sets]
                values[method, whole, metric] = {seed: fmean(part[seed] for part in parts) for seed in parts[0]}
    return {key: by_seed for key, by_seed in values.items() if by_seed}


def spread(found: Mapping[str, Sequence[records.Result]]) -> dict[str, NDArray[np.float64]]:
    """The metrics of temporal sampling, the latest checkpoint first; avg@32 is that of 32 samples so spread."""
    names = [f"vanilla/rl/checkpoints/{step_name(step)}" for step in reversed(SPREAD)]
    if not all(name in found for name in names):
        return {}
    n, c = (
        np.array([[result[key] for result in found[name]] for name in names]) for key in ("num_samples", "num_correct")
    )  # type: ignore[literal-required]
    passed = {f"pass@{k}": temporal.pass_at_k(n, c, k) for k in metrics.KS}
    return {"avg@32": np.average(c / n, axis=0, weights=temporal.quotas(32, len(names))), **passed}


class Cost(NamedTuple):
    """What a policy cost after the base: rollouts drawn, and completion tokens trained on in RL and in fine-tuning."""

    rollouts: int
    rl_tokens: int
    tuning_tokens: int


def cost(root: Path, policy: str) -> Cost:
    """What all runs and fine-tunings that a policy came out of have cost together, each counted once."""
    steps: dict[str, int] = {}
    tuned: set[str] = set()
    ancestry(root, policy, steps, tuned)
    rows = [row for run, last in steps.items() if "." not in run for row in rl_log(root / run)[:last]]
    drawn = sum(sum(1 for _ in (root / run).open()) for run in steps if run.endswith(".jsonl"))
    tuning = sum(read_json(root / name / "metrics.json")["num_tokens"] for name in tuned)
    rollouts, tokens = (sum(int(row[name]) for row in rows) for name in ("num_rollouts", "update_tokens"))
    return Cost(rollouts + drawn, tokens, tuning)


def ancestry(root: Path, policy: str, steps: dict[str, int], tuned: set[str]) -> None:
    """Add to `steps` the RL runs (or files of samples) behind a policy, with the last step taken of each; to `tuned`
    the policies that fine-tuning made."""
    run, _, last = policy.partition("/checkpoints/")
    record = read_json(root / run / "manifest.json")
    if last:
        steps[run] = max(steps.get(run, 0), int(last.removeprefix("step_")))
        ancestry(root, record.get("policy", "0/policy"), steps, tuned)
    elif record.get("stage") == "merge":
        for source in record["paths"].values():
            ancestry(root, source, steps, tuned)
    elif record.get("stage") == "rft":
        tuned.add(policy)
        ancestry(root, record["policy"], steps, tuned)
        made = read_json((root / record["examples"]).with_suffix(".manifest.json"))
        steps |= {rollouts: max(steps.get(rollouts, 0), STEPS) for rollouts in made["rollouts"]}


@cache
def rl_log(run: Path) -> Sequence[Mapping[str, str]]:
    """The lines of a run's log.tsv."""
    with (run / "log.tsv").open(newline="") as file:
        return list(csv.DictReader(file, dialect="excel-tab"))


def costs(method: str) -> list[Cost]:
    """What a method cost, seed by seed."""
    place, policy, _ = METHODS[method]
    found = {root: evaluated(root / "eval" / place / "valid/results.jsonl") for root in sorted(RUNS.glob("[0-9]*"))}
    names = {root: policy or next(iter(results), "") for root, results in found.items()}
    return [cost(root, name) for root, name in names.items() if name in found[root]]


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
    yield (
        "## Frontier\n\nThe plain average of all four sets. *On it*: no other method that trained on the same problems "
        "has a higher mean of both. Rollouts drawn and completion tokens trained on, after the base; thousands, means "
        "over seeds."
    )
    head = ["Method", "avg@32", "pass@32", "on it", "rollouts", "RL tokens", "tuning tokens"]
    yield table(head, [frontier_line(values, method, present) for method in by_accuracy(values, present)])
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


def by_accuracy(values: Values, methods: Iterable[str]) -> list[str]:
    """Methods from the highest average accuracy down; those that trained on other problems are left out."""
    alike = [method for method in methods if not method.endswith("mixed")]
    return sorted(alike, key=lambda method: -fmean(values[method, "all", "avg@32"].values()))


def frontier_line(values: Values, method: str, present: Sequence[str]) -> list[str]:
    """A method's averages over all sets, whether none is better in both, and what it cost."""
    found = {other: both(values, other) for other in by_accuracy(values, present)}
    own = found[method]
    is_best = not any(all(a > b for a, b in zip(each, own, strict=True)) for each in found.values())
    spent = [f"{fmean(amounts) / 1000:,.0f}" for amounts in zip(*costs(method), strict=True)]
    return [method, *(cell(mean(values[method, "all", metric].values())) for metric in BOTH), "●" * is_best, *spent]


def both(values: Values, method: str) -> list[float]:
    """The mean over seeds of accuracy and of coverage, all sets."""
    return [fmean(values[method, "all", metric].values()) for metric in BOTH]


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
        save(canvas, path)


def draw_frontier(values: Values, path: Path) -> None:
    """Accuracy against coverage, the average of all sets: a dot a method, full on the frontier, with its intervals."""
    present = by_accuracy(values, [method for method in METHODS if (method, "all", "avg@32") in values])
    with matplotlib.rc_context(figures.STYLE | {"figure.facecolor": "white", "svg.hashsalt": "rloop"}):
        canvas = Figure(figsize=(8, 5.5), layout="constrained")
        axes = canvas.subplots()
        for method in present:
            found = [mean(values[method, "all", metric].values()) for metric in BOTH]
            x, y = (each.value for each in found)
            on_it = bool(frontier_line(values, method, present)[3])
            colour = figures.COLOURS.get(method, "#2a9d76" if on_it else "#9aa1ab")
            halves = [0.0 if each.half != each.half else each.half for each in found]
            axes.errorbar(x, y, xerr=halves[0], yerr=halves[1], color=colour, alpha=0.25, linewidth=1)
            axes.plot(x, y, "o", color=colour, markerfacecolor=colour if on_it else "none")
            *place, side = LABELS.get(method, (5, 4, "left"))
            axes.annotate(method, (x, y), place, textcoords="offset points", ha=side, fontsize=8, color=colour)
        axes.set_xlabel("avg@32, average of the four sets, percent")
        axes.set_ylabel("pass@32, percent")
        axes.grid(alpha=0.2)
        save(canvas, path)


def save(canvas: Figure, path: Path) -> None:
    """Write a figure as PNG and SVG."""
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
    draw_frontier(values, OUT / "frontier")
    print(text)


if __name__ == "__main__":
    main()
