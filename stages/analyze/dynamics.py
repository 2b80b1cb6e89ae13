"""What a policy learns and forgets between checkpoints (the paper's section 3.1), from counts of correct samples.

A checkpoint solves a problem if at least `min_correct` of its samples are correct (the paper: at least one of 32).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stages.core.errors import InputError
from stages.core.records import Result

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


def solved(checkpoints: Sequence[Sequence[Result]], min_correct: int = 1) -> "Array":
    """Whether each checkpoint solves each problem, bool [checkpoints, problems], problems in order of their ids.

    Raises InputError if the checkpoints were not all evaluated on the same problems.
    """
    import numpy as np

    counts: list[Mapping[str, int]] = [{r["problem_id"]: r["num_correct"] for r in results} for results in checkpoints]
    problems = sorted(counts[0])
    for results, count in zip(checkpoints, counts, strict=True):
        if count.keys() != counts[0].keys():
            odd = sorted(count.keys() ^ counts[0].keys())[0]
            names = f"{checkpoints[0][0]['policy']} and {results[0]['policy']}"
            raise InputError(f"{names} were not evaluated on the same problems ({odd}): name evals of one set")
    return np.array([[count[problem] >= min_correct for problem in problems] for count in counts], dtype=bool)


def learning(is_solved: "Array") -> "Array":
    """[i, j]: share of problems solved at j and not at i; read above the diagonal, where j comes after i."""
    return forgetting(is_solved).T


def forgetting(is_solved: "Array") -> "Array":
    """[i, j]: share of problems solved at i and not at j; read above the diagonal, where j comes after i."""
    import numpy as np

    yes = is_solved.astype(np.float64)
    return yes @ (1 - yes).T / yes.shape[1]
