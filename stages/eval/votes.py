"""maj@k: the chance that the majority of k samples is right, from the classes that equivalent answers form.

The correct completions of a problem are one class by their verdict. Two wrong answers are of one class if the verifier
holds one of them correct when the other is the answer, or if further answers link them so. What has another verdict
than `correct` or `wrong` votes for nothing, nor does an answer that the verifier does not hold equal to itself, since
it can't read it.

A Result counts the classes: `num_correct`, and `wrong_votes` for those of wrong answers, the largest first.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import islice, product
from math import comb
from typing import Any

from stages.core.errors import InputError
from stages.core.grading.verifier import Verifier
from stages.core.grading.verifier.extraction import extract
from stages.core.records import Rollout

MAX_BALLOTS = 64  # given to the verifier at once; one of n different answers has n * n pairs


class Ballots:
    """The wrong answers of each policy on each problem, with the number of rollouts that gave each."""

    def __init__(self, bare: bool) -> None:
        self._bare = bare
        self._answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)

    def add(self, rollout: Rollout) -> Rollout:
        """Take one rollout's answer, and return the rollout."""
        if rollout["verdict"] == "wrong" and (answer := extract(rollout["completion"], self._bare)) is not None:
            self._answers[rollout["policy"], rollout["problem_id"]][answer] += 1
        return rollout

    def count(self, results: Sequence[Any], verifier: Verifier) -> None:
        """Give each Result its `wrong_votes`."""
        for start in range(0, len(results), MAX_BALLOTS):
            part = results[start : start + MAX_BALLOTS]
            answers = [self._answers[result["policy"], result["problem_id"]] for result in part]
            for result, votes in zip(part, class_sizes(answers, verifier), strict=True):
                result["wrong_votes"] = votes


def class_sizes(ballots: Sequence[Counter[str]], verifier: Verifier) -> list[list[int]]:
    """The votes of each class of equivalent answers, for each ballot, the largest first."""
    pairs = [pair for ballot in ballots for pair in product(ballot, ballot)]
    verdicts = zip(pairs, verifier.compare(pairs), strict=True)
    equal = ({pair for pair, verdict in islice(verdicts, len(own) ** 2) if verdict == "correct"} for own in ballots)
    return [_sizes(ballot, pairs) for ballot, pairs in zip(ballots, equal, strict=True)]


def _sizes(ballot: Counter[str], equal: Collection[tuple[str, str]]) -> list[int]:
    classes: list[set[str]] = []
    for text in (text for text in ballot if (text, text) in equal):
        like = {other for other in ballot if (text, other) in equal or (other, text) in equal}
        linked = [members for members in classes if members & like]
        classes = [members for members in classes if members not in linked] + [{text}.union(*linked)]
    return sorted((sum(ballot[text] for text in members) for members in classes), reverse=True)


def of_problems(results: Sequence[Any], k: int) -> list[float]:
    """maj@k on each problem."""
    return [maj_at_k(r["num_samples"], r["num_correct"], tuple(r["wrong_votes"]), k) for r in results]


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
