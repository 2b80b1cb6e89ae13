"""Checkpoints, and the states that a killed run goes on from.

A step is a function of the weights, the optimizer, the position in the stream of problems and the seed. So the state
on disk is just these, and a run that is started again repeats what it lost, to the same rollouts. With them go the
running acceptance, which says how many groups to draw, the difference between engine and trainer that the run began
with, which later steps are held against, and the coefficient of the entropy term.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from stages.core.outputs import whole_dir
from stages.core.ranks import Ranks
from stages.rl.drawing import Cursor
from stages.rl.rounds import Acceptance
from stages.rl.rundir import RunDir
from stages.rl.trainer import Trainer

NAME = "cursor.json"  # in a state, beside weights and optimizer


@dataclass(frozen=True)
class RunState:
    """What a state holds beside weights and optimizer; `start_mismatch` (nats a token) is what the run began with."""

    cursor: Cursor
    start_mismatch: float
    max_sequences: int = 0  # of the engine, since the batches of one decide how its floats are rounded
    entropy_coefficient: float = 0.0  # of the next step
    token_budget: int = 0  # of a micro-batch, as it was planned by the GPU's memory, or halved for want of it

    def write(self, path: Path) -> None:
        position, acceptance = self.cursor
        values = asdict(self) | {"cursor": {"position": position, "acceptance": asdict(acceptance)}}
        (path / NAME).write_bytes(orjson.dumps(values))

    @staticmethod
    def read(path: Path) -> "RunState":
        values = orjson.loads((path / NAME).read_bytes())
        position, acceptance = values["cursor"]["position"], Acceptance(**values["cursor"]["acceptance"])
        return RunState(**values | {"cursor": Cursor(position, acceptance)})


class Saver:
    """Writes what a run keeps of its policy into `directory`; every rank has one, and all call it together.

    `saved` is the step whose state is on disk.
    """

    def __init__(self, directory: RunDir, trainer: Trainer, ranks: Ranks):
        self.directory, self.trainer, self.ranks = directory, trainer, ranks
        self.saved = 0

    def keep_checkpoint(self, step: int) -> None:
        """Write the checkpoint of `step`, if it is not there yet."""
        path = self.directory.checkpoint(step)
        if not any(self.ranks.gather(path.is_dir())):
            self._write_whole(path, self.trainer.save_checkpoint)

    def keep_state(self, step: int, state: RunState, is_last: bool = False) -> None:
        """Write the state after `step`. The one before it is kept until another follows, but not beside the last."""

        def write(path: Path) -> None:
            self.trainer.save_state(path)
            self.ranks.wait()
            if self.ranks.is_first:
                state.write(path)
                self.directory.seal_state(path)

        if self.ranks.is_first:
            self.directory.forget_states_before(self.saved)
        self._write_whole(self.directory.state_dir(step), write)
        if self.ranks.is_first and is_last:
            self.directory.forget_states_before(step)
        self.saved = step

    def restore(self, step: int) -> RunState:
        """Give the trainer the state after `step`; what else it holds."""
        path = self.directory.state_dir(step)
        self.trainer.load_state(path)
        self.saved = step
        return RunState.read(path)

    def _write_whole(self, path: Path, write: Callable[[Path], None]) -> None:
        """All ranks write into one directory beside `path`, which the first then renames."""
        if self.ranks.is_alone:
            with whole_dir(path) as beside:
                write(beside)
            return
        beside = path.with_name(f".{path.name}.partial")
        write(beside)
        self.ranks.wait()
        if self.ranks.is_first:
            beside.rename(path)
        self.ranks.wait()
