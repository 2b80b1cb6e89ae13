"""The mathematics of DAPO (Yu et al., 2025, arXiv 2503.14476), and nothing else.

Group-normalised advantages, the soft overlong penalty, dynamic sampling's question, and the clipped token-level loss
with a truncated importance weight for the difference between the engine's and the trainer's probabilities. GRPO is
the same with clip_low = clip_high and every group trained on.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


def is_informative(rewards: Sequence[float]) -> bool:
    """Whether a group teaches anything: False if all raw rewards are exactly equal (DAPO section 3.2).

    Pass the verifier's rewards: shaped ones differ by length and would keep all-wrong groups.
    """
    return any(reward != rewards[0] for reward in rewards)


def overlong_penalty(num_tokens: int, max_tokens: int, buffer: int, penalty: float = 1.0) -> float:
    """The soft overlong punishment (DAPO equation 13), from 0 down to -`penalty`; lengths in tokens.

    0 up to max_tokens - buffer, then falling linearly, -penalty at max_tokens. A buffer of 0 turns it off.
    """
    if buffer == 0:
        return 0.0
    over = num_tokens - (max_tokens - buffer)
    return -penalty * min(max(over / buffer, 0.0), 1.0)


def normalised(rewards: Sequence[float], eps: float) -> list[float]:
    """(reward - mean) / (std + eps) within one group (DAPO equation 9); std over n - 1, as TRL and verl take it.

    A group of equal rewards gives exact zeros, whatever rounding the mean suffers.
    """
    if not is_informative(rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    std = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))
    return [(reward - mean) / (std + eps) for reward in rewards]


def centred(rewards: Sequence[float], eps: float) -> list[float]:
    """reward - mean: without the division, which weighs nearly solved and nearly unsolved problems up.

    Dr. GRPO (Liu et al., 2025, arXiv 2503.20783). `eps` plays no part.
    """
    mean = math.fsum(rewards) / len(rewards)
    return [reward - mean if is_informative(rewards) else 0.0 for reward in rewards]


def per_success(rewards: Sequence[float], eps: float) -> list[float]:
    """(reward - mean) / (mean + eps): the gradient of the log of the pass rate, of rewards of 0 or more.

    MaxRL (arXiv 2602.02710): with rewards of 0 and 1 the mean over a group is that over its successes, less a baseline.
    """
    mean = math.fsum(rewards) / len(rewards)
    return [deviation / (mean + eps) for deviation in centred(rewards, eps)]


ADVANTAGES = {"dapo": normalised, "centred": centred, "maxrl": per_success}


class TokenLoss(NamedTuple):
    """Sums over the tokens of a micro-batch; all but `loss` are without gradient."""

    loss: "Tensor"
    clipped_low: "Tensor"
    clipped_high: "Tensor"


def token_loss(
    log_probs: "Tensor",
    old_log_probs: "Tensor",
    advantages: "Tensor",
    mask: "Tensor",
    clip_low: float,
    clip_high: float,
    importance: "Tensor | None" = None,
) -> TokenLoss:
    """The clipped surrogate (DAPO equation 8), summed over the tokens where `mask` holds; the caller divides.

    Shapes: `log_probs`, `old_log_probs`, `mask` and `importance` are (sequences, tokens), `advantages` (sequences, 1).
    Per token: -importance * min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A).
    """
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = -(ratio * advantages).minimum(clipped * advantages)
    if importance is not None:
        surrogate = surrogate * importance
    held_low = (ratio < 1 - clip_low) & (advantages < 0) & mask
    held_high = (ratio > 1 + clip_high) & (advantages > 0) & mask
    return TokenLoss((surrogate * mask).sum(), held_low.sum(), held_high.sum())


def entropy_weight(coefficient: float, entropy: float, target: float) -> float:
    """What the entropy in nats a token weighs in a step's loss: the coefficient up to the `target`, above it 0.

    Adaptive entropy control (He et al., 2025, Skywork-OR1, arXiv 2505.22312). A target of 0 turns it off.
    """
    return coefficient if entropy <= target else 0.0


def next_coefficient(coefficient: float, entropy: float, target: float, delta: float) -> float:
    """The coefficient of the step after one of this `entropy`: up by `delta` below the target, else down, to 0 at most.

    Source as of `entropy_weight`, which has no bound: below 0 the term would never be in the loss.
    """
    return max(0.0, coefficient + (delta if entropy < target else -delta))


def importance_weights(old_log_probs: "Tensor", engine_log_probs: "Tensor", cap: float) -> "Tensor":
    """min(p_trainer / p_engine, cap) for each token: truncated importance sampling (Yao et al., 2025).

    The cap bounds the variance that single tokens with a tiny engine probability would bring.
    """
    return (old_log_probs - engine_log_probs).exp().clamp(max=cap)
