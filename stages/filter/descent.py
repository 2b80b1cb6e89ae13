"""The iterations before one: the rl runs that a run descends from, by what the manifests name as inputs.

    runs/3/rl <- runs/2/policy <- runs/2/examples.jsonl <- runs/2/rl/rollouts <- runs/1/policy <- ... <- the base

A policy that nothing here made is the base. Each input must still be what its output was made from, so that pass rates
are never taken from the rollouts of another chain.
"""

from pathlib import Path

from stages.core.errors import InputError
from stages.core.progress import warn
from stages.core.provenance import digest, manifest_of, stamp

BY_HAND = "name the rollouts that count by --rollouts, with --per-policy in the place of --accumulate"


def with_earlier(paths: list[str]) -> list[str]:
    """The rl runs `paths` and all that they descend from, each once, the earliest first.

    Raises InputError for what is no rl run, and where an input is gone or is another one now.
    """
    runs: dict[str, None] = {}
    for path in paths:
        if not (Path(path) / "rollouts").is_dir():
            raise InputError(f"--accumulate: {path} is no rl output, of which the start policy is known: {BY_HAND}")
        _follow(Path(path), runs, set())
    return list(runs)


def _follow(output: Path, runs: dict[str, None], seen: set[Path]) -> None:
    """Add the runs that `output` was made from to `runs`, then itself if it is one."""
    if output in seen:
        return
    seen.add(output)
    is_run, manifest = (output / "rollouts").is_dir(), manifest_of(output)
    inputs, stamps = (manifest.get(part) or {} for part in ("inputs", "stamps"))
    if is_run and not inputs:
        raise InputError(f"--accumulate: {output} has no manifest.json that names its start policy: {BY_HAND}")
    if output.suffix == ".jsonl" and not any(Path(path).name == "rollouts" for path in inputs):
        warn(f"--accumulate goes back no further than {output}: it is no choice from the rollouts of an rl output")
        return
    for path, known in inputs.items():
        if is_run and path.endswith(".jsonl"):  # the problems, which may come from other rollouts
            continue
        _refuse_changed(path, known, stamps.get(path, ""), output)
        _follow(_run_of(Path(path)), runs, seen)
    if is_run:
        runs.setdefault(str(output))


def _run_of(path: Path) -> Path:
    """The rl run that `path` is a part of; other paths as they are."""
    if path.name in ("rollouts", "checkpoints"):
        return path.parent
    return path.parent.parent if path.parent.name == "checkpoints" else path


def _refuse_changed(path: str, known: str, mark: str, output: Path) -> None:
    if not Path(path).exists():
        raise InputError(f"--accumulate: {output} was made from {path}, which is not there: restore it, or {BY_HAND}")
    if stamp(path) != mark and digest(path) != known:
        raise InputError(
            f"--accumulate: {output} was made from another {path} than the one that is there now: make it anew, or "
            f"{BY_HAND}"
        )
