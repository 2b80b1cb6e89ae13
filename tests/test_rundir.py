"""The rl output directory: claimed once, resumed at the last whole state, never mixed with another run."""

from dataclasses import replace

import pytest

from stages.core import jsonl
from stages.core.errors import InputError
from stages.core.provenance import Identity, Inputs
from stages.rl.rundir import RunDir

IDENTITY = Identity("rl", {"lr": 0.1, "steps": 5}, Inputs({"policy": "abc"}, {}), {"sympy": "1.13"})


def saved(directory, step):
    state = directory.state_dir(step)
    state.mkdir(parents=True)
    for name in ("weights", "optimizer"):
        (state / name).write_text(f"{name} of step {step}")
    directory.seal_state(state)
    directory.write_rollouts(step, [{"step": step}])
    directory.append_log({"step": step, "loss": float("nan"), "reward": step / 3})


def test_a_fresh_directory_starts_at_step_0(tmp_path):
    directory = RunDir(tmp_path / "rl")
    assert directory.begin(IDENTITY, False) is False
    assert directory.resume_step() == 0


def test_resuming_keeps_what_the_last_state_covers_and_clears_what_came_after(tmp_path):
    directory = RunDir(tmp_path / "rl")
    directory.begin(IDENTITY, False)
    for step in (1, 2, 3):
        saved(directory, step)
    directory.write_rollouts(4, [{"step": 4}])
    directory.append_log({"step": 4, "loss": 1.0, "reward": 1.0})
    (directory.path / "log.tsv").open("a").write("5\t0.1")  # a line cut by a kill
    (directory.checkpoint(4)).mkdir(parents=True)
    assert directory.begin(IDENTITY, False) is False
    assert directory.resume_step() == 3
    assert [row["step"] for row in directory.log_rows()] == [1, 2, 3]
    assert "loss" not in directory.log_rows()[0]
    assert sorted(path.name for path in directory.path.glob("*/*")) == [
        "run.json", "step_000001", "step_000001.jsonl", "step_000002", "step_000002.jsonl", "step_000003",
        "step_000003.jsonl",
    ]  # fmt: skip


def test_other_parameters_or_inputs_are_refused_by_name_and_nothing_is_lost(tmp_path):
    directory = RunDir(tmp_path / "rl")
    directory.begin(IDENTITY, False)
    saved(directory, 1)
    other = replace(IDENTITY, parameters={"lr": 0.2, "steps": 5}, inputs=Inputs({"policy": "abd"}, {}))
    with pytest.raises(InputError, match=r"lr was 0.1, is now 0.2; the content of policy has changed.*or name another"):
        directory.begin(other, False)
    assert [record for _, record in jsonl.read(directory.path / "rollouts/step_000001.jsonl")] == [{"step": 1}]


def test_a_run_that_lacks_an_option_is_one_of_another_version_unless_the_option_has_no_effect(tmp_path):
    directory = RunDir(tmp_path / "rl")
    directory.begin(IDENTITY, False)
    newer = replace(IDENTITY, parameters={**IDENTITY.parameters, "rank": 0, "valid": None}, free=frozenset({"valid"}))
    with pytest.raises(InputError, match="begun by another version of rloop, without rank: finish it with that one"):
        directory.begin(newer, False)
    assert directory.begin(newer, True) is False


def files(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_another_run_is_moved_aside_and_never_removed_where_the_user_asked_for_that(tmp_path, capsys):
    directory = RunDir(tmp_path / "rl")
    directory.begin(IDENTITY, False)
    saved(directory, 1)
    before = files(directory.path)
    assert directory.begin(replace(IDENTITY, inputs=Inputs({"policy": "x"}, {})), True) is False
    assert directory.resume_step() == 0
    assert not (directory.path / "rollouts").exists()
    (aside,) = tmp_path.glob("rl.before-*")
    assert files(aside) == before
    assert f"what it held is now in {aside}" in capsys.readouterr().err
    saved(directory, 1)
    assert directory.begin(IDENTITY, True) is False
    assert len(list(tmp_path.glob("rl.before-*"))) == 2


ROUNDED = replace(
    IDENTITY, parameters={**IDENTITY.parameters, "processes": 1}, versions={"sympy": "1.13", "torch": "2.1"},
    rounding=frozenset({"processes"}),
)  # fmt: skip


@pytest.mark.parametrize("restart", [False, True])
def test_a_run_goes_on_where_only_rounding_changes_and_notes_what_and_since_when(tmp_path, restart, capsys):
    directory = RunDir(tmp_path / "rl")
    directory.begin(ROUNDED, False)
    saved(directory, 1)
    saved(directory, 2)
    changed = {"parameters": {**ROUNDED.parameters, "processes": 4}, "versions": {"sympy": "1.13", "torch": "2.2"}}
    other = replace(ROUNDED, **changed)
    assert directory.begin(other, restart) is False
    assert directory.resume_step() == 2
    expected = ["processes was 1, is now 4", "torch was 2.1, is now 2.2"]
    assert f"rounded otherwise from step 3 on: {'; '.join(expected)}" in capsys.readouterr().err
    assert directory.begin(other, restart) is False
    assert directory.changes == [{"step": 3, "changed": expected}]
    assert not capsys.readouterr().err, "said once"


def test_a_change_that_was_noted_for_a_step_that_a_damaged_state_undoes_counts_from_the_one_it_goes_back_to(tmp_path):
    directory = RunDir(tmp_path / "rl")
    directory.begin(ROUNDED, False)
    for step in (1, 2):
        saved(directory, step)
    flip(directory.state_dir(2) / "weights")
    directory.begin(replace(ROUNDED, parameters={**ROUNDED.parameters, "processes": 4}), False)
    assert directory.resume_step() == 1
    assert [change["step"] for change in directory.changes] == [2]


def test_an_exact_run_does_not_go_on_where_rounding_changes(tmp_path):
    directory = RunDir(tmp_path / "rl")
    directory.begin(ROUNDED, False)
    saved(directory, 1)
    before = files(directory.path)
    with pytest.raises(InputError, match=r"processes was 1, is now 4\. Give that again to go on, or leave out --exact"):
        directory.begin(replace(ROUNDED, parameters={**ROUNDED.parameters, "processes": 4}), False, True)
    assert files(directory.path) == before


def test_a_run_with_steps_done_says_what_its_micro_batches_were_planned_with_but_not_to_another_run(tmp_path):
    directory, rounding = RunDir(tmp_path / "rl"), ROUNDED.rounding | {"token_budget"}
    here = replace(ROUNDED, parameters={**ROUNDED.parameters, "token_budget": 4096}, rounding=rounding)
    assert directory.planned_budget(here) == 0
    directory.begin(here, False)
    assert directory.planned_budget(here) == 0
    saved(directory, 1)
    smaller_gpu = replace(here, parameters={**here.parameters, "token_budget": 512})
    assert RunDir(directory.path).planned_budget(smaller_gpu) == 4096
    assert directory.planned_budget(replace(smaller_gpu, inputs=Inputs({"policy": "a larger one"}, {}))) == 0


def test_a_run_that_was_begun_before_something_that_only_rounds_was_noted_goes_on(tmp_path, capsys):
    directory = RunDir(tmp_path / "rl")
    directory.begin(ROUNDED, False)
    saved(directory, 1)
    rounding = ROUNDED.rounding | {"token_budget"}
    newer = replace(ROUNDED, parameters={**ROUNDED.parameters, "token_budget": 4096}, rounding=rounding)
    assert directory.planned_budget(newer) == 0
    assert directory.begin(newer, True) is False
    assert directory.resume_step() == 1
    assert "token_budget was None, is now 4096" in capsys.readouterr().err


def flip(path):
    path.write_bytes(bytes([path.read_bytes()[0] ^ 64]) + path.read_bytes()[1:])


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize("damage", [flip, cut, lambda path: path.unlink(), lambda path: path.write_text("")])
@pytest.mark.parametrize("name", ["weights", "digests.json"])
def test_from_a_damaged_state_a_run_goes_back_to_the_one_before_with_a_line(tmp_path, name, damage, capsys):
    directory = RunDir(tmp_path / "rl")
    directory.begin(IDENTITY, False)
    for step in (1, 2):
        saved(directory, step)
    damage(directory.state_dir(2) / name)
    directory.begin(IDENTITY, False)
    assert directory.resume_step() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "state/step_000002" in line and line.endswith("going back to the state before it")
    assert [row["step"] for row in directory.log_rows()] == [1]
    assert sorted(path.name for path in directory.path.glob("*/step_*")) == ["step_000001", "step_000001.jsonl"]
    damage(directory.state_dir(1) / name)
    before = files(directory.path)
    with pytest.raises(InputError, match=r"state/step_000001.*restore it, or move .*rl away to start over"):
        directory.resume_step()
    assert files(directory.path) == before


@pytest.mark.parametrize("log", ["", "step\tloss\n1\t0.5\n", "step\tloss\n1\tx\n2\t0.5\n", "\x00" * 40, "no\nlog\n"])
def test_a_log_that_lacks_steps_or_is_none_is_refused_and_nothing_is_lost(tmp_path, log):
    directory = RunDir(tmp_path / "rl")
    directory.begin(IDENTITY, False)
    for step in (1, 2):
        saved(directory, step)
    directory.log_path.write_text(log)
    before = files(directory.path)
    with pytest.raises(InputError, match=r"log\.tsv.*restore"):
        directory.resume_step()
    assert files(directory.path) == before


def test_what_else_lies_in_the_directory_is_passed_over(tmp_path):
    directory = RunDir(tmp_path / "rl")
    directory.begin(IDENTITY, False)
    saved(directory, 1)
    for name in ("state/step_x", "checkpoints/step_", "state/step_000003.old", "rollouts/step_1.bak"):
        (directory.path / name).mkdir(parents=True)
    assert directory.resume_step() == 1
    assert directory.last_checkpoint(9) is None


def test_a_directory_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "rl").mkdir()
    (tmp_path / "rl/thesis.tex").write_text("precious")
    for restart in (False, True):
        with pytest.raises(InputError, match="no rl run"):
            RunDir(tmp_path / "rl").begin(IDENTITY, restart)
    assert (tmp_path / "rl/thesis.tex").read_text() == "precious"


def finished(tmp_path, steps=2):
    identity = with_steps(IDENTITY, steps)
    directory = RunDir(tmp_path / "rl")
    directory.begin(identity, False)
    for step in range(1, steps + 1):
        saved(directory, step)
    directory.checkpoint(steps).mkdir(parents=True)
    directory.finish({"steps": steps}, identity.record)
    return directory, identity


def with_steps(identity, steps):
    return replace(identity, parameters={**identity.parameters, "steps": steps})


@pytest.mark.parametrize("restart", [False, True])
def test_a_finished_run_is_known_as_such_and_goes_on_if_it_is_given_more_steps(tmp_path, restart):
    directory, identity = finished(tmp_path)
    assert directory.begin(identity, restart) is True
    assert directory.begin(with_steps(identity, 4), restart) is False
    assert directory.resume_step() == 2
    assert (directory.path / "rollouts/step_000002.jsonl").exists() and directory.last_checkpoint(3).is_dir()
    assert not (directory.path / "manifest.json").exists(), "it is no longer finished"
    assert directory.begin(identity, restart) is False, "and may be ended where it was"


def test_fewer_steps_than_are_done_are_refused_and_start_over_if_the_user_asked_for_that(tmp_path):
    directory, identity = finished(tmp_path)
    with pytest.raises(InputError, match="holds 2 steps, more than --steps 1: give --steps 2, or more, or name anoth"):
        directory.begin(with_steps(identity, 1), False)
    assert directory.begin(identity, False) is True, "nothing was changed"
    assert directory.begin(with_steps(identity, 1), True) is False
    assert directory.resume_step() == 0


def test_a_run_that_is_going_on_may_be_given_any_number_of_steps_not_below_its_state(tmp_path):
    directory = RunDir(tmp_path / "rl")
    directory.begin(IDENTITY, False)
    for step in (1, 2, 3):
        saved(directory, step)
    for steps in (9, 3):
        assert directory.begin(with_steps(IDENTITY, steps), False) is False
    with pytest.raises(InputError, match="holds 3 steps, more than --steps 2"):
        directory.begin(with_steps(IDENTITY, 2), False)


def test_without_its_last_state_a_finished_run_can_not_be_made_longer(tmp_path):
    directory, identity = finished(tmp_path)
    directory.forget_state()
    assert directory.begin(identity, False) is True
    with pytest.raises(InputError, match="finished run of 2 steps without its last state"):
        directory.begin(with_steps(identity, 3), False)
    assert directory.begin(with_steps(identity, 3), True) is False
    assert directory.resume_step() == 0


def test_another_version_of_the_verifier_is_refused_by_name(tmp_path):
    directory, identity = finished(tmp_path)
    other = replace(identity, versions={"sympy": "1.14"})
    for changed in (other, with_steps(other, 5)):
        with pytest.raises(InputError, match=r"settings: sympy was 1\.13, is now 1\.14\. Give"):
            directory.begin(changed, False)
    assert directory.begin(other, True) is False
    assert directory.resume_step() == 0


def test_parts_of_a_run_alone_are_refused_and_moved_aside_where_the_user_asked_for_that(tmp_path):
    (tmp_path / "rl").mkdir()
    for name in ("metrics.json", ".gitignore"):  # as dvc puts them back without the rest
        (tmp_path / "rl" / name).write_text("{}")
    directory = RunDir(tmp_path / "rl")
    with pytest.raises(InputError, match=r"holds only metrics\.json of an rl run: restore the rest, or name another"):
        directory.begin(IDENTITY, False)
    assert directory.begin(IDENTITY, True) is False
    assert sorted(path.name for path in directory.path.iterdir()) == [".gitignore", "state"]
    assert len(list(tmp_path.glob("rl.before-*/metrics.json"))) == 1


def test_a_finished_run_that_has_lost_its_rollouts_is_not_taken_for_done(tmp_path):
    directory = RunDir(tmp_path / "rl")
    directory.begin(IDENTITY, False)
    for step in range(1, 6):
        saved(directory, step)
    directory.finish({"steps": 5}, IDENTITY.record)
    with pytest.raises(InputError, match="finished run without its checkpoints: restore that, or name another"):
        directory.begin(IDENTITY, False)
    assert directory.begin(IDENTITY, True) is False
    assert directory.resume_step() == 0 and not (directory.path / "manifest.json").exists()


def test_a_setting_without_effect_on_the_results_may_change_on_the_way(tmp_path):
    directory = RunDir(tmp_path / "rl")
    directory.begin(IDENTITY, False)
    saved(directory, 1)
    other = replace(IDENTITY, parameters={"lr": 0.2, "steps": 5})
    assert directory.begin(replace(other, free=frozenset({"lr"})), True) is False
    assert directory.resume_step() == 1
    with pytest.raises(InputError, match=r"lr was 0\.2, is now 0\.1"):
        directory.begin(IDENTITY, False)


@pytest.mark.parametrize("manifest", ['{"stage": "rft"}', '{"name": "a web page"}', "{}"])
def test_a_directory_with_a_manifest_of_something_else_is_never_removed(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(InputError, match="holds something that is no rl run"):
        RunDir(tmp_path).begin(IDENTITY, restart_if_changed=True)
    assert (tmp_path / "manifest.json").read_text() == manifest


def test_a_cut_manifest_is_a_plain_error(tmp_path):
    (tmp_path / "manifest.json").write_text('{"stage": "rl"')
    with pytest.raises(InputError, match=r"manifest\.json: not valid JSON"):
        RunDir(tmp_path).begin(IDENTITY, restart_if_changed=True)
