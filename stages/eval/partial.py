"""What an interrupted evaluation has drawn so far: groups of rollouts by policy, and the settings behind them.

    .OUT.partial/settings.json                  what every group depends on, but for its policy and its problem
    .OUT.partial/<problems>-<policy>.jsonl      a policy's groups, a line each, in the order in which they were done

It lies beside OUT and is removed once OUT is written. Policies and problem files are known by their digests, so a
repeated call may name more of them, and those that have changed are drawn anew.
"""

from dataclasses import replace
from pathlib import Path

import orjson

from stages.core import outputs
from stages.core.errors import InputError
from stages.core.provenance import Identity, read_manifest
from stages.core.records import Rollout

SETTINGS = "settings.json"


NO_MATTER = ("k", "select", "limit")  # options of eval on which no group of rollouts depends


def directory(out: Path, identity: Identity) -> Path:
    """The partial directory of `out`, made if there is none.

    Raises InputError if one with other settings is there: its groups could not be mixed with new ones.
    """
    path = out.with_name(f".{out.name}.partial")
    if not (path / SETTINGS).exists():
        path.mkdir(parents=True, exist_ok=True)
        outputs.write_json(path / SETTINGS, identity.record | {"inputs": {}})
    groups = replace(identity, inputs={})  # policies and problems are in the names of the files
    if changes := groups.differences(read_manifest(path / SETTINGS), free=NO_MATTER):
        raise InputError(
            f"{path} holds an interrupted evaluation with other settings: {'; '.join(changes)}. Repeat it as it was "
            f"begun, or remove {path} to begin anew"
        )
    return path


class Groups:
    """A policy's groups on disk. A broken line and all after it are dropped, to be drawn again."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+b")
        self._file.seek(0)
        self._places: dict[str, int] = {}
        end = 0
        while (line := self._file.readline()).endswith(b"\n") and (problem_id := _problem_of(line)):
            self._places[problem_id] = end
            end += len(line)
        self._file.truncate(end)

    def __enter__(self) -> "Groups":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, problem_id: str) -> bool:
        return problem_id in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, rollouts: list[Rollout]) -> None:
        """Keep the rollouts of one problem."""
        self._places[rollouts[0]["problem_id"]] = self._file.seek(0, 2)
        self._file.write(orjson.dumps(rollouts, option=orjson.OPT_APPEND_NEWLINE))
        self._file.flush()

    def get(self, problem_id: str) -> list[Rollout]:
        """The rollouts of a problem, by sample."""
        self._file.seek(self._places[problem_id])
        return orjson.loads(self._file.readline())


def _problem_of(line: bytes) -> str:
    """The id of the problem whose rollouts a line holds; "" for a broken line."""
    try:
        return orjson.loads(line)[0]["problem_id"]
    except (orjson.JSONDecodeError, LookupError, TypeError):
        return ""
