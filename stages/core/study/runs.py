"""A directory of runs: the method and step of each policy in it, their evaluations and logs.

    runs/0/policy                              the base: step 0 of every method
    runs/<i>/rl/checkpoints/step_<n>           RLoop, n steps into iteration i: the steps of all iterations before, + n
    runs/<i>/policy                            RLoop, what iteration i ended with: the start of i + 1
    runs/vanilla/rl/checkpoints/step_<n>       RL alone (the baseline), step n
    runs/<name>/rl/checkpoints/step_<n>        any other run, which is called by its name
    runs/eval/**/results.jsonl                 evaluations, each of one set; one may hold several policies, and the sets
                                               of a policy may come from several

Any of these may be missing.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stages.core import records
from stages.core.errors import InputError
from stages.core.outputs import read_json
from stages.core.progress import warn
from stages.core.provenance import read_manifest
from stages.core.records import Result, Rollout
from stages.core.study.metrics import by_policy, check_results
from stages.core.tabular import read_tsv

BASE, RLOOP, RL = "Base", "RLoop", "RL"
MAX_STEPS = 10**9 - 1
MAX_DIRECTORIES = 100_000  # below the directory that evaluations are looked for in
ROOT = Path("/")
KERNELS = ("dev", "proc", "sys")  # below ROOT: no files, and in /proc a directory for every thread

_CHECKPOINT = re.compile(r"^(?P<run>.*)/checkpoints/step_0*(?P<step>\d{1,9})$")
_ITERATION = re.compile(r"^(?:.*/)?(?P<iteration>\d+)/(?P<part>rl|policy)$")


class Position(NamedTuple):
    """Where a policy is on its method's path: Position("runs/2/rl/checkpoints/step_000010", "RLoop", 40, "40").

    `step` counts RL steps from the base. A policy that `ends_iteration` is the next start policy, not a checkpoint of
    RL: its label has the stage that made it ("30+rft"). A policy anywhere else is a method of its own.
    """

    policy: str
    method: str
    step: int
    label: str
    ends_iteration: bool = False


class Evaluation(NamedTuple):
    """Every policy's results on one problem set, and the eval output that each policy's results are from."""

    problem_set: str
    results: dict[str, list[Result]]
    homes: dict[str, Path]

    @property
    def rollouts(self) -> list[Path]:
        """The rollouts files that hold the policies' completions; not every eval output needs to have kept its own."""
        files = (home / "rollouts.jsonl" for home in dict.fromkeys(self.homes.values()))
        return [file for file in files if file.exists()]

    @property
    def temperature(self) -> str:
        """What the samples were drawn at: "1", "0.6, 1" if policies differ, "" if no result tells."""
        known = {row["temperature"] for of in self.results.values() for row in of if "temperature" in row}
        return ", ".join(f"{value:g}" for value in sorted(known))


def positions(policies: Iterable[str], root: str | Path | None = None, bases: Collection[str] = ()) -> list[Position]:
    """Each policy's position, by method (the base, RL, RLoop, then other runs by name) and then along its path.

    `root` is the directory of runs: the lengths of the iterations, and what made the policies that end them, are read
    there, even if policies were evaluated under another path or from another working directory. Of `bases`, which are
    the base by their content, the first is the base if there is none at <root>/0/policy.
    """
    policies = [policy.rstrip("/") for policy in policies]
    offsets = _offsets(policies, root)
    listed = [_position(policy, offsets, root) for policy in policies]
    if not any(position.method == BASE for position in listed):
        others = [position for position in listed if position.policy in bases and not position_below(position.policy)]
        listed = [Position(each.policy, BASE, 0, "0") if each in others[:1] else each for each in listed]
    return sorted(listed, key=_order)


def _order(position: Position) -> tuple[Any, ...]:
    known = (BASE, RL, RLOOP)
    turn = known.index(position.method) if position.method in known else len(known)
    return turn, position.method, position.step, iteration_of(position.policy), position.ends_iteration


def root_of(evals: Iterable[Path], named: Path | None = None) -> Path | None:
    """The directory of runs: the one `named`, or the next above one of the eval outputs with an <iteration>/rl in it.

    Raises InputError if the named one is not there.
    """
    if named and not named.is_dir():
        raise InputError(f"{named}: no such directory; name a directory of runs")
    if named:
        return named
    for directory in evals:
        for above in directory.absolute().parents:
            if any(_ITERATION.match(str(run)) for run in above.glob("[0-9]*/rl")):
                return above
    return None


def path_of(positions: Sequence[Position], method: str) -> list[Position]:
    """A method's positions from the base on, in the order of training."""
    return [each for name in (BASE, method) for each in positions if each.method == name]


def _position(policy: str, offsets: Mapping[int, int], root: str | Path | None) -> Position:
    checkpoint = _CHECKPOINT.match(policy)
    run = checkpoint["run"] if checkpoint else policy
    step = int(checkpoint["step"]) if checkpoint else 0
    if (turn := _ITERATION.match(run)) and (checkpoint or turn["part"] == "policy"):
        iteration = int(turn["iteration"])
        if iteration == 0:
            return Position(policy, BASE, 0, "0")
        if checkpoint:
            step += offsets[iteration]
            return Position(policy, RLOOP, step, str(step))
        step = offsets[iteration + 1]
        return Position(policy, RLOOP, step, f"{step}+{_maker(iteration, root)}", ends_iteration=True)
    if not checkpoint:
        return Position(policy, policy, 0, policy)
    name = Path(run).parent.name if Path(run).name == "rl" else Path(run).name
    return Position(policy, RL if name == "vanilla" else name, step, str(step))


def _maker(iteration: int, root: str | Path | None) -> str:
    """The stage that made the policy which an iteration ended with, by its manifest below `root`; else "start"."""
    if root is None:
        return "start"
    return str(read_manifest(Path(root, str(iteration), "policy", "manifest.json")).get("stage", "start"))


def iteration_of(path: str) -> int:
    """The iteration that a checkpoint, an rl run or a fine-tuned policy belongs to by its path; 0 for none."""
    checkpoint = _CHECKPOINT.match(path)
    turn = _ITERATION.match(checkpoint["run"] if checkpoint else path)
    return int(turn["iteration"]) if turn else 0


def ends(policies: Iterable[str]) -> set[str]:
    """The last checkpoint of each run among `policies`, and the policies that are no checkpoint of a run."""
    last: dict[str, tuple[int, str]] = {}
    for policy in policies:
        checkpoint = _CHECKPOINT.match(policy)
        run, step = (checkpoint["run"], int(checkpoint["step"])) if checkpoint else (policy, 0)
        last[run] = max(last.get(run, (0, policy)), (step, policy))
    return {policy for _, policy in last.values()}


def position_below(policy: str) -> Path | None:
    """Where a policy lies below the directory of runs, as in 2/policy; None for one that is none of its."""
    checkpoint = _CHECKPOINT.match(policy)
    run = Path(checkpoint["run"] if checkpoint else policy)
    if not checkpoint and not (run.name == "policy" and _ITERATION.match(policy)):
        return None
    of_run = run.parts[-2:] if run.name in ("rl", "policy") else run.parts[-1:]
    return Path(*of_run, *(Path(policy).parts[-2:] if checkpoint else ()))


def _offsets(policies: Sequence[str], root: str | Path | None) -> dict[int, int]:
    """RL steps before each iteration, from the manifests or logs of the iterations, or else from their checkpoints.

    Policies are looked up below `root` only: relative to the working directory their paths may mean something else.
    """
    lengths: dict[int, int] = {}
    for policy in policies:
        checkpoint, iteration = _CHECKPOINT.match(policy), iteration_of(policy)
        for earlier in range(1, iteration + 1):
            run = Path(root) / str(earlier) / "rl" if root is not None else None
            lengths[earlier] = max(lengths.get(earlier, 0), num_steps(run) if run else 0)
        if checkpoint and iteration:
            lengths[iteration] = max(lengths.get(iteration, 0), int(checkpoint["step"]))
    usual = max(lengths.values(), default=0)
    offsets = {1: 0}
    for iteration in range(1, max(lengths, default=0) + 1):
        offsets[iteration + 1] = offsets[iteration] + (lengths.get(iteration) or usual)
    return offsets


def num_steps(run: Path) -> int:
    """RL steps of an rl output by its manifest or its log; 0 where it has neither, InputError for what no run has."""
    path = run / "manifest.json"
    steps = (read_manifest(path).get("parameters") or {}).get("steps", 0)
    if not (isinstance(steps, int) and steps > 0):
        path = run / "log.tsv"
        steps = max((row["step"] for row in read_tsv(path) if "step" in row), default=0)
    if not 0 <= steps <= MAX_STEPS:
        raise InputError(f"{path}: no run has {steps:g} steps: restore it, or remove it")
    return int(steps)


def find_evals(directories: Iterable[str | Path]) -> list[Path]:
    """Every eval output at or below `directories`, in their order and by name; none at all is an InputError."""
    evals: list[Path] = []
    for directory in directories:
        if not Path(directory).is_dir():
            raise InputError(f"{directory}: no such directory; name the --out of an eval, or a directory of them")
        if not (here := evals_below(Path(directory))):
            raise InputError(f"{directory} holds no results.jsonl: name the --out of an eval, or a directory of them")
        evals += here
    return list(dict.fromkeys(evals))


def evals_below(directory: Path) -> list[Path]:
    """Every directory at or below `directory` with a results.jsonl, unfinished ones left out, by name.

    Links are not followed, and what can't be read or is the kernel's is passed over; InputError where there is more to
    look through than any directory of runs holds.
    """
    directories: list[Path] = []
    for count, (current, below, files) in enumerate(os.walk(directory)):
        if count == MAX_DIRECTORIES:
            raise InputError(
                f"{directory}: there are more than {MAX_DIRECTORIES:,} directories below it: name the --out of an "
                "eval, or a directory of them"
            )
        below[:] = [name for name in below if name not in KERNELS or Path(current).resolve() != ROOT]
        if "results.jsonl" in files:
            directories.append(Path(current))
    return sorted(path for path in directories if not any(part.endswith(".partial") for part in path.parts))


def at_temperature(name: str) -> tuple[str, str]:
    """A set's own name and, if it was evaluated at several temperatures, "@" and which: ("valid", "@0.6")."""
    own, mark, temperature = name.rpartition("@")
    is_number = mark and temperature.replace(".", "", 1).isdecimal()
    return (own, mark + temperature) if is_number else (name, "")


def drawn_at(temperature: str) -> str:
    """What a caption ends with: "; samples drawn at temperature 1", or "" if it is not known."""
    return f"; samples drawn at temperature {temperature}" if temperature else ""


def named_set(wanted: str, names: Iterable[str]) -> str:
    """The one of the sets `names` that is called `wanted`, or so but for a temperature, the lowest; "" if none is."""
    temperatures = {name: at_temperature(name) for name in names}
    of_set = [name for name, (own, _) in temperatures.items() if wanted == own]
    lowest = min(of_set, key=lambda name: float(temperatures[name][1].removeprefix("@") or 0), default="")
    return wanted if wanted in temperatures else lowest


def set_name(directory: Path) -> str:
    """A problem set's name: by the eval's manifest, or else the eval's directory, as in runs/eval/1/valid."""
    return str(read_json(directory / "manifest.json").get("set") or directory.name)


def read_evals(
    directories: Sequence[Path], keeps: Callable[[Path, str], bool] = lambda directory, policy: True
) -> dict[str, Evaluation]:
    """Evaluations by problem set, policies in order of appearance; of a policy evaluated twice the first counts.

    What `keeps` refuses, by eval output and policy, is not there; nor is a set that holds nothing else. Raises
    InputError for results that cannot be: two of one problem, more correct samples than samples.
    """
    evaluations: dict[str, Evaluation] = {}
    for directory in directories:
        name = set_name(directory)
        here = evaluations.setdefault(name, Evaluation(name, {}, {}))
        file = directory / "results.jsonl"
        for policy, results in by_policy(list(records.read(file, Result))).items():
            try:
                check_results(results)
            except InputError as error:
                raise InputError(f"{file}: {error}") from None
            if not keeps(directory, policy.rstrip("/")):
                continue
            if here.homes.setdefault(policy.rstrip("/"), directory) == directory:
                here.results[policy.rstrip("/")] = results
            else:
                first = here.homes[policy.rstrip("/")]
                warn(f"{policy} was evaluated on {name} twice: {first} counts, {directory} does not")
    return {name: evaluation for name, evaluation in evaluations.items() if evaluation.results}


def read_rollouts(evaluation: Evaluation) -> Iterator[Rollout]:
    """The rollouts behind the results of an evaluation, those of each policy from the eval output that counts."""
    for path in evaluation.rollouts:
        for rollout in records.read(path, Rollout):
            policy = rollout["policy"].rstrip("/")
            if evaluation.homes.get(policy) == path.parent:
                rollout["policy"] = policy
                yield rollout
