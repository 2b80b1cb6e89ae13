"""The rl stage run for real: the real engine, real updates, killed and resumed, refused and stopped."""

import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rloop_cli import warm
from stages.core import jsonl, records
from stages.core.errors import InputError
from stages.core.rundir import RunDir
from stages.rl import Knobs
from tests import ranks

TIMINGS = ("seconds", "handover_s", "update_s", "generate_s", "verify_s", "tokens_per_s")
SMALL = (  # noqa: SIM905
    "--template none --problems-per-step 8 --group-size 16 --max-tokens 32 --overlong-buffer 0 --minibatches 2 "
    "--lr 2e-3 --warmup-steps 0 --max-rounds 3"
).split()


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """Problems whose answer is always 7: a policy that boxes anything at all soon learns to say so."""
    path = tmp_path_factory.mktemp("easy") / "easy.jsonl"
    sums = [(a, b) for a in range(1, 10) for b in range(1, 5)]
    jsonl.write(path, ({"id": f"{a}+{b}", "problem": f"{a}+{b}=?", "answer": "7", "source": "easy"} for a, b in sums))
    return path


def command(policy, problems, out, *options):
    return ["rl", "--policy", str(policy), "--problems", str(problems), "--out", str(out), *SMALL, *map(str, options)]


def run(arguments, log):
    """Run `rloop ARGUMENTS` to its end: its exit code, and what it printed."""
    log.unlink(missing_ok=True)
    process = warm.start(arguments, log.parent, log)
    process.join()
    return process.exitcode, log.read_text()


def wait_for(condition, is_alive, limit_s=300):
    end = time.monotonic() + limit_s
    while not condition():
        assert is_alive(), "the run ended by itself"
        assert time.monotonic() < end, "the moment never came"
        time.sleep(0.002)


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture(scope="module")
def whole_run(toy, easy, tmp_path_factory):
    """An uninterrupted run of 8 steps."""
    out = tmp_path_factory.mktemp("whole") / "rl"
    arguments = command(toy / "policy", easy, out, "--steps", 8, "--save-every", 2, "--checkpoint-every", 4)
    code, printed = run(arguments, out.with_suffix(".log"))
    assert code == 0, printed
    return out


@pytest.mark.slow
def test_the_reward_rises_on_an_easy_set_and_the_rollouts_add_up(whole_run):
    rows = RunDir(whole_run).log_rows()
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert sum(row["pass_rate"] for row in rows[-2:]) > sum(row["pass_rate"] for row in rows[:2]) + 0.2
    for row in rows:
        rollouts = list(records.read(whole_run / f"rollouts/step_{int(row['step']):06d}.jsonl", records.Rollout))
        assert len(rollouts) == row["num_groups"] * 16 == row["num_rollouts"]
        assert sum(rollout["trained"] for rollout in rollouts) == row["num_kept"] * 16 == row["num_trained"]
        assert sum(rollout["num_tokens"] for rollout in rollouts) == row["rollout_tokens"]
        assert sum(rollout["reward"] for rollout in rollouts) / len(rollouts) == pytest.approx(
            row["pass_rate"], rel=1e-5
        )
        assert row["num_kept"] == 8 or row["short_batch"] == 1
        keys = [(rollout["problem_id"], rollout["sample"]) for rollout in rollouts]
        assert len(set(keys)) == len(keys)


@pytest.mark.slow
def test_engine_and_trainer_agree_after_every_hand_over(whole_run):
    assert all(row["mismatch_max"] < 1e-4 for row in RunDir(whole_run).log_rows() if row["update_tokens"])


@pytest.mark.slow
def test_a_finished_run_leaves_checkpoints_metrics_and_no_state(whole_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert sorted(path.name for path in (whole_run / "checkpoints").iterdir()) == ["step_000004", "step_000008"]
    AutoModelForCausalLM.from_pretrained(whole_run / "checkpoints/step_000008")
    AutoTokenizer.from_pretrained(whole_run / "checkpoints/step_000008")
    metrics = json.loads((whole_run / "metrics.json").read_bytes())
    manifest = json.loads((whole_run / "manifest.json").read_bytes())
    assert metrics["steps"] == manifest["parameters"]["steps"] == 8
    assert metrics["num_rollouts"] == sum(row["num_rollouts"] for row in RunDir(whole_run).log_rows())
    assert not (whole_run / "state").exists()


@pytest.mark.slow
def test_killed_at_three_moments_the_run_ends_bit_for_bit_as_if_nothing_had_happened(whole_run, toy, easy, tmp_path):
    out = tmp_path / "rl"
    arguments = command(toy / "policy", easy, out, "--steps", 8, "--save-every", 2, "--checkpoint-every", 4)
    moments = [
        lambda: (out / "rollouts/step_000001.jsonl").exists(),  # in the first step, before any state
        lambda: (out / "rollouts/step_000004.jsonl").exists(),  # between two states
        lambda: (out / "checkpoints/step_000004").exists() and not (out / "state/step_000004").exists(),
    ]
    for moment in moments:
        process = warm.start(arguments, tmp_path, tmp_path / "killed.log")
        wait_for(moment, process.is_alive)
        process.kill()
        process.join()
        assert not (out / "manifest.json").exists()
    code, printed = run(arguments, tmp_path / "rl.log")
    assert code == 0, printed
    for kind in ("rollouts/*", "checkpoints/*/*"):
        names = sorted(str(path.relative_to(whole_run)) for path in whole_run.glob(kind))
        assert names == sorted(str(path.relative_to(out)) for path in out.glob(kind))
        assert all(filecmp.cmp(whole_run / name, out / name, shallow=False) for name in names)
    stripped = [
        [{name: value for name, value in row.items() if name not in TIMINGS} for row in RunDir(path).log_rows()]
        for path in (whole_run, out)
    ]
    assert stripped[0] == stripped[1]


@pytest.mark.slow
def test_sigterm_and_the_death_of_the_starter_both_save_and_end_the_run(toy, easy, tmp_path):
    out = tmp_path / "rl"
    arguments = command(toy / "policy", easy, out, "--steps", 500, "--save-every", 100)
    process = warm.start(arguments, tmp_path, tmp_path / "first.log")
    wait_for(lambda: (out / "log.tsv").exists(), process.is_alive)
    code, printed = run(arguments, tmp_path / "second.log")
    assert code == 2
    assert "being written by another process" in printed
    process.terminate()
    process.join(120)
    assert process.exitcode == 143
    saved = RunDir(out).log_rows()[-1]["step"]
    assert (out / f"state/step_{int(saved):06d}").is_dir()

    starter = (  # under nohup a run is meant to outlive its starter, so SIGHUP is put back
        "import signal, subprocess, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
        "print(subprocess.Popen(sys.argv[1:]).pid, flush=True); input()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", starter, sys.executable, "-m", "rloop_cli", *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    child = int(parent.stdout.readline())
    try:
        wait_for(lambda: RunDir(out).log_rows()[-1]["step"] > saved, lambda: parent.poll() is None)
        parent.kill()
        parent.wait()
        wait_for(lambda: is_gone(child), lambda: True, 120)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    assert (out / f"state/step_{int(RunDir(out).log_rows()[-1]['step']):06d}").is_dir()


@pytest.mark.slow
def test_other_parameters_in_the_same_out_are_refused_in_one_line(whole_run, toy, easy, tmp_path):
    before = sorted((path, path.stat().st_mtime_ns) for path in whole_run.rglob("*"))
    often = "--save-every", 2, "--checkpoint-every", 4
    code, printed = run(command(toy / "policy", easy, whole_run, "--steps", 9, *often), tmp_path / "log")
    assert code == 2
    assert "steps was 8, is now 9" in printed
    assert "Traceback" not in printed
    code, printed = run(command(toy / "policy", easy, whole_run, "--steps", 8, *often), tmp_path / "log")
    assert code == 0
    assert "nothing to do" in printed
    assert sorted((path, path.stat().st_mtime_ns) for path in whole_run.rglob("*")) == before


@pytest.mark.parametrize(
    ("knob", "message"),
    [
        ({"group_size": 1}, "--group-size 1"),
        ({"steps": 0}, "--steps 0"),
        ({"temperature": 0.0}, "--temperature"),
        ({"overlong_buffer": 9999}, "--overlong-buffer 9999"),
        ({"dtype": "float8"}, "--dtype float8"),
        ({"clip_low": 1.0}, "--clip-low"),
        ({"clip_high": -0.1}, "--clip-high -0.1"),
        ({"lr": -1.0}, "--lr -1.0"),
        ({"beta2": 1.0}, "--beta2 1.0"),
        ({"max_grad_norm": 0.0}, "--max-grad-norm 0.0"),
        ({"memory_fraction": 7.0}, "--memory-fraction 7.0"),
    ],
)
def test_a_knob_that_can_not_work_is_refused_in_its_own_name(knob, message):
    with pytest.raises(InputError, match=message):
        Knobs(**knob)


def test_max_tokens_beyond_the_context_is_refused_before_anything_starts(tiny_policy, easy, tmp_path):
    from stages.rl import run as rl

    with pytest.raises(InputError, match="--max-tokens 5000 does not fit the policy's context"):
        rl(str(tiny_policy), easy, tmp_path / "rl", Knobs(max_tokens=5000, template="none"))
    assert not (tmp_path / "rl").exists()


def test_weights_of_another_shape_are_refused_before_anything_is_written(tiny_policy, easy, tmp_path):
    from stages.rl import run as rl

    policy = shutil.copytree(tiny_policy, tmp_path / "policy")
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(InputError, match=r"has shape .* config\.json asks for"):
        rl(str(policy), easy, tmp_path / "rl", Knobs(max_tokens=32, overlong_buffer=0, template="none"))
    assert not (tmp_path / "rl").exists()


def add_up(out):
    """Whether the log agrees with the rollouts of each step, whose groups are whole."""
    assert json.loads((out / "manifest.json").read_bytes())["parameters"]["processes"] == 2
    for row in RunDir(out).log_rows():
        rollouts = list(records.read(out / f"rollouts/step_{int(row['step']):06d}.jsonl", records.Rollout))
        assert len(rollouts) == row["num_groups"] * 16
        assert row["num_kept"] <= 8
        groups = [[rollout["problem_id"] for rollout in rollouts[i : i + 16]] for i in range(0, len(rollouts), 16)]
        assert all(len(set(group)) == 1 for group in groups)


@pytest.mark.slow
def test_two_processes_draw_and_train_together_and_one_writes(toy, easy, tmp_path):
    launch = (
        *(sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"),
        *("--config_file", str(ranks.ROOT / "configs/accelerate/cpu2.yaml"), "-m", "rloop_cli"),
    )
    arguments = command(toy / "policy", easy, tmp_path / "rl", "--steps", 2, "--save-every", 1)
    done = subprocess.run(
        [*launch, *arguments], env=os.environ | ranks.ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    add_up(tmp_path / "rl")
    for row in RunDir(tmp_path / "rl").log_rows():
        assert row["update_tokens"] == 0 or row["mismatch_max"] < 1e-4


@pytest.mark.slow
def test_the_paper_s_combination_goes_on_after_a_kill_as_if_nothing_had_happened(toy, easy, tmp_path):
    """Two ranks, bfloat16, FSDP2, gradient checkpointing, mini-batches; a copy of what lay on disk after step 1."""
    out, killed = tmp_path / "rl", tmp_path / "killed"
    options = ("--steps", 2, "--save-every", 1, "--checkpoint-every", 1, "--dtype", "bfloat16")
    launch = [*ranks.LAUNCH, *command(toy / "policy", easy, out, *options, "--gradient-checkpointing")]
    environment = os.environ | ranks.ENVIRONMENT
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(launch, env=environment, cwd=ranks.ROOT, stdout=log, stderr=log)
        wait_for(lambda: (out / "state/step_000001").exists(), lambda: run.poll() is None)
        shutil.copytree(out, killed)
        assert run.wait() == 0, (tmp_path / "log").read_text()[-3000:]
    assert not (killed / "checkpoints/step_000002").exists()
    launch[launch.index(str(out))] = str(killed)
    done = subprocess.run(launch, env=environment, cwd=ranks.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on after step 1" in done.stderr
    add_up(out)
    for name in sorted(path.relative_to(out) for kind in ("rollouts/*", "checkpoints/*/*") for path in out.glob(kind)):
        assert filecmp.cmp(out / name, killed / name, shallow=False), name
    for row, again in zip(RunDir(out).log_rows(), RunDir(killed).log_rows(), strict=True):
        assert all(row[name] == again[name] for name in row.keys() - set(TIMINGS))
        assert row["num_kept"] >= 1
        assert row["skipped_updates"] == 0
        assert 1e-4 < row["mismatch"] < 0.05  # nats a token: that of bfloat16
    config = json.loads((out / "checkpoints/step_000002/config.json").read_text())
    assert config["dtype"] == "bfloat16"
