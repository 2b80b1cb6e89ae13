"""The mathematics of fine-tuning: what an example weighs, and what its tokens cost.

Without options the objective is the mean of -log p over the completion tokens. Nothing here reads or writes.
"""

import math
from collections.abc import Sequence

import torch


def likelihood_weight(start: Sequence[float], behaviour: Sequence[float]) -> float:
    """How likely a completion is under the start policy, beside the policy that drew it: at most 1.

    min(1, exp(mean of start_t - behaviour_t)) over the log-probs of its tokens, the geometric mean of their ratios
    (PEAR, arXiv 2602.01058, on the level of the sequence). The bound keeps a few likely examples from deciding all.
    """
    total = math.fsum(a - b for a, b in zip(start, behaviour, strict=True))
    return math.exp(min(0.0, total / len(start))) if start else 1.0


def token_losses(log_probs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What each token costs by its log-prob, of any shape, and its example's weight, of the same shape.

    w >= 0: -w log p. w < 0: |w| p, which is bounded, where -w log p would fall without end as p goes to 0 (RIFT, arXiv
    2601.09253): its gradient |w| p grad(log p) fades once the token has become unlikely.
    """
    return torch.where(weights < 0, -weights * log_probs.exp(), -weights * log_probs)


def kl_from_start(logits: torch.Tensor, start_logits: torch.Tensor) -> torch.Tensor:
    """KL(start || policy) over the vocabulary for each position, in nats; logits (..., vocabulary).

    The direction that holds on to all that the start policy does: what it finds likely must stay likely (the base as a
    prior, as in GIFT, arXiv 2601.09233).
    """
    start = start_logits.float().log_softmax(-1)
    return (start.exp() * (start - logits.float().log_softmax(-1))).sum(-1)
