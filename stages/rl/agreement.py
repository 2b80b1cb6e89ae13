"""Whether the engine samples from the trained policy: whether its log-probabilities are the trainer's.

Measured (nats, toy and random policies of 0.1 to 0.8 M parameters, and SmolLM2-135M): float32 at most 4e-5 apart;
bfloat16 0.0007 to 0.05 a token on average, 0.4 at most. From other weights: 0.1 if both are nearly uniform, else
2 to 6. A hand-over that stops in the middle of a run takes the mean from 0.002 to 0.02 in one step of the toy (lr 3e-4)
and to 0.2 in twenty; healthy runs stay below 1.2 times the start.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from stages.core.drawing.engine import Engine, Sampling
from stages.core.drawing.rollouts import Prompt
from stages.rl.trainer import TokenRollout, Trainer

NUM_PROMPTS = 8
MAX_TOKENS = 32
DRIFT = 10.0


class LogProbDifference(NamedTuple):
    """How far the engine's log-probabilities are from the trainer's over some tokens, in nats."""

    mean: float
    largest: float


@dataclass(frozen=True)
class Bound:
    """The difference allowed at the start: in float32 the largest of all tokens, in bfloat16 the mean."""

    is_float32: bool
    given: float  # the user's bound; 0 is the default of the type

    @property
    def value(self) -> float:
        """The bound in nats."""
        return self.given or (1e-3 if self.is_float32 else 0.1)

    def breach(self, measured: LogProbDifference) -> str:
        """How `measured` lies beyond the bound, such as "0.2 on average"; "" if it does not."""
        compared, how = (measured.largest, "at most") if self.is_float32 else (measured.mean, "on average")
        return "" if compared <= self.value else f"{compared:.2g} {how}"

    def far(self, start: float) -> float:
        """The mean difference of a step from which on it is far above `start`, the mean when the run began.

        Training sharpens the policy, which lowers the mean. A start of almost nothing does not make every step far.
        """
        return max(DRIFT * start, self.value / 10)


def difference(engine: Engine, trainer: Trainer, prompts: Sequence[Prompt], sampling: Sampling) -> LogProbDifference:
    """Engine against trainer on a few fresh completions, with the weights that each has."""
    rollouts = _samples(engine, prompts, sampling)
    own = torch.cat(trainer.log_probs(rollouts))
    drawn = torch.tensor([value for rollout in rollouts for value in rollout.engine_log_probs])
    apart = torch.nan_to_num((own - drawn).abs(), nan=math.inf).double()
    return LogProbDifference(float(apart.mean()), float(apart.max()))


def _samples(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling) -> list[TokenRollout]:
    few = prompts[:NUM_PROMPTS]
    how = Sampling(
        2, min(MAX_TOKENS, sampling.max_tokens), sampling.temperature, seeds=[2 * number for number in range(len(few))]
    )
    groups = engine.generate([prompt.token_ids for prompt in few], how, lambda *_: None)
    return [
        TokenRollout(prompt.token_ids, completion.token_ids, completion.log_probs, 0.0)
        for prompt, group in zip(few, groups, strict=True)
        for completion in group
    ]
