"""What a policy needs on one GPU while rl updates it and while it generates, by arithmetic.

    python benchmarks/memory.py                                     the tables of docs/memory.md
    python benchmarks/memory.py configs/qwen2.5-0.5b-gsm8k.yaml     the plan of a params file, on its GPU

One process in bfloat16 autocast: weights, gradients and moments in float32, frozen matrices of linear layers in
bfloat16. tests/test_memory.py holds parameters and activations against torch's own. What is marked as an estimate was
read in the sources or seen elsewhere; nothing here was measured on a GPU.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from tabulate import tabulate

from stages import rft
from stages.rl import Options

GIB = 2**30
GPUS = {24: 22.0, 48: 44.0, 80: 79.0}  # GiB that the smallest of its kind offers: L4 and A10G, L40S, A100 and H100
CONTEXT = 1.5  # GiB, estimate: CUDA context, allocator's fragments, what a sleeping engine keeps
ENGINE_WORK = 2.0  # GiB, estimate: the engine's activations, logits of its sampler, CUDA graphs
HEAD_TILE = 4096 * 32768  # logits that TRL's fused head holds at a time


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder of the Qwen2 kind (biases at query, key and value)."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linear(self) -> int:
        """Parameters of the linear layers, their biases included, the head left out."""
        attention = 2 * self.hidden * (self.query + self.key) + self.query + 2 * self.key
        return self.layers * (attention + 3 * self.hidden * self.mlp)

    @property
    def vectors(self) -> int:
        """Parameters of the norms."""
        return (2 * self.layers + 1) * self.hidden

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        return self.linear + self.vectors + self.embedding * (1 if self.tied else 2)

    def adapter(self, rank: int) -> int:
        """Parameters of adapters on all linear layers."""
        sizes = 2 * (self.hidden + self.query) + 2 * (self.hidden + self.key) + 3 * (self.hidden + self.mlp)
        return self.layers * rank * sizes

    @property
    def cache_per_token(self) -> int:
        """Bytes of the engine's cache a token, in bfloat16."""
        return self.layers * 2 * self.key * 2


SHAPES = {
    "Qwen/Qwen2.5-0.5B": Shape(896, 4864, 24, 14, 2, 64, 151936, tied=True),
    "Qwen/Qwen2.5-1.5B": Shape(1536, 8960, 28, 12, 2, 128, 151936, tied=True),
    "Qwen/Qwen2.5-7B": Shape(3584, 18944, 28, 28, 4, 128, 152064, tied=False),
    "Qwen/Qwen2.5-32B": Shape(5120, 27648, 64, 40, 8, 128, 152064, tied=False),
}


def layer_activations(shape: Shape, rank: int = 0) -> int:
    """Bytes a token that one layer keeps for its backward pass.

    Between layers the stream is float32, in products bfloat16, and each linear layer keeps a bfloat16 copy of its input
    of its own. Attention keeps query, key, value, output, and a float32 a head. An adapter keeps its inner values, and
    an input where the frozen layer needs none; a frozen norm does not keep what it has normalised.
    """
    attention = 4 * shape.query + 4 * shape.key + 4 * shape.heads
    inputs = (3 + 2) * 2 * shape.hidden  # of query, key, value; of gate, up
    stream = 2 * (4 * shape.hidden + 4)  # before each norm, and its scale
    extra = 2 * shape.query + 7 * 2 * rank if rank else 2 * 4 * shape.hidden
    return attention + inputs + stream + extra + 8 * shape.mlp


def activations(shape: Shape, rank: int = 0, checkpointing: bool = False) -> int:
    """Bytes a token that a forward pass keeps, without the head."""
    norm = 4 * shape.hidden + 4
    end = norm if rank else norm + 4 * shape.hidden + 8  # the last norm; the token's id, for the embedding's gradient
    if checkpointing:
        return shape.layers * 4 * shape.hidden + end
    return shape.layers * layer_activations(shape, rank) - (norm if rank else 0) + end


def backward_work(shape: Shape, rank: int = 0, checkpointing: bool = False) -> int:
    """Bytes a token while the backward pass is in a layer: gradients (estimate), and what is computed again."""
    gradients = 8 * shape.mlp + 8 * shape.hidden
    return gradients + (layer_activations(shape, rank) - 4 * shape.hidden if checkpointing else 0)


def held(shape: Shape, rank: int = 0) -> dict[str, int]:
    """Bytes of what stays from step to step, and of gradients and the weights' casts while an update runs."""
    if not rank:
        size = shape.parameters
        return {"weights": 4 * size, "moments": 8 * size, "gradients": 4 * size, "casts": 2 * shape.linear}
    adapter = shape.adapter(rank)
    frozen = 2 * (shape.linear + (0 if shape.tied else shape.embedding)) + 4 * (shape.embedding + shape.vectors)
    return {
        "weights": frozen + 4 * adapter,
        "moments": 8 * adapter,
        "gradients": 4 * adapter,
        "casts": 2 * adapter,
    }


def head_work(shape: Shape, tokens: int, rank: int = 0) -> int:
    """Bytes at the head: a tile of logits, a tile of weights, the states and their gradient, the weights' gradient."""
    tile = 2 * HEAD_TILE + 2 * 32768 * shape.hidden
    return tile + 2 * 4 * shape.hidden * tokens + (0 if rank else 4 * shape.embedding)


def update(shape: Shape, options: Options | rft.Options) -> dict[str, float]:
    """GiB by part while rl or rft updates with these options, and their sum."""
    rank, checkpointing, tokens = options.lora_rank, options.gradient_checkpointing, options.tokens_per_microbatch
    layer = backward_work(shape, rank, checkpointing) * tokens
    parts = {name: size / GIB for name, size in held(shape, rank).items()}
    parts |= {
        "activations": activations(shape, rank, checkpointing) * tokens / GIB,
        "at work": max(layer, head_work(shape, tokens, rank)) / GIB,
        "context": CONTEXT,
    }
    return parts | {"sum": sum(parts.values())}


def generation(shape: Shape, options: Options, gpu_gib: float) -> dict[str, float]:
    """GiB by part while the engine draws, their sum, and the tokens (thousands) that its cache holds."""
    engine = options.memory_fraction * gpu_gib
    weights = 2 * shape.parameters / GIB
    trainer = held(shape, options.lora_rank)
    parts = {
        "engine": engine,
        "trainer": (trainer["weights"] + trainer["moments"]) / GIB,
        "hand-over": 2 * 2 * shape.embedding / GIB,
        "context": CONTEXT,
    }
    cache = engine - weights - ENGINE_WORK
    return parts | {"sum": sum(parts.values()), "cache tokens (thousands)": cache * GIB / shape.cache_per_token / 1000}


def plan(path: Path) -> tuple[Shape, int, Options]:
    """The policy's shape, the GPU's nominal GB (its first line names them) and rl's options of a params file."""
    text = path.read_text()
    params = yaml.safe_load(text)
    gpu = next(size for size in GPUS if f"{size} GB" in text.splitlines()[0])
    return SHAPES[params["fetch"]["0"]], gpu, Options(**params["rl"])


def rft_options(path: Path) -> rft.Options:
    """rft's options of a params file."""
    return rft.Options(**yaml.safe_load(path.read_text())["rft"])


def largest_microbatch(shape: Shape, options: Options, gpu_gib: float) -> int:
    """The most tokens in a micro-batch, a power of two, that fit; 0 if fewer than 1,024 do."""
    sizes = [2**power for power in range(17, 9, -1)]
    fits = (n for n in sizes if update(shape, replace(options, tokens_per_microbatch=n))["sum"] <= gpu_gib)
    return next(fits, 0)


def cache_left(shape: Shape, options: Options, gpu_gib: float) -> float:
    """Thousands of tokens that the engine's cache may hold if it gets all that the trainer leaves."""
    beside = generation(shape, options, gpu_gib)
    share = 1 - (beside["sum"] - beside["engine"]) / gpu_gib
    if share <= 0:
        return 0.0
    return generation(shape, replace(options, memory_fraction=share), gpu_gib)["cache tokens (thousands)"]


def verdict(shape: Shape, gpu_gib: float, options: Options) -> str:
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
        for kind, options in (("full", Options()), (f"LoRA {rank}", Options(lora_rank=rank))):
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
