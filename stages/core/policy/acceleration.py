"""How rl and rft use accelerate: float32 gradients under bfloat16, whole weights from shards."""

import functools
import importlib.util
import logging
import math
import os
import shutil
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from stages.core.errors import InputError
from stages.core.policy import adapters, checkpoints
from stages.core.policy.memory import FLASH_PACKAGES, TrainingOptions

COMPILER = "inductor"
FP8_SINCE = (8, 9)  # compute capability
SHORT_TOKENS = 512  # up to which the attention weights of all pairs of a sequence's tokens are kept

# Torch 2.11 warns of an output head that does not run; the fused loss takes its weights instead, see Trainer.log_probs.
logging.getLogger("torch.distributed.fsdp.fully_shard").setLevel(logging.ERROR)


def uses_bfloat16(dtype: str) -> bool:
    """Whether `--dtype` means bfloat16: either named, or auto on a GPU.

    Raises InputError for a GPU that has none, such as a V100 or T4, where it would be computed by other means, slowly.
    """
    on_gpu = torch.cuda.is_available()
    is_meant = dtype == "bfloat16" or (dtype == "auto" and on_gpu)
    if is_meant and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(f"--dtype {dtype}: {torch.cuda.get_device_name()} has no bfloat16: add --dtype float32")
    return is_meant


def is_bfloat16_on_gpu(dtype: str) -> bool:
    """Whether there is a GPU, and `--dtype` means bfloat16 on it."""
    return torch.cuda.is_available() and uses_bfloat16(dtype)


def capability() -> tuple[int, int] | None:
    """The compute capability of this process's GPU; None without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def fp8_fault(dtype: str, capability: tuple[int, int] | None) -> str:
    """Why an engine on such a GPU can't compute in FP8 beside a trainer in `--dtype`; "" if it can.

    Before 8.9 vLLM holds weights in FP8 and multiplies in bfloat16; in 0.23 its captured graphs then use a workspace
    that sleep and hand-over have given back.
    """
    if capability is None or dtype == "float32":
        return "it takes a GPU that computes in bfloat16"
    return "" if capability >= FP8_SINCE else "this GPU has no products in FP8, as RTX 40, L40S, H100 and newer ones do"


def check(options: TrainingOptions) -> None:
    """Raise InputError for an attention or a compiler that `options` ask for and this machine lacks."""
    name = options.attn_implementation
    if package := FLASH_PACKAGES.get(name):
        if not is_bfloat16_on_gpu(options.dtype):
            raise InputError(f"--attn-implementation {name}: it computes in bfloat16 on a GPU only: leave it out")
        if importlib.util.find_spec(package) is None:
            raise InputError(f"--attn-implementation {name}: {package} is not installed: install it, or leave it out")
    if options.compile_layers and not torch.cuda.is_available():
        check_compiler("--compile-layers")


def check_compiler(option: str) -> None:
    """Raise InputError if there is no C++ compiler, which inductor calls by CXX or g++."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise InputError(f"{option}: there is no C++ compiler ({compiler}): install g++, set CXX, or leave it out")


def compile_layers(model: Any) -> None:
    """Let each layer of the decoder run as compiled code, for any length; call it before `prepare`.

    In place: names of weights, gradient checkpointing and states stay. accelerate's own way renames the weights.
    Raises InputError for a policy whose layers transformers does not name.
    """
    layers = [layer for layer in model.modules() if type(layer).__name__ in (model._no_split_modules or ())]
    if not layers:
        raise InputError(
            f"--compile-layers: transformers does not name the layers of {type(model).__name__}: leave it out"
        )
    torch._dynamo.config.disable = False  # as an engine on the CPU has it
    for layer in layers:
        layer.compile(dynamic=True, backend=COMPILER)


def choose_attention(model: Any, name: str, is_bfloat16: bool) -> None:
    """With the `name` auto, let a CPU's passes in bfloat16 over short sequences compute attention by plain products.

    Torch's fused attention takes two to three times as long there. Plain products keep the weights of all pairs of
    tokens, so long sequences have the fused one. Call it after heads and prefixes are added, before it is wrapped.
    """
    if torch.cuda.is_available() or not is_bfloat16 or name != "auto" or model.config._attn_implementation != "sdpa":
        return
    if not model._can_set_attn_implementation():  # Falcon: transformers would warn in each pass, and change nothing
        return
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        prefixes = kwargs.get("prefixes")
        longest = input_ids.shape[1] + (0 if prefixes is None else prefixes.ids.shape[1])
        self.set_attn_implementation("eager" if longest <= SHORT_TOKENS else "sdpa")
        return original(input_ids, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


def compute_exactly() -> None:
    """Let a GPU add up in a fixed order, in updates and, where vLLM has that mode, in the engine; before either starts.

    The same work then gives the same bits, at some cost in speed. A CPU does so anyway.
    """
    if (version := capability()) is None:
        return
    for name, value in exact_environment(version).items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)


def exact_environment(capability: tuple[int, int]) -> dict[str, str]:
    """What has to be set on a GPU of that compute capability.

    vLLM's mode for batches of any size is for Hopper and newer: on 8.x (A100, L40S, RTX 4090) it puts products without
    a gradient into the place of torch's, in the whole process, so that no policy could be trained beside it.
    """
    settings = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
    return settings | ({"VLLM_BATCH_INVARIANT": "1"} if capability >= (9, 0) else {})


def memory_in_use() -> float:
    """GiB of this process's GPU in use, by whomever; NaN without one.

    Torch keeps what it has freed, so right after an update this is the update's peak.
    """
    if not torch.cuda.is_available():
        return math.nan
    free, whole = torch.cuda.mem_get_info()
    return (whole - free) / 2**30


def reduce_in_float32(accelerator: Accelerator) -> None:
    """Let FSDP2 sum gradients over ranks in float32; under bfloat16 accelerate would sum and return bfloat16.

    Call it before `prepare`. What a module returns keeps its type: log-probabilities are float32 already. An output
    type of float32 would hold for each layer, not for the whole: gradient checkpointing would keep twice as much, and
    the head would multiply in float32.
    """
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy


def full_weights(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The whole weights of an unwrapped model in `dtype`, one at a time and tied ones once; all ranks must iterate.

    Adapters are merged into them, in float32.
    """
    for name, tensor in adapters.merged(model):
        if name in model.all_tied_weights_keys:
            continue
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)  # before it is gathered: half the traffic, half the memory
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_policy(accelerator: Accelerator, model: Any, tokenizer: Any, path: Path | None, dtype: torch.dtype) -> None:
    """Write a checkpoint directory in `dtype`; called on every rank, written by the main one.

    The weights are gathered one by one and kept, on the CPU, by the main rank only. `path` may be None on the others.
    """
    kept = {}
    for name, tensor in full_weights(model, dtype):
        if accelerator.is_main_process:
            kept[name] = tensor.to("cpu")
    if accelerator.is_main_process:
        assert path is not None
        checkpoints.save(model, tokenizer, path, kept)
