"""The rl output directory: claimed once, resumed at the last whole state, never mixed with another run."""

import pytest

from stages.core import jsonl
from stages.core.errors import InputError
from stages.rl.rundir import RunDir

IDENTITY = {"parameters": {"lr": 0.1, "steps": 5}, "inputs": {"policy": "abc"}}


def saved(directory, step):
    directory.state_dir(step).mkdir(parents=True)
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
    other = {"parameters": {"lr": 0.2, "steps": 5}, "inputs": {"policy": "abd"}}
    with pytest.raises(InputError, match=r"lr was 0.1, is now 0.2; the content of policy has changed.*or name another"):
        directory.begin(other, False)
    assert [record for _, record in jsonl.read(directory.path / "rollouts/step_000001.jsonl")] == [{"step": 1}]


def test_another_run_is_removed_where_the_user_asked_for_that(tmp_path):
    directory = RunDir(tmp_path / "rl")
    directory.begin(IDENTITY, False)
    saved(directory, 1)
    assert directory.begin({**IDENTITY, "inputs": {"policy": "x"}}, True) is False
    assert directory.resume_step() == 0
    assert not (directory.path / "rollouts").exists()


def test_a_directory_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "rl").mkdir()
    (tmp_path / "rl/thesis.tex").write_text("precious")
    for restart in (False, True):
        with pytest.raises(InputError, match="no rl run"):
            RunDir(tmp_path / "rl").begin(IDENTITY, restart)
    assert (tmp_path / "rl/thesis.tex").read_text() == "precious"


def test_a_finished_run_is_known_as_such_and_its_state_is_gone(tmp_path):
    directory = RunDir(tmp_path / "rl")
    directory.begin(IDENTITY, False)
    saved(directory, 1)
    directory.checkpoint(1).mkdir(parents=True)
    directory.finish({"steps": 1}, {**IDENTITY, "stage": "rl"})
    assert not directory.state.exists()
    assert directory.begin(IDENTITY, False) is True
    with pytest.raises(InputError, match="steps was 5, is now 9"):
        directory.begin({**IDENTITY, "parameters": {"lr": 0.1, "steps": 9}}, False)


def test_parts_of_a_run_alone_are_refused_and_replaced_where_the_user_asked_for_that(tmp_path):
    for name in ("metrics.json", ".gitignore"):  # as dvc puts them back without the rest
        (tmp_path / name).write_text("{}")
    directory = RunDir(tmp_path)
    with pytest.raises(InputError, match=r"holds only metrics\.json of an rl run: restore the rest, or name another"):
        directory.begin(IDENTITY, False)
    assert directory.begin(IDENTITY, True) is False
    assert sorted(path.name for path in tmp_path.iterdir()) == [".gitignore", "state"]


def test_a_finished_run_that_has_lost_its_rollouts_is_not_taken_for_done(tmp_path):
    directory = RunDir(tmp_path / "rl")
    directory.begin(IDENTITY, False)
    saved(directory, 1)
    directory.finish({"steps": 1}, {**IDENTITY, "stage": "rl"})
    with pytest.raises(InputError, match="finished run without its checkpoints: restore that, or name another"):
        directory.begin(IDENTITY, False)
    assert directory.begin(IDENTITY, True) is False
    assert directory.resume_step() == 0 and not (directory.path / "manifest.json").exists()


def test_a_setting_without_effect_on_the_results_may_change_on_the_way(tmp_path):
    directory = RunDir(tmp_path / "rl")
    directory.begin(IDENTITY, False)
    saved(directory, 1)
    other = {**IDENTITY, "parameters": {"lr": 0.1, "steps": 6}}
    assert directory.begin(other, True, free=("steps",)) is False
    assert directory.resume_step() == 1
    with pytest.raises(InputError, match="steps was 5, is now 6"):
        directory.begin(other, False)


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
