"""How long is left of experiments/words/run.py, by what its finished parts and steps took.

Nothing is assumed: a kind of work of which nothing has been done yet is named, not guessed.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stages.core.outputs import read_json
from stages.core.tabular import read_tsv

UNITS = {"rl": "steps", "rft": "fine-tunings", "eval": "problems asked"}  # what each kind of work is counted in
BASELINE = "vanilla/rl"
TESTED = 3  # policies of an iteration, and of the baseline, that are asked the test sets, at most


class Part(NamedTuple):
    """What a project has to do, in the units of its kind; `out` lies in its runs/."""

    kind: str
    out: str
    amount: int


class Done(NamedTuple):
    """How much of a part is done, and the seconds it took."""

    amount: int
    seconds: float


def parts(params: Mapping[str, Any], sizes: Mapping[str, int], is_shared: bool) -> Iterator[Part]:
    """The parts of a project that take time; with `is_shared` without those that it takes from another.

    `sizes` are the numbers of problems: of the validation set (`valid`), and of the test sets together (`tests`).
    """
    steps, every = params["rl"]["steps"], params["rl"]["checkpoint_every"]
    in_iteration, in_vanilla = (math.ceil(count / every) for count in (steps, params["vanilla"]["steps"]))
    if not is_shared:
        yield Part("eval", "eval/0", sizes["valid"] + sizes["tests"])
        yield Part("rl", BASELINE, params["vanilla"]["steps"])
        yield Part("eval", "eval/vanilla/valid", in_vanilla * sizes["valid"])
        yield Part("eval", "eval/vanilla/test", TESTED * sizes["tests"])
    for key in params["iterations"]:
        if key != "1":  # the first is the beginning of the baseline
            yield Part("rl", f"{key}/rl", steps)
        yield Part("rft", f"{key}/policy", 1)
        yield Part("eval", f"eval/{key}/valid", (in_iteration + 1) * sizes["valid"])
        yield Part("eval", f"eval/{key}/test", TESTED * sizes["tests"])


def done(part: Part, runs: Path) -> Done:
    """What is there of a part."""
    if part.kind == "rl":
        log = read_tsv(runs / part.out / "log.tsv")
        if part.out == BASELINE:  # before it has a log, its first steps are made as the first iteration's
            log = log or read_tsv(runs / "1/rl/log.tsv")
        return Done(min(len(log), part.amount), sum(row.get("seconds", 0.0) for row in log))
    manifest = read_json(runs / part.out / "manifest.json")
    return Done(part.amount if manifest else 0, float(manifest.get("seconds", 0.0)))


def left(works: Iterable[tuple[Part, Done]]) -> tuple[float, list[str]]:
    """(seconds left of the kinds of work that have been timed, what is left of the others)."""
    amounts: dict[str, int] = defaultdict(int)
    timed: dict[str, Done] = defaultdict(lambda: Done(0, 0.0))
    for part, so_far in works:
        amounts[part.kind] += part.amount - so_far.amount
        before = timed[part.kind]
        timed[part.kind] = Done(before.amount + so_far.amount, before.seconds + so_far.seconds)
    known = {kind: timed[kind].seconds / timed[kind].amount for kind in amounts if timed[kind].amount}
    rest = [f"{amount} {UNITS[kind]}" for kind, amount in amounts.items() if amount and kind not in known]
    return sum(amounts[kind] * rate for kind, rate in known.items()), rest


def line(works: Iterable[tuple[Part, Done]]) -> str:
    """`about 31.5 h left`, `not timed yet: 3 fine-tunings left`, or both."""
    seconds, rest = left(works)
    untimed = f"not timed yet: {', '.join(rest)} left" if rest else ""
    return "; ".join(filter(None, [f"about {seconds / 3600:.1f} h left" if seconds or not rest else "", untimed]))
