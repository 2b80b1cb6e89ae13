"""A directory of runs as it lies on disk: where each policy stands on its way, its evaluations, its logs.

    runs/0/policy                              the base: step 0 of every method
    runs/<i>/rl/checkpoints/step_<n>           RLoop, n steps into iteration i: the steps of all iterations before, + n
    runs/<i>/policy                            RLoop, fine-tuned after iteration i: the start of iteration i + 1
    runs/vanilla/rl/checkpoints/step_<n>       RL alone (the baseline), step n
    runs/<name>/rl/checkpoints/step_<n>        any other run, which is called by its name
    runs/eval/<set>/**/results.jsonl           evaluations; one may hold several policies

Nothing here is needed to be whole: what is missing is simply not found.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from stages.core import records
from stages.core.errors import InputError
from stages.core.metrics import by_policy
from stages.core.records import Result, Rollout

BASE, RLOOP, RL = "Base", "RLoop", "RL"
FINE_TUNED = "+RFT"

_CHECKPOINT = re.compile(r"^(?P<run>.*)/checkpoints/step_0*(?P<step>\d+)$")
_ITERATION = re.compile(r"^(?:.*/)?(?P<iteration>\d+)/(?P<part>rl|policy)$")


class Place(NamedTuple):
    """Where a policy stands: Place("runs/2/rl/checkpoints/step_000010", "RLoop", 40, "40").

    `step` counts RL steps from the base; `label` names the place on its way ("30+RFT" is the policy fine-tuned after
    step 30). What stands on no known way has itself as its method.
    """

    policy: str
    method: str
    step: int
    label: str

    @property
    def fine_tuned(self) -> bool:
        """Whether this is a start policy made by rft, not a checkpoint of RL."""
        return self.label.endswith(FINE_TUNED)


class Evaluation(NamedTuple):
    """Every policy's results on one problem set, and the rollouts files that hold their completions."""

    problem_set: str
    results: dict[str, list[Result]]
    rollouts: list[Path]


def places(policies: Iterable[str], root: str | Path = "") -> list[Place]:
    """Each policy's place, ordered by method and then by way; `root` is the directory of runs, if its name differs."""
    policies = [policy.rstrip("/") for policy in policies]
    offsets = _offsets(policies, Path(root))
    return sorted((_place(policy, offsets) for policy in policies), key=lambda p: (p.method, p.step, p.fine_tuned))


def way(found: Sequence[Place], method: str) -> list[Place]:
    """A method's places from the base on, in the order of training."""
    return [place for place in found if place.method == BASE] + [place for place in found if place.method == method]


def _place(policy: str, offsets: Mapping[int, int]) -> Place:
    checkpoint = _CHECKPOINT.match(policy)
    run = checkpoint["run"] if checkpoint else policy
    step = int(checkpoint["step"]) if checkpoint else 0
    if (turn := _ITERATION.match(run)) and (checkpoint or turn["part"] == "policy"):
        iteration = int(turn["iteration"])
        if iteration == 0:
            return Place(policy, BASE, 0, "0")
        if checkpoint:
            step += offsets[iteration]
            return Place(policy, RLOOP, step, str(step))
        step = offsets[iteration + 1]
        return Place(policy, RLOOP, step, f"{step}{FINE_TUNED}")
    if not checkpoint:
        return Place(policy, policy, 0, policy)
    name = Path(run).parent.name if Path(run).name == "rl" else Path(run).name
    return Place(policy, RL if name == "vanilla" else name, step, str(step))


def _offsets(policies: Sequence[str], root: Path) -> dict[int, int]:
    """RL steps before each iteration, from the manifests or logs of the iterations, or else from their checkpoints."""
    lengths: dict[int, int] = {}
    for policy in policies:
        checkpoint = _CHECKPOINT.match(policy)
        run = checkpoint["run"] if checkpoint else policy
        if (turn := _ITERATION.match(run)) is None:
            continue
        iteration = int(turn["iteration"])
        above = Path(run).parents[1]
        for earlier in range(1, iteration + 1):
            known = num_steps(above / str(earlier) / "rl") or num_steps(root / str(earlier) / "rl")
            lengths[earlier] = max(lengths.get(earlier, 0), known)
        if checkpoint:
            lengths[iteration] = max(lengths.get(iteration, 0), int(checkpoint["step"]))
    usual = max(lengths.values(), default=0)
    offsets = {1: 0}
    for iteration in range(1, max(lengths, default=0) + 1):
        offsets[iteration + 1] = offsets[iteration] + (lengths.get(iteration) or usual)
    return offsets


def num_steps(run: Path) -> int:
    """RL steps of an rl output by its manifest or its log; 0 where it has neither."""
    steps = read_json(run / "manifest.json").get("parameters", {}).get("steps", 0)
    if isinstance(steps, int) and steps > 0:
        return steps
    return int(max((row["step"] for row in read_log(run / "log.tsv") if "step" in row), default=0))


def find_evals(directories: Iterable[str | Path]) -> list[Path]:
    """Every directory at or below `directories` that holds a results.jsonl, sorted; none at all is an InputError."""
    found: set[Path] = set()
    for directory in directories:
        if not Path(directory).is_dir():
            raise InputError(f"{directory}: no such directory; name the --out of an eval, or a directory of them")
        here = {path.parent for path in Path(directory).rglob("results.jsonl")}
        if not here:
            raise InputError(f"{directory} holds no results.jsonl: name the --out of an eval, or a directory of them")
        found |= {path for path in here if not any(part.endswith(".partial") for part in path.parts)}
    return sorted(found)


def set_name(directory: Path) -> str:
    """A problem set's name: the last directory of its evaluation's path, as in runs/eval/1/valid."""
    return directory.name


def read_evals(directories: Sequence[Path]) -> dict[str, Evaluation]:
    """Evaluations by problem set, policies in order of appearance; of a policy evaluated twice the first counts."""
    found: dict[str, Evaluation] = {}
    for directory in directories:
        name = set_name(directory)
        here = found.setdefault(name, Evaluation(name, {}, []))
        for policy, results in by_policy(list(records.read(directory / "results.jsonl", Result))).items():
            here.results.setdefault(policy.rstrip("/"), results)
        if (directory / "rollouts.jsonl").exists():
            here.rollouts.append(directory / "rollouts.jsonl")
    return found


def read_rollouts(evaluation: Evaluation) -> Iterator[Rollout]:
    """The rollouts of an evaluation; of a policy with rollouts in two files only those of the first."""
    home: dict[str, Path] = {}
    for path in evaluation.rollouts:
        for rollout in records.read(path, Rollout):
            policy = rollout["policy"].rstrip("/")
            if home.setdefault(policy, path) == path:
                rollout["policy"] = policy
                yield rollout


def read_log(path: str | Path) -> list[dict[str, float]]:
    """The rows of a log.tsv, numbers only (others and empty cells are left out); [] where there is no such file."""
    if not Path(path).is_file():
        return []
    with Path(path).open(newline="", encoding="utf-8") as file:
        return [_numbers(row) for row in csv.DictReader(file, delimiter="\t")]


def _numbers(row: Mapping[Any, Any]) -> dict[str, float]:
    numbers = {}
    for name, text in row.items():
        try:
            numbers[name] = float(text)
        except (TypeError, ValueError):
            continue
    return numbers


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object of `path`; {} where there is no such file, an InputError where it is no JSON object."""
    if not Path(path).is_file():
        return {}
    try:
        value = orjson.loads(Path(path).read_bytes())
    except orjson.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON ({error}): was the file cut?") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
