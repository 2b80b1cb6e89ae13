"""Merge: the weighted average of policies, another way to the next start policy.

With weights 1 - a and a it is the start policy moved by the share a of the way that RL went: theta + a (theta_RL -
theta), as in "Model soups" (arXiv 2203.05482) and WiSE-FT (arXiv 2109.01903). Tensors are read and written in parts, so
a policy of 7 B parameters takes less than 4 GB of memory. OUT appears whole or not at all.
"""

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from stages.core import outputs
from stages.core.errors import InputError
from stages.core.options import PATH, OptionGroup
from stages.core.policy import checkpoints
from stages.core.progress import StepProgress
from stages.core.provenance import identify, is_done, manifest, recorded

if TYPE_CHECKING:
    import torch

AT_ONCE = 2**24  # numbers of a tensor that are averaged together: 64 MiB in float32
SHARD = "1GB"  # of a file, which is held in memory until it is written
OWN = (  # what a policy has of its own, beside its configuration and tokenizer
    *("*.safetensors", "*.index.json", "*.bin", "*.pth", "*.gguf", ".*"),
    *("README.md", "log.tsv", "metrics.json", "manifest.json"),
)


@dataclass(frozen=True, kw_only=True)
class Options(OptionGroup):
    """What `rloop merge` takes."""

    policy: Annotated[
        list[str], "a checkpoint, or a directory of checkpoints, which stands for its last; repeatable", PATH
    ]
    weight: Annotated[list[float], "the weight of each policy, in their order; they sum to 1"]
    out: Annotated[Path, "directory to write", PATH]

    def __post_init__(self) -> None:
        """Raise InputError if the weights are not as many as the policies, or don't sum to 1."""
        super().__post_init__()
        if len(self.policy) < 2:
            raise InputError(f"--policy: name at least two policies to merge, found {len(self.policy)}")
        if len(self.weight) != len(self.policy):
            raise InputError(f"--weight: {len(self.policy)} policies need as many weights, found {len(self.weight)}")
        if not math.isclose(total := math.fsum(self.weight), 1, abs_tol=1e-6):
            raise InputError(f"--weight: the weights must sum to 1, these sum to {total:g}")


def run(options: Options) -> None:
    """Average policies of one architecture, tensor by tensor, in float32; OUT has the type of the first.

    Weights may be negative or above 1, which moves on beyond a policy.

    Example: rloop merge --policy loop/0/policy --policy loop/1/rl/checkpoints --weight .5 --weight .5
    --out loop/1/merged
    """
    started = time.perf_counter()
    outputs.refuse_unwritable(options.out)
    names: dict[Path, str] = {}
    weights: dict[Path, float] = {}  # of a policy that is named twice the sum
    for name, weight in zip(options.policy, options.weight, strict=True):
        path = checkpoints.resolve(checkpoints.within(name)[-1])
        names[path], weights[path] = name, weights.get(path, 0.0) + weight
    paths = [*names]
    identity = identify("merge", options, recorded(paths), weight=[*weights.values()])
    if is_done(options.out, options.out / "manifest.json", lambda: identity):
        return
    stored = [_Stored(path) for path in paths]
    _check_alike([*names.values()], paths, [each.shapes for each in stored])
    for path in paths:
        checkpoints.check_shapes(path)
    with outputs.claimed(options.out), outputs.whole_dir(options.out) as beside:
        shutil.copytree(paths[0], beside, ignore=shutil.ignore_patterns(*OWN), dirs_exist_ok=True)
        num_tensors = _write(stored, [*weights.values()], beside)
        seconds = time.perf_counter() - started
        outputs.write_json(beside / "manifest.json", manifest(identity, {"tensors": num_tensors}, seconds))


def _check_alike(names: Sequence[str], paths: Sequence[Path], shapes: Sequence[dict[str, list[int]]]) -> None:
    """Raise InputError if policies differ in configuration, tokenizer, or the names or shapes of their tensors."""
    vocabulary = checkpoints.load_tokenizer(paths[0]).get_vocab()
    for name, path, own in zip(names[1:], paths[1:], shapes[1:], strict=True):
        fault = checkpoints.difference(paths[0], path)
        differing = sorted(key for key in shapes[0].keys() | own.keys() if shapes[0].get(key) != own.get(key))
        if fault is None and differing:
            fault = f"tensor {differing[0]} is missing in one, or of another shape"
        if fault is None and checkpoints.load_tokenizer(path).get_vocab() != vocabulary:
            fault = "their tokenizers differ"
        if fault:
            raise InputError(f"policies {names[0]} and {name} cannot be averaged: {fault}")


class _Stored:
    """The tensors of a checkpoint by name. A file is open only while it is read, for its pages count as memory."""

    def __init__(self, path: Path) -> None:
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, list[int]] = {}
        for file in checkpoints.weight_files(path):
            with checkpoints.opened(file) as tensors:
                self._files |= dict.fromkeys(tensors.keys(), file)
                self.shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118

    def rows(self, name: str, rows: slice) -> "torch.Tensor":
        """Some rows of a tensor; all of it if it is a single number."""
        with checkpoints.opened(self._files[name]) as tensors:
            part: torch.Tensor = tensors.get_slice(name)[rows if self.shapes[name] else ...]
            return part.clone()


def _write(stored: Sequence[_Stored], weights: Sequence[float], out: Path) -> int:
    """Write the averaged tensors to `out`, one file of at most SHARD after another; return their number."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    first = stored[0]
    dtypes = {name: first.rows(name, slice(0, 0)).dtype for name in first.shapes}
    planned = {name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in first.shapes.items()}
    plan = split_torch_state_dict_into_shards(planned, max_shard_size=SHARD)
    with StepProgress("merge", len(plan.filename_to_tensors)) as progress:
        for number, (file, names) in enumerate(plan.filename_to_tensors.items(), 1):
            averaged = {name: _average_rows(stored, weights, name, dtypes[name]) for name in names}
            with checkpoints.writing_weights(out / file):
                save_file(averaged, out / file, metadata={"format": "pt"})
            (out / file).chmod(outputs.default_mode())
            progress.step(number, file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        outputs.write_json(out / "model.safetensors.index.json", index)
    return len(planned)


def _average_rows(
    stored: Sequence[_Stored], weights: Sequence[float], name: str, dtype: "torch.dtype"
) -> "torch.Tensor":
    """The average of one tensor, some rows at a time."""
    import torch

    shape = stored[0].shapes[name]
    if not shape:
        return average([each.rows(name, slice(None)) for each in stored], weights)
    averaged = torch.empty(shape, dtype=dtype)
    num_rows = max(1, AT_ONCE // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], num_rows):
        rows = slice(start, start + num_rows)
        averaged[rows] = average([each.rows(name, rows) for each in stored], weights)
    return averaged


def average(tensors: "Sequence[torch.Tensor]", weights: Sequence[float]) -> "torch.Tensor":
    """sum_i weights[i] * tensors[i], added in float32 from left to right; in the type of the first tensor.

    Whole numbers are no weights: of them the first tensor is taken.
    """
    if not tensors[0].is_floating_point():
        return tensors[0]
    total = weights[0] * tensors[0].float()
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total += weight * tensor.float()
    return total.to(tensors[0].dtype)
