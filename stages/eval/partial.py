"""What an interrupted evaluation has drawn so far: groups of rollouts by policy, and the settings behind them.

    .OUT.partial/settings.json                           what every group depends on, but for policy and problem
    .OUT.partial/t1-<problems>-<policy>-<engine>.jsonl   a policy's groups at temperature 1, a line each, as they come,
                                                         [CRC-32, [rollout, ...]], by which damage shows
    .OUT.partial/greedy-t0-<problems>-...                the same for --greedy
    .OUT.partial/tokens<n>-t1-<problems>-...             with --kl-to: token ids of the first n samples of each group
    .OUT.partial/kl<n>-<base>-t1-<problems>-...          and their Divergences

It lies beside OUT and is removed once OUT is written. Policies and problem files are known by their digests, so a
repeated call may name more of them, and those that have changed are drawn anew. Each engine has files of its own; all
of them are read, so a repeated call may have more ranks or fewer.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from stages.core import outputs, tabular
from stages.core.drawing.request import Request
from stages.core.drawing.rollouts import Group, Prompt
from stages.core.errors import InputError
from stages.core.provenance import Identity, Inputs, is_done, read_manifest, versions

SETTINGS = "settings.json"
Stems = dict[tuple[str, str], str]  # what the names of the partial files begin with, by set and policy

NO_MATTER = (
    "temperature",
    "k",
    "maj",
    "greedy",
    "kl_to",
    "kl_samples",
    "select",
    "limit",
)  # options of eval on which no group of rollouts depends


def begin(out: Path, identity: Identity, policies: list[str], stack: ExitStack) -> Path | None:
    """Lock `out` for as long as `stack` lives; its partial directory, or None if `out` is done."""
    stack.enter_context(outputs.locked(out))
    _refuse_other(out, identity, policies)
    return None if is_done(out, out / "manifest.json", lambda: identity) else directory(out, identity)


def _refuse_other(out: Path, identity: Identity, policies: list[str]) -> None:
    """Raise InputError for an evaluation of other policies, and if only the verifier differs: to regrade is enough."""
    known = read_manifest(out / "manifest.json")
    if known.get("stage") != "eval":
        return
    if known.get("policies") != policies:
        named = tabular.some(known.get("policies") or [])
        raise InputError(f"{out} evaluates other policies ({named}): name another --out, or remove it first")
    changes = identity.differences(known)
    if changes and not replace(identity, versions=versions()).differences(known):
        raise InputError(
            f"{out} was graded by another verifier ({', '.join(changes)}): grade it anew with rloop regrade "
            f"--rollouts {out} and another --out, or remove it"
        )


def directory(out: Path, identity: Identity) -> Path:
    """The partial directory of `out`, made if there is none; the first rank alone makes it.

    Raises InputError if one with other settings is there: its groups could not be mixed with new ones.
    """
    path = out.with_name(f".{out.name}.partial")
    if not (path / SETTINGS).exists():
        path.mkdir(parents=True, exist_ok=True)
        outputs.write_json(path / SETTINGS, identity.record | {"inputs": {}, "stamps": {}})
    groups = replace(identity, inputs=Inputs({}, {}))  # policies and problems are in the names of the files
    if changes := groups.differences(read_manifest(path / SETTINGS), free=NO_MATTER):
        raise InputError(
            f"{path} holds an interrupted evaluation with other settings: {'; '.join(changes)}. Repeat it as it was "
            f"begun, or remove {path} to begin anew"
        )
    return path


class Groups:
    """A policy's groups on a set of problems, by all engines. A broken line and all after it count as not drawn."""

    def __init__(self, directory: Path, stem: str) -> None:
        """`stem` is what the names of the files begin with."""
        self._files = [path.open("rb") for path in sorted(directory.glob(f"{stem}*.jsonl"))]
        self._found: dict[str, tuple[BinaryIO, int]] = {}
        for file in self._files:
            for problem_id, start, _ in _whole_lines(file):
                self._found[problem_id] = file, start

    def __enter__(self) -> "Groups":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    @property
    def problem_ids(self) -> set[str]:
        """The problems whose groups are there."""
        return set(self._found)

    def get(self, problem_id: str) -> list[Any]:
        """The rollouts of a problem, by sample, or what else its line holds."""
        file, start = self._found[problem_id]
        file.seek(start)
        return _records_of(file.readline())


class Writer:
    """Adds groups to the file of one engine, from which a broken line and all after it are dropped first."""

    def __init__(self, directory: Path, stem: str, engine: int) -> None:
        self._path = directory / f"{stem}-{engine}.jsonl"
        self._file = self._path.open("a+b")
        self._file.seek(0)
        self._file.truncate(max((end for _, _, end in _whole_lines(self._file)), default=0))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        with outputs.naming(self._path):
            self._file.close()

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Keep the rollouts of one problem, or what else there is of it, with its id."""
        body = orjson.dumps(records)
        with outputs.naming(self._path):
            self._file.write(b"[%d,%s]\n" % (zlib.crc32(body), body))
            self._file.flush()


class Keeper:
    """Keeps the groups that one engine draws, and before each the token ids of its first `num_scored` samples.

    So if the rollouts of a group are there, its tokens are, unless it was drawn by a call that did not want them.
    """

    def __init__(self, directory: Path, stem: str, engine: int, num_scored: int) -> None:
        self._num_scored = num_scored
        self._rollouts = Writer(directory, stem, engine)
        self._tokens = Writer(directory, tokens_stem(stem, num_scored), engine) if num_scored else nullcontext()

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, *error: object) -> None:
        self._rollouts.__exit__(*error)
        self._tokens.__exit__(*error)

    def add(self, group: Group, policy: str) -> None:
        """Keep one group."""
        if isinstance(self._tokens, Writer):
            problem_id, completions = group.prompt.problem["id"], group.completions[: self._num_scored]
            self._tokens.add([{"problem_id": problem_id, "token_ids": each.token_ids} for each in completions])
        self._rollouts.add(group.rollouts(policy))


def tokens_stem(stem: str, num_scored: int) -> str:
    """The stem of the files of token ids that belong to those of rollouts."""
    return f"tokens{num_scored}-{stem}"


def missing(request: Request, policy: str, stems: Stems, known: dict[str, set[str]]) -> list[tuple[str, Prompt]]:
    """What a policy lacks of all sets, each prompt with its stem; it counts as `known` from now on."""
    lacking = []
    for set_name, prompts in request.sets.items():
        stem = stems[set_name, policy]
        lacking += [(stem, prompt) for prompt in prompts if prompt.problem["id"] not in known[stem]]
        known[stem].update(prompt.problem["id"] for prompt in prompts)
    return lacking


def kept(directory: Path, stem: str, num_scored: int = 0) -> set[str]:
    """The problems whose groups are there, with the tokens of `num_scored` samples."""
    with Groups(directory, stem) as groups:
        ids = groups.problem_ids
    return ids & kept(directory, tokens_stem(stem, num_scored)) if num_scored else ids


def _whole_lines(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Problem, start and end of each line up to the first that is broken."""
    start = 0
    while (line := file.readline()).endswith(b"\n") and (problem_id := _problem_of(line)):
        yield problem_id, start, start + len(line)
        start += len(line)


def _problem_of(line: bytes) -> str:
    """The id of the problem whose rollouts a line holds; "" for a broken line."""
    number, _, body = line[1:-2].partition(b",")
    return _records_of(line)[0]["problem_id"] if number == b"%d" % zlib.crc32(body) else ""


def _records_of(line: bytes) -> list[Any]:
    return orjson.loads(line)[1]
