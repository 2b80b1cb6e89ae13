"""The growing directory of an rl run: its files are whole at any moment, and say from which step to resume.

rollouts/step_000001.jsonl ...   checkpoints/step_000050/ ...   log.tsv   metrics.json   manifest.json
state/run.json                   the identity of the run
state/step_000010/               weights, optimizer and cursor after that step, with the digest of each of these files

The state before the last is kept, too, for the case that the last one is damaged; a finished run keeps its last one, so
that it can be made longer: only --steps says where it ends. Nothing with steps in it is ever removed: where another run
takes its place, it is moved aside.
"""

import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stages.core import jsonl, outputs
from stages.core.errors import InputError
from stages.core.outputs import naming, read_json, whole_file, write_json
from stages.core.progress import warn
from stages.core.provenance import Identity, digest, read_manifest
from stages.core.records import Rollout
from stages.core.tabular import append_tsv, read_tsv

OWN = {"rollouts", "checkpoints", "log.tsv", "metrics.json", "state", "tracker"}
BUDGET = "token_budget"  # in a run's parameters: tokens of a micro-batch as used, where the option may be 0
DIGESTS = "digests.json"  # in a state: SHA-256 of each of its other files
_STEP = re.compile(r"step_(\d{6,})(?:\.jsonl)?")


def step_name(step: int) -> str:
    """ "step_000012": names sort as the steps do."""
    return f"step_{step:06d}"


class RunDir:
    """An rl output directory. Steps count from 1; `step` 0 is the start."""

    def __init__(self, path: Path):
        self.path = path
        self.state = path / "state"
        self.log_path = path / "log.tsv"

    def begin(self, identity: Identity, restart_if_changed: bool, is_exact: bool = False) -> bool:
        """Claim the directory for the run of this identity.

        Returns whether the run is already finished. It may be given more steps, if its last state is there, and goes on
        where only the rounding of floats is another, which `changes` records; not if it `is_exact`. Raises InputError
        if the directory holds another run, naming the difference, or only parts of one, or something that is no run;
        with `restart_if_changed` another run and parts of one are moved aside instead.
        """
        known = self._known()
        if known is not None:
            roundings = identity.roundings(known)
            fault = self._fault(known, identity)
            if not fault and is_exact and roundings:
                fault = f"was begun otherwise: {'; '.join(roundings)}. Give that again to go on, or leave out --exact"
            if not fault:
                return self._go_on(identity, roundings)
        else:
            self._refuse_foreign()
            parts = ", ".join(sorted(self._parts()))
            fault = f"holds only {parts} of an rl run: restore the rest" if parts else ""
        if fault and not restart_if_changed:
            raise InputError(
                f"{self.path} {fault}, or name another --out (or remove {self.path}) to start over; nothing was changed"
            )
        self._start_over(identity)
        return False

    def _fault(self, known: Mapping[str, Any], identity: Identity) -> str:
        """Why the run that is `known` can't go on as one of this `identity`; "" if it can."""
        settings = known.get("parameters") or {}
        may_lack = identity.free | identity.rounding
        if unknown := [name for name in identity.parameters if name not in {*settings, *may_lack}]:
            return f"was begun by another version of rloop, without {', '.join(unknown)}: finish it with that one"
        if changes := identity.differences(known, free={"steps"}):
            return f"was begun with other settings: {'; '.join(changes)}. Give those again to go on"
        if self._is_finished and (lost := {"rollouts", "checkpoints", "log.tsv", "metrics.json"} - self._parts()):
            return f"holds a finished run without its {', '.join(sorted(lost))}: restore that"
        done = self._num_done()
        steps = identity.parameters.get("steps", done)
        if steps < done:
            return f"holds {done} steps, more than --steps {steps}: give --steps {done}, or more"
        if steps > done and self._is_finished and done not in self._saved_steps():
            return f"holds a finished run of {done} steps without its last state, so it can't be made longer"
        return ""

    def _go_on(self, identity: Identity, roundings: list[str]) -> bool:
        """Resume the run; return whether there is nothing left to do. One that gets more steps is unfinished again."""
        changes, done = self.changes, self._num_done()
        if self._is_finished:
            if identity.parameters.get("steps") == done:
                return True
            (self.path / "manifest.json").unlink()
            (self.path / "metrics.json").unlink()
        if roundings and done:
            warn(f"{self.path} goes on, and is rounded otherwise from step {done + 1} on: {'; '.join(roundings)}")
            changes = [*changes, {"step": done + 1, "changed": roundings}]
        write_json(self.state / "run.json", {**identity.record, "changes": changes})
        return False

    @property
    def changes(self) -> list[dict[str, Any]]:
        """What rounds floats otherwise than before, from which step on: {"step": 3, "changed": ["torch was ..."]}."""
        return list((self._known() or {}).get("changes") or [])

    def _start_over(self, identity: Identity) -> None:
        parts = [part for part in (*sorted(self._parts()), "manifest.json") if (self.path / part).exists()]
        if parts:
            aside = outputs.aside(self.path)
            aside.mkdir()
            for part in parts:  # the identity last, should this be interrupted
                (self.path / part).rename(aside / part)
            warn(f"{self.path} is begun anew; what it held is now in {aside}")
        self.state.mkdir(parents=True, exist_ok=True)
        write_json(self.state / "run.json", identity.record)

    def planned_budget(self, identity: Identity) -> int:
        """The tokens of a micro-batch that the steps that are done of this run were planned with; 0 if there are none.

        Another run, which is refused or moved aside, says nothing: its policy may be a smaller one.
        """
        known = self._known()
        goes_on = known is not None and not self._fault(known, identity) and self._num_done() > 0
        return int(known["parameters"].get(BUDGET, 0)) if known and goes_on else 0

    def resume_step(self) -> int:
        """The step to go on after, 0 for a fresh start; what lies beyond it is cleared away.

        It is that of the last state whose files have the digests that they were written with. Raises InputError if none
        of several has, or if the log lacks a step.
        """
        step = self._last_whole_state()
        self._check_log(step)
        self._note_again(step)
        for path in [*self.path.glob("rollouts/*"), *self.path.glob("checkpoints/*"), *self.state.glob("*")]:
            if (number := _step_of(path)) and number > step:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in self.path.rglob(".*.partial"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._cut_log(step)
        return step

    def _note_again(self, step: int) -> None:
        """Let changes of rounding that were noted for steps beyond the next one count from that: they are done anew."""
        if any(change["step"] > step + 1 for change in self.changes):
            changes = [{**change, "step": min(change["step"], step + 1)} for change in self.changes]
            write_json(self.state / "run.json", {**(self._known() or {}), "changes": changes})

    def _last_whole_state(self) -> int:
        steps = self._saved_steps()
        for step in reversed(steps):
            if not (fault := _damage(self.state_dir(step))):
                return step
            if step == steps[0]:
                raise InputError(f"{fault}: restore it, or move {self.path} away to start over; nothing was changed")
            warn(f"{fault}: going back to the state before it")
        return 0

    def seal_state(self, path: Path) -> None:
        """Note the digests of all files of a state that is written to `path`, where it is not yet in its place."""
        write_json(path / DIGESTS, _digests(path))

    def where_it_goes_on(self) -> str:
        """What to tell who interrupts the run."""
        saved = max(self._saved_steps(), default=0)
        return f"the same command goes on after step {saved}" if saved else "the same command starts over"

    def state_dir(self, step: int) -> Path:
        return self.state / step_name(step)

    def forget_states_before(self, step: int) -> None:
        """Remove the states that `step` supersedes."""
        for old in self._saved_steps():
            if old < step:
                shutil.rmtree(self.state_dir(old))

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / step_name(step)

    def last_checkpoint(self, step: int) -> Path | None:
        """The last checkpoint of `step` or before."""
        return max((path for path in self.path.glob("checkpoints/*") if 0 < _step_of(path) <= step), default=None)

    def forget_rollouts(self, step: int) -> None:
        """Remove the rollouts of a step that was not done."""
        self._rollouts(step).unlink(missing_ok=True)

    def write_rollouts(self, step: int, rollouts: Iterable[Rollout]) -> None:
        """Write the step's rollouts, whole; a later call for the same step replaces them."""
        jsonl.write(self._rollouts(step), rollouts)

    def append_log(self, row: Mapping[str, Any]) -> None:
        """Add a line to log.tsv, with the header before the first."""
        with naming(self.log_path):
            append_tsv(self.log_path, row)

    def log_rows(self) -> list[dict[str, float]]:
        """log.tsv as numbers; an empty cell is left out."""
        return read_tsv(self.log_path)

    def finish(self, metrics: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Write metrics and manifest, in this order."""
        write_json(self.path / "metrics.json", metrics)
        write_json(self.path / "manifest.json", manifest)

    def forget_state(self) -> None:
        """Remove what resuming needs: a finished run can't be made longer then."""
        shutil.rmtree(self.state, ignore_errors=True)

    def rollout_digests(self) -> dict[str, str]:
        """SHA-256 of each step's rollouts by file name, by which filter notices what was changed since."""
        return {file.name: digest(file) for file in sorted(self.path.glob("rollouts/step_*.jsonl"))}

    def _rollouts(self, step: int) -> Path:
        return self.path / "rollouts" / f"{step_name(step)}.jsonl"

    def _known(self) -> dict[str, Any] | None:
        for path in (self.state / "run.json", self.path / "manifest.json"):
            if path.is_file():
                manifest = read_manifest(path)
                if path.parent == self.path and manifest.get("stage") != "rl":  # other software writes manifests, too
                    return None
                return manifest
        return None

    def _num_done(self) -> int:
        """Steps of a finished run, or those that its last state covers."""
        if self._is_finished:
            return int(read_json(self.path / "manifest.json")["parameters"]["steps"])
        return max(self._saved_steps(), default=0)

    @property
    def _is_finished(self) -> bool:
        return (self.path / "manifest.json").is_file()

    def _parts(self) -> set[str]:
        """The parts of a run that are there: a killed removal, or a partial checkout, leaves only some."""
        return {name for name in OWN if (self.path / name).exists()} - ({"state"} if not self._saved_steps() else set())

    def _refuse_foreign(self) -> None:
        foreign = self.path.is_file() or (
            self.path.is_dir() and any(path.name not in {*OWN, ".gitignore"} for path in self.path.iterdir())
        )
        if foreign:
            raise InputError(f"{self.path} already holds something that is no rl run: name another --out")

    def _saved_steps(self) -> list[int]:
        return sorted(filter(None, map(_step_of, self.state.glob("*"))))

    def _check_log(self, step: int) -> None:
        """Raise InputError unless the log has a line for each step up to `step`."""
        steps = [row.get("step") for row in self.log_rows() if row.get("step", 0) <= step]
        if steps != list(range(1, step + 1)):
            raise InputError(
                f"{self.log_path} does not hold each of the {step} steps that are done: restore it; nothing was changed"
            )

    def _cut_log(self, step: int) -> None:
        if not self.log_path.exists():
            return
        header, *lines = self.log_path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and float(line.split("\t", 1)[0]) <= step]
        with whole_file(self.log_path) as beside:
            beside.write_text("".join([header, *kept]) if kept else "")
        if not kept:
            self.log_path.unlink()


def _step_of(path: Path) -> int:
    """The step of a file or directory by its name; 0 for one of another name."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else 0


def _digests(path: Path) -> dict[str, str]:
    """SHA-256 by name of the files of a state, several read at a time."""
    files = sorted(file for file in path.iterdir() if file.is_file() and file.name != DIGESTS)
    with ThreadPoolExecutor() as pool:
        return dict(zip((file.name for file in files), pool.map(digest, files), strict=True))


def _damage(path: Path) -> str:
    """Why a state cannot be trusted; "" if it can."""
    try:
        noted = read_json(path / DIGESTS)
    except InputError as error:
        return str(error)
    if not noted:
        return f"{path}: {DIGESTS} is missing"
    now = _digests(path)
    damaged = [name for name in {**noted, **now} if noted.get(name) != now.get(name)]
    return f"{path / damaged[0]} is not as it was written" if damaged else ""
