"""Seconds that a step of rl takes to draw its batch: round by round, ahead, and by refilling as groups finish.

    python benchmarks/rounds.py              the paper's scale: 512 groups of 16, on 8 ranks of 512 sequences
    python benchmarks/rounds.py --batch 128  another batch

How many groups a round draws is the product's own code (`stages/rl/rounds.py`); engine and lengths are models. A pass
of the engine takes 8 ms and 27 us a sequence. Lengths are log-normal, cut at 2,048 tokens, with a mean of 774 after
that. A group is informative by chance, with the probability in the first column.

"missing" draws as many groups as are missing, in at most ten rounds. "refilling" knows the acceptance, begins another
group as soon as those that are done and those that run would not fill the batch, and ends when it is full, whatever
still runs: a bound, whose batch is biased towards short completions. The update, which comes on top, is the same.
"""

import argparse
import heapq
import math
import random
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from itertools import repeat
from statistics import fmean
from typing import NamedTuple

from stages.core import tabular
from stages.rl.rounds import Acceptance, Rounds

PASS_S, SEQUENCE_S = 0.008, 27e-6
MU, SIGMA, MAX_TOKENS = 6.454, 0.7, 2048
GROUP_SIZE, MAX_ROUNDS = 16, 10
SHARES = (0.25, 0.4, 0.5, 0.6)


class Simulated(NamedTuple):
    lengths: list[int]
    is_informative: bool


class Step(NamedTuple):
    seconds: float
    num_rounds: float
    num_kept: float
    num_drawn: float


class Rank:
    """An engine with room for so many sequences at once; others wait, in their order."""

    def __init__(self, room: int):
        self.room = room
        self.clock = 0.0
        self._passes = 0
        self._running: list[tuple[int, int]] = []  # (pass in which it ends, group)
        self._waiting: deque[tuple[int, int]] = deque()

    def add(self, number: int, group: Simulated, now: float = 0.0) -> None:
        passes = int((now - self.clock) / self._pass_s) if self._running else 0
        self._passes += passes
        self.clock = self.clock + passes * self._pass_s if self._running else now
        self._waiting += zip(group.lengths, repeat(number))
        self._begin()

    @property
    def load(self) -> int:
        return len(self._running) + len(self._waiting)

    @property
    def next_end(self) -> float:
        """When a sequence ends next, if nothing is added; never if nothing runs."""
        return self.clock + (self._running[0][0] - self._passes) * self._pass_s if self._running else math.inf

    def run(self) -> int:
        """Go on until a sequence ends; the number of its group."""
        self.clock = self.next_end
        self._passes, number = heapq.heappop(self._running)
        self._begin()
        return number

    def _begin(self) -> None:
        while self._waiting and len(self._running) < self.room:
            length, number = self._waiting.popleft()
            heapq.heappush(self._running, (self._passes + length, number))

    @property
    def _pass_s(self) -> float:
        return PASS_S + SEQUENCE_S * len(self._running)


def stream(share: float, luck: random.Random) -> Iterator[Simulated]:
    while True:
        lengths = [max(1, min(MAX_TOKENS, round(luck.lognormvariate(MU, SIGMA)))) for _ in range(GROUP_SIZE)]
        yield Simulated(lengths, luck.random() < share)


def round_s(groups: list[Simulated], ranks: int, room: int) -> float:
    """Seconds until the last rank is done; groups are dealt as rl deals them."""
    times = []
    for number in range(ranks):
        rank = Rank(room)
        for group in groups[number::ranks]:
            rank.add(0, group)
        while rank.load:
            rank.run()
        times.append(rank.clock)
    return max(times)


def by_rounds(
    problems: Iterator[Simulated], batch: int, ranks: int, room: int, steps: int, ahead: bool
) -> Iterator[Step]:
    """Steps as rl goes through them."""
    acceptance = Acceptance()
    for _ in range(steps):
        rounds, seconds = Rounds(batch, MAX_ROUNDS, acceptance.faded()), 0.0
        while num_wanted := rounds.num_wanted:
            groups = [next(problems) for _ in range(num_wanted if ahead else rounds.num_missing)]
            seconds += round_s(groups, ranks, room)
            rounds.count(sum(group.is_informative for group in groups), len(groups))
        acceptance = rounds.acceptance
        yield Step(seconds, rounds.num_rounds, batch - rounds.num_missing, rounds.num_drawn)


def by_refilling(share: float, problems: Iterator[Simulated], batch: int, ranks: int, room: int) -> Step:
    engines = [Rank(room) for _ in range(ranks)]
    groups: list[Simulated] = []
    left: Counter[int] = Counter()  # sequences that each group under way waits for
    num_kept, now = 0, 0.0
    while num_kept < batch:
        while num_kept + share * len(left) < batch:
            left[len(groups)] = GROUP_SIZE
            groups.append(next(problems))
            min(engines, key=lambda engine: engine.load).add(len(groups) - 1, groups[-1], now)
        first = min(engines, key=lambda engine: engine.next_end)
        number = first.run()
        now = first.clock
        left[number] -= 1
        if not left[number]:
            del left[number]
            num_kept += groups[number].is_informative
    return Step(now, 1, num_kept, len(groups))


def mean(steps: Iterable[Step]) -> Step:
    return Step(*map(fmean, zip(*steps, strict=True)))


def row(share: float, batch: int, ranks: int, room: int, steps: int, seed: int) -> list[str]:
    size = batch, ranks, room
    missing = mean(by_rounds(stream(share, random.Random(seed)), *size, steps, ahead=False))
    ahead = mean(by_rounds(stream(share, random.Random(seed)), *size, steps, ahead=True))
    problems = stream(share, random.Random(seed))
    refilled = mean(by_refilling(share, problems, *size) for _ in range(steps))
    return [
        *(f"{share:.0%}", f"{missing.seconds:.0f} s", f"{missing.num_rounds:.1f}", f"{missing.num_kept:.0f}"),
        *(f"{ahead.seconds:.0f} s", f"{ahead.num_rounds:.2f}", f"{ahead.num_kept:.0f}", f"{ahead.num_drawn:.0f}"),
        *(f"{refilled.seconds:.0f} s", f"{refilled.num_drawn:.0f}", f"{ahead.seconds / refilled.seconds:.2f}"),
    ]


def main() -> None:
    """Print a line for each acceptance; means over steps, of which the first knows nothing of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 512), ("ranks", 8), ("room", 512), ("steps", 20), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = vars(parser.parse_args())
    header = ["informative", "missing", "rounds", "kept", "ahead", "rounds", "kept", "drawn", "refilling", "drawn"]
    print(tabular.aligned([[*header, "ahead/refilling"], *(row(share, **given) for share in SHARES)]))


if __name__ == "__main__":
    main()
