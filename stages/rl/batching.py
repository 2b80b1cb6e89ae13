"""Which sequences go together: shares of ranks, mini-batches, and the endless stream of problems."""

import random
from collections.abc import Sequence
from itertools import pairwise


def shares(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Deal sequence numbers to ranks so that each holds about as many tokens: longest first, back and forth."""
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    for turn, index in enumerate(sorted(range(len(lengths)), key=lambda index: -lengths[index])):
        lap, seat = divmod(turn, num_ranks)
        dealt[seat if lap % 2 == 0 else num_ranks - 1 - seat].append(index)
    return dealt


def split(items: Sequence[int], num_parts: int) -> list[list[int]]:
    """Cut into `num_parts` runs whose sizes differ by at most one; none is dropped. Fewer parts if items run out."""
    num_parts = min(num_parts, len(items))
    cuts = [len(items) * part // num_parts for part in range(num_parts + 1)] if num_parts else [0]
    return [list(items[start:end]) for start, end in pairwise(cuts)]


class ProblemStream:
    """Problem numbers without end: every epoch a fresh permutation, each number once an epoch.

    The whole state is `position`, the count of numbers handed out, so a run resumes exactly.
    """

    def __init__(self, num_problems: int, seed: int, position: int = 0):
        self.num_problems = num_problems
        self.seed = seed
        self.position = position
        self._epoch = -1
        self._order: list[int] = []

    def take(self, count: int) -> list[int]:
        return [self._next() for _ in range(count)]

    def _next(self) -> int:
        epoch, index = divmod(self.position, self.num_problems)
        if epoch != self._epoch:
            self._order = list(range(self.num_problems))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
            self._epoch = epoch
        self.position += 1
        return self._order[index]
