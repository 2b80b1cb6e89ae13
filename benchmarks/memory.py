"""What a policy needs on one GPU while rl updates it and while it generates, by arithmetic.

    python benchmarks/memory.py                                     the tables of docs/memory.md
    python benchmarks/memory.py configs/qwen2.5-0.5b-gsm8k.yaml     the plan of a params file, on the GPUs it names,
                                                                    and the lines that it holds of it

The seconds of a step are an estimate: products at 40 % of what a card's data sheet has for dense bfloat16; the engine's
model is that of rounds.py, which is 7 B's on an H100, carried over to other sizes and cards; half of the groups are
informative; lengths are spread as there, in proportion to max_tokens. The arithmetic of memory is
stages/core/policy/memory.py; `rloop check --gpu-memory` holds the policy that is there against it.
"""

import sys
from dataclasses import replace
from pathlib import Path

import yaml
from tabulate import tabulate

from stages import rft
from stages.core.policy.memory import Gpus, Shape, generation, update
from stages.rl import Settings

GPUS = {24: 22.0, 32: 31.0, 48: 44.0, 80: 79.0}  # GiB that the smallest offers: L4, A10G; 5090; L40S; A100, H100

SHAPES = {
    "Qwen/Qwen2.5-0.5B": Shape(896, 4864, 24, 14, 2, 64, 151936, tied=True),
    "Qwen/Qwen2.5-1.5B": Shape(1536, 8960, 28, 12, 2, 128, 151936, tied=True),
    "Qwen/Qwen2.5-7B": Shape(3584, 18944, 28, 28, 4, 128, 152064, tied=False),
    "Qwen/Qwen2.5-32B": Shape(5120, 27648, 64, 40, 8, 128, 152064, tied=False),
}

CARDS = {24: "RTX 4090", 48: "L40S", 80: "H100"}  # that RATES are of: flop/s, bytes/s
RATES = {24: (66e12, 1.0e12), 48: (145e12, 0.86e12), 80: (400e12, 3.35e12)}
LAUNCH_S, SAMPLE_S = 0.0035, 5e-6  # of the engine's pass, and of a sequence in it, beside reading weights and products
PROMPT_TOKENS, LENGTH = 150, 774 / 2048  # of a prompt; of a completion, as a part of max_tokens
INFORMATIVE = 0.5  # of the groups


def plan(path: Path) -> tuple[Shape, int, int, Settings]:
    """The policy's shape, the GPU's nominal GB and how many there are (its first line), and rl's options of it."""
    first, params = path.read_text().splitlines()[0], yaml.safe_load(path.read_text())
    gpu = next(size for size in GPUS if f"{size} GB" in first)
    shape = SHAPES[params["fetch"]["0"].replace("-Math-", "-")]
    return shape, gpu, 8 if "eight" in first else 1, Settings(**params["rl"])


def seconds(shape: Shape, options: Settings, gpu: int, num_gpus: int) -> dict[str, float]:
    """Estimated seconds of a step of rl: to draw a batch, and to update on it."""
    flops, bandwidth = RATES[gpu]
    weights = shape.linear + shape.embedding  # with the head
    rollouts, length = options.problems_per_step * options.group_size, LENGTH * options.max_tokens
    drawn = rollouts / INFORMATIVE / num_gpus
    room = min(drawn, options.max_sequences or 512)
    read_s = LAUNCH_S + 2 * weights / bandwidth
    pass_s = read_s + room * (SAMPLE_S + 2 * weights / (1.6 * flops))
    scored = (
        2 * (options.minibatches - 1) / options.minibatches
    )  # the old log-probabilities, but for the first update's
    a_weight = (4 if options.lora_rank else 6) + scored + (2 if options.gradient_checkpointing else 0)
    tokens = rollouts * (length + PROMPT_TOKENS)
    return {
        "draw": drawn * length / room * pass_s + (options.max_tokens - length) * (read_s + pass_s) / 2,
        "update": tokens * weights * a_weight / num_gpus / flops,
    }


def told(path: Path) -> str:
    """The lines of a params file that say what a step should take."""
    shape, gpu, number, options = plan(path)
    gpus = Gpus(GPUS[gpu], number, number > 1)
    updating, drawing = update(shape, options, gpus), generation(shape, options, gpus)
    step = seconds(shape, options, gpu, number)
    return f"""\
# Reckoned, for a GPU: updates in {updating["sum"]:.1f} of {GPUS[gpu]:g} GiB, draws in {drawing["sum"]:.1f} with a \
cache of {drawing["cache tokens (thousands)"]:.0f},000 tokens.
# A step, estimated for {CARDS[gpu]}s: {step["draw"]:.0f} s to draw, {step["update"]:.0f} to update, about one to hand \
over (benchmarks/memory.py). What it
# takes: generate_s, update_s, handover_s and peak_memory_gib in log.tsv. The estimate is good to a factor of two.
"""


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
    beside = generation(shape, options, Gpus(gpu_gib))
    share = 1 - (beside["sum"] - beside["engine"]) / gpu_gib
    if share <= 0:
        return 0.0
    return generation(shape, replace(options, memory_fraction=share), Gpus(gpu_gib))["cache tokens (thousands)"]


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
    shape, gpu, number, options = plan(path)
    gpus = Gpus(GPUS[gpu], number, number > 1)
    print(told(path))
    print(f"{number} x {gpu} GB, which offers {GPUS[gpu]:g} GiB; GiB by part, and seconds of a step:")
    moments = {
        "rl updates": update(shape, options, gpus),
        "rl generates": generation(shape, options, gpus),
        "rft": update(shape, rft_options(path), gpus),
        "a step": seconds(shape, options, gpu, number),
    }
    for name, parts in moments.items():
        rows = [[part, f"{size:.1f}"] for part, size in parts.items()]
        print(f"\n{name}\n{tabulate(rows, tablefmt='github')}")


if __name__ == "__main__":
    main()
