"""`rloop filter` against bare `orjson.loads` over the same lines and against `datasets` doing the same: time, memory.

    python benchmarks/filter.py                       # 1 GB of rollouts as long as the paper's
    python benchmarks/filter.py --megabytes 200 --completion 150     # as short as the toy's
    python benchmarks/filter.py --file runs/1/rl/rollouts/step_000001.jsonl

Each runs in a process of its own, `--repeats` times in turn; the least CPU time is shown, since wall time hangs on
what else the machine does. `datasets` runs twice: with an empty cache, and with what its first run left in it.
"""

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import orjson

MAX_PASS_RATE = 0.1
WORDS = (
    "the",
    "so we get",
    "\\frac{1}{2}",
    "x^2 + 3x",
    "=",
    "\n\n",
    "Therefore",
    "$n$",
    "\\left(",
    "1234",
    "\u2264",
    '"',
)


def main() -> None:
    """Make rollouts unless there are any, run the three in turn, print a table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--megabytes", type=int, default=1000)
    options.add_argument("--completion", type=int, default=5000, help="mean length of a completion in characters")
    options.add_argument("--problems", type=int, default=5000)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--file", type=Path, help="rollouts of your own")
    options.add_argument("--only", choices=RUNS, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.only:
        report(chosen.only, chosen.file)
        return
    with tempfile.TemporaryDirectory() as scratch:
        file = chosen.file or Path(scratch) / "rollouts.jsonl"
        if not chosen.file:
            make_rollouts(file, chosen.megabytes * 10**6, chosen.completion, chosen.problems)
        print_table(file, measure(file, chosen.repeats, Path(scratch)))


def make_rollouts(file: Path, size: int, completion: int, num_problems: int) -> None:
    """Rollouts with a lognormal length and pass rates from 0 to 1, many near 0."""
    rng = random.Random(0)
    text = " ".join(rng.choice(WORDS) for _ in range(500_000))
    prompts = ["<|im_start|>user\n" + text[(at := rng.randrange(10**6)) : at + 300] for _ in range(num_problems)]
    with file.open("wb", buffering=2**20) as out:
        while out.tell() < size:
            number = rng.randrange(num_problems)
            length = min(len(text) // 2, int(rng.lognormvariate(-0.125, 0.5) * completion))
            start = rng.randrange(len(text) - length)
            correct = rng.random() < (number / num_problems) ** 2
            rollout = {
                "problem_id": f"dapo-17k/{number:016x}",
                "sample": rng.randrange(16),
                "step": 1,
                "policy": "runs/0/policy",
                "prompt": prompts[number],
                "completion": text[start : start + length] + " \\boxed{7}",
                "answer": "7",
                "reward": float(correct),
                "verdict": "correct" if correct else "wrong",
                "num_tokens": length // 3,
                "finish_reason": "stop" if rng.random() < 0.95 else "length",
                "trained": True,
                "shaped_reward": 1.0 if correct else -1.0,
            }
            out.write(orjson.dumps(rollout, option=orjson.OPT_APPEND_NEWLINE))


def bare_loads(file: Path, scratch: Path) -> None:
    """What the others are measured by: every line parsed, nothing done with it."""
    with file.open("rb") as lines:
        for line in lines:
            orjson.loads(line)


def rloop_filter(file: Path, scratch: Path) -> None:
    """The stage itself."""
    from stages import filter as stage

    out = scratch / "rloop.jsonl"
    out.unlink(missing_ok=True)
    stage.run(stage.Options(rollouts=[str(file)], out=str(out), max_pass_rate=MAX_PASS_RATE))


def with_datasets(file: Path, scratch: Path) -> None:
    """The same selection by `datasets`: its JSON reader, columns for the pass rates, select, to_json."""
    import datasets

    datasets.disable_progress_bars()
    cache = scratch / "cache"
    table = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
    columns = table.select_columns(["problem_id", "reward", "finish_reason"]).with_format("arrow")[:]
    problem_ids = columns["problem_id"].to_pylist()
    rewards = columns["reward"].to_pylist()
    finished = columns["finish_reason"].to_pylist()
    totals, correct = Counter(problem_ids), Counter()
    for problem_id, reward in zip(problem_ids, rewards, strict=True):
        correct[problem_id] += reward
    rates = {problem_id: correct[problem_id] / totals[problem_id] for problem_id in totals}
    wanted = [
        number
        for number, (problem_id, reward, finish) in enumerate(zip(problem_ids, rewards, finished, strict=True))
        if reward == 1 and finish == "stop" and rates[problem_id] < MAX_PASS_RATE
    ]
    seen: set[tuple[str, str]] = set()
    with (scratch / "datasets.jsonl").open("wb") as out:
        for row in table.select(wanted).select_columns(["problem_id", "prompt", "completion"]):
            if (row["prompt"], row["completion"]) not in seen:
                seen.add((row["prompt"], row["completion"]))
                example = row | {"pass_rate": rates[row["problem_id"]]}
                out.write(orjson.dumps(example, option=orjson.OPT_APPEND_NEWLINE))


RUNS = {"orjson.loads": bare_loads, "rloop filter": rloop_filter, "datasets": with_datasets}


def report(name: str, file: Path) -> None:
    """Run one of the three here, its outputs in the directory that stdin names, and print what it took as JSON."""
    scratch = Path(sys.stdin.readline().strip())
    wall, cpu = time.monotonic(), time.process_time()
    RUNS[name](file, scratch)
    taken = {"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu}
    print(json.dumps(taken | {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def measure(file: Path, repeats: int, scratch: Path) -> dict[str, list[dict[str, float]]]:
    """What every run took, by name, the three in turn."""
    taken: dict[str, list[dict[str, float]]] = {}
    for repeat in range(repeats):
        for name in RUNS:
            command = [sys.executable, __file__, "--only", name, "--file", str(file)]
            run = subprocess.run(command, input=f"{scratch}\n", capture_output=True, text=True, check=True)
            label = "datasets, again" if name == "datasets" and repeat else name
            taken.setdefault(label, []).append(json.loads(run.stdout))
    same = (scratch / "rloop.jsonl").read_bytes() == (scratch / "datasets.jsonl").read_bytes()
    print("rloop and datasets chose the same examples" if same else "rloop and datasets chose DIFFERENT examples")
    shutil.rmtree(scratch / "cache")
    return taken


def print_table(file: Path, taken: dict[str, list[dict[str, float]]]) -> None:
    """A line a contender: least CPU time, speed against bare orjson.loads, least wall time, greatest memory."""
    size = file.stat().st_size
    with file.open("rb") as lines:
        print(f"{size / 1e6:,.0f} MB in {sum(1 for _ in lines):,} rollouts")
    print(f"{'':<18}{'CPU s':>8}{'wall s':>8}{'MB/s':>8}{'speed':>8}{'peak MB':>9}")
    base = min(run["cpu"] for run in taken["orjson.loads"])
    for name, runs in taken.items():
        cpu, wall = (min(run[kind] for run in runs) for kind in ("cpu", "wall"))
        memory = max(run["memory"] for run in runs)
        print(f"{name:<18}{cpu:>8.2f}{wall:>8.2f}{size / 1e6 / cpu:>8.0f}{base / cpu:>8.2f}{memory:>9.0f}")


if __name__ == "__main__":
    main()
