"""What maj@k counts: the classes that equivalent answers form (core/study/votes.py makes the figure of them).

The correct completions of a problem are one class by their verdict. Two wrong answers are of one class if the verifier
holds one of them correct when the other is the answer, or if further answers link them so. What has another verdict
than `correct` or `wrong` votes for nothing, nor does an answer that the verifier does not hold equal to itself, since
it can't read it.

A Result counts the classes: `num_correct`, and `wrong_votes` for those of wrong answers, the largest first.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from itertools import islice, product
from typing import Any

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

    def count(self, results: Sequence[Any]) -> None:
        """Give each Result its `wrong_votes`."""
        with Verifier() as verifier:
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
