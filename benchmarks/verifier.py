"""Scores per second and core: the verifier beside plain math_verify.parse + verify, on the same completions.

    python benchmarks/verifier.py                        completions made on the spot, three workloads
    python benchmarks/verifier.py --rollouts FILE        the completions of a rollouts.jsonl (of rl, sample or eval)

Both sides run in turn on the same slices of work, in one process and one worker, so that the noise of a shared machine
falls on both; what counts is CPU time (the caller's plus the worker's), not wall time. The start of the worker, once a
run, is told apart. The completions made here are 2,000 characters of working with a box at the end; of 16 for one
problem about half are right and about three values are distinct, in several notations each.
"""

import argparse
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from math_verify import parse, verify

from stages.core import records
from stages.core.grading.verifier import VERSION, Verifier

Graded = tuple[str, str]  # completion, answer
WORKING = (
    "Let us look at the given condition first. We write $x^2 - 5x + 6 = 0$, so that $(x-2)(x-3) = 0$, and put this "
    "back into the sum $\\sum_{k=1}^{n} k = \\frac{n(n+1)}{2}$ to see what is left over in each of the cases. "
)


def integer(draw: random.Random) -> tuple[str, list[str]]:
    """An answer and notations of it."""
    n = draw.randint(-50, 4000)
    return str(n), [str(n), f"{n:,}", f"{n}.0", f"x = {n}"]


def fraction(draw: random.Random) -> tuple[str, list[str]]:
    """An answer and notations of it."""
    a, b = draw.randint(1, 30), draw.choice([3, 4, 7, 8, 9, 11])
    return f"\\frac{{{a}}}{{{b}}}", [f"\\frac{{{a}}}{{{b}}}", f"\\dfrac{{{a}}}{{{b}}}", f"{a}/{b}"]


def surd(draw: random.Random) -> tuple[str, list[str]]:
    """An answer and notations of it."""
    a, b = draw.randint(2, 20), draw.choice([2, 3, 5, 7])
    return f"{a}\\sqrt{{{b}}}", [f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{a * a * b}}}", f"{a}\\cdot\\sqrt{b}"]


def multiple_of_pi(draw: random.Random) -> tuple[str, list[str]]:
    """An answer and notations of it."""
    a, b = draw.randint(2, 60), draw.choice([2, 3, 4, 6])
    return f"\\frac{{{a}\\pi}}{{{b}}}", [f"\\frac{{{a}\\pi}}{{{b}}}", f"\\frac{{{a}}}{{{b}}}\\pi", f"{a}\\pi/{b}"]


def pair(draw: random.Random) -> tuple[str, list[str]]:
    """An answer and notations of it."""
    a, b = draw.randint(-20, 20), draw.randint(-20, 20)
    return f"({a},{b})", [f"({a},{b})", f"\\left({a}, {b}\\right)", f"(x,y)=({a},{b})"]


def several(draw: random.Random) -> tuple[str, list[str]]:
    """An answer and notations of it."""
    a, b = draw.sample(range(-30, 30), 2)
    return f"{a}, {b}", [f"{a}, {b}", f"{b},{a}", f"\\{{{a},{b}\\}}", f"x={a}\\text{{ or }}x={b}"]


def interval(draw: random.Random) -> tuple[str, list[str]]:
    """An answer and notations of it."""
    a = draw.randint(-20, 20)
    return f"({a},\\infty)", [f"({a},\\infty)", f"x>{a}", f"({a}, +\\infty)"]


def polynomial(draw: random.Random) -> tuple[str, list[str]]:
    """An answer and notations of it."""
    a, b = draw.randint(1, 20), draw.randint(1, 20)
    return f"x^2+{a + b}x+{a * b}", [f"x^2+{a + b}x+{a * b}", f"(x+{a})(x+{b})", f"{a * b}+{a + b}x+x^2"]


def day(draw: random.Random) -> tuple[str, list[str]]:
    """An answer and notations of it."""
    name = draw.choice(["Monday", "Tuesday", "Friday", "Sunday"])
    return f"\\text{{{name}}}", [name, f"\\text{{{name}}}"]


MIXED = [integer] * 48 + [fraction] * 14 + [surd] * 10 + [multiple_of_pi] * 6 + [pair] * 6 + [several] * 5
MIXED += [interval] * 3 + [polynomial] * 6 + [day] * 2


def completions(kinds: list[Callable[..., tuple[str, list[str]]]], problems: int, samples: int) -> list[list[Graded]]:
    """For each problem its pairs; a wrong one is right for another problem of the kind."""
    draw = random.Random(7)
    groups = []
    for _ in range(problems):
        kind = draw.choice(kinds)
        answer, spellings = kind(draw)
        others = [kind(draw)[1] for _ in range(3)]
        weights = [8, 5, 2, 1]
        chosen = [draw.choice(draw.choices([spellings, *others], weights)[0][:2]) for _ in range(samples)]
        groups.append([(f"{working(draw)}So the answer is $\\boxed{{{text}}}$.", answer) for text in chosen])
    return groups


def working(draw: random.Random) -> str:
    """About 2,000 characters that no other completion has."""
    return "".join(WORKING.replace("5x", f"{draw.randint(2, 999)}x") for _ in range(8))


def slices(groups: list[list[Graded]], size: int = 20) -> Iterator[list[Graded]]:
    """The pairs of `size` problems at a time, shuffled as an engine hands them out."""
    for start in range(0, len(groups), size):
        part = [item for group in groups[start : start + size] for item in group]
        random.Random(start).shuffle(part)
        yield part


def plain(pairs: list[Graded]) -> list[float]:
    """math-verify as its README uses it."""
    return [float(verify(parse(f"\\boxed{{{answer}}}"), parse(text))) for text, answer in pairs]


def cpu_s(pids: list[int]) -> float:
    """CPU seconds so far of this process and of `pids`."""
    total = time.process_time()
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def compare(name: str, groups: list[list[Graded]], verifier: Verifier) -> None:
    """Run both sides over the same slices, and print a line of the table."""
    seconds = {"plain": 0.0, "verifier": 0.0}
    count = agreed = 0
    for part in slices(groups):
        start = cpu_s([])
        theirs = plain(part)
        middle, before = cpu_s([]), cpu_s(verifier.worker_pids)
        ours = [score.reward for score in verifier.verify(part)]
        seconds["plain"] += middle - start
        seconds["verifier"] += cpu_s(verifier.worker_pids) - before
        count += len(part)
        agreed += sum(a == b for a, b in zip(theirs, ours, strict=True))
    rates = {side: count / spent for side, spent in seconds.items()}
    ratio = rates["verifier"] / rates["plain"]
    print(f"{name:<34}{count:>7}{rates['plain']:>9.0f}{rates['verifier']:>11.0f}{ratio:>8.1f}x{agreed / count:>10.1%}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", help="measure on the completions of this file instead")
    parser.add_argument("--problems", type=int, default=100, help="problems of each workload made here")
    options = parser.parse_args()
    logging.disable()
    with Verifier(workers=1) as verifier:
        before = time.perf_counter()
        verifier.verify([("\\boxed{\\sqrt{2}+x}", "x+\\sqrt{3}")])
        print(f"{VERSION}\nworker ready after {time.perf_counter() - before:.1f} s\n")
        plain([("\\boxed{\\sqrt{2}+x}", "x+\\sqrt{3}")] * 3 + [("\\boxed{(1,x^2)}", "[1,\\pi]")])
        print(f"{'workload':<34}{'pairs':>7}{'plain/s':>9}{'verifier/s':>11}{'ratio':>9}{'agree':>10}")
        if options.rollouts:
            groups: dict[str, list[Graded]] = {}
            for rollout in records.read(options.rollouts, records.Rollout):
                groups.setdefault(rollout["problem_id"], []).append((rollout["completion"], rollout["answer"]))
            compare(options.rollouts[-33:], list(groups.values()), verifier)
            return
        compare("mixed answers, 16 samples each", completions(MIXED, options.problems, 16), verifier)
        compare("integers, 16 samples each", completions([integer], options.problems, 16), verifier)
        compare("mixed answers, 1 sample each", completions(MIXED, 4 * options.problems, 1), verifier)


if __name__ == "__main__":
    main()
