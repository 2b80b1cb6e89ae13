"""What a policy needs on a GPU while rl or rft updates it and while it generates, by arithmetic (docs/memory.md).

bfloat16 autocast: weights, gradients and moments in float32, frozen matrices of linear layers in bfloat16.
tests/test_memory.py holds parameters and activations against torch's own bytes, and sharding against the tables of
docs/memory.md. What is marked as an estimate was read in the sources or seen elsewhere; nothing here was measured on a
GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
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
    """What a stage that trains adds to its options, and what the memory of an update hangs on."""

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
        "the attention that transformers computes with; flash_attention_2 and 3 want a GPU, bfloat16 and their package",
        one_of("sdpa", "eager", *FLASH_PACKAGES),
        ROUNDING,
    ] = "sdpa"
    compile_layers: Annotated[
        bool, "compile the decoder's layers, in place: the first updates take minutes longer, later ones less", ROUNDING
    ] = False


class Draws(Protocol):
    """What counts of the options of rl, sample and eval; `lora_rank` is rl's."""

    @property
    def lora_rank(self) -> int: ...

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
    return {"weights": frozen + 4 * adapter, "moments": 8 * adapter, "gradients": 4 * adapter, "casts": 2 * adapter}


def head_work(shape: Shape, tokens: int, rank: int = 0) -> int:
    """Bytes at the head: a tile of logits, a tile of weights, the states and their gradient, the weights' gradient."""
    tile = 2 * HEAD_TILE + 2 * 32768 * shape.hidden
    return tile + 2 * 4 * shape.hidden * tokens + (0 if rank else 4 * shape.embedding)


def update(shape: Shape, options: TrainingOptions, gpus: Gpus = NO_GPU) -> dict[str, float]:
    """GiB by part while rl or rft updates with these options, and their sum; on each of the GPUs the same."""
    if gpus.is_sharded:
        return _sharded_update(shape, options, gpus.number)
    rank, checkpointing = options.lora_rank, options.gradient_checkpointing
    tokens = options.tokens_per_microbatch or MOST_TOKENS
    layer = backward_work(shape, rank, checkpointing) * tokens
    parts = {name: size / GIB for name, size in held(shape, rank).items()}
    parts |= {
        "activations": activations(shape, rank, checkpointing) * tokens / GIB,
        "at work": max(layer, head_work(shape, tokens, rank)) / GIB,
        "context": CONTEXT,
    }
    return parts | {"sum": sum(parts.values())}


def sharded_layer(shape: Shape) -> int:
    """Bytes a token that one layer keeps under FSDP2, where what passes from layer to layer is bfloat16."""
    return 8 * shape.mlp + 29 * shape.hidden


def _sharded_update(shape: Shape, options: TrainingOptions, num_gpus: int) -> dict[str, float]:
    """Under FSDP2: each GPU holds its part, gathers two layers (one ahead) and the head."""
    tokens, layer = options.tokens_per_microbatch or MOST_TOKENS, (shape.linear + shape.vectors) / shape.layers
    held_by_all = {name: size for name, size in held(shape, options.lora_rank).items() if name != "casts"}
    gradients = (
        0 if options.lora_rank else 2 + 4
    )  # bytes a weight: bfloat16, and float32 as it is summed over the ranks
    kept, again = 2 * shape.hidden, sharded_layer(shape)
    if not options.gradient_checkpointing:
        kept, again = again, 0
    in_layer = (again + 6 * shape.mlp) * tokens + gradients * layer
    parts = {name: size / num_gpus / GIB for name, size in held_by_all.items()} | {
        "gathered": (2 * 2 * layer + 2 * shape.embedding) / GIB,
        "activations": shape.layers * kept * tokens / GIB,
        "at work": max(in_layer, 2 * HEAD_TILE + gradients * shape.embedding) / GIB,
        "context": ASLEEP_OF_MANY,
    }
    return parts | {"sum": sum(parts.values())}


def generation(shape: Shape, options: Draws, gpus: Gpus, trains: bool = True) -> dict[str, float]:
    """GiB by part while the engine draws, their sum, and the tokens (thousands) that its cache holds.

    On several GPUs `tensor_parallel` of them share an engine. The trainer's part is a share of it if it is sharded,
    and none in eval and sample, which do not train.
    """
    is_alone = trains and gpus.number == 1
    parts = {"engine": options.memory_fraction * gpus.gib}
    if trains:
        trainer = held(shape, options.lora_rank)
        own = (trainer["weights"] + trainer["moments"]) / (gpus.number if gpus.is_sharded else 1)
        parts |= {"trainer": own / GIB, "hand-over": 2 * 2 * shape.embedding / GIB}
    parts |= {"context": CONTEXT if is_alone else CONTEXT_OF_MANY}
    shared = min(options.tensor_parallel, shape.kv_heads)  # fewer key/value heads than GPUs are held several times over
    work = ENGINE_WORK if is_alone else ENGINE_WORK_OF_MANY
    cache = parts["engine"] - 2 * shape.parameters / options.tensor_parallel / GIB - work
    cached = cache * GIB / shape.cache_per_token * shared / 1000
    return parts | {"sum": sum(parts.values()), "cache tokens (thousands)": cached}


def fitting_tokens(shape: Shape, options: TrainingOptions, gpus: Gpus) -> int:
    """The most tokens a micro-batch, 16,384 or a half, a quarter, ... of it, that fit the memory; 0 if none do."""
    tokens = MOST_TOKENS
    while tokens >= LEAST_TOKENS:
        if update(shape, with_tokens(options, tokens), gpus)["sum"] <= MARGIN * gpus.gib:
            return tokens
        tokens //= 2
    return 0


def with_tokens(options: TrainingOptions, tokens: int) -> TrainingOptions:
    """What counts of `options` here, with another micro-batch."""
    rank, checkpointing = options.lora_rank, options.gradient_checkpointing
    return TrainingOptions(lora_rank=rank, gradient_checkpointing=checkpointing, tokens_per_microbatch=tokens)


def update_advice(shape: Shape, options: TrainingOptions, gpus: Gpus) -> str | None:
    """What to change if an update with these options does not fit the memory by the plan; None if it fits."""
    needed = update(shape, with_tokens(options, planned_tokens(shape, options, gpus)), gpus)["sum"]
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
        other = TrainingOptions(lora_rank=rank, gradient_checkpointing=checkpointing)
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
    a_gib = GIB * min(options.tensor_parallel, shape.kv_heads) / shape.cache_per_token
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
