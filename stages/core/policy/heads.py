"""The output head in training: log-probabilities and entropies of the completion tokens, in float32.

On a GPU it is TRL's fused head, which never holds the logits. A CPU has the memory for those of one micro-batch
(`MAX_LOGITS` bounds it) and wants few passes over the vocabulary: the model's own head runs on the completion tokens
alone, one product in the compute type, and two passes in float32 follow.
"""

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from stages.core.policy.checkpoints import IGNORED

MAX_LOGITS = 2**28  # of a micro-batch on the CPU: 1 GiB in float32, and as much for their gradient
CHUNK = 2**21  # logits that are held in float32 at a time: what a processor's cache holds


def add_head(model: Any, temperature: float = 1.0) -> None:
    """Let `model(..., labels=..., fused_lm_head=True)` return log-probabilities and entropies instead of logits.

    Positions without a label of their own are not scored. Call it before the model is wrapped.
    """
    if torch.cuda.is_available():
        add_fused_lm_head(model, temperature, outputs=("log_probs", "entropy"))
    else:
        add_plain_head(model, temperature)


def token_budget(tokens_per_microbatch: int, vocabulary: int) -> int:
    """The tokens of a micro-batch: as asked for, on a CPU at most as many as keep the logits below MAX_LOGITS."""
    if torch.cuda.is_available():
        return tokens_per_microbatch
    return max(1, min(tokens_per_microbatch, MAX_LOGITS // vocabulary))


def add_plain_head(model: Any, temperature: float = 1.0) -> None:
    """The head for a CPU, in the place of TRL's; the model's own forward pass stays, with all that it does to logits.

    As the head is called as a module, FSDP gathers its weights, and adapters in it count.
    """
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return original(*args, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        mask = labels != IGNORED
        head = self.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :-1][mask],))
        try:
            output = original(*args, **kwargs | {"use_cache": False})
        finally:
            hook.remove()
        log_probs, entropy, is_top1 = _Scores.apply(output.logits, labels[mask], temperature)
        log_probs, entropy, is_top1 = (
            torch.zeros_like(mask, dtype=values.dtype).masked_scatter(mask, values)
            for values in (log_probs, entropy, is_top1)
        )
        return FusedCausalLMOutput(
            log_probs=log_probs,
            entropy=entropy,
            is_top1=is_top1,
            label_mask=mask,
            aux_loss=getattr(output, "aux_loss", None),
        )

    model.forward = types.MethodType(forward, model)


class _Scores(torch.autograd.Function):
    """Log-probabilities of `tokens`, entropies, and whether each is the likeliest; of logits (tokens, vocabulary).

    Kept for the gradient are the logits as they are and two numbers a token, not the probabilities.
    """

    @staticmethod
    def forward(context: Any, logits: Any, tokens: Any, temperature: float) -> Any:
        log_probs, entropy = (torch.empty(len(tokens), dtype=torch.float32, device=logits.device) for _ in range(2))
        is_top1 = torch.empty_like(tokens, dtype=torch.bool)
        norms = torch.empty_like(log_probs)
        for rows in _chunks(logits):
            scaled = _scaled(logits[rows], temperature)
            own, top = scaled.gather(-1, tokens[rows, None])[:, 0], scaled.amax(-1)
            weights = (scaled - top[:, None]).exp_()
            total = weights.sum(-1)
            norms[rows] = top + total.log()
            is_top1[rows] = own >= top
            log_probs[rows] = own - norms[rows]
            entropy[rows] = norms[rows] - torch.linalg.vecdot(weights, scaled) / total
        context.save_for_backward(logits, tokens, norms, entropy)
        context.temperature = temperature
        context.set_materialize_grads(False)  # without an entropy term there is no gradient of the entropy
        context.mark_non_differentiable(is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        logits, tokens, norms, entropy = context.saved_tensors
        of_log_probs, of_entropy = (None if part is None else part / context.temperature for part in gradients[:2])
        scale = torch.zeros_like(norms) if of_log_probs is None else of_log_probs
        gradient = torch.empty_like(logits)
        for rows in _chunks(logits):
            log_probs = _scaled(logits[rows], context.temperature) - norms[rows, None]
            slope = -scale[rows, None]
            if of_entropy is not None:  # d entropy / d logit = -p (log p + entropy)
                slope = slope - of_entropy[rows, None] * (log_probs + entropy[rows, None])
            probs = log_probs.exp_()
            probs.mul_(slope).scatter_add_(-1, tokens[rows, None], scale[rows, None])
            gradient[rows] = probs
        return gradient, None, None


def _scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """The logits in float32 over the temperature, without a pass over them where neither changes anything."""
    return logits.float() if temperature == 1 else logits.float() / temperature


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    size = max(1, CHUNK // logits.shape[-1])
    return (slice(start, start + size) for start in range(0, len(logits), size))
