"""maj@k: the chance that the majority of k samples is right, from the votes that each class of equal answers has."""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import comb

from stages.core.errors import InputError


@lru_cache(2**16)
def maj_at_k(num_samples: int, num_correct: int, wrong_votes: tuple[int, ...], k: int) -> float:
    """Chance that of k of the samples, drawn without replacement, most of those that vote are correct.

    With j correct ones among the k, that is the share of choices of the other k - j in which no class of wrong answers
    has more than j votes; one in which t of them have j, too, counts 1 / (t + 1), and one without votes nothing.
    Exact, and unbiased for every n >= k as pass@k is: the average over all C(n, k) choices.
    """
    num_silent = num_samples - num_correct - sum(wrong_votes)
    if num_silent < 0:
        raise InputError("a result counts more votes than samples: was it edited?")
    choices = sum(
        comb(num_correct, top) * _not_outvoted(wrong_votes, num_silent, top, k - top)
        for top in range(1, min(k, num_correct) + 1)
    )
    return float(choices / comb(num_samples, k))


def _not_outvoted(wrong_votes: Sequence[int], num_silent: int, top: int, num_others: int) -> Fraction:
    """Ways to choose `num_others` that leave no class more than `top`, each divided among the classes that have it."""
    ways = {(0, 1): 1}  # by how many are chosen so far, and how many classes have `top` of them, the correct included
    for size in (size for size in wrong_votes if size >= top):
        longer: Counter[tuple[int, int]] = Counter()
        for (chosen, at_top), count in ways.items():
            for votes in range(min(top, num_others - chosen) + 1):
                longer[chosen + votes, at_top + (votes == top)] += count * comb(size, votes)
        ways = longer
    free = num_silent + sum(size for size in wrong_votes if size < top)  # too few to matter
    return sum(
        (Fraction(count * comb(free, num_others - chosen), at_top) for (chosen, at_top), count in ways.items()),
        Fraction(),
    )
