"""What a policy needs on a GPU while rl or rft updates it and while it generates, by arithmetic (docs/memory.md).

Weights, gradients and moments are float32 whatever the compute type. In bfloat16 frozen matrices of linear layers are
held in it; autocast, or FSDP2, rounds the others. tests/test_memory.py holds parameters and activations against torch's
own bytes, and sharding against the tables of docs/memory-many-gpus.md. What is marked as an estimate was read in the
sources or seen elsewhere; nothing here was measured on a GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

from stages.core.errors import InputError
from stages.core.options import ROUNDING, at_least, one_of
from stages.core.outputs import read_json
from stages.core.policy import checkpoints
from stages.core.policy.adapters import LoraOptions

GIB = 2**30
CONTEXT = 1.5  # GiB, estimate: CUDA context, allocator's fragments, what a sleeping engine keeps
CONTEXT_OF_MANY = 2.0  # GiB, estimate: the same and NCCL, while the engine is awake
ASLEEP_OF_MANY = 4.0  # GiB, estimate: the same while it sleeps
ENGINE_WORK = 2.0  # GiB, estimate: the engine's activations, logits of its sampler, CUDA graphs
ENGINE_WORK_OF_MANY = 3.0  # GiB, estimate: the same for policies that need several GPUs
TOLERANCE = 0.01  # of the number of weights: biases, or norms of queries, that the plan doesn't know
MOST_TOKENS, LEAST_TOKENS = 16384, 512  # a micro-batch: without a plan, and the smallest that a plan proposes
CPU_TOKENS = 2048  # fewer read weights and gradients too often, more leave the processor's caches and hold more padding
MARGIN = 0.95  # of a GPU's memory, that a plan may fill
FLASH_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
HEAD_TILE = 4096 * 32768  # logits that TRL's fused head holds at a time


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(LoraOptions):
    """What a stage that trains adds to its options, on which the memory of an update depends."""

    tokens_per_microbatch: Annotated[
        int,
        "most tokens, padding included, in one forward and backward pass; 0 is the most that fits by docs/memory.md, "
        "on a CPU 2,048",
        at_least(0),
        ROUNDING,
    ] = 0
    gradient_checkpointing: Annotated[bool, "recompute activations in the backward pass to save memory", ROUNDING] = (
        False
    )
    dtype: Annotated[
        str,
        "compute type: float32, bfloat16, or auto (bfloat16 on a GPU, float32 elsewhere)",
        one_of("auto", "float32", "bfloat16"),
    ] = "auto"
    attn_implementation: Annotated[
        str,
        "the attention that transformers computes with; auto is sdpa, on a CPU in bfloat16 eager for short sequences; "
        "flash_attention_2 and 3 want a GPU, bfloat16 and their package",
        one_of("auto", "sdpa", "eager", *FLASH_PACKAGES),
        ROUNDING,
    ] = "auto"
    compile_layers: Annotated[
        bool, "compile the decoder's layers, in place: the first updates take minutes longer, later ones less", ROUNDING
    ] = False


class Draws(Protocol):
    """What counts of the options of rl, sample and eval; `lora_rank` is rl's."""

    @property
    def lora_rank(self) -> int: ...

    @property
    def dtype(self) -> str: ...

    @property
    def memory_fraction(self) -> float: ...

    @property
    def tensor_parallel(self) -> int: ...

    @property
    def max_sequences(self) -> int: ...


class Gpus(NamedTuple):
    """What a stage runs on: the memory of each GPU, 0 without one, their number, whether they share the policy."""

    gib: float = 0.0
    number: int = 1
    is_sharded: bool = False


NO_GPU = Gpus()


class Widths(NamedTuple):
    """Bytes of a number: in products, and in the stream of values between layers."""

    product: int
    stream: int


FLOAT32, AUTOCAST, SHARDED = Widths(4, 4), Widths(2, 4), Widths(2, 2)  # the last two in bfloat16; of FSDP2 the last


def widths(dtype: str, is_sharded: bool = False) -> Widths:
    """Those of an update on a GPU with this `--dtype`."""
    return FLOAT32 if dtype == "float32" else SHARDED if is_sharded else AUTOCAST


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
    def cached(self) -> int:
        """Numbers in the engine's cache a token."""
        return self.layers * 2 * self.key


def shape_of(config: Mapping[str, Any]) -> Shape | None:
    """The shape that a config.json describes; None if it is no decoder of this kind, such as a mixture of experts."""
    config = {**config, **config.get("text_config", {})}
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if any(type(config.get(name)) is not int for name in names) or any("expert" in name for name in config):
        return None
    hidden, mlp, layers, heads, vocab = (config[name] for name in names)
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    return Shape(hidden, mlp, layers, heads, kv_heads, head_dim, vocab, bool(config.get("tie_word_embeddings")))


def read_shape(policy: Path) -> Shape:
    """The shape of a checkpoint; InputError if it is broken, or the plan is not for its kind.

    Its weights are counted by the headers of the files; a tied head that was written all the same counts once.
    """
    shape = shape_of(read_json(checkpoints.resolve(str(policy)) / "config.json"))
    stored = checkpoints.shapes(policy)
    if shape is not None and shape.tied:
        stored.pop("lm_head.weight", None)
    if shape is None or abs(shape.parameters / sum(map(prod, stored.values())) - 1) > TOLERANCE:
        raise InputError(f"the plan is for decoders of Qwen2's and Llama's kind, and {policy} is none")
    return shape


def layer_activations(shape: Shape, rank: int = 0, width: Widths = AUTOCAST) -> int:
    """Bytes a token that one layer keeps for its backward pass.

    Attention keeps query, key, value, output, and a float32 a head; a norm its input in float32, and what it has
    normalised if it is trained. Under autocast each linear layer keeps a rounded copy of its input of its own; else
    query, key and value share one, and so do gate and up. An adapter keeps its inner values and, under autocast, an
    input where the frozen layer needs none.
    """
    product, stream = width
    is_cast = product < stream
    attention = 2 * product * (shape.query + shape.key) + 4 * shape.heads
    inputs = (5 if is_cast else 2) * product * shape.hidden  # of query, key, value; of gate, up
    norms = 2 * (4 * shape.hidden + 4)
    extra = 2 * stream * shape.hidden
    if rank:
        extra = 7 * product * rank + (product * shape.query if is_cast else 0)
    return attention + inputs + norms + extra + 4 * product * shape.mlp


def activations(shape: Shape, rank: int = 0, checkpointing: bool = False, width: Widths = AUTOCAST) -> int:
    """Bytes a token that a forward pass keeps, without the head."""
    norm = 4 * shape.hidden + 4
    end = norm if rank else norm + width.stream * shape.hidden + 8  # the last norm; the token's id, for the embedding
    if checkpointing:
        return shape.layers * width.stream * shape.hidden + end
    return shape.layers * layer_activations(shape, rank, width) - (norm if rank else 0) + end


def backward_work(shape: Shape, rank: int = 0, checkpointing: bool = False, width: Widths = AUTOCAST) -> int:
    """Bytes a token while the backward pass is in a layer: gradients (estimate), and what is computed again."""
    gradients = 4 * width.product * shape.mlp + 8 * shape.hidden
    again = layer_activations(shape, rank, width) - width.stream * shape.hidden
    return gradients + (again if checkpointing else 0)


def held(shape: Shape, rank: int = 0, width: Widths = AUTOCAST) -> dict[str, int]:
    """Bytes of what stays from step to step, and of gradients and the weights' casts while an update runs."""
    trained = shape.adapter(rank) if rank else shape.parameters
    rounded = shape.linear + (0 if shape.tied else shape.embedding) if rank else 0  # frozen, in the products' type
    frozen = width.product * rounded + 4 * (shape.parameters - rounded if rank else 0)
    casts = (trained if rank else shape.linear) if width == AUTOCAST else 0
    return {"weights": frozen + 4 * trained, "moments": 8 * trained, "gradients": 4 * trained, "casts": 2 * casts}


def head_work(shape: Shape, tokens: int, rank: int = 0, width: Widths = AUTOCAST) -> int:
    """Bytes at the head: a tile of logits, a tile of weights, the states and their gradient, the weights' gradient."""
    tile = width.product * (HEAD_TILE + 32768 * shape.hidden)
    return tile + 2 * 4 * shape.hidden * tokens + (0 if rank else 4 * shape.embedding)


def update(shape: Shape, options: TrainingOptions, gpus: Gpus = NO_GPU) -> dict[str, float]:
    """GiB by part while rl or rft updates with these options, and their sum; on each of the GPUs the same."""
    how = options.lora_rank, options.gradient_checkpointing, widths(options.dtype, gpus.is_sharded)
    rank, _, width = how
    tokens = options.tokens_per_microbatch or MOST_TOKENS
    kept, work = activations(shape, *how) * tokens, backward_work(shape, *how) * tokens
    parts = held(shape, rank, width)
    if gpus.is_sharded:
        parts = {name: size // gpus.number for name, size in parts.items() if name != "casts"}
        layer = (shape.linear + shape.vectors + shape.adapter(rank)) // shape.layers
        parts["gathered"] = width.product * (2 * layer + shape.embedding)  # two layers, one of them ahead; the head
        summed = 0 if rank else width.product + 4  # bytes a gradient: as computed, and as it is summed over the ranks
        work, head = work + summed * layer, width.product * HEAD_TILE + summed * shape.embedding
    else:
        head = head_work(shape, tokens, rank, width)
    parts |= {"activations": kept, "at work": max(work, head)}
    gib = {name: size / GIB for name, size in parts.items()} | {
        "context": ASLEEP_OF_MANY if gpus.is_sharded else CONTEXT
    }
    return gib | {"sum": sum(gib.values())}


def generation(shape: Shape, options: Draws, gpus: Gpus, trains: bool = True) -> dict[str, float]:
    """GiB by part while the engine draws, their sum, and the tokens (thousands) that its cache holds.

    On several GPUs `tensor_parallel` of them share an engine. The trainer's part is a share of it if it is sharded,
    and none in eval and sample, which do not train.
    """
    is_alone = trains and gpus.number == 1
    width = widths(options.dtype)
    parts = {"engine": options.memory_fraction * gpus.gib}
    if trains:
        trainer = held(shape, options.lora_rank, width)
        own = (trainer["weights"] + trainer["moments"]) / (gpus.number if gpus.is_sharded else 1)
        parts |= {"trainer": own / GIB, "hand-over": 2 * width.product * shape.embedding / GIB}
    parts |= {"context": CONTEXT if is_alone else CONTEXT_OF_MANY}
    shared = min(options.tensor_parallel, shape.kv_heads)  # fewer key/value heads than GPUs are held several times over
    work = ENGINE_WORK if is_alone else ENGINE_WORK_OF_MANY
    cache = parts["engine"] - width.product * shape.parameters / options.tensor_parallel / GIB - work
    cached = cache * GIB / (width.product * shape.cached) * shared / 1000
    return parts | {"sum": sum(parts.values()), "cache tokens (thousands)": cached}


def fitting_tokens(shape: Shape, options: TrainingOptions, gpus: Gpus) -> int:
    """The most tokens a micro-batch, 16,384 or a half, a quarter, ... of it, that fit the memory; 0 if none do."""
    tokens = MOST_TOKENS
    while tokens >= LEAST_TOKENS:
        if update(shape, replace(options, tokens_per_microbatch=tokens), gpus)["sum"] <= MARGIN * gpus.gib:
            return tokens
        tokens //= 2
    return 0


def update_advice(shape: Shape, options: TrainingOptions, gpus: Gpus) -> str | None:
    """What to change if an update with these options does not fit the memory by the plan; None if it fits."""
    tokens = planned_tokens(shape, options, gpus)
    needed = update(shape, replace(options, tokens_per_microbatch=tokens), gpus)["sum"]
    if needed <= gpus.gib:
        return None
    said = f"an update takes {needed:.1f} GiB by the plan, and the GPU has {gpus.gib:.1f}"
    if tokens := fitting_tokens(shape, options, gpus):
        return f"{said}: --tokens-per-microbatch {tokens} fits"
    for flag, rank, checkpointing in (
        ("--gradient-checkpointing", options.lora_rank, True),
        ("--lora-rank 32", 32, options.gradient_checkpointing),
        ("--lora-rank 32 --gradient-checkpointing", 32, True),
    ):
        other = replace(options, lora_rank=rank, gradient_checkpointing=checkpointing)
        if tokens := fitting_tokens(shape, other, gpus):
            return f"{said}: {flag} --tokens-per-microbatch {tokens} fits"
    return f"{said}: no option makes it fit; share the policy among GPUs (configs/accelerate/gpu8-fsdp2.yaml)"


def engine_advice(shape: Shape, options: Draws, longest: int, gpus: Gpus, trains: bool = True) -> str | None:
    """What to change if by the plan the engine does not fit beside the trainer, or its cache does not do; else None.

    It has to hold one sequence of the `longest` length, in tokens, and `max_sequences`, if given, at half of it.
    """
    parts = generation(shape, options, gpus, trains)
    cached, wanted = 1000 * parts["cache tokens (thousands)"], max(1.0, options.max_sequences / 2) * longest
    if parts["sum"] <= gpus.gib and cached >= wanted:
        return None
    if parts["sum"] > gpus.gib:
        said = f"drawing takes {parts['sum']:.1f} GiB by the plan, and the GPU has {gpus.gib:.1f}"
    else:
        said = f"the engine's cache has room for {max(0.0, cached):,.0f} tokens by the plan, and needs {wanted:,.0f}"
    spare = MARGIN * gpus.gib - parts["sum"]
    fraction = int(20 * (options.memory_fraction + spare / gpus.gib)) / 20
    a_gib = GIB * min(options.tensor_parallel, shape.kv_heads) / (widths(options.dtype).product * shape.cached)
    cached += (fraction - options.memory_fraction) * gpus.gib * a_gib
    if fraction > 0 and cached >= longest:
        fewer = f" --max-sequences {2 * cached // longest:.0f}" if cached < wanted else ""
        return f"{said}: --memory-fraction {fraction:g}{fewer} fits"
    remedy = "--lora-rank, or share the policy among GPUs" if trains else "--tensor-parallel, on more GPUs"
    return f"{said}: no --memory-fraction makes it fit; take {remedy}"


def gpu_memory() -> float:
    """GiB of this process's GPU; 0 without one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else 0.0


def planned_shape(policy: Path, gpu_gib: float) -> Shape | None:
    """The shape to plan with; None without a GPU, or for a policy that the plan is not for."""
    try:
        return read_shape(policy) if gpu_gib else None
    except InputError:
        return None


def planned_tokens(shape: Shape | None, options: TrainingOptions, gpus: Gpus) -> int:
    """The tokens of a micro-batch: those given, for 0 those of the plan; without a plan 16,384, on a CPU 2,048."""
    if options.tokens_per_microbatch or shape is None or not gpus.gib:
        return options.tokens_per_microbatch or (MOST_TOKENS if gpus.gib else CPU_TOKENS)
    return fitting_tokens(shape, options, gpus) or LEAST_TOKENS
