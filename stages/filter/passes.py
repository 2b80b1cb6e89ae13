"""The two passes over the rollouts: the first checks and counts every line, the second goes back to those that count.

Between them only the positions of the successes are kept, on disk, and the counts of each problem.
"""

import sys
import tempfile
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from os.path import normpath, realpath
from pathlib import Path
from typing import Any, BinaryIO, Literal

import orjson

from stages.core import jsonl, records
from stages.core.errors import InputError
from stages.core.records import Example, Rollout
from stages.filter.selection import Positions, Tally

SAMPLED: tuple[Literal["token_ids", "log_probs"], ...] = ("token_ids", "log_probs")  # kept in examples
FLUSH_LINES = 4096  # lines between two moves of the bar


@dataclass
class RolloutFile:
    """One file of rollouts, read twice; what can be read only once is copied to `spool` on the way."""

    path: str
    run: str = ""  # the rl output that it is a step of
    spool: Any = None

    @property
    def name(self) -> str:
        return jsonl.name_of(self.path)

    @contextmanager
    def first_pass(self) -> Iterator[jsonl.LineSource]:
        """The file from its start, copied on the way if it can be read only once."""
        with jsonl.opened(self.path) as file:
            if self.path != "-" and file.seekable():
                yield file
            else:
                self.spool = tempfile.TemporaryFile()  # noqa: SIM115 (read again later)
                yield _Tee(file, self.spool)

    @contextmanager
    def second_pass(self) -> Iterator[BinaryIO]:
        """The same bytes again, to be read from any offset."""
        if self.spool is not None:
            yield self.spool
        else:
            with jsonl.opened(self.path) as file:
                yield file


@dataclass
class _Tee:
    file: BinaryIO
    copy: BinaryIO

    def readline(self, limit: int, /) -> bytes:
        line = self.file.readline(limit)
        self.copy.write(line)
        return line


def sources(paths: list[str], steps: range | None = None) -> list[RolloutFile]:
    """The rollouts files of `paths`: of an rl output its steps in order. InputError if one is named twice."""
    files: list[RolloutFile] = []
    for path in paths:
        files += _steps(Path(path), steps) if Path(path).is_dir() else [RolloutFile(path)]
    seen = set()
    for source in files:
        identity = source.path if source.path == "-" else realpath(source.path)
        if identity in seen:
            raise InputError(f"--rollouts {source.path}: was given twice; its rollouts would count twice")
        seen.add(identity)
    return files


def _steps(directory: Path, steps: range | None) -> list[RolloutFile]:
    files = sorted(directory.glob("rollouts/step_*.jsonl"))
    if not files:
        raise InputError(f"{directory} holds no rollouts/step_*.jsonl: expected an rl output or a JSONL file")
    kept = [file for file in files if steps is None or int(file.stem.removeprefix("step_")) in steps]
    if not kept:
        raise InputError(f"--steps: {directory} has none of these, only {files[0].stem} to {files[-1].stem}")
    return [RolloutFile(str(file), str(directory)) for file in kept]


class Counts:
    """The first pass: which rollouts count, their problems with their tallies, and the positions of the successes.

    Those of the policy that `policy` names count, or of the only one there is, or of all, each policy for itself. An rl
    output counts as one policy, its start policy, even if a resumed run named it by another path.
    """

    def __init__(
        self,
        policy: str = "",
        per_policy: bool = False,
        steps: range | None = None,
        min_reward: float = 1.0,
        keep_truncated: bool = False,
        keep_failures: bool = False,
    ):
        self.wanted, self.per_policy, self.steps = normpath(policy) if policy else "", per_policy, steps
        self.min_reward, self.keep_truncated, self.keep_failures = min_reward, keep_truncated, keep_failures
        self.tallies: list[Tally] = []
        self.successes, self.failures = Positions(), Positions()
        self.num_of_run: Counter[str] = Counter()  # rollouts that were read, by the rl output that they are of
        self._names: dict[str, dict[str, Tally]] = {}  # policy -> problem id -> tally
        self._of_run: dict[str, str] = {}
        self._questions: dict[str, int] = {}

    def read(self, sources: list[RolloutFile]) -> None:
        """Check every line and count it; InputError if no rollout counts."""
        with _progress(sources) as advance:
            for index, source in enumerate(sources):
                with source.first_pass() as file:
                    for offset in self._read(file, source, index):
                        advance(index, offset)
        if not self.tallies:
            if self.steps is not None:
                raise InputError("--steps: no rollout is of one of these steps")
            raise InputError(f"--policy {self.wanted}: the rollouts are of {', '.join(self._names)}")

    def _read(self, file: jsonl.LineSource, source: RolloutFile, index: int) -> Iterator[int]:
        """Count the rollouts of one file; yield the offset reached every FLUSH_LINES lines."""
        steps, min_reward, keep_truncated = self.steps, self.min_reward, self.keep_truncated
        keep_failures = self.keep_failures
        add_success, add_failure = self.successes.buffer.extend, self.failures.buffer.extend
        policy, tallies, line = None, None, 0
        for line, offset, rollout in records.scan(file, source.name, Rollout):
            if rollout["policy"] != policy:  # looked up only when it changes, since every line passes here
                policy = rollout["policy"]
                tallies = self._tallies_of(policy, source.run, f"{source.name}:{line}")
            reward = rollout["reward"]
            if (reward >= 1) != (rollout["verdict"] == "correct"):
                raise InputError(f"{source.name}:{line}: {_contradiction(rollout)}")
            if tallies is not None and (steps is None or rollout["step"] in steps):
                is_success = reward >= min_reward
                question = hash((rollout["prompt"], rollout["answer"]))
                tally = tallies.get(rollout["problem_id"])
                if tally is None or tally.question != question:
                    tally = self._first_tally(tallies, rollout, question, f"{source.name}:{line}")
                tally.num_rollouts += 1
                tally.num_correct += is_success
                if (is_success or keep_failures) and (keep_truncated or rollout["finish_reason"] != "length"):
                    tally.num_usable += is_success
                    (add_success if is_success else add_failure)((index, offset, tally.number))
            if not line % FLUSH_LINES:
                self.successes.flush()
                self.failures.flush()
                yield offset
        self.num_of_run[source.run] += line

    def _tallies_of(self, name: str, run: str, where: str) -> dict[str, Tally] | None:
        """The tallies of a policy; None if its rollouts don't count; InputError for a second one if none was named."""
        name = normpath(name)
        if run:
            name = self._of_run.setdefault(run, name)
        tallies = self._names.setdefault(name, {})
        if self.per_policy or self.wanted or len(self._names) == 1:
            return tallies if name == (self.wanted or name) else None
        first = next(iter(self._names))
        raise InputError(
            f"{where}: a rollout of policy {name}, after those of {first}: a pass rate is of one policy; name it with "
            "--policy, or take each for itself with --per-policy"
        )

    def _first_tally(self, tallies: dict[str, Tally], rollout: Rollout, question: int, where: str) -> Tally:
        """A new problem's tally; InputError if the problem is known with another prompt or answer."""
        problem_id = rollout["problem_id"]
        if self._questions.setdefault(problem_id, question) != question:
            raise InputError(
                f"{where}: problem {problem_id} has another prompt or answer than before: filter rollouts of one set "
                "of problems and one template at a time"
            )
        if not rollout["prompt"]:
            raise InputError(f"{where}: the prompt of problem {problem_id} is empty: draw its rollouts again")
        tally = tallies[problem_id] = Tally(len(self.tallies), problem_id, question=question)
        self.tallies.append(tally)
        return tally


def _contradiction(rollout: Rollout) -> str:
    reward, verdict = rollout["reward"], rollout["verdict"]
    return f"reward {reward:g} and verdict {verdict} contradict each other: grade these rollouts anew (rloop regrade)"


def candidates(
    sources: list[RolloutFile], successes: Positions, numbers: Container[int]
) -> Iterator[tuple[int, int, int, str, str]]:
    """Second pass: (source, offset, problem number, prompt, completion) of the successes on these problem numbers."""
    wanted = (position for position in successes if position[2] in numbers)
    for (index, offset, number), rollout in _revisit(sources, wanted):
        yield index, offset, number, rollout["prompt"], rollout["completion"]


def examples(
    sources: list[RolloutFile], chosen: Iterable[tuple[int, int, int]], tallies: Sequence[Tally], weight: float = 1.0
) -> Iterator[Example]:
    """The rollouts at the chosen positions (source, offset, problem number), as examples of a `weight`."""
    for (_, _, number), rollout in _revisit(sources, chosen):
        example = Example(
            problem_id=rollout["problem_id"],
            prompt=rollout["prompt"],
            completion=rollout["completion"],
            pass_rate=tallies[number].pass_rate,
        )
        if weight != 1:
            example["weight"] = weight
        for name in SAMPLED:
            if name in rollout:
                example[name] = rollout[name]
        yield example


def _revisit(
    sources: list[RolloutFile], positions: Iterable[tuple[int, ...]]
) -> Iterator[tuple[tuple[int, ...], Rollout]]:
    """The rollouts at `positions`, which begin with source and offset, the sources in order."""
    for index, group in groupby(positions, key=lambda position: position[0]):
        with sources[index].second_pass() as file:
            for position in group:
                file.seek(position[1])
                yield position, orjson.loads(file.readline())


@contextmanager
def _progress(sources: list[RolloutFile]) -> Iterator[Any]:
    """A bar over the bytes of all sources on a terminal's stderr; yields what moves it to (source, offset)."""
    if not sys.stderr.isatty():
        yield lambda index, offset: None
        return
    from rich.console import Console
    from rich.progress import Progress

    sizes = [Path(source.path).stat().st_size if Path(source.path).is_file() else 0 for source in sources]
    before = [sum(sizes[:index]) for index in range(len(sizes))]
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading rollouts", total=sum(sizes) if all(sizes) else None)
        yield lambda index, offset: bar.update(task, completed=before[index] + offset)
