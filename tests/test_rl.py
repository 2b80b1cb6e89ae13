"""The rl stage run for real: the real engine, real updates, killed and resumed, refused and stopped."""

import filecmp
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages import rl
from stages.core import jsonl, lifetime, records
from stages.core.drawing.engine import VllmEngine
from stages.core.drawing.rollouts import OWN_PROMPTS
from stages.core.errors import InputError
from stages.core.policy import checkpoints
from stages.rl.rundir import RunDir
from tests import ranks, warm

TIMINGS = ("seconds", "handover_s", "update_s", "generate_s", "verify_s", "valid_s", "tokens_per_s")
SMALL = (  # noqa: SIM905
    "--template none --problems-per-step 8 --group-size 16 --max-tokens 32 --overlong-buffer 0 --minibatches 2 "
    "--lr 2e-3 --warmup-steps 0 --max-rounds 3"
).split()


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """Problems whose answer is always 7, or "seven": a policy that boxes anything at all soon learns to say so.

    Each has a prompt of its own, without the words of the problem.
    """
    path = tmp_path_factory.mktemp("easy") / "easy.jsonl"
    sums = [(a, b) for a in range(1, 10) for b in range(1, 5)]
    own = {f"{a}+{b}": f"{a}+{b}=?" for a, b in sums}
    seven = {"answer": "seven", "other_answers": ["7"]}
    problems = ({"id": i, "problem": f"What is {text}", "source": "easy", "prompt": text} | seven
                for i, text in own.items())  # fmt: skip
    jsonl.write(path, problems)
    return path


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """A validation set whose prompts are longer than those of `easy`."""
    path = tmp_path_factory.mktemp("held_out") / "held_out.jsonl"
    sums = [f"{a}+{b}+{a}+1=?" for a in range(1, 5) for b in range(1, 3)]
    jsonl.write(path, ({"id": text, "problem": text, "answer": "7", "source": "held_out"} for text in sums))
    return path


def command(policy, problems, out, *options):
    return ["rl", "--policy", str(policy), "--problems", str(problems), "--out", str(out), *SMALL, *map(str, options)]


def options_for(policy, problems, out, **settings):
    return rl.Options(policy=str(policy), problems=problems, out=out, template="none", **settings)


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


@pytest.fixture(scope="module")
def whole_run(toy, easy, held_out, tmp_path_factory):
    """An uninterrupted run of 8 steps, measured on a validation set."""
    out = tmp_path_factory.mktemp("whole") / "rl"
    options = ("--steps", 8, "--save-every", 2, "--checkpoint-every", 4, "--valid", held_out, "--valid-every", 4)
    arguments = command(toy / "policy", easy, out, *options)
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
        assert all(rollout["prompt"] == f"{rollout['problem_id']}=?" for rollout in rollouts)
        assert row["num_kept"] == 8 or row["short_batch"] == 1
        keys = [(rollout["problem_id"], rollout["sample"]) for rollout in rollouts]
        assert len(set(keys)) == len(keys)


@pytest.mark.slow
def test_engine_and_trainer_agree_after_every_hand_over(whole_run):
    assert max(row["mismatch_max"] for row in RunDir(whole_run).log_rows() if row["update_tokens"]) < 1e-4


@pytest.mark.slow
def test_a_finished_run_leaves_checkpoints_metrics_and_the_last_state(whole_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert sorted(path.name for path in (whole_run / "checkpoints").iterdir()) == ["step_000004", "step_000008"]
    AutoModelForCausalLM.from_pretrained(whole_run / "checkpoints/step_000008")
    AutoTokenizer.from_pretrained(whole_run / "checkpoints/step_000008")
    metrics = json.loads((whole_run / "metrics.json").read_bytes())
    manifest = json.loads((whole_run / "manifest.json").read_bytes())
    assert metrics["steps"] == manifest["parameters"]["steps"] == 8
    used = {"tokens_per_microbatch": 0, "token_budget": 2048, "processes": 1}  # as asked for, and as used
    assert used.items() <= manifest["parameters"].items()
    assert metrics["num_rollouts"] == sum(row["num_rollouts"] for row in RunDir(whole_run).log_rows())
    assert metrics["mismatch_alarms"] == 0
    assert manifest["template_digest"] == OWN_PROMPTS
    assert sorted(path.name for path in (whole_run / "state").iterdir()) == ["run.json", "step_000008"]


@pytest.mark.slow
def test_while_it_trains_a_run_measures_what_eval_does_of_its_checkpoints(whole_run, toy, held_out, tmp_path):
    policies = ("--policy", toy / "policy", "--policy", whole_run / "checkpoints")
    shape = ("--template", "none", "--max-tokens", 32, "--num-samples", 4, "--k", 4)
    arguments = ["eval", *policies, "--problems", held_out, "--out", tmp_path / "eval", *shape]
    code, printed = run(list(map(str, arguments)), tmp_path / "eval.log")
    assert code == 0, printed
    assert printed.count("was trained with prompts of its problems' own, and is now prompted with none") == 2
    of_policies = json.loads((tmp_path / "eval/metrics.json").read_bytes())["policies"].values()
    rows, metrics = RunDir(whole_run).log_rows(), json.loads((whole_run / "metrics.json").read_bytes())
    assert [row["step"] for row in rows if "valid" in row] == [4, 8]
    measured = [rows[0]["valid_start"], rows[3]["valid"], rows[7]["valid"]]
    assert measured == pytest.approx([of_policy["avg@4"]["value"] for of_policy in of_policies], abs=1e-5)
    assert measured[2] > measured[0]
    assert metrics["valid_start"] == measured[0]
    assert metrics["valid_last"] == measured[2]


@pytest.mark.slow
def test_killed_terminated_and_made_longer_a_run_ends_bit_for_bit_as_if_nothing_had_happened(
    whole_run, toy, easy, held_out, tmp_path
):
    """Nor do measurements change anything: this run makes others than `whole_run` does."""
    out = tmp_path / "rl"
    arguments = command(toy / "policy", easy, out, "--save-every", 2, "--checkpoint-every", 4, "--steps")
    moments = [
        lambda: (out / "rollouts/step_000001.jsonl").exists(),  # in the first step, before any state
        lambda: (out / "rollouts/step_000003.jsonl").exists(),
    ]
    for moment, ending in zip(moments, (signal.SIGKILL, signal.SIGINT), strict=True):
        process = warm.start([*arguments, "4"], tmp_path, tmp_path / "killed.log")
        wait_for(moment, process.is_alive)
        os.kill(process.pid, ending)
        process.join()
        assert not (out / "manifest.json").exists()
    assert process.exitcode == 130
    last = (tmp_path / "killed.log").read_text().splitlines()[-1]
    assert re.fullmatch(r"rloop: stopped (while step 3 was drawn, with 2 steps done|after step 3); the same .*", last)
    code, printed = run([*arguments, "4"], tmp_path / "rl.log")
    assert code == 0, printed
    assert json.loads((out / "metrics.json").read_bytes())["steps"] == 4

    other = [*arguments, "8", "--valid", str(easy), "--valid-every", "1"]
    process = warm.start(other, tmp_path, tmp_path / "terminated.log")
    wait_for(lambda: len(RunDir(out).log_rows()) == 5, process.is_alive)
    code, printed = run([*arguments, "8"], tmp_path / "second.log")
    assert code == 2
    assert "being written by another process" in printed
    process.terminate()
    process.join(120)
    assert process.exitcode == 143
    done = len(RunDir(out).log_rows())
    assert max(path.name for path in (out / "state").glob("step_*")) == f"step_{done:06d}"
    assert len(list((out / "rollouts").iterdir())) == done
    assert not (out / "manifest.json").exists()

    code, printed = run([*arguments, "8", "--valid", str(held_out), "--valid-every", "5"], tmp_path / "rl.log")
    assert code == 0, printed
    for kind in (
        "rollouts/*",
        "checkpoints/*/*",
        "state/*/[!.d]*",
    ):  # torch notes a path and a random name in .metadata, of which digests.json has a digest
        names = sorted(str(path.relative_to(whole_run)) for path in whole_run.glob(kind))
        assert names == sorted(str(path.relative_to(out)) for path in out.glob(kind))
        assert all(filecmp.cmp(whole_run / name, out / name, shallow=False) for name in names)
    rows = [RunDir(path).log_rows() for path in (whole_run, out)]
    assert rows[0][7]["valid"] == rows[1][7]["valid"]
    assert "36 of 36 problems of --valid are trained on, too" in (tmp_path / "terminated.log").read_text()
    assert "valid" in rows[1][4], "step 5, of the part that was terminated"
    apart = {*TIMINGS, "valid", "valid_start"}
    stripped = [[{name: row[name] for name in row.keys() - apart} for row in of_run] for of_run in rows]
    assert stripped[0] == stripped[1]
    code, printed = run([*arguments, "8", "--no-keep-state"], tmp_path / "rl.log")
    assert code == 0, printed
    assert not (out / "state").exists()


@pytest.mark.slow
def test_on_two_threads_too_a_run_made_longer_ends_bit_for_bit_as_one_in_one_go(toy, easy, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    for out, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        arguments = command(toy / "policy", easy, tmp_path / out, "--steps", steps, "--checkpoint-every", 4)
        done = subprocess.run(
            [sys.executable, "-m", "rloop_cli", *arguments], cwd=ranks.ROOT, env=environment, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    names = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").glob("rollouts/*")]
    for name in (*names, Path("checkpoints/step_000004/model.safetensors")):
        assert filecmp.cmp(tmp_path / "whole" / name, tmp_path / "parts" / name, shallow=False), name
    assert any(row["update_tokens"] for row in RunDir(tmp_path / "whole").log_rows())


@pytest.mark.slow
def test_in_bfloat16_too_a_hand_over_that_does_nothing_ends_in_one_line(toy, easy, tmp_path):
    log = tmp_path / "log"
    arguments = command(toy / "policy", easy, tmp_path / "rl", "--steps", 2, "--dtype", "bfloat16")
    process = multiprocessing.get_context("forkserver").Process(target=idle_hand_over, args=(arguments, str(log)))
    process.start()
    process.join()
    assert process.exitcode == 2
    said = [line for line in log.read_text().splitlines() if line.startswith("rloop:")]
    assert sum("vLLM cannot take new weights of its kind" in line for line in said) == 1
    assert "vLLM cannot take new weights of its kind" in said[-1]
    assert "Traceback" not in log.read_text()


def idle_hand_over(arguments, log):
    """`rloop ARGUMENTS` with an engine that says thank you for new weights and goes on with those it has."""
    VllmEngine.load = lambda self, weights: [name for name, _ in weights]
    warm._command(arguments, str(Path(log).parent), log)


@pytest.mark.slow
def test_what_a_run_holds_is_neither_mixed_nor_lost_and_the_refusal_is_one_line(whole_run, toy, easy, tmp_path):
    before = sorted((path, path.stat().st_mtime_ns) for path in whole_run.rglob("*"))
    often = "--save-every", 2, "--checkpoint-every", 4
    for options, message in (
        (("--steps", 7, *often), "holds 8 steps, more than --steps 7"),
        (("--steps", 9, *often, "--lr", "1e-3"), "lr was 0.002, is now 0.001"),
    ):
        code, printed = run(command(toy / "policy", easy, whole_run, *options), tmp_path / "log")
        assert code == 2
        assert message in printed
        assert len([line for line in printed.splitlines() if line.startswith("rloop")]) == 1
        assert "Traceback" not in printed
    code, printed = run(command(toy / "policy", easy, whole_run, "--steps", 8, *often), tmp_path / "log")
    assert code == 0
    assert "nothing to do" in printed
    assert sorted((path, path.stat().st_mtime_ns) for path in whole_run.rglob("*")) == before


@pytest.mark.parametrize(
    ("option", "message"),
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
        ({"entropy_target": -0.1}, "--entropy-target -0.1"),
        ({"entropy_delta": 0.1}, "--entropy-delta 0.1 with --entropy-target 0: give both, or neither"),
        ({"entropy_target": 0.1, "entropy_delta": 0.0}, "--entropy-delta 0 with --entropy-target 0.1: give both"),
        ({"rollout_dtype": "fp8", "importance_cap": 0.0}, "--rollout-dtype fp8 .* needs --importance-cap"),
    ],
)
def test_a_option_that_can_not_work_is_refused_in_its_own_name(option, message):
    with pytest.raises(InputError, match=message):
        rl.Settings(**option)


def test_max_tokens_beyond_the_context_is_refused_before_anything_starts(tiny_policy, easy, tmp_path):
    with pytest.raises(InputError, match="--max-tokens 5000 does not fit the policy's context"):
        rl.run(options_for(tiny_policy, easy, tmp_path / "rl", max_tokens=5000))
    assert not (tmp_path / "rl").exists()


def test_an_entropy_that_no_policy_can_have_is_refused_before_anything_starts(tiny_policy, easy, tmp_path):
    with pytest.raises(InputError, match=r"--entropy-target 5: must be below 4\.\d+ nats a token") as caught:
        rl.run(options_for(tiny_policy, easy, tmp_path / "rl", max_tokens=32, overlong_buffer=0, entropy_target=5.0))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "rl").exists()


def test_fp8_rollouts_are_refused_without_a_gpu(tiny_policy, easy, tmp_path):
    with pytest.raises(InputError, match="--rollout-dtype fp8: it takes a GPU"):
        rl.run(options_for(tiny_policy, easy, tmp_path / "rl", rollout_dtype="fp8", max_tokens=32))


def test_weights_of_another_shape_are_refused_before_anything_is_written(tiny_policy, easy, tmp_path):
    policy = shutil.copytree(tiny_policy, tmp_path / "policy")
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(InputError, match=r"has shape .* config\.json asks for"):
        rl.run(options_for(policy, easy, tmp_path / "rl", max_tokens=32, overlong_buffer=0))
    assert not (tmp_path / "rl").exists()


STARTER = (  # under nohup a run is meant to outlive its starter, so SIGHUP is put back
    "import signal, subprocess, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    "subprocess.Popen(['bash', '-c', '\"$@\"; true', *sys.argv]); input()"
)


def processes_of(word):
    """The ids of all processes with `word` in their command line."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if word.encode() in lifetime._proc(pid, "cmdline")]


def check_the_ranks_work(out, steps):
    """The log agrees with the rollouts of each step, whose groups are whole."""
    assert json.loads((out / "manifest.json").read_bytes())["parameters"]["processes"] == 2
    rows = RunDir(out).log_rows()
    assert len(rows) == steps
    for row in rows:
        rollouts = list(records.read(out / f"rollouts/step_{int(row['step']):06d}.jsonl", records.Rollout))
        assert len(rollouts) == row["num_groups"] * 16
        assert row["num_kept"] <= 8
        groups = [[rollout["problem_id"] for rollout in rollouts[i : i + 16]] for i in range(0, len(rollouts), 16)]
        assert all(len(set(group)) == 1 for group in groups)


@pytest.mark.slow
def test_two_processes_end_with_the_starter_of_their_launcher_and_go_on_when_started_again(toy, easy, tmp_path):
    out, environment = tmp_path / "rl", os.environ | ranks.ENVIRONMENT
    arguments = command(toy / "policy", easy, out, "--save-every", 100, "--steps")
    launch = [*ranks.DDP, *arguments]
    log = (tmp_path / "log").open("w")
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, *launch, "500"],
        env=environment,
        cwd=ranks.ROOT,
        stdin=subprocess.PIPE,
        stderr=log,
    )
    try:
        wait_for(lambda: RunDir(out).log_rows(), lambda: starter.poll() is None)
        starter.kill()
        starter.wait()
        wait_for(lambda: not processes_of(str(out)), lambda: True, 120)
    finally:
        for pid in processes_of(str(out)):
            os.kill(pid, signal.SIGKILL)
    done = len(RunDir(out).log_rows())
    assert max(path.name for path in (out / "state").glob("step_*")) == f"step_{done:06d}"
    assert len(list((out / "rollouts").iterdir())) == done
    (said,) = (line for line in (tmp_path / "log").read_text().splitlines() if "rloop: stopped" in line)
    assert str(done) in said

    again = subprocess.run(
        [*launch, str(done + 1)], env=environment, cwd=ranks.ROOT, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"going on after step {done}" in again.stderr
    check_the_ranks_work(out, done + 1)
    assert max(row["mismatch_max"] for row in RunDir(out).log_rows() if row["update_tokens"]) < 1e-4


@pytest.mark.slow
def test_the_paper_s_combination_goes_on_after_a_kill_as_if_nothing_had_happened(toy, easy, held_out, tmp_path):
    """Two ranks, bfloat16, FSDP2, gradient checkpointing, mini-batches; a copy of what lay on disk after step 1."""
    out, killed = tmp_path / "rl", tmp_path / "killed"
    options = ("--steps", 2, "--save-every", 1, "--checkpoint-every", 1, "--dtype", "bfloat16")
    options = (*options, "--valid", held_out, "--valid-every", 1, "--valid-samples", 3)
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
    check_the_ranks_work(out, 2)
    for name in sorted(path.relative_to(out) for kind in ("rollouts/*", "checkpoints/*/*") for path in out.glob(kind)):
        assert filecmp.cmp(out / name, killed / name, shallow=False), name
    for row, again in zip(RunDir(out).log_rows(), RunDir(killed).log_rows(), strict=True):
        assert all(row[name] == again[name] for name in row.keys() - set(TIMINGS))
        assert row["num_kept"] >= 1
        assert row["skipped_updates"] == 0
        assert 1e-4 < row["mismatch"] < 0.05  # nats a token: that of bfloat16
    measured = [row["valid"] for row in RunDir(out).log_rows()] + [RunDir(out).log_rows()[0]["valid_start"]]
    assert all(24 * value == pytest.approx(round(24 * value), abs=1e-3) for value in measured)
    assert any(measured)
    config = json.loads((out / "checkpoints/step_000002/config.json").read_text())
    assert config["dtype"] == "bfloat16"


@pytest.mark.slow
def test_with_adapters_and_own_rewards_a_run_goes_on_after_a_kill_as_if_nothing_had_happened(toy, easy, tmp_path):
    out, killed, reward = tmp_path / "rl", tmp_path / "killed", tmp_path / "short.py"
    reward.write_text(
        "def short(completions, answer, **_):\n    return [1 / (1 + len(text)) for text in completions]\n"
    )
    options = ("--steps", 3, "--save-every", 1, "--checkpoint-every", 1, "--lora-rank", 4, "--lr", 1e-2)
    rewards = ("--reward", "math-verify", "--reward", f"{reward}:short")
    options = (*options, *rewards, "--reward-weight", 1, "--reward-weight", 0.5)
    process = warm.start(command(toy / "policy", easy, out, *options), tmp_path, tmp_path / "log")
    wait_for(lambda: (out / "state/step_000001").exists(), process.is_alive)
    os.kill(process.pid, signal.SIGSTOP)
    shutil.copytree(out, killed)
    os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    code, printed = run(command(toy / "policy", easy, killed, *options), tmp_path / "log")
    assert code == 0, printed
    assert "going on after step 1" in printed
    for name in sorted(path.relative_to(out) for kind in ("rollouts/*", "checkpoints/*/*") for path in out.glob(kind)):
        assert filecmp.cmp(out / name, killed / name, shallow=False), name
    assert all(row["mismatch_max"] < 1e-4 for row in RunDir(out).log_rows())
    start, first, last = (
        dict(checkpoints.disk_weights(path))
        for path in (toy / "policy", out / "checkpoints/step_000001", out / "checkpoints/step_000003")
    )
    assert {name for name in start if not start[name].equal(last[name])} == {n for n in start if "proj.weight" in n}
    assert not any(first[name].equal(last[name]) for name in first if "proj.weight" in name)
    parameters = json.loads((out / "manifest.json").read_bytes())["parameters"]
    assert (parameters["reward"], parameters["reward_weight"]) == (["math-verify", "short.py:short"], [1.0, 0.5])
    rollouts = list(records.read(out / "rollouts/step_000001.jsonl", records.Rollout))
    for rollout in rollouts:
        each = {
            "math-verify": rollout["rewards"]["math-verify"],
            "short.py:short": 1 / (1 + len(rollout["completion"])),
        }
        assert rollout["rewards"] == each
        assert rollout["reward"] == each["math-verify"] + 0.5 * each["short.py:short"]
        assert (rollout["verdict"] == "correct") == (each["math-verify"] == 1)
    reward.write_text(reward.read_text().replace("1 +", "2 +"))
    code, printed = run(command(toy / "policy", easy, out, *options), tmp_path / "log")
    assert code == 2
    assert "begun with other settings: reward_digest was" in printed


def test_a_learning_rate_that_overflows_the_weights_is_refused_before_anything_starts(tiny_policy, easy, tmp_path):
    with pytest.raises(InputError, match=r"--lr 1e\+300: must be at most 1"):
        rl.run(options_for(tiny_policy, easy, tmp_path / "rl", lr=1e300))
    assert not (tmp_path / "rl").exists()
