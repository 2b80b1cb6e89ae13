"""LoRA: a policy whose weights are frozen, and small matrices beside its layers that are trained instead, by peft.

A layer with the weight W (out x in) has an adapter B (out x rank) and A (rank x in), and computes with
W + lora_alpha / lora_rank * B A. W never changes. The engine and every checkpoint get that sum, computed in float32
each time anew, so nothing drifts, and whatever reads a checkpoint needs to know nothing of adapters. B begins at zero:
before the first update the sum is the start policy, bit for bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from stages.core.errors import InputError
from stages.core.options import OptionGroup, above, at_least
from stages.core.policy import checkpoints
from stages.core.ranks import Ranks

if TYPE_CHECKING:
    import torch

ALL = "all-linear"
NAME = "default"  # peft's own name for the only adapter of a model


@dataclass(frozen=True, kw_only=True)
class LoraOptions(OptionGroup):
    """What a stage that trains adds to its options."""

    lora_rank: Annotated[
        int, "train adapters of this rank (LoRA) instead of the weights, which takes less memory; 0 is off", at_least(0)
    ] = 0
    lora_alpha: Annotated[float, "adapters are scaled by lora_alpha / lora_rank", above(0)] = 32.0
    lora_targets: Annotated[
        str, f"layers that get an adapter: {ALL}, or names with commas between, such as q_proj,v_proj"
    ] = ALL


def check(path: Path, options: LoraOptions) -> None:
    """Raise InputError if the adapters that `options` ask for don't fit the policy at `path`; loads no weights."""
    if options.lora_rank:
        _targets(checkpoints.outline(path), options)


def attach(model: Any, options: LoraOptions, seed: int, is_bfloat16: bool) -> None:
    """Freeze `model` and give it adapters in float32, in place; nothing happens if the rank is 0.

    `seed` decides A's first values, so that all ranks begin alike. If the compute type is bfloat16, frozen matrices
    that it holds without loss are kept in it: autocast would round them for each product anyway.
    """
    if not options.lora_rank:
        return
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    targets = list(_targets(model, options))
    config = LoraConfig(r=options.lora_rank, lora_alpha=options.lora_alpha, target_modules=targets)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, NAME)
    if is_bfloat16:
        _hold_in_bfloat16(model)


def trained(model: Any) -> dict[str, Any]:
    """The parameters that an optimizer is to have, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def merged(model: Any) -> Iterator[tuple[str, "torch.Tensor"]]:
    """The state of `model` with its adapters added to its weights, named as without adapters, one tensor at a time.

    Sharded weights stay sharded: each rank adds its own rows.
    """
    import torch

    layers = {f"{name}.base_layer.weight": layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        if layer := layers.get(name):
            with torch.no_grad():
                tensor = tensor.float() + layer.get_delta_weight(NAME)
        yield name.replace(".base_layer.", "."), tensor


def _targets(model: Any, options: LoraOptions) -> dict[str, Any]:
    """The layers that get an adapter, by name; InputError if a target names none, or one is smaller than the rank.

    The output head gets none: the loss takes its weight past the layer itself.
    """
    from torch.nn import Linear

    head = model.get_output_embeddings()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear) and layer is not head}
    names = list(layers) if options.lora_targets == ALL else options.lora_targets.split(",")
    targets: dict[str, Any] = {}
    for target in names:
        matching = {name: layer for name, layer in layers.items() if f".{name}".endswith(f".{target}")}
        if not matching:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in layers})) or "none"
            raise InputError(f"--lora-targets {target}: no layer has this name: take {ALL}, or some of {known}")
        targets |= matching
    for name, layer in targets.items():
        if options.lora_rank > (size := min(layer.in_features, layer.out_features)):
            raise InputError(
                f"--lora-rank {options.lora_rank}: {name} is {layer.out_features} x {layer.in_features}: take at most "
                f"{size}, or leave this layer out by --lora-targets"
            )
    return targets


def _hold_in_bfloat16(model: Any) -> None:
    """Keep frozen matrices of linear layers in bfloat16 if no bit of them is lost; the embedding stays as it is.

    The first rank decides for all, which may not hold the weights yet.
    """
    import torch

    embedding, layers = model.get_input_embeddings().weight, []
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and not layer.weight.requires_grad and layer.weight is not embedding:
            layers.append(layer)
    keeps = [all(torch.equal(own, own.bfloat16().float()) for own in layer.parameters(False)) for layer in layers]
    for layer, keep in zip(layers, Ranks().gather(keeps)[0], strict=True):
        if keep:
            layer.to(torch.bfloat16)
