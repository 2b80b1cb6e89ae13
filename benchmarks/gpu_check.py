"""What holds on the GPU of this machine: the tests marked gpu, then a short rl, with the versions and figures to keep.

    make gpu-check                                         the toy's policy
    make gpu-check POLICY=Qwen/Qwen2.5-0.5B-Instruct       another: a hub id or a directory
    make gpu-check POLICY=... PROBLEMS=train.jsonl         on problems of one's own (default: sums of two numbers)
    make gpu-check PYTHON=/path/to/python                  where the active Python is not the one with vLLM

It needs what `pip install -e '.[gpu,dev]'` installs, and the GPU for itself: the tests read the memory of the whole
device. Without a GPU it says so and ends well. The tests take some minutes, most of them for vLLM's compilation; the rl
run, of five steps, depends on the policy. All that is written goes to a temporary directory.
"""

import argparse
import importlib.util
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import packages_distributions, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "vllm", "transformers", "accelerate", "trl")
NEEDED = (*PACKAGES, "pytest")
DRIVERS = {12: 525, 13: 580}  # the oldest driver for torch's major version of CUDA
STEPS = 5
COMMON = f"--steps {STEPS} --group-size 16 --max-rounds 3 --save-every {STEPS} --warmup-steps 0 --dtype bfloat16"
TOY = "--template none --problems-per-step 16 --max-tokens 72 --overlong-buffer 0 --minibatches 2 --lr 3e-4"
REAL = "--problems-per-step 32 --max-tokens 512 --overlong-buffer 128 --minibatches 4 --lr 1e-6"


def main() -> int:
    """Check what there is to check; the exit code is that of the tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="", help="a checkpoint directory or a hub id; default: the toy's policy")
    parser.add_argument("--problems", default="", help="problems (JSONL); default: the toy's, or sums of two numbers")
    given = parser.parse_args()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if fault := driver_fault(missing):
        print(f"gpu-check: {fault}")
        return 2
    if not has_gpu(missing):
        print("gpu-check: there is no GPU here; nothing was checked")
        return 0
    if missing:
        print(f"gpu-check: {sys.executable} lacks {', '.join(missing)}: pip install -e '.[gpu,dev]', or PYTHON=...")
        return 2
    tests = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_gpu.py"], cwd=ROOT, check=False)
    with tempfile.TemporaryDirectory() as scratch:
        short_run(Path(scratch), given.policy, given.problems)
    return tests.returncode


def driver_fault(missing: list[str]) -> str:
    """Why torch can't use this machine's driver; says how the two go together. "" also without torch or nvidia-smi."""
    if "torch" in missing or not shutil.which("nvidia-smi"):
        return ""
    try:
        drivers = ask("driver_version")
    except subprocess.CalledProcessError as error:
        return f"nvidia-smi finds no driver ({' '.join(error.stdout.split())}): install it, or start it"
    import torch

    fault = too_old(drivers[0], torch.version.cuda)
    print(
        f"driver {drivers[0]}, torch {torch.__version__} for CUDA {torch.version.cuda}: {fault or 'they go together'}"
    )
    return fault


def too_old(driver: str, cuda: str | None) -> str:
    """What to do about a driver that is too old for torch's CUDA; "" if it is not."""
    if cuda is None:
        return (
            "this torch is for CPUs: pip install -c constraints-gpu.txt -e '.[gpu,dev]' into an environment of its own"
        )
    needed = DRIVERS.get(int(cuda.partition(".")[0]), 0)
    if int(driver.partition(".")[0]) >= needed:
        return ""
    return f"CUDA {cuda} needs a driver of {needed} or newer: see docs/gpu.md"


def has_gpu(missing: list[str]) -> bool:
    """What torch says; where there is no torch to ask, whether the driver has made its device."""
    if "torch" in missing:
        return Path("/dev/nvidiactl").exists()
    import torch

    return torch.cuda.is_available()


def short_run(scratch: Path, policy: str, problems: str) -> None:
    """Run rl for a few steps and print what to keep of it."""
    options = f"{COMMON} {REAL if policy else TOY}".split()
    if not policy:
        rloop("toy", "--out", str(scratch / "toy"), "--pretrain-steps", "200")
        policy, problems = str(scratch / "toy/policy"), problems or str(scratch / "toy/train.jsonl")
    problems = problems or sums(scratch / "sums.jsonl")
    with PeakMemory() as memory:
        rloop("rl", "--policy", policy, "--problems", problems, "--out", str(scratch / "rl"), *options)
    print()
    print(f"GPU            {'; '.join(ask('name,driver_version,memory.total'))} (name, driver, memory)")
    print(f"versions       {versions()}")
    print(f"policy         {policy}, bfloat16")
    print(f"memory         {memory.peak_mib / 1024:.1f} GiB of the GPU at most, engine and trainer together")
    for name, value in figures(rows_of(scratch / "rl")[1:]).items():
        print(f"{name:14s} {value}")


def versions() -> str:
    """Of the packages that decide what a GPU gives."""
    installed = packages_distributions()
    return ", ".join(f"{name} {version(installed[name][0])}" for name in PACKAGES)


def rows_of(run: Path) -> list[dict[str, str]]:
    """The lines of a run's log.tsv."""
    header, *lines = (run / "log.tsv").read_text().splitlines()
    return [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]


def figures(rows: list[dict[str, str]]) -> dict[str, float | None]:
    """What to keep of some steps: means, of which the first step, that warms up, should be left out; None: no value."""

    def mean(name: str) -> float:
        values = [float(row[name]) for row in rows if row[name]]
        return sum(values) / len(values) if values else math.nan

    values = {
        "a step, s": mean("seconds"),
        "draw, s": mean("generate_s"),
        "update, s": mean("update_s"),
        "hand-over, s": mean("handover_s"),
        "tokens/s": mean("tokens_per_s"),
        "draw, tokens/s": mean("rollout_tokens") / mean("generate_s"),
        "update, tokens/s": mean("update_tokens") / (mean("update_s") or math.nan),
        "peak GiB": mean("peak_memory_gib"),
        "mismatch, mean": mean("mismatch"),  # nats a token, engine against trainer
        "mismatch, most": mean("mismatch_max"),
    }
    return {"steps": len(rows)} | {
        name: float(f"{value:.4g}") if math.isfinite(value) else None for name, value in values.items()
    }


class PeakMemory:
    """The most memory in use on any GPU while the block runs, in MiB."""

    def __enter__(self) -> "PeakMemory":
        self.peak_mib, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.5):
            self.peak_mib = max(self.peak_mib, *(int(value) for value in ask("memory.used")))


def ask(what: str) -> list[str]:
    """What nvidia-smi says of each GPU."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()


def rloop(*arguments: str) -> None:
    """Run a stage as a command of its own and say how long it took."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "rloop_cli", *arguments], cwd=ROOT, check=True)
    print(f"rloop {arguments[0]}: {time.perf_counter() - started:.0f} s with its start")


def sums(path: Path) -> str:
    """Write problems of which a small instruct model solves some and not others."""
    draw = random.Random(0)
    pairs = [(draw.randrange(10, 10 ** draw.randint(2, 5)), draw.randrange(10, 10**4)) for _ in range(256)]
    with path.open("w") as file:
        for number, (a, b) in enumerate(pairs):
            problem = {"id": f"{number}", "problem": f"What is {a} + {b} * 7?", "answer": str(a + b * 7)}
            file.write(json.dumps(problem | {"source": "sums"}) + "\n")
    return str(path)


if __name__ == "__main__":
    sys.exit(main())
