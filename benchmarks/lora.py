"""LoRA beside full training: an update's tokens a second and the most memory it takes, through rl's own trainer.

    python benchmarks/lora.py --policy DIR [--ranks 0 16 64] [--dtype bfloat16] [--rounds 3]

Each rank (0 is full training) has a process of its own, which makes the trainer, one update to warm up, and then an
update whenever it is told to. All live side by side and take turns, so that other work on the machine counts for all
alike. Memory is the resident set above that before the trainer was made, its peak during the updates. On a CPU that
includes what malloc keeps back of tensors that are gone, so the difference between ranks comes out too small. On a GPU
there are also torch's own count and, to be read of one rank alone, what is in use of the GPU, which is what the plan of
docs/memory.md reckons.
"""

import argparse
import json
import multiprocessing
import random
import resource
import statistics
import time
from pathlib import Path
from typing import Any

GIB = 2**30


def resident() -> float:
    """GiB of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / GIB


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """GiB, the most since `reset_peak`."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / GIB


def rollouts(vocabulary: int, count: int, prompt: int, completion: int) -> list[Any]:
    from stages.rl.trainer import TokenRollout

    draw = random.Random(0)
    return [
        TokenRollout(
            [draw.randrange(10, vocabulary) for _ in range(prompt)],
            [draw.randrange(10, vocabulary) for _ in range(completion)],
            [-8.0] * completion,
            draw.choice([-1.0, 1.0]),
        )
        for _ in range(count)
    ]


def serve(channel: Any, args: argparse.Namespace, rank: int) -> None:
    """Make the trainer of one rank; an update for every message, answered with its figures."""
    import torch

    from stages import rl
    from stages.core.policy import adapters, checkpoints, memory
    from stages.core.policy.acceleration import memory_in_use
    from stages.rl.trainer import Trainer, start_accelerator

    torch.set_num_threads(args.threads)
    settings = rl.Settings(
        dtype=args.dtype,
        minibatches=1,
        tokens_per_microbatch=args.tokens_per_microbatch,
        lora_rank=rank,
        gradient_checkpointing=args.gradient_checkpointing,
        **args.settings,
    )
    accelerator = start_accelerator(settings)
    before = resident()
    trainer = Trainer(args.policy, accelerator, settings)
    size = checkpoints.load_config(args.policy).vocab_size
    batch = rollouts(size, args.rollouts, args.prompt_tokens, args.completion_tokens)
    trainer.update(batch, 1e-6)
    trainer.release()
    number = sum(weight.numel() for weight in adapters.trained(trainer.model).values())
    plan = memory.update(memory.read_shape(args.policy), settings)["sum"]
    channel.send({"rank": rank, "trained": number, "plan": plan})
    while channel.recv():
        reset_peak()
        started = time.perf_counter()
        trainer.update(batch, 1e-6)
        seconds = time.perf_counter() - started
        whole = memory_in_use()
        trainer.release()
        used = peak() - before
        gpu = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0
        started = time.perf_counter()
        for _ in trainer.weights():
            pass
        merge = time.perf_counter() - started
        channel.send({"seconds": seconds, "peak": used, "gpu": gpu, "whole": whole, "merge": merge})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[0, 16, 64])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=60)
    parser.add_argument("--completion-tokens", type=int, default=100)
    parser.add_argument("--tokens-per-microbatch", type=int, default=2560)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--settings", type=json.loads, default={}, help="other settings of rl, as JSON without spaces")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    workers = []
    for rank in args.ranks:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, args, rank), daemon=True)
        process.start()
        workers.append((ours, ours.recv(), []))  # one after another, so that none warms up beside another
    for _ in range(args.rounds):
        for channel, _, figures in workers:
            channel.send(True)
            figures.append(channel.recv())
    tokens = args.rollouts * (args.prompt_tokens + args.completion_tokens)
    for channel, about, figures in workers:
        channel.send(False)
        times = [each["seconds"] for each in figures]
        row = {
            "lora_rank": about["rank"],
            "trained parameters": about["trained"],
            "tokens/s": round(tokens / min(times)),
            "tokens/s, median": round(tokens / statistics.median(times)),
            "peak GiB": round(max(each["peak"] for each in figures), 2),
            "merge s": round(min(each["merge"] for each in figures), 2),
            "plan GiB": round(about["plan"], 2),
        }
        if any(each["gpu"] for each in figures):
            row["GPU peak GiB"] = round(max(each["gpu"] for each in figures), 2)
            row["GPU in use GiB"] = round(max(each["whole"] for each in figures), 2)  # peak_memory_gib, as in log.tsv
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
