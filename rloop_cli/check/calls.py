"""The commands of the graph as they would be called: who makes which file, and how each is launched."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import yaml

from stages.core.errors import InputError
from stages.core.policy import checkpoints

MADE_FROM = ("rl", "rft", "merge")  # they write policies of the architecture of their --policy


@dataclass(frozen=True)
class Call:
    """Stage `name` of the graph; graph.py makes it, the other modules of this room read it.

    `stage` is the command, "" if it is none of ours, such as `hf download`. `options` is its `Options`, None for
    others; `paths` are the options that name what is read, by flag. `outs` are the paths that it makes, `launch` the
    words before the command. `origin("--steps")` begins a fault: "params.yaml: rl.steps". `is_stale` if what lies at
    its outs is of another command, by dvc.lock, such as of the params file that was used before.
    """

    name: str
    stage: str
    options: Any
    paths: dict[str, list[str]]
    outs: Sequence[str]
    launch: Sequence[str]
    origin: Callable[..., str]
    is_stale: bool = False

    @property
    def made(self) -> Iterator[PurePath]:
        """What is there once it has run."""
        yield from map(PurePath, self.outs)
        if out := getattr(self.options, "out", None):
            yield PurePath(out)

    def makes(self, path: str) -> bool:
        """Whether it makes `path`, something in it, or the directory that it is in."""
        wanted = PurePath(path)
        return any(own.is_relative_to(wanted) or wanted.is_relative_to(own) for own in self.made)


def maker(calls: Sequence[Call], path: str) -> Call | None:
    """The first call that makes `path`."""
    return next((call for call in calls if call.makes(path)), None)


def is_there(calls: Sequence[Call], path: str | Path) -> bool:
    """Whether `path` exists and is, as far as DVC knows, what these calls make."""
    above = maker(calls, str(path))
    return Path(path).exists() and not (above is not None and above.is_stale)


class Base(NamedTuple):
    """The policy whose architecture and tokenizer a policy has: a directory that is there, or None.

    `waits_for` says what has to be done before it is there.
    """

    path: Path | None
    waits_for: str = ""


def base_of(calls: Sequence[Call], policy: str) -> Base:
    """What `policy` descends from, by the graph: rl, rft and merge keep the architecture."""
    if is_there(calls, Path(policy, "config.json")):
        return Base(Path(policy))
    above = maker(calls, policy)
    if above is not None and above.stage in MADE_FROM:
        named = above.options.policy
        return base_of(calls, named if isinstance(named, str) else named[0])
    if above is None:
        return _cached(policy, f"{policy}, which is taken for a hub id, is in no local cache")
    waits = f"dvc repro {above.name}, which makes {policy}"
    hub_id = next((word for word in above.launch[2:] if not word.startswith("-")), "")
    return _cached(hub_id, waits) if not above.stage and "download" in above.launch else Base(None, waits)


def _cached(hub_id: str, waits_for: str) -> Base:
    """The local copy of a policy of the hub, if it is whole, without asking the hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(hub_id, "config.json")
        return Base(checkpoints.resolve(str(Path(str(config)).parent))) if config else Base(None, waits_for)
    except (HFValidationError, InputError):
        return Base(None, waits_for)


def policies_of(call: Call, calls: Sequence[Call]) -> list[str]:
    """The policies that a call names, those of the evaluations it takes them from included."""
    named = getattr(call.options, "policy", [])
    names = [named] if isinstance(named, str) else list(named)
    for output in map(str, getattr(call.options, "selected", [])):
        if (other := maker(calls, output)) is not None and other.stage == "eval":
            names += policies_of(other, calls)
    return names


class Launch(NamedTuple):
    """The processes that a call starts, None if its words don't say, and whether they share the policy (FSDP)."""

    num_processes: int | None
    is_sharded: bool = False


def launched(call: Call) -> Launch:
    """What the words before the command say, and the config file of accelerate."""
    words = [part for word in call.launch for part in word.split("=")]
    options = {word.replace("-", "_"): after for word, after in pairwise(words)}
    if any(word.endswith(".sh") for word in words):
        return Launch(None)
    if not {"accelerate", "torchrun"} & set(words):
        return Launch(1)
    file = Path(options.get("__config_file", ""))
    config = yaml.safe_load(file.read_text()) if file.is_file() else {}
    number = str(options.get("__num_processes") or options.get("__nproc_per_node") or config.get("num_processes"))
    is_sharded = config.get("distributed_type") == "FSDP" or "--use_fsdp" in words
    return Launch(int(number) if number.isdigit() else None, is_sharded)
