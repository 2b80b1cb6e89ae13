"""What a policy learns and forgets between checkpoints (the paper's section 3.1), from counts of correct samples.

A checkpoint solves a problem if at least `min_correct` of its samples are correct (the paper: at least one of 32).
"""

from collections.abc import Sequence
from functools import lru_cache
from math import comb
from typing import TYPE_CHECKING

from stages.core.errors import InputError
from stages.core.records import Result
from stages.core.study import metrics
from stages.core.study.metrics import Interval

if TYPE_CHECKING:
    from stages.core.study.metrics import Array


def counts(checkpoints: Sequence[Sequence[Result]], field: str) -> "Array":
    """A count of each checkpoint and problem, int [checkpoints, problems], problems in order of their ids.

    Raises InputError if the checkpoints were not all evaluated on the same problems.
    """
    import numpy as np

    by_problem = [{r["problem_id"]: r[field] for r in results} for results in checkpoints]  # type: ignore[literal-required]
    problems = sorted(by_problem[0])
    for results, of_checkpoint in zip(checkpoints, by_problem, strict=True):
        if of_checkpoint.keys() != by_problem[0].keys():
            odd = sorted(of_checkpoint.keys() ^ by_problem[0].keys())[0]
            names = f"{checkpoints[0][0]['policy']} and {results[0]['policy']}"
            raise InputError(f"{names} were not evaluated on the same problems ({odd}): name evals of one set")
    return np.array([[of_checkpoint[problem] for problem in problems] for of_checkpoint in by_problem])


def solved(checkpoints: Sequence[Sequence[Result]], min_correct: int = 1) -> "Array":
    """Whether each checkpoint solves each problem, bool [checkpoints, problems]; raises InputError as `counts` does."""
    return counts(checkpoints, "num_correct") >= min_correct


def learning(is_solved: "Array") -> "Array":
    """[i, j]: share of problems solved at j and not at i; read above the diagonal, where j comes after i."""
    return forgetting(is_solved).T


def forgetting(is_solved: "Array") -> "Array":
    """[i, j]: share of problems solved at i and not at j; read above the diagonal, where j comes after i."""
    import numpy as np

    yes = is_solved.astype(np.float64)
    return yes @ (1 - yes).T / yes.shape[1]


def forgetting_of_halves(checkpoints: Sequence[Sequence[Result]], min_correct: int = 1) -> "Array":
    """[i, j]: forgetting with half of each checkpoint's samples, expected over all choices of the halves.

    On the diagonal the two halves are one policy's own, so that this is what chance alone forgets: forgetting beyond it
    is real. Both are unbiased at that number of samples, which forgetting of i by i with all samples can't be.
    """
    import numpy as np

    n, c = (counts(checkpoints, field) for field in ("num_samples", "num_correct"))
    both = np.vectorize(lambda n, c: _of_halves(int(n), int(c), min_correct), otypes=[float, float])(n, c)
    yes, floor = both
    forgotten = yes @ (1 - yes).T / yes.shape[1]
    np.fill_diagonal(forgotten, floor.mean(axis=1))
    return np.asarray(forgotten)


@lru_cache(2**16)
def _of_halves(n: int, c: int, min_correct: int) -> tuple[float, float]:
    """Of n samples, c of them correct: the chance that a half solves the problem, and that then another does not."""
    half = n // 2
    first = {a: comb(half, a) * comb(n - half, c - a) for a in range(min(half, c) + 1)}
    solved = sum(ways for a, ways in first.items() if a >= min_correct)
    only = sum(
        comb(half, a) * comb(half, b) * comb(n - 2 * half, c - a - b)
        for a in range(min_correct, min(half, c) + 1)
        for b in range(min(min_correct - 1, c - a) + 1)
    )
    return solved / comb(n, c), only / comb(n, c)


def retention(is_solved: "Array") -> list[Interval]:
    """Of the problems that the first checkpoint solves, the share that each one solves; NaN if it solves none."""
    return [metrics.share_interval(is_solved[0] & later, is_solved[0]) for later in is_solved]


def turnover(is_solved: "Array") -> list[Interval]:
    """Of the problems that each checkpoint solves, the share that the first one doesn't; NaN if it solves none."""
    return [metrics.share_interval(later & ~is_solved[0], later) for later in is_solved]
