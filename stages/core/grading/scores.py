"""What grading gives: a Score for each completion, and the Grader that hands them out while the engine goes on."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol, Self

from stages.core.records import Problem, Verdict


class Score(NamedTuple):
    """A verdict; `reward` is 1.0 for `correct` and 0.0 otherwise; `prediction` is the text that was compared.

    With rewards of one's own `reward` is their weighted sum, `parts` are the rewards by name, None for
    one that does not apply, and `fault` says why there are none.
    """

    verdict: Verdict
    reward: float
    prediction: str | None
    parts: dict[str, float | None] | None = None
    fault: str = ""

    @property
    def applies(self) -> bool:
        """Whether any reward applies to the completion."""
        return self.parts is None or any(part is not None for part in self.parts.values())


class Pending:
    """Scores that are being worked out: what `settle` makes of the `awaited` results, once these are there."""

    def __init__(self, awaited: Sequence[Future[Any]], settle: Callable[[], list[Score]]) -> None:
        self.awaited = awaited
        self._settle = settle
        self._scores: list[Score] | None = None

    @property
    def is_done(self) -> bool:
        """Whether `result` would return at once."""
        return all(each.done() for each in self.awaited)

    def result(self) -> list[Score]:
        """The scores in the order of the completions; waits for them. From then on they can go to another process."""
        if self._scores is None:
            self._scores = self._settle()
            self.awaited, self._settle = (), list
        return self._scores


class Grader(Protocol):
    """What scores completions: a Verifier, or rewards of one's own."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...

    def grade(
        self, problem: Problem, prompt: str, completions: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> Pending:
        """Begin to score the completions of one prompt, and return at once."""
        ...

    def refuse_failed(self) -> None:
        """Raise InputError if there are no rewards for any group so far."""
        ...
