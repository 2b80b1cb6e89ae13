"""What a GPU is asked in a quarter of an hour, part by part; a part that is done is not done again.

    python -m benchmarks.gpu_quarter_hour                     on a GPU, all parts, the most wanted first
    python -m benchmarks.gpu_quarter_hour --only trl update   these
    python -m benchmarks.gpu_quarter_hour --minutes 13        begin no part that would take longer than that in all
    python -m benchmarks.gpu_quarter_hour --rehearse          the same on the CPU, with tiny policies and few tokens

Each part has a process group and a time limit of its own, and a line in --results as soon as it ends: its figures, or
what went wrong, with which versions and on which GPU. The same command goes on with the parts that have no figures yet,
also after a kill, and in the end prints all as a table for the docs. All policies are made here, so no network is
needed: the toy's, and random weights of Qwen2.5's sizes. The rehearsal gives the same commands other numbers (`Scale`);
a CPU has no engine that sleeps, no newer runner of vLLM, no vLLM in TRL.

`PARTS` says how long each takes on an H100 or H200, policies and compilations that it is the first to need included:
14.7 minutes together. That is reckoned from what was timed on one: starts of rl (25 s, and 35 for a first
compilation), and the tests.
"""

import argparse
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from benchmarks import gpu_check
from benchmarks.gpu_check import ROOT, figures, rows_of, versions
from stages.core import outputs

PYTHON = sys.executable
FSDP2 = "-m accelerate.commands.launch --config_file configs/accelerate/gpu8-fsdp2.yaml --num_processes 1"
STEP = "--template none --max-tokens 72 --overlong-buffer 0 --minibatches 2 --lr 3e-4 --max-rounds 3 --warmup-steps 0"


@dataclass(frozen=True)
class Scale:
    """The numbers that differ between a GPU and the rehearsal: words of commands, and sizes of the random policies."""

    toy: str = "--pretrain-steps 200"
    rl: str = "--problems-per-step 16 --group-size 16 --dtype bfloat16"
    launched: str = "rloop_cli"
    policy: str = "Qwen/Qwen2.5-1.5B"  # that is updated; the smaller one draws
    small: str = "Qwen/Qwen2.5-0.5B"
    update: str = "--rollouts 32 --prompt-tokens 128 --completion-tokens 896 --tokens-per-microbatch 8192 --rounds 2"
    runners: tuple[str, ...] = ("0", "1")  # of vLLM, by VLLM_USE_V2_MODEL_RUNNER
    drawn: str = "64 16 512"  # prompts, samples of each, tokens
    trl: str = "--problems 32 --group-size 16 --max-tokens 512 --tokens-per-microbatch 16384 --trl-batch 32 --rounds 1"
    peer: str = "TRL vllm"
    fp8: str = "--rollout-dtype fp8"


REHEARSAL = Scale(
    toy="--pretrain-steps 250 --num-train 60 --num-test 20",
    rl="--problems-per-step 8 --group-size 8 --dtype bfloat16",
    launched="tests.ranks",  # which lets a process on gloo pass for a GPU
    policy="tiny",
    small="tiny",
    update="--rollouts 4 --prompt-tokens 8 --completion-tokens 16 --tokens-per-microbatch 64 --rounds 1",
    runners=("0",),
    drawn="4 2 8",
    trl="--problems 2 --group-size 4 --max-tokens 16 --tokens-per-microbatch 128 --trl-batch 8 --rounds 1 --steps 1",
    peer="TRL generate",
    fp8="--rollout-dtype auto",
)


RUNS = "runs"  # of the part that is being done, below the scratch directory


def _end_with_parent() -> None:
    """Let Linux send this process SIGTERM when its parent ends, by SIGKILL too: nothing stays on the GPU."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


@dataclass
class Bench:
    """Where a part works, and until when it may."""

    scratch: Path
    scale: Scale
    deadline: float = field(default_factory=lambda: time.monotonic() + 3600)

    def call(self, *words: str | Path, env: Mapping[str, str] | None = None) -> str:
        """Run a Python command in the repository; its standard output. Raises CalledProcessError or TimeoutExpired."""
        parts = [str(part) for word in words for part in ([word] if isinstance(word, Path) else word.split())]
        with subprocess.Popen(
            [PYTHON, *parts], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | dict(env or {}),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            preexec_fn=_end_with_parent,
        ) as process:  # fmt: skip
            try:
                out, err = process.communicate(timeout=max(1.0, self.deadline - time.monotonic()))
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # the launcher's ranks too
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, parts, out, err)
        return out

    @property
    def toy(self) -> Path:
        """The toy with a rough policy, made once."""
        if not (self.scratch / "toy/policy").exists():
            shutil.rmtree(self.scratch / "toy", ignore_errors=True)
            self.call("-m rloop_cli toy --out", self.scratch / "toy", self.scale.toy)
        return self.scratch / "toy"

    def random(self, name: str) -> Path:
        """A policy of random weights of the named size, made once."""
        path = self.scratch / name.replace("/", "-")
        if not path.exists():
            self.call("-m benchmarks.gpu_quarter_hour --make", path, name)
        return path

    def rl(self, name: str, *words: str, launch: str = "-m rloop_cli", env: Mapping[str, str] | None = None) -> Path:
        """Run rl on the toy's policy, or go on with what this part has begun; its output."""
        out = self.scratch / RUNS / name
        files = ("--policy", self.toy / "policy", "--problems", self.toy / "train.jsonl", "--out", out)
        self.call(f"{launch} rl", *files, STEP, self.scale.rl, *words, env=env)
        return out


def tests(bench: Bench) -> dict[str, Any]:
    """The tests marked gpu, on the kind of policy that has vLLM's newer runner in each version."""
    out = bench.call("-m pytest -p no:cacheprovider --durations=0 -m gpu -k llama tests/test_gpu.py")
    return {"said": out.strip().splitlines()[-1]}


def fsdp2(bench: Bench) -> dict[str, Any]:
    """rl sharded by FSDP2 (NCCL): bfloat16, fused head, sharded state, sleep; two steps, and on from their state."""
    launch = f"{FSDP2} --main_process_port 0 -m {bench.scale.launched}"
    for steps in (2, 4):
        out = bench.rl("fsdp2", f"--steps {steps} --save-every 1 --gradient-checkpointing", launch=launch)
    return figures(rows_of(out)[1:]) | {"parts of the state": len([*out.glob("state/**/*.distcp")])}


def resume(bench: Bench) -> dict[str, Any]:
    """Two steps and then two more, beside four at once, with and without --exact: how many steps drew the same.

    The figures are those of four at once.
    """
    said: dict[str, Any] = {}
    for flag in ("", "--exact"):
        runs = []
        for name, counts in (("twice", (2, 4)), ("once", (4,))):
            for steps in counts:
                runs.append(bench.rl(f"{name}{flag}", f"--steps {steps} --save-every 2 {flag}"))
        files = zip(*(sorted(run.glob("rollouts/*")) for run in (runs[0], runs[-1])), strict=True)
        same = sum(one.read_bytes() == other.read_bytes() for one, other in files)
        said[flag or "default"] = {"same rollouts": f"{same} of 4 steps"} | figures(rows_of(runs[-1])[1:])
    return said


def trl(bench: Bench) -> dict[str, Any]:
    """Steps of rl and of TRL with vLLM in its process, on one policy and the same prompts, a process each."""
    said: dict[str, Any] = {}
    for sides in ("rloop bare", bench.scale.peer):
        totals = bench.scratch / "totals.json"
        chosen = [f"--side {side.replace(' ', '-')}" for side in (sides.split() if "bare" in sides else [sides])]
        policy = bench.random(bench.scale.small)
        words = ("-m benchmarks.rl_vs_trl --dtype bfloat16 --policy", policy, bench.scale.trl, *chosen)
        bench.call(*words, "--totals", totals)
        said |= json.loads(totals.read_text())
    return said


def update(bench: Bench) -> dict[str, Any]:
    """An update of a random policy with and without gradient checkpointing, and what the memory plan says of each."""
    return {name: _update(bench, flag) for name, flag in (("plain", ""), ("checkpointing", "--gradient-checkpointing"))}


def compiled(bench: Bench) -> dict[str, Any]:
    """The same update with compiled layers."""
    return _update(bench, '--settings {"compile_layers":true}')


def lora(bench: Bench) -> dict[str, Any]:
    """LoRA: mismatch and hand-over of rl on the toy, and an update of the random policy."""
    steps = figures(rows_of(bench.rl("lora", "--steps 3 --lora-rank 16"))[1:])
    return {"rl": steps, "update": _update(bench, "", rank=32)}


def runners(bench: Bench) -> dict[str, Any]:
    """Tokens a second of vLLM's runners, as the product draws: with seeds and log-probabilities."""
    policy = bench.random(bench.scale.small)
    words = ("-m benchmarks.gpu_quarter_hour --draw", policy, bench.scale.drawn)
    return {
        f"V2_MODEL_RUNNER={number}": json.loads(
            bench.call(*words, env={"VLLM_USE_V2_MODEL_RUNNER": number}).splitlines()[-1]
        )
        for number in bench.scale.runners
    }


def segments(bench: Bench) -> dict[str, Any]:
    """rl with expandable segments, which the engine's sleep bears by vLLM 0.32's sources."""
    conf = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    return figures(rows_of(bench.rl("segments", "--steps 3", env=conf))[1:])


def rollouts(bench: Bench) -> dict[str, Any]:
    """rl with FP8 rollouts, and with the engine's log-probabilities as the old ones: mismatch and speed."""
    runs = {"fp8": bench.scale.fp8, "engine-log-probs": "--engine-log-probs"}
    return {name: figures(rows_of(bench.rl(name, f"--steps 3 {words}"))[1:]) for name, words in runs.items()}


def _update(bench: Bench, flags: str, rank: int = 0) -> dict[str, Any]:
    """benchmarks/lora.py on the random policy, beside the plan."""
    policy = bench.random(bench.scale.policy)
    out = bench.call("-m benchmarks.lora --policy", policy, f"--ranks {rank}", bench.scale.update, flags)
    return json.loads(out.splitlines()[-1])


class Part(NamedTuple):
    """What is done, and the seconds that it should take on a GPU."""

    run: Callable[[Bench], dict[str, Any]]
    estimate_s: int


LIMIT = 1.6  # of a part's estimate, after which it is ended
# What matters most comes first: that hand-over and sleep are right; sharding, which no GPU has run; the comparison that
# users ask for; the plan, which all who choose a card rely on.
PARTS = {
    part.run.__name__: part
    for part in (
        Part(tests, 90), Part(fsdp2, 110), Part(trl, 110), Part(update, 75), Part(resume, 190), Part(rollouts, 85),
        Part(runners, 90), Part(lora, 50), Part(compiled, 55), Part(segments, 25),
    )
}  # fmt: skip


def lines_of(results: Path) -> dict[str, dict[str, Any]]:
    """By part its figures, or what last went wrong."""
    rows = map(json.loads, results.read_text().splitlines()) if results.exists() else ()
    known: dict[str, dict[str, Any]] = {}
    for row in rows:
        if "figures" in row or "figures" not in known.get(row["part"], {}):
            known[row["part"]] = row
    return known


def done(results: Path) -> set[str]:
    """The parts that have figures."""
    return {name for name, row in lines_of(results).items() if "figures" in row}


def measure(
    names: Iterable[str],
    bench: Bench,
    results: Path,
    parts: Mapping[str, Part] = PARTS,
    slack: float = 1,
    minutes: float = float("inf"),
) -> None:
    """Do the parts that have no figures yet, each within its limit times `slack`, and write each one's line at once.

    None is begun whose estimate is beyond the `minutes` that there are.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    for name in [name for name in names if name not in done(results)]:
        began = time.monotonic()
        if began + parts[name].estimate_s > end:
            print(f"{name:9s} not begun: it should take {parts[name].estimate_s} s, and {end - began:.0f} are left")
            continue
        limit = slack * LIMIT * parts[name].estimate_s
        bench.deadline = began + limit
        shutil.rmtree(bench.scratch / RUNS, ignore_errors=True)
        row: dict[str, Any] = {"part": name}
        try:
            row["figures"] = parts[name].run(bench)
        except subprocess.TimeoutExpired:
            row["fault"] = f"not done in {limit:.0f} s"
        except subprocess.CalledProcessError as error:
            row["fault"] = (
                f"{' '.join(error.cmd)} ended with {error.returncode}: {error.stdout[-500:]}{error.stderr[-1500:]}"
            )
        except Exception as error:  # whatever a part's own reading meets: the others are to run
            row["fault"] = repr(error)
        row |= {"seconds": round(time.monotonic() - began, 1), "on": machine()}
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name:9s} {row['seconds']:6.1f} s  {row.get('fault', row.get('figures'))}", flush=True)


def no_gpu() -> str:
    """What to do where there is none; "" if there is one."""
    return "" if gpu_check.has_gpu([]) else "there is no GPU here: --rehearse goes through the parts on the CPU"


def machine() -> str:
    """The GPU, or that there is none, and the versions."""
    gpus = gpu_check.ask("name,driver_version,memory.total") if gpu_check.has_gpu([]) else ["no GPU"]
    return "; ".join([*gpus, versions()])


def table(results: Path, names: Iterable[str]) -> str:
    """What there is of the parts, as a table for the docs, and below it on what machine."""
    known = {name: row for name, row in lines_of(results).items() if name in names}
    cells = []
    for name, row in known.items():
        fault = {"fault": " ".join(row["fault"].split())[-200:].replace("|", "/")} if "fault" in row else {}
        for run, figures_ in flat(row.get("figures", fault)):
            said = "; ".join(f"{figure} {value}" for figure, value in figures_.items() if value is not None)
            cells.append([name, run, f"{row['seconds']:.0f}", said])
    missing = [name for name in names if name not in known]
    below = [
        *dict.fromkeys(row["on"] for row in known.values()),
        *([f"not done: {', '.join(missing)}"] * bool(missing)),
    ]
    return tabulate(cells, ["part", "of", "seconds", "figures"], "github") + "\n\n" + "\n".join(below)


def flat(said: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The figures of a part, those of each run in it under the run's name."""
    if own := {key: value for key, value in said.items() if not isinstance(value, dict)}:
        yield name, own
    for key, value in said.items():
        if isinstance(value, dict):
            yield from flat(value, f"{name} {key}".strip())


def make(path: Path, name: str) -> None:
    """Write a policy of random weights of the named size; of those that only update most token ids have no text."""
    from benchmarks.memory import SHAPES
    from benchmarks.rl_vs_trl import make_policy

    if name == "tiny":
        with outputs.whole_dir(path) as beside:
            make_policy(beside, 96, 1024, "bfloat16")
        return
    shape = SHAPES[name]
    sizes = {
        "hidden_size": shape.hidden, "intermediate_size": shape.mlp, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "tie_word_embeddings": shape.tied,
    }  # fmt: skip
    if name == Scale.policy:
        sizes["vocab_size"] = shape.vocab
    with outputs.whole_dir(path) as beside:
        make_policy(beside, 4096, 1024, "bfloat16", **sizes)


def draw(policy: Path, num_prompts: int, num_samples: int, num_tokens: int) -> None:
    """Print tokens a second of an engine, the second time that it draws."""
    from stages.core.drawing.engine import EngineOptions, Sampling, VllmEngine

    engine = VllmEngine(policy, EngineOptions(dtype="bfloat16", memory_fraction=0.6), max_model_len=num_tokens + 32)
    for repeat in range(2):
        seeds = [100 * number + repeat for number in range(num_prompts)]
        began = time.perf_counter()
        groups = engine.generate(
            [[5 + number, 9, 7] for number in range(num_prompts)], Sampling(num_samples, num_tokens, seeds=seeds)
        )
        seconds = time.perf_counter() - began
    tokens = sum(len(completion.token_ids) for group in groups for completion in group)
    print(json.dumps({"tokens/s": round(tokens / seconds), "seconds": round(seconds, 2)}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts; default: all")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny; its results lie below --scratch")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="that there are; default: no limit")
    parser.add_argument("--scratch", type=Path, default=ROOT / "runs/gpu-quarter-hour", help="policies and runs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/gpu-quarter-hour.jsonl")
    parser.add_argument("--make", nargs=2, metavar=("DIR", "NAME"), help=argparse.SUPPRESS)
    parser.add_argument("--draw", nargs=4, metavar=("POLICY", "PROMPTS", "SAMPLES", "TOKENS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        make(Path(given.make[0]), given.make[1])
        return 0
    if given.draw:
        draw(Path(given.draw[0]), *map(int, given.draw[1:]))
        return 0
    if not given.rehearse and (fault := gpu_check.driver_fault([]) or no_gpu()):
        print(f"gpu-quarter-hour: {fault}")
        return 2
    scratch = given.scratch / ("rehearsal" if given.rehearse else "gpu")
    results = scratch / "results.jsonl" if given.rehearse else given.results
    scratch.mkdir(parents=True, exist_ok=True)
    measure(
        given.only,
        Bench(scratch.absolute(), REHEARSAL if given.rehearse else Scale()),
        results,
        slack=4 if given.rehearse else 1,
        minutes=given.minutes,
    )
    print(f"\n{table(results, given.only)}")
    return len(set(given.only) - done(results))


if __name__ == "__main__":
    sys.exit(main())
