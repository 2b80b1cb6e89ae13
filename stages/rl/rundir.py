"""The growing directory of an rl run: its files are whole at any moment, and say from which step to resume.

rollouts/step_000001.jsonl ...   checkpoints/step_000050/ ...   log.tsv   metrics.json   manifest.json
state/run.json                   the identity of the run
state/step_000010/               weights, optimizer and position after that step; the newest one only

A finished run keeps its state, so that it can be made longer: only --steps says where it ends.
"""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stages.core import jsonl
from stages.core.errors import InputError
from stages.core.outputs import read_json, whole_file, write_json
from stages.core.provenance import Identity, read_manifest
from stages.core.records import Rollout
from stages.core.tabular import append_tsv, read_tsv

OWN = {"rollouts", "checkpoints", "log.tsv", "metrics.json", "state", "tracker"}


def step_name(step: int) -> str:
    """ "step_000012": names sort as the steps do."""
    return f"step_{step:06d}"


class RunDir:
    """An rl output directory. Steps count from 1; `step` 0 is the start."""

    def __init__(self, path: Path):
        self.path = path
        self.state = path / "state"
        self.log_path = path / "log.tsv"

    def begin(self, identity: Identity, restart_if_changed: bool) -> bool:
        """Claim the directory for the run of this identity.

        Returns whether the run is already finished. It may be given more steps, if its last state is there. Raises
        InputError if the directory holds another run, naming the difference, or only parts of one, or something that
        is no run; with `restart_if_changed` another run and parts of one are removed instead.
        """
        known = self._known()
        if known is not None:
            fault = self._fault(known, identity)
            if not fault:
                return self._go_on(identity)
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
        if unknown := [name for name in identity.parameters if name not in {*settings, *identity.free}]:
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

    def _go_on(self, identity: Identity) -> bool:
        """Resume the run; return whether there is nothing left to do. One that gets more steps is unfinished again."""
        if self._is_finished:
            if identity.parameters.get("steps") == self._num_done():
                return True
            (self.path / "manifest.json").unlink()
            (self.path / "metrics.json").unlink()
        write_json(self.state / "run.json", identity.record)
        return False

    def _start_over(self, identity: Identity) -> None:
        for part in (*sorted(self._parts()), "manifest.json"):  # the identity last, should this be interrupted
            path = self.path / part
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.state.mkdir(parents=True, exist_ok=True)
        write_json(self.state / "run.json", identity.record)

    def resume_step(self) -> int:
        """The step to go on after, 0 for a fresh start; what lies beyond it is cleared away."""
        saved = self._saved_steps()
        step = saved[-1] if saved else 0
        for path in [*self.path.glob("rollouts/step_*.jsonl"), *self.path.glob("checkpoints/step_*")]:
            if int(path.stem.split("_")[1]) > step:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in self.path.rglob(".*.partial"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._cut_log(step)
        return step

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
        paths = [path for path in self.path.glob("checkpoints/step_*") if int(path.name.split("_")[1]) <= step]
        return max(paths, default=None)

    def forget_rollouts(self, step: int) -> None:
        """Remove the rollouts of a step that was not done."""
        self._rollouts(step).unlink(missing_ok=True)

    def write_rollouts(self, step: int, rollouts: Iterable[Rollout]) -> None:
        """Write the step's rollouts, whole; a later call for the same step replaces them."""
        jsonl.write(self._rollouts(step), rollouts)

    def append_log(self, row: Mapping[str, Any]) -> None:
        """Add a line to log.tsv, with the header before the first."""
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
        return sorted(int(path.name.split("_")[1]) for path in self.state.glob("step_*"))

    def _cut_log(self, step: int) -> None:
        if not self.log_path.exists():
            return
        header, *lines = self.log_path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and int(line.split("\t", 1)[0]) <= step]
        with whole_file(self.log_path) as beside:
            beside.write_text("".join([header, *kept]) if kept else "")
        if not kept:
            self.log_path.unlink()
