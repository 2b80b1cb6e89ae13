"""Forms of policies that are no checkpoint directory of safetensors: what they are, and how to make one of them.

Read are a transformers checkpoint directory (config.json, a tokenizer, model.safetensors or its parts with their index)
of a causal language model, a directory of such, or the hub's id of one.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.core.errors import InputError
from stages.core.outputs import read_json

LFS = b"version https://git-lfs"  # what a file that Git LFS has not fetched begins with
GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # in the names of architectures that write text


def refuse_others(path: Path) -> None:
    """Raise InputError if `path` is known to be another form: GGUF, an adapter, torch's pickles, Git LFS pointers."""
    if path.suffix == ".gguf" or _has(path, "*.gguf"):
        raise InputError(
            f"policy {path}: GGUF, which is llama.cpp's form, is not read: take the checkpoint that it was made from"
        )
    if (path / "adapter_config.json").is_file() and not _has(path, "model*.safetensors"):
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path", "its base")
        raise InputError(
            f'policy {path}: a LoRA adapter of {base}, which has to be merged first: python -c "from peft import '
            f"AutoPeftModelForCausalLM as M; M.from_pretrained('{path}').merge_and_unload().save_pretrained('merged')\""
            ", then copy the base's tokenizer files to merged"
        )
    for file in path.iterdir() if path.is_dir() else ():
        if file.is_file() and _is_pointer(file):
            raise InputError(
                f"policy {path}: {file.name} is a Git LFS pointer: fetch what it stands for by git lfs pull"
            )
    if _has(path, "pytorch_model*.bin") and not _has(path, "*.safetensors"):
        raise InputError(
            f"policy {path}: its weights are pickles (pytorch_model.bin), which can run code and are not read: where "
            'you trust them, python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{path}').save_pretrained('{path}')\" writes them as safetensors beside"
        )


def _has(path: Path, pattern: str) -> bool:
    return path.is_dir() and any(path.glob(pattern))


def _is_pointer(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(LFS)) == LFS


def refuse_odd_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raise InputError for a config.json of a model that writes no text, or of what would only fail further down."""
    architectures = config.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    if named and not any(part in str(architecture) for architecture in named for part in GENERATES):
        raise InputError(
            f"policy {path}: {', '.join(map(str, named))} writes no text: take the causal language model "
            "(...ForCausalLM) that it was made from"
        )
    for part in (config, *(part for part in config.values() if isinstance(part, Mapping))):
        base = part.get("rope_theta", 1.0)
        if type(base) not in (int, float) or not 0 < base < math.inf:
            raise InputError(f"policy {path}: config.json: rope_theta must be a number above 0, found {base!r}")
        dtype = part.get("dtype") or part.get("torch_dtype")
        if isinstance(dtype, str) and not _is_dtype(dtype):
            raise InputError(f"policy {path}: config.json: torch has no type {dtype!r}: name float32 or bfloat16")


def _is_dtype(name: str) -> bool:
    import torch

    return name == "auto" or isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype)
