"""Which rollouts become examples: pass rates over all rollouts of a problem, hard problems, a choice within each.

Memory grows with the number of problems alone: the candidates' positions and hashes are kept on disk.
"""

import hashlib
import io
import math
import sqlite3
import tempfile
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from stages.core.errors import InputError
from stages.core.tabular import aligned

THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0)


@dataclass(slots=True)
class Tally:
    """Counts over all rollouts that one policy gave on one problem; `number` is its index in order of appearance."""

    number: int
    problem_id: str = ""
    num_rollouts: int = 0
    num_correct: int = 0
    num_usable: int = 0  # successes that may become examples: those that were not truncated, or all
    question: int = 0  # a hash of prompt and answer, which all rollouts of a problem share

    @property
    def pass_rate(self) -> float:
        """Share of successes among all rollouts."""
        return self.num_correct / self.num_rollouts

    def is_below(self, max_pass_rate: float | None) -> bool:
        """Whether the pass rate lies strictly below `max_pass_rate`; 1 means no bound, None that nothing does.

        A division rounds to the nearest float, and so does a threshold as it is typed: 3 of 30 is not below 0.1.
        """
        return max_pass_rate is not None and (max_pass_rate >= 1 or self.pass_rate < max_pass_rate)


@dataclass(frozen=True)
class Hardness:
    """Which solved problems are hard: the first of them in the order of their pass rates, equal ones drawn by `seed`.

    These are all below `max_pass_rate`, and at least the share `hardest` of them, and at least `min_problems`.
    """

    max_pass_rate: float | None = 0.1
    hardest: float | None = None
    min_problems: int = 0
    seed: int = 0

    def num_hard(self, solved: Collection[Tally]) -> int:
        """How many of the solved problems are hard."""
        num_below = sum(tally.is_below(self.max_pass_rate) for tally in solved)
        share = math.ceil((self.hardest or 0) * len(solved) - 1e-9)  # 0.07 of 100 is 7, as typed
        return max(num_below, share, min(self.min_problems, len(solved)))

    def hard(self, solved: Collection[Tally]) -> list[Tally]:
        """The hard ones, the hardest first."""
        return sorted(solved, key=self._rank)[: self.num_hard(solved)]

    def _rank(self, tally: Tally) -> tuple[float, bytes, int]:
        return tally.pass_rate, _digest(f"{self.seed}/{tally.problem_id}".encode()), tally.number


def can_select(tallies: Collection[Tally], max_pass_rate: float) -> bool:
    """Whether one success among the most rollouts that any problem has is a pass rate below `max_pass_rate`."""
    return Tally(0, num_rollouts=max(tally.num_rollouts for tally in tallies), num_correct=1).is_below(max_pass_rate)


def yield_table(
    tallies: Collection[Tally], max_pass_rate: float | None, examples: Mapping[int, int] | None = None
) -> str:
    """How many problems and successes lie below each threshold, `max_pass_rate` among them, as aligned text.

    `examples`, if it is known, is the number of examples that each problem number would give.
    """
    titles = ["pass rate", "problems", "successes"] + (["examples"] if examples is not None else [])
    rows = [titles]
    for threshold in sorted({*THRESHOLDS, *([] if max_pass_rate is None else [max_pass_rate])}):
        below = [tally for tally in tallies if tally.num_usable and tally.is_below(threshold)]
        counts = [len(below), sum(tally.num_usable for tally in below)]
        if examples is not None:
            counts.append(sum(examples.get(tally.number, 0) for tally in below))
        rows.append([f"below {threshold:g}" if threshold < 1 else "any", *(f"{count:,}" for count in counts)])
    return aligned(rows)


class Positions:
    """Positions of candidates in order of arrival: triples (source, offset, problem number), 24 bytes each on disk.

    Add a triple with `buffer.extend`, without a call in between since every success passes here, and `flush` often.
    """

    def __init__(self) -> None:
        self.buffer = array("q")
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as this object)

    def flush(self) -> None:
        """Move the buffer to disk."""
        self._file.seek(0, io.SEEK_END)
        self.buffer.tofile(self._file)
        del self.buffer[:]

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        self.flush()
        self._file.seek(0)
        while block := self._file.read(24 * 2**14):
            numbers = iter(array("q", block))
            yield from zip(numbers, numbers, numbers, strict=True)


class Choice:
    """Candidates without exact duplicates, and of each problem a random choice that `seed` and its texts decide.

    The order in which candidates come decides only which of several equal ones is kept: the first.
    """

    def __init__(self, seed: int, keep_duplicates: bool) -> None:
        self._seed = seed.to_bytes(8, "big", signed=True)
        self._keep_duplicates = keep_duplicates
        self._table = sqlite3.connect("")  # on disk, gone when closed
        self._table.execute(
            "CREATE TABLE candidate (identity BLOB PRIMARY KEY, source, offset, problem, luck) WITHOUT ROWID"
        )
        self._table.execute("CREATE TABLE copies (identity BLOB PRIMARY KEY, count) WITHOUT ROWID")

    def add(self, candidates: Iterable[tuple[int, int, int, str, str]]) -> None:
        """Take in (source, offset, problem number, prompt, completion)."""
        try:
            with self._table:
                rows = map(self._row, candidates)
                self._table.executemany("INSERT OR IGNORE INTO candidate VALUES (?,?,?,?,?)", rows)
        except sqlite3.OperationalError as error:
            raise InputError(f"temporary files: {error}: set TMPDIR to a directory with more room") from None

    def num_candidates(self) -> dict[int, int]:
        """Problem number to the number of its candidates, duplicates left out."""
        return dict(self._table.execute("SELECT problem, count(*) FROM candidate GROUP BY problem"))

    def chosen(self, max_per_problem: int) -> Iterator[tuple[int, int, int]]:
        """(source, offset, problem number) of the chosen, in that order; at most `max_per_problem` each, 0 for all."""
        yield from self._table.execute(
            "SELECT source, offset, problem FROM (SELECT source, offset, problem,"
            " row_number() OVER (PARTITION BY problem ORDER BY luck) AS turn FROM candidate)"
            " WHERE turn <= ? ORDER BY source, offset",
            (max_per_problem or 2**62,),
        )

    def _row(self, candidate: tuple[int, int, int, str, str]) -> tuple[bytes, int, int, int, bytes]:
        source, offset, problem, prompt, completion = candidate
        identity = _digest(f"{len(prompt)}:{prompt}{completion}".encode())
        if self._keep_duplicates:  # number equal texts, so that the choice does not depend on their positions
            identity = _digest(identity + str(self._turn(identity)).encode())
        return identity, source, offset, problem, hashlib.blake2b(identity, digest_size=8, key=self._seed).digest()

    def _turn(self, identity: bytes) -> int:
        """How often the text has come so far, this time included."""
        count = "INSERT INTO copies VALUES (?, 1) ON CONFLICT DO UPDATE SET count = count + 1 RETURNING count"
        return int(self._table.execute(count, (identity,)).fetchone()[0])


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16, person=b"rloop").digest()
