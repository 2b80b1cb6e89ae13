"""A prompt that many completions follow is computed once for all of them, in the update as in the engine.

A prefix is a prompt without its last token. The decoder reads the prefixes of a micro-batch, and its keys and values
are handed to each sequence that goes on from one of them, gradient included: the same sums in another order. With
groups of 16 and prompts as long as their completions that is nearly half of an update's work.
"""

import functools
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from stages.core.policy.checkpoints import PADDING


class Prefixes(NamedTuple):
    """`ids` and `mask` are (prefixes, tokens), padded on the left; `rows` says which of them a sequence goes on from.

    `lengths` are the tokens of each sequence without padding.
    """

    ids: Tensor
    mask: Tensor
    rows: Tensor
    lengths: Tensor


def fits(model: Any) -> bool:
    """Whether the decoder keeps keys and values alone, which can be handed on, and its passes are kept whole.

    Not so the states of linear attention, or gradient checkpointing, which turns a decoder's cache off.
    """
    layers = DynamicCache(config=model.config).layers
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return plain and not model.is_gradient_checkpointing


def add_prefixes(model: Any) -> None:
    """Let `model(..., prefixes=Prefixes)` go on from prefixes. Call it after the head is added, before it is wrapped.

    Both passes are within one call of the model, whose autocast holds for both.
    """
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, prefixes: Prefixes | None = None, **kwargs: Any) -> Any:
        return original(*args, **kwargs, **({} if prefixes is None else _after(self, prefixes)))

    model.forward = types.MethodType(forward, model)


def build(prompts: Sequence[Sequence[int]], lengths: Sequence[int], device: Any) -> Prefixes | None:
    """The prefixes of `prompts`, one a sequence, each kept once; None if no prompt has more than one token."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    if max(map(len, numbers)) < 2:
        return None
    heads = [torch.tensor(prompt[:-1], dtype=torch.long) for prompt in numbers]
    ids = pad_sequence(heads, True, PADDING, padding_side="left")
    mask = pad_sequence([torch.ones_like(head) for head in heads], True, 0, padding_side="left")
    rows = torch.tensor([numbers[tuple(prompt)] for prompt in prompts])
    return Prefixes(*(part.to(device) for part in (ids, mask, rows, torch.tensor(lengths))))


class _Repeated(torch.autograd.Function):
    """`values[rows]`, whose gradient is added up one row after another: an index's own comes as its threads do."""

    @staticmethod
    def forward(context: Any, values: Tensor, rows: Tensor) -> Tensor:
        context.rows, context.shape = rows, values.shape
        return values.index_select(0, rows)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        total = gradients[0].new_zeros(context.shape)
        return total.index_add_(0, context.rows, gradients[0]), None


def _after(model: Any, prefixes: Prefixes) -> dict[str, Any]:
    """What a pass over the sequences needs to go on from their prefixes.

    Positions stop at a sequence's last token: padding has none of its own, and a table of positions may end there.
    """
    ids, mask, rows, lengths = prefixes
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        layer.keys, layer.values = _Repeated.apply(layer.keys, rows), _Repeated.apply(layer.values, rows)
    steps = torch.arange(int(lengths.max()), device=ids.device).expand(len(rows), -1)
    return {
        "past_key_values": cache,
        "attention_mask": torch.cat([mask[rows], torch.ones_like(steps)], dim=1),
        "position_ids": mask.sum(1)[rows, None] + steps.minimum(lengths[:, None] - 1),
    }
