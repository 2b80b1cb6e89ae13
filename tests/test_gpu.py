"""What only a GPU can show: `make gpu-check` runs these there. Elsewhere they are skipped, but for the last."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks import gpu_check, gpu_quarter_hour
from benchmarks.gpu_quarter_hour import Bench, Part, Scale
from stages import rl
from stages.core import jsonl
from stages.core.policy import acceleration
from stages.rl.trainer import TokenRollout, Trainer, start_accelerator
from tests.ranks import ROOT
from tests.test_trainer import OPTIONS

GIB = 2**30
SHARE = 0.2  # of the GPU's memory, for the engine
PROMPTS = [[5 + i, 9, 7 + i % 3] for i in range(16)]

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two GPUs")


@pytest.fixture(scope="module", params=["qwen2", "llama"])  # vLLM 0.23 has another runner for each
def policy(make_policy, request):
    """Random weights with heads of 64, a size that every kernel for attention knows."""
    return make_policy(
        std=0.05, kind=request.param, hidden_size=256, intermediate_size=512, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pair(policy):
    """An engine that sleeps and a trainer on the same GPU, both in bfloat16, as rl puts them together."""
    from stages.core.drawing.engine import EngineOptions, VllmEngine

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = start_accelerator(rl.Settings(dtype="bfloat16"))
    engine = VllmEngine(policy, EngineOptions(dtype="bfloat16", memory_fraction=SHARE), max_model_len=96, sleeps=True)
    trainer = Trainer(policy, accelerator, replace(OPTIONS, gradient_checkpointing=True))
    engine.load(trainer.weights())
    yield engine, trainer
    engine.close()


def drawn(engine, seeds, prompts=PROMPTS):
    from stages.core.drawing.engine import Sampling

    return engine.generate(prompts, Sampling(4, 32, seeds=seeds), lambda *_: None)


def tokens(groups):
    return [[completion.token_ids for completion in group] for group in groups]


def rollouts_of(groups):
    return [
        TokenRollout(prompt, completion.token_ids, completion.log_probs, 1.0 - number % 3)
        for prompt, group in zip(PROMPTS, groups, strict=True)
        for number, completion in enumerate(group)
    ]


def mismatch(trainer, rollouts):
    """Mean difference between the engine's log-probabilities and the trainer's, in nats a token."""
    own = torch.cat(trainer.log_probs(rollouts))
    return (own - torch.tensor([value for rollout in rollouts for value in rollout.engine_log_probs])).abs().mean()


@gpu
@needs_gpu
def test_the_engine_draws_with_the_weights_that_were_handed_over(pair):
    engine, trainer = pair
    rollouts = rollouts_of(drawn(engine, range(16)))
    assert mismatch(trainer, rollouts) < 0.05
    trainer.update(rollouts, lr=1e-2)
    assert mismatch(trainer, rollouts) > 0.2
    engine.load(trainer.weights())
    assert mismatch(trainer, rollouts_of(drawn(engine, range(16)))) < 0.05


@gpu
@needs_gpu
def test_asleep_the_engine_gives_its_memory_back_and_awake_it_draws_as_before(pair):
    engine, trainer = pair
    engine.load(trainer.weights())
    before = drawn(engine, range(16))
    free, total = torch.cuda.mem_get_info()
    engine.sleep()
    assert torch.cuda.mem_get_info()[0] - free > 0.5 * SHARE * total
    trainer.release()
    engine.wake()
    engine.load(trainer.weights())
    assert tokens(drawn(engine, range(16))) == tokens(before)


@gpu
@needs_gpu
def test_samples_come_from_the_seeds_of_their_requests_and_from_nothing_else(pair):
    engine, trainer = pair
    engine.load(trainer.weights())
    first = tokens(drawn(engine, range(16)))
    assert tokens(drawn(engine, range(16))) == first
    others = tokens(drawn(engine, range(1000, 1016)))
    assert all(one != other for one, other in zip(first, others, strict=True))
    alike = tokens(drawn(engine, range(0, 160, 10), [PROMPTS[0]] * 16))  # one prompt under the seeds of 16 ranks
    samples = [tuple(sample) for group in alike for sample in group if len(sample) > 8]  # not by chance alike
    assert len(set(samples)) == len(samples)


@gpu
@needs_gpu
def test_ten_steps_take_no_more_memory_than_two(pair):
    engine, trainer = pair
    used = []
    for step in range(10):
        trainer.release()
        engine.wake()
        engine.load(trainer.weights())
        groups = drawn(engine, range(step, step + 16))
        engine.sleep()
        trainer.update(rollouts_of(groups), lr=1e-4)
        trainer.release()
        free, total = torch.cuda.mem_get_info()
        used.append(total - free)
    engine.wake()
    engine.load(trainer.weights())
    assert used[9] - used[1] < GIB / 16


@gpu
@needs_two
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_two_gpus_draw_and_train_together(policy, tmp_path, tensor_parallel):
    problems = tmp_path / "problems.jsonl"
    sums = [(a, b) for a in range(1, 9) for b in range(1, 9)]
    jsonl.write(
        problems, ({"id": f"{a}+{b}", "problem": f"{a}+{b}=?", "answer": f"{a + b}", "source": "sums"} for a, b in sums)
    )
    options = (
        f"--policy {policy} --problems {problems} --out {tmp_path / 'rl'} --template none --steps 2 --max-rounds 2 "
        "--problems-per-step 8 --group-size 16 --max-tokens 32 --overlong-buffer 0 --minibatches 2 --dtype bfloat16 "
        f"--gradient-checkpointing --memory-fraction 0.2 --save-every 1 --tensor-parallel {tensor_parallel}"
    )
    launch = "accelerate.commands.launch --config_file configs/accelerate/gpu8-fsdp2.yaml --num_processes 2"
    done = subprocess.run(
        [sys.executable, "-m", *launch.split(), "--main_process_port", "0", "-m", "rloop_cli", "rl", *options.split()],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "rl/manifest.json").read_bytes())["parameters"]["processes"] == 2
    assert json.loads((tmp_path / "rl/checkpoints/step_000002/config.json").read_bytes())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("driver", "cuda", "fault"),
    [
        ("580.65.06", "13.0", ""),
        ("570.86.15", "13.0", "CUDA 13.0 needs a driver of 580 or newer"),
        ("570.86.15", "12.8", ""),
        ("515.43.04", "12.1", "CUDA 12.1 needs a driver of 525 or newer"),
        ("580.65.06", None, "this torch is for CPUs"),
    ],
)
def test_a_driver_that_is_too_old_for_torch_is_named(driver, cuda, fault):
    said = gpu_check.too_old(driver, cuda)
    assert said.startswith(fault) and bool(said) == bool(fault)


def test_a_driver_that_does_not_answer_is_said_in_a_line(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    said = "nvidia-smi finds no driver (NVIDIA-SMI has failed): install it, or start it"
    assert gpu_check.driver_fault([]) == said


def test_exactly_the_engine_of_cards_before_hopper_keeps_torch_s_own_products_which_have_a_gradient():
    old, new = (acceleration.exact_environment(capability) for capability in ((8, 9), (9, 0)))
    assert new.items() - old.items() == {("VLLM_BATCH_INVARIANT", "1")}
    assert set(old) == {"CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"}


@pytest.mark.parametrize(
    ("dtype", "capability", "fault"),
    [
        ("auto", None, "it takes a GPU that computes in bfloat16"),
        ("float32", (9, 0), "it takes a GPU that computes in bfloat16"),
        ("auto", (8, 0), "this GPU has no products in FP8"),
        ("bfloat16", (8, 9), ""),
        ("auto", (12, 0), ""),
    ],
)
def test_rollouts_in_fp8_are_for_gpus_that_compute_in_it(dtype, capability, fault):
    said = acceleration.fp8_fault(dtype, capability)
    assert said.startswith(fault) and bool(said) == bool(fault)


def lines_of(results):
    return [json.loads(line) for line in results.read_text().splitlines()]


def test_of_a_quarter_of_an_hour_a_part_that_is_done_is_not_done_again_and_one_that_fails_leaves_the_rest(tmp_path):
    calls = []

    def good(bench):
        calls.append("good")
        return {"tokens/s": 7, "fp8": {"update, s": 0.5, "peak GiB": None}}

    def bad(bench):
        calls.append("bad")
        bench.call("-m no_such_module")

    parts = {part.run.__name__: part for part in (Part(bad, 60), Part(good, 60))}
    results = tmp_path / "results/parts.jsonl"
    for _ in range(2):
        gpu_quarter_hour.measure(parts, Bench(tmp_path, gpu_quarter_hour.REHEARSAL), results, parts)
    assert calls == ["bad", "good", "bad"]
    first, second, third = lines_of(results)
    assert "No module named no_such_module" in first["fault"] and first["part"] == third["part"] == "bad"
    assert second["figures"]["tokens/s"] == 7 and second["on"].startswith("no GPU; torch ")
    head, _, *rows = gpu_quarter_hour.table(results, ["bad", "good", "later"]).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (head, *rows[:3])]
    assert [row[:2] for row in cells] == [["part", "of"], ["bad", ""], ["good", ""], ["good", "fp8"]]
    assert [row[3] for row in cells[2:]] == ["tokens/s 7", "update, s 0.5"] and "no_such_module" in cells[1][3]
    assert rows[-1] == "not done: later"


def test_a_part_is_begun_only_if_it_fits_the_minutes_that_there_are_and_all_fit_a_quarter_of_an_hour(tmp_path, capsys):
    parts = {"long": Part(lambda bench: {}, 90), "short": Part(lambda bench: {}, 20)}
    results = tmp_path / "parts.jsonl"
    gpu_quarter_hour.measure(parts, Bench(tmp_path, Scale()), results, parts, minutes=1)
    assert [line["part"] for line in lines_of(results)] == ["short"]
    assert "long      not begun: it should take 90 s, and 60 are left" in capsys.readouterr().out
    together = sum(part.estimate_s for part in gpu_quarter_hour.PARTS.values()) / 60
    assert together <= 15 and f"{together:.1f} minutes together" in gpu_quarter_hour.__doc__
    told = ", ".join(f"{name} {part.estimate_s}" for name, part in gpu_quarter_hour.PARTS.items())
    assert told in " ".join((ROOT / "docs/gpu.md").read_text().split())


def is_gone(pid):
    status = Path("/proc", pid, "status")
    return not status.exists() or "\nState:\tZ" in status.read_text()


def test_a_part_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path):
    script = tmp_path / "long.py"
    script.write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )

    def endless(bench):
        bench.call(script)

    results = tmp_path / "parts.jsonl"
    gpu_quarter_hour.measure(["endless"], Bench(tmp_path, Scale()), results, {"endless": Part(endless, 2)})
    assert lines_of(results)[0]["fault"] == "not done in 3 s"
    assert is_gone((tmp_path / "pid").read_text())


def test_killed_in_a_part_it_leaves_no_process_on_the_gpu(tmp_path):
    script, pid = tmp_path / "long.py", tmp_path / "pid"
    script.write_text("import os, time\nopen(os.environ['SAYS'], 'w').write(str(os.getpid()))\ntime.sleep(600)\n")
    code = (
        "import sys; from pathlib import Path; from benchmarks.gpu_quarter_hour import *\n"
        "Bench(Path(sys.argv[1]), Scale()).call(Path(sys.argv[2]), env={'SAYS': sys.argv[3]})"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path, script, pid], cwd=ROOT)
    wait_until(lambda: pid.exists() and pid.read_text())
    process.kill()
    process.wait()
    wait_until(lambda: is_gone(pid.read_text()))


def wait_until(holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_figures_of_a_run_are_means_over_its_steps_and_empty_columns_count_for_nothing(tmp_path):
    names = "seconds generate_s update_s handover_s tokens_per_s rollout_tokens update_tokens peak_memory_gib mismatch"
    table = [[*names.split(), "mismatch_max"], *(["2", "1", "0.5", "0.1", "50", "90", n, "", "", ""] for n in "15")]
    (tmp_path / "log.tsv").write_text("".join("\t".join(row) + "\n" for row in table))
    figures = gpu_check.figures(gpu_check.rows_of(tmp_path))
    assert (figures["steps"], figures["draw, tokens/s"], figures["update, tokens/s"]) == (2, 90, 6)
    assert figures["peak GiB"] is figures["mismatch, mean"] is None


@pytest.mark.slow
def test_the_quarter_of_an_hour_is_rehearsed_on_a_cpu(tmp_path):
    command = "-m benchmarks.gpu_quarter_hour --rehearse --only runners trl --scratch"
    done = subprocess.run(
        [sys.executable, *command.split(), tmp_path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runners, trl = lines_of(tmp_path / "rehearsal/results.jsonl")
    assert runners["figures"]["V2_MODEL_RUNNER=0"]["tokens/s"] > 0
    sides = trl["figures"]
    assert set(sides) == {"rloop", "bare", "TRL generate"}
    assert all(sides[side]["generate, tokens/s"] > 0 for side in sides)
    assert all(sides[side]["update, tokens/s"] > 0 for side in ("rloop", "TRL generate"))


@pytest.mark.slow
def test_without_a_gpu_the_check_says_so_and_that_is_no_failure():
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py"], cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "gpu-check: there is no GPU here; nothing was checked\n"
