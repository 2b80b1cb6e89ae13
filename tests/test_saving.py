"""What a run saves of its policy: whole or absent, on a full disk too; from a damaged state it goes one back."""

import resource
from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator

from stages.core.errors import InputError
from stages.core.provenance import Identity, Inputs
from stages.core.ranks import ALONE
from stages.rl.drawing import Cursor
from stages.rl.rounds import Acceptance
from stages.rl.rundir import RunDir
from stages.rl.saving import RunState, Saver
from stages.rl.trainer import Trainer
from tests.test_trainer import OPTIONS, some_rollouts

STATE = RunState(Cursor(12, Acceptance(3.5, 9.0)), 1e-3)


@contextmanager
def files_of_at_most(size):
    """Within the block a file takes so many bytes, as if the disk were full then."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def saver(tiny_policy, tmp_path):
    directory = RunDir(tmp_path / "rl")
    directory.begin(Identity("rl", {}, Inputs({}, {}), {}), False)
    return Saver(directory, Trainer(tiny_policy, Accelerator(), OPTIONS), ALONE)


def everything(saver):
    return sorted(str(path.relative_to(saver.directory.path)) for path in saver.directory.path.rglob("*"))


@pytest.mark.parametrize("size", [0, 100, 5_000, 100_000, 300_000])
def test_on_a_full_disk_state_and_checkpoint_are_absent_with_a_line_that_names_them(saver, size):
    before = everything(saver)
    with files_of_at_most(size), pytest.raises((InputError, OSError)) as state:
        saver.keep_state(1, STATE)
    with files_of_at_most(size), pytest.raises((InputError, OSError)) as checkpoint:
        saver.keep_checkpoint(1)
    for error, name in ((state, "state"), (checkpoint, "checkpoints")):
        assert "step_000001" in str(error.value) and name in str(error.value) and "\n" not in str(error.value)
    assert [name for name in everything(saver) if name != "checkpoints"] == before
    saver.keep_state(1, STATE)
    saver.keep_checkpoint(1)
    assert saver.directory.state_dir(1).is_dir() and saver.directory.checkpoint(1).is_dir()


def log_for(directory, steps):
    for step in range(1, steps + 1):
        directory.append_log({"step": step})


def test_one_flipped_bit_of_a_state_is_noticed_and_the_state_before_taken(saver, capsys):
    trainer, directory = saver.trainer, saver.directory
    for step in (1, 2):
        trainer.update(some_rollouts(8, seed=step), 1e-3)
        saver.keep_state(step, STATE)
        if step == 1:
            first = {name: weight.clone() for name, weight in trainer.weights()}
    log_for(directory, 2)
    (file,) = directory.state_dir(2).glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x40  # of some weight's exponent
    file.write_bytes(content)
    assert directory.resume_step() == 1
    assert f"{file} is not as it was written: going back to the state before it" in capsys.readouterr().err
    assert saver.restore(1) == STATE
    assert all(torch.equal(weight, first[name]) for name, weight in trainer.weights())


def test_two_states_are_kept_while_a_run_goes_on_and_one_at_its_end(saver):
    for step in (1, 2, 3, 4):
        saver.keep_state(step, STATE, is_last=step == 4)
        kept = sorted(int(path.name[-1]) for path in saver.directory.state.glob("step_*"))
        assert kept == {1: [1], 2: [1, 2], 3: [2, 3], 4: [4]}[step]
