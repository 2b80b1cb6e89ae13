"""What a policy needs on one GPU while rl updates it and while it generates, by arithmetic.

    python benchmarks/memory.py                                     the tables of docs/memory.md
    python benchmarks/memory.py configs/qwen2.5-0.5b-gsm8k.yaml     the plan of a params file, on its GPU

The arithmetic is stages/core/policy/memory.py; `rloop check --gpu-memory` holds the policy that is there against it.
"""

import sys
from dataclasses import replace
from pathlib import Path

import yaml
from tabulate import tabulate

from stages import rft
from stages.core.policy.memory import Shape, generation, update
from stages.rl import Settings

GPUS = {24: 22.0, 48: 44.0, 80: 79.0}  # GiB that the smallest of its kind offers: L4 and A10G, L40S, A100 and H100

SHAPES = {
    "Qwen/Qwen2.5-0.5B": Shape(896, 4864, 24, 14, 2, 64, 151936, tied=True),
    "Qwen/Qwen2.5-1.5B": Shape(1536, 8960, 28, 12, 2, 128, 151936, tied=True),
    "Qwen/Qwen2.5-7B": Shape(3584, 18944, 28, 28, 4, 128, 152064, tied=False),
    "Qwen/Qwen2.5-32B": Shape(5120, 27648, 64, 40, 8, 128, 152064, tied=False),
}


def plan(path: Path) -> tuple[Shape, int, Settings]:
    """The policy's shape, the GPU's nominal GB (its first line names them) and rl's options of a params file."""
    text = path.read_text()
    params = yaml.safe_load(text)
    gpu = next(size for size in GPUS if f"{size} GB" in text.splitlines()[0])
    return SHAPES[params["fetch"]["0"]], gpu, Settings(**params["rl"])


def rft_options(path: Path) -> rft.Options:
    """rft's options of a params file."""
    paths = {"policy": "policy", "examples": Path("examples.jsonl"), "out": Path("out")}
    return rft.Options(**paths, **yaml.safe_load(path.read_text())["rft"])


def largest_microbatch(shape: Shape, options: Settings, gpu_gib: float) -> int:
    """The most tokens in a micro-batch, a power of two, that fit; 0 if fewer than 1,024 do."""
    sizes = [2**power for power in range(17, 9, -1)]
    fits = (n for n in sizes if update(shape, replace(options, tokens_per_microbatch=n))["sum"] <= gpu_gib)
    return next(fits, 0)


def cache_left(shape: Shape, options: Settings, gpu_gib: float) -> float:
    """Thousands of tokens that the engine's cache may hold if it gets all that the trainer leaves."""
    beside = generation(shape, options, gpu_gib)
    share = 1 - (beside["sum"] - beside["engine"]) / gpu_gib
    if share <= 0:
        return 0.0
    return generation(shape, replace(options, memory_fraction=share), gpu_gib)["cache tokens (thousands)"]


def verdict(shape: Shape, gpu_gib: float, options: Settings) -> str:
    """What fits: tokens of a micro-batch without and with gradient checkpointing, and thousands of cached tokens."""
    plain, checkpointed = (
        largest_microbatch(shape, replace(options, gradient_checkpointing=on), gpu_gib) for on in (False, True)
    )
    cache = cache_left(shape, options, gpu_gib)
    if not checkpointed or cache < 50:
        return "no"
    return f"{plain or '-'} / {checkpointed}, cache {cache:.0f} k"


def overview(rank: int = 32) -> str:
    """What fits on GPUs of several sizes, and the parts behind it at 4,096 tokens a micro-batch."""
    fits, parts = [], []
    for name, shape in list(SHAPES.items())[:3]:
        for kind, options in (("full", Settings()), (f"LoRA {rank}", Settings(lora_rank=rank))):
            fits.append([name, kind, *(verdict(shape, gib, options) for gib in GPUS.values())])
            four = replace(options, tokens_per_microbatch=4096, gradient_checkpointing=True)
            parts.append([name, kind, *(f"{size:.1f}" for size in update(shape, four).values())])
    columns = ["weights", "moments", "gradients", "casts", "activations", "at work", "context", "sum"]
    return "\n\n".join(
        [
            tabulate(fits, ["policy", "", *(f"{size} GB" for size in GPUS)], "github"),
            tabulate(parts, ["policy", "", *columns], "github", disable_numparse=True),
        ]
    )


def main() -> None:
    if len(sys.argv) == 1:
        print(overview())
        return
    path = Path(sys.argv[1])
    shape, gpu, options = plan(path)
    print(f"a GPU of {gpu} GB, which offers {GPUS[gpu]:g} GiB; GiB by part:")
    moments = {
        "rl updates": update(shape, options),
        "rl generates": generation(shape, options, GPUS[gpu]),
        "rft": update(shape, rft_options(path)),
    }
    for name, parts in moments.items():
        rows = [[part, f"{size:.1f}"] for part, size in parts.items()]
        print(f"\n{name}\n{tabulate(rows, tablefmt='github')}")


if __name__ == "__main__":
    main()
