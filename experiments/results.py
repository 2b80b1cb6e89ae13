"""Tables over seeds of what experiments/run.py has made so far, from the results.tsv of each project's report.

    python experiments/results.py experiments/overfit/runs/arms --out experiments/overfit/results

Writes measurements.tsv (one number a line: seed, method, set, metric) and results.md. Figures are percent. An interval
is the 95 % Student interval of the mean over seeds; fewer than three seeds have none. A difference is taken within each
seed, where both methods began from the same base and answered the same problems. What is sure of one seed, with
intervals over problems, is in its own report.
"""

import argparse
import csv
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from scipy.stats import t as student
from tabulate import tabulate

from stages.core.errors import InputError
from stages.core.tabular import write_tsv

MIN_SEEDS = 3
RL, RLOOP = "RL", "RLoop"
ENDS = {"": RL, ", last RL endpoint": RL, ", chosen": f"{RL}, chosen"}  # of RLoop's rows, and what each stands against

Values = Mapping[tuple[str, str, str], Mapping[str, float]]  # (set, method, metric): percent by seed


def measured(directory: Path) -> Values:
    """What the reports below `directory` say; RLoop's rows are named after the arm, "RLoop all, chosen"."""
    values: dict[tuple[str, str, str], dict[str, float]] = {}
    for file in sorted(directory.glob("[0-9]*-*/runs/results.tsv")):
        seed, _, arm = file.parents[1].name.partition("-")
        for row in csv.DictReader(file.read_text().splitlines(), dialect="excel-tab"):
            method = row["method"].replace(RLOOP, f"{RLOOP} {arm}")
            for metric in (name for name in row if "@" in name and not name.endswith(("_low", "_high"))):
                if row[metric]:
                    values.setdefault((row["set"], method, metric), {}).setdefault(seed, float(row[metric]))
    if not values:
        raise InputError(f"{directory} holds no report yet: python experiments/run.py")
    return values


def mean(values: Iterable[float], signed: bool = False) -> str:
    """`47.1 ± 4.9`, the mean over seeds and its interval; a difference whose interval excludes zero is bold."""
    numbers = list(values)
    text = f"{fmean(numbers):{'+' if signed else ''}.1f}"
    if len(numbers) < MIN_SEEDS:
        return text
    half = student.ppf(0.975, len(numbers) - 1) * stdev(numbers) / len(numbers) ** 0.5
    return f"**{text} ± {half:.1f}**" if signed and abs(fmean(numbers)) > half else f"{text} ± {half:.1f}"


def pairs(methods: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each of RLoop's rows with the row of RL that it stands against, and RL's own loss after its best checkpoint."""
    for method in methods:
        if method.startswith(RLOOP):
            yield method, next(other for end, other in reversed(ENDS.items()) if method.endswith(end))
    yield f"{RL}, chosen", RL


def differences(values: Values, problems: str, one: str, other: str, metric: str) -> list[float]:
    """One minus other in points, of the seeds that both have."""
    first, second = (values.get((problems, method, metric), {}) for method in (one, other))
    return [first[seed] - second[seed] for seed in first if seed in second]


def table(values: Values, problems: str) -> str:
    """The means of a set's methods, and below them the differences."""
    methods = list(dict.fromkeys(method for name, method, _ in values if name == problems))
    metrics = list(dict.fromkeys(metric for name, _, metric in values if name == problems))
    rows = []
    for method in methods:
        seeds = {metric: values.get((problems, method, metric), {}) for metric in metrics}
        cells = [mean(by_seed.values()) if by_seed else "-" for by_seed in seeds.values()]
        rows.append([method, *cells, max(map(len, seeds.values()))])
    for one, other in pairs(methods):
        apart = [differences(values, problems, one, other, metric) for metric in metrics]
        if any(apart):
            cells = [mean(points, signed=True) if points else "-" for points in apart]
            rows.append([f"{one} − {other}", *cells, max(map(len, apart))])
    return tabulate(rows, ["", *metrics, "seeds"], tablefmt="github", disable_numparse=True)


def write(directory: Path, out: Path) -> str:
    """Write both files; the text of results.md. InputError if there is no report yet."""
    values = measured(directory)
    names = list(dict.fromkeys(name for name, _, _ in values))
    names.sort(key=lambda name: not name.startswith("Average"))
    text = "\n\n".join([f"# {directory.name}, over seeds", *(f"## {name}\n\n{table(values, name)}" for name in names)])
    out.mkdir(parents=True, exist_ok=True)
    keys = ("set", "method", "metric")
    lines = [
        {"seed": seed} | dict(zip(keys, key, strict=True)) | {"percent": value}
        for key, by_seed in values.items()
        for seed, value in by_seed.items()
    ]
    write_tsv(out / "measurements.tsv", lines)
    (out / "results.md").write_text(text + "\n")
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
