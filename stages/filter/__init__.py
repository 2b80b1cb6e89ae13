"""Filter: rollouts to examples, the successes on the problems that stayed hard, from which rft learns.

A problem's pass rate is taken over all its rollouts of the whole phase, those that no update saw included, so it is
known only at the end: the first pass checks and counts every line, the second goes back to the successes that count.
To rank successes by length, likelihood or a judge, drop examples from the file before rft.
"""

import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from os.path import normpath, realpath
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import orjson

from stages.core import jsonl, outputs, provenance, records, tabular
from stages.core.errors import InputError
from stages.core.options import PATH, WITHOUT_EFFECT, above, at_least, at_most, checked, values
from stages.core.progress import warn
from stages.core.provenance import identify_run, manifest
from stages.core.records import Example, Rollout
from stages.filter.selection import Choice, Positions, Tally, can_select, yield_table

FLUSH_LINES = 4096  # lines between two moves of the bar


@checked
def run(
    *,
    rollouts: Annotated[list[str], "rollouts: a JSONL file, an rl output directory, or - for stdin; repeatable", PATH],
    out: Annotated[str, "the examples, a new JSONL file, or - for stdout; not needed with --dry-run", PATH] = "",
    problems: Annotated[Path | None, "write the hard ones of these problems (JSONL), not examples", PATH] = None,
    policy: Annotated[str, "take only the rollouts of this policy; needed where there are several"] = "",
    max_pass_rate: Annotated[
        float, "a problem is hard if its pass rate is below this; 10 % is 0.1, 1 is no bound", above(0), at_most(1)
    ] = 0.1,
    min_reward: Annotated[float, "a rollout is a success if its reward is this or more"] = 1.0,
    max_per_problem: Annotated[
        int, "keep at most so many successes of a problem, drawn at random; 0 keeps all", at_least(0)
    ] = 0,
    seed: Annotated[int, "decides the draw of --max-per-problem"] = 0,
    keep_truncated: Annotated[
        bool, "keep successes that were cut at the token limit; rft then teaches to stop there"
    ] = False,
    keep_duplicates: Annotated[bool, "keep every copy of a completion that was drawn more than once"] = False,
    dry_run: Annotated[bool, "write nothing; print the yield by threshold as a table", WITHOUT_EFFECT] = False,
) -> None:
    """Choose the successes on hard problems as examples to fine-tune on.

    The pass rate of a problem is its share of successes among all rollouts given, whether an update saw them or not.
    Chosen are successes of the problems strictly below --max-pass-rate, in the order in which they come. A success is a
    correct rollout or, where rewards are not just 1 or 0, one with --min-reward. Standard
    input is kept in a temporary file (see TMPDIR), since every rollout must be counted before the first is chosen.
    Beside FILE.jsonl FILE.manifest.json says how it came about.

    Balanced examples, at most n successes of every problem that was solved, hard or not, are
    --max-pass-rate 1 --max-per-problem n.

    With --problems, the file that the rollouts are of, its hard problems are written in the place of examples, for rl:
    those below --max-pass-rate that were solved at least once, each with its pass rate.

    Example: rloop filter --rollouts loop/1/rl --out loop/1/examples.jsonl --max-pass-rate 0.5
    """
    given, start = locals(), time.monotonic()
    parameters = values(run, given)
    if not dry_run:
        _check_out(out)
    sources = _sources(rollouts)
    _warn_of_running(rollouts)
    if dry_run:
        print(_yield(sources, parameters))
        return
    manifest_file = Path(out).with_suffix(".manifest.json")
    with outputs.claimed(out, manifest_file):
        counts = (_choose if problems is None else _choose_problems)(sources, out, parameters)
        if out != "-":
            read = provenance.recorded([*_inputs(rollouts), *([problems] if problems else [])])
            identity = identify_run(run, given, read.digests)
            record = manifest(identity, counts, time.monotonic() - start, rollouts=rollouts, stamps=read.stamps)
            outputs.write_json(manifest_file, record)


def _yield(sources: list["_Source"], parameters: dict[str, Any]) -> str:
    """What each threshold would give, as a table."""
    tallies, successes = _count(sources, parameters)
    choice = Choice(parameters["seed"], parameters["keep_duplicates"])
    choice.add(_candidates(sources, successes, set(range(len(tallies)))))
    cap = parameters["max_per_problem"]
    examples = {number: min(count, cap or count) for number, count in choice.num_candidates().items()}
    return yield_table(tallies.values(), parameters["max_pass_rate"], examples)


def _choose(sources: list["_Source"], out: str, parameters: dict[str, Any]) -> dict[str, int]:
    """Write the examples; return the counts of the manifest."""
    max_pass_rate = parameters["max_pass_rate"]
    tallies, successes = _count(sources, parameters)
    hard = {tally.number: tally for tally in tallies.values() if tally.num_usable and tally.is_below(max_pass_rate)}
    if not hard:
        raise InputError(_nothing_selected(tallies, max_pass_rate))
    choice = Choice(parameters["seed"], parameters["keep_duplicates"])
    choice.add(_candidates(sources, successes, hard))
    count = jsonl.write(out, _examples(sources, choice.chosen(parameters["max_per_problem"]), tallies))
    print(_summary(tallies, hard, sum(choice.num_candidates().values()), count, max_pass_rate, out), file=sys.stderr)
    num_rollouts = sum(tally.num_rollouts for tally in tallies.values())
    return {"rollouts": num_rollouts, "problems": len(tallies), "hard_problems": len(hard), "examples": count}


def _choose_problems(sources: list["_Source"], out: str, parameters: dict[str, Any]) -> dict[str, int]:
    """Write the hard ones of --problems, in their order, each with its pass rate; return the counts of the manifest."""
    max_pass_rate, file = parameters["max_pass_rate"], parameters["problems"]
    by_id = {problem["id"]: problem for problem in records.read_problems(file)}
    tallies, _ = _count(sources, parameters | {"keep_truncated": True})
    if strange := [name for name in tallies if name not in by_id]:
        raise InputError(f"--problems {file}: lacks {tabular.some(strange)}: name the file that the rollouts are of")
    hard = [
        name for name in by_id if (tally := tallies.get(name)) and tally.num_correct and tally.is_below(max_pass_rate)
    ]
    if not hard:
        raise InputError(_nothing_selected(tallies, max_pass_rate))
    count = jsonl.write(out, ({**by_id[name], "pass_rate": tallies[name].pass_rate} for name in hard))
    unsolved = sum(not tally.num_correct for tally in tallies.values())
    print(
        f"filter: of {len(tallies):,} problems with rollouts {count:,} are solved, with a pass rate below "
        f"{max_pass_rate:g}; {unsolved:,} were never solved -> {'stdout' if out == '-' else out}",
        file=sys.stderr,
    )
    num_rollouts = sum(tally.num_rollouts for tally in tallies.values())
    return {"rollouts": num_rollouts, "problems": len(tallies), "hard_problems": count}


def _check_out(out: str) -> None:
    if not out:
        raise InputError("--out is missing: name a file, or - for stdout, or ask for --dry-run")
    if out != "-":
        outputs.refuse_occupied(out)
        outputs.refuse_no_file(out)


@dataclass
class _Source:
    """One file of rollouts, read twice; what can be read only once is copied to `spool` on the way."""

    path: str
    run: str = ""  # the rl output that it is a step of
    spool: Any = None

    @property
    def name(self) -> str:
        return jsonl.name_of(self.path)

    @contextmanager
    def first_pass(self) -> Iterator[jsonl.LineSource]:
        with jsonl.opened(self.path) as file:
            if self.path != "-" and file.seekable():
                yield file
            else:
                self.spool = tempfile.TemporaryFile()  # noqa: SIM115 (read again later)
                yield _Tee(file, self.spool)

    @contextmanager
    def second_pass(self) -> Iterator[BinaryIO]:
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


def _sources(paths: list[str]) -> list[_Source]:
    """The rollouts files of `paths`: of an rl output, its steps in order. InputError if one is named twice."""
    sources: list[_Source] = []
    for path in paths:
        sources += _steps(Path(path)) if Path(path).is_dir() else [_Source(path)]
    seen = set()
    for source in sources:
        identity = source.path if source.path == "-" else realpath(source.path)
        if identity in seen:
            raise InputError(f"--rollouts {source.path}: was given twice; its rollouts would count twice")
        seen.add(identity)
    return sources


def _inputs(paths: list[str]) -> list[Path]:
    """What the examples are made from, for the manifest: of an rl output its rollouts; standard input leaves none."""
    return [Path(path, "rollouts") if Path(path).is_dir() else Path(path) for path in paths if path != "-"]


def _steps(directory: Path) -> list[_Source]:
    files = sorted(str(file) for file in directory.glob("rollouts/step_*.jsonl"))
    if not files:
        raise InputError(f"{directory} holds no rollouts/step_*.jsonl: expected an rl output or a JSONL file")
    return [_Source(file, str(directory)) for file in files]


def _warn_of_running(paths: list[str]) -> None:
    """Warn of rl outputs that are still growing: pass rates would be over a part of the phase."""
    for path in paths:
        if not Path(path).is_dir():
            continue
        if outputs.is_locked(path):
            warn(f"{path} is still being written: pass rates are over the steps that are there now")
        elif not (Path(path) / "manifest.json").exists():
            warn(f"{path} is no finished rl run (no manifest.json): pass rates are over the steps that are there")


def _count(sources: list[_Source], parameters: dict[str, Any]) -> tuple[dict[str, Tally], Positions]:
    """First pass: check every line, count by problem id, and note the places of the usable successes."""
    tallies: dict[str, Tally] = {}
    successes = Positions()
    policies = _Policies(parameters["policy"])
    with _progress(sources) as advance:
        for place, source in enumerate(sources):
            with source.first_pass() as file:
                for offset in _count_file(file, source, place, tallies, successes, parameters, policies):
                    advance(place, offset)
    if not tallies:
        raise InputError(f"--policy {parameters['policy']}: the rollouts are of {', '.join(policies.names)}")
    return tallies, successes


class _Policies:
    """Whose rollouts count: those of the policy that --policy names, or of the only one there is.

    An rl output counts as one policy, its start policy, even if a resumed run named it by another path.
    """

    def __init__(self, wanted: str):
        self.wanted = normpath(wanted) if wanted else ""
        self.names: dict[str, None] = {}
        self._of_run: dict[str, str] = {}

    def counts(self, name: str, run: str, where: str) -> bool:
        """Whether rollouts of the policy `name` count; InputError if they are a second one's and none was named."""
        name = normpath(name)
        if run:
            name = self._of_run.setdefault(run, name)
        self.names[name] = None
        if self.wanted or len(self.names) == 1:
            return name == (self.wanted or name)
        first = next(iter(self.names))
        raise InputError(
            f"{where}: a rollout of policy {name}, after those of {first}: a pass rate is of one policy; name it with "
            "--policy"
        )


def _count_file(
    file: jsonl.LineSource,
    source: _Source,
    place: int,
    tallies: dict[str, Tally],
    successes: Positions,
    parameters: dict[str, Any],
    policies: _Policies,
) -> Iterator[int]:
    """Count the rollouts of one file; yield the offset reached every so many lines."""
    add_success = successes.buffer.extend
    keep_truncated, min_reward = parameters["keep_truncated"], parameters["min_reward"]
    policy, is_wanted = None, False
    for line, offset, rollout in records.scan(file, source.name, Rollout):
        if rollout["policy"] != policy:  # looked up only when it changes, since every line of every file passes here
            policy = rollout["policy"]
            is_wanted = policies.counts(policy, source.run, f"{source.name}:{line}")
        reward = rollout["reward"]
        if (reward >= 1) != (rollout["verdict"] == "correct"):
            raise InputError(f"{source.name}:{line}: {_contradiction(rollout)}")
        if is_wanted:
            is_success = reward >= min_reward
            question = hash((rollout["prompt"], rollout["answer"]))
            tally = tallies.get(rollout["problem_id"])
            if tally is None or tally.question != question:
                tally = _first_tally(tallies, rollout, question, f"{source.name}:{line}")
            tally.num_rollouts += 1
            tally.num_correct += is_success
            if is_success and (keep_truncated or rollout["finish_reason"] != "length"):
                tally.num_usable += 1
                add_success((place, offset, tally.number))
        if not line % FLUSH_LINES:
            successes.flush()
            yield offset


def _contradiction(rollout: Rollout) -> str:
    reward, verdict = rollout["reward"], rollout["verdict"]
    return f"reward {reward:g} and verdict {verdict} contradict each other: grade these rollouts anew (eval --regrade)"


def _first_tally(tallies: dict[str, Tally], rollout: Rollout, question: int, where: str) -> Tally:
    """A new problem's tally; InputError if the problem is known with another prompt or answer."""
    problem_id = rollout["problem_id"]
    if problem_id in tallies:
        raise InputError(
            f"{where}: problem {problem_id} has another prompt or answer than before: filter rollouts of one set of "
            "problems and one template at a time"
        )
    if not rollout["prompt"]:
        raise InputError(f"{where}: the prompt of problem {problem_id} is empty: draw its rollouts again")
    tally = tallies[problem_id] = Tally(len(tallies), question=question)
    return tally


def _candidates(
    sources: list[_Source], successes: Positions, numbers: Iterable[int]
) -> Iterator[tuple[int, int, int, str, str]]:
    """Second pass: the texts of the successes on the problems with these numbers."""
    wanted = (position for position in successes if position[2] in numbers)
    for (place, offset, number), rollout in _revisit(sources, wanted):
        yield place, offset, number, rollout["prompt"], rollout["completion"]


def _examples(
    sources: list[_Source], chosen: Iterable[tuple[int, int]], tallies: dict[str, Tally]
) -> Iterator[Example]:
    for _, rollout in _revisit(sources, chosen):
        problem_id = rollout["problem_id"]
        yield Example(
            problem_id=problem_id,
            prompt=rollout["prompt"],
            completion=rollout["completion"],
            pass_rate=tallies[problem_id].pass_rate,
        )


def _revisit(sources: list[_Source], positions: Iterable[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], Rollout]]:
    """The rollouts at `positions`, which begin with source and offset, the sources in order."""
    for place, group in groupby(positions, key=lambda position: position[0]):
        with sources[place].second_pass() as file:
            for position in group:
                file.seek(position[1])
                yield position, orjson.loads(file.readline())


@contextmanager
def _progress(sources: list[_Source]) -> Iterator[Any]:
    """A bar over the bytes of all sources on a terminal's stderr; yields what moves it to (source, offset)."""
    if not sys.stderr.isatty():
        yield lambda place, offset: None
        return
    from rich.console import Console
    from rich.progress import Progress

    sizes = [Path(source.path).stat().st_size if Path(source.path).is_file() else 0 for source in sources]
    before = [sum(sizes[:place]) for place in range(len(sizes))]
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading rollouts", total=sum(sizes) if all(sizes) else None)
        yield lambda place, offset: bar.update(task, completed=before[place] + offset)


def _nothing_selected(tallies: dict[str, Tally], max_pass_rate: float) -> str:
    """The message if no problem is hard enough, with the yield table below it."""
    most = max(tally.num_rollouts for tally in tallies.values())
    if not any(tally.num_usable for tally in tallies.values()):
        fault = "no rollout succeeded within the token limit: start from a stronger policy or easier problems"
    elif not can_select(tallies.values(), max_pass_rate):
        fault = (
            f"--max-pass-rate {max_pass_rate:g} can select nothing: no problem has more than {most} rollouts, and one "
            f"success in {most} is {1 / most:.3g} already; raise it above that, or draw more rollouts a problem"
        )
    else:
        fault = (
            f"no problem with a success has a pass rate below --max-pass-rate {max_pass_rate:g}: raise it, "
            "or explore for more steps"
        )
    return f"{fault}. The yield by threshold:\n{yield_table(tallies.values(), max_pass_rate)}"


def _summary(
    tallies: dict[str, Tally], hard: dict[int, Tally], num_distinct: int, count: int, max_pass_rate: float, out: str
) -> str:
    num_correct = sum(tally.num_correct for tally in hard.values())
    num_usable = sum(tally.num_usable for tally in hard.values())
    num_rollouts = sum(tally.num_rollouts for tally in tallies.values())
    below = f" with a pass rate below {max_pass_rate:g}" if max_pass_rate < 1 else ""
    return (
        f"filter: {num_rollouts:,} rollouts of {len(tallies):,} problems; {num_correct:,} successes on {len(hard):,} "
        f"problems{below}; dropped {num_correct - num_usable:,} truncated, {num_usable - num_distinct:,} duplicates, "
        f"{num_distinct - count:,} over the cap; {count:,} examples -> {'stdout' if out == '-' else out}"
    )
