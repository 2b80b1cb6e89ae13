"""avg@k of a small validation set while rl trains, by the engine that is there.

Each measurement draws the samples that `rloop eval` draws from the checkpoint of that step with the same --seed, up to
the rounding of floats, so the steps of a run are compared on the same draws. Nothing of the run depends on it: the
stream of problems, the seeds of the rollouts and the weights stay as they are. The completions are not kept: to read
them, run eval on a checkpoint.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from stages.core.drawing.engine import Engine, Sampling, ShouldStop
from stages.core.drawing.rollouts import Group, Prompt, draw_each, seeded
from stages.core.grading.scores import Grader
from stages.core.lifetime import Stopped
from stages.core.ranks import Ranks
from stages.rl.options import Settings


class Measured(NamedTuple):
    """avg@k of one policy, NaN if it was not measured, and the seconds that took."""

    value: float = math.nan
    seconds: float = 0.0


NOT_MEASURED = Measured()


@dataclass(frozen=True)
class Validation:
    """The prompts of the validation set, how to sample them, and every how many steps; `seed` is the run's."""

    prompts: Sequence[Prompt]
    sampling: Sampling
    every: int
    seed: int

    def is_due(self, step: int, last: int) -> bool:
        """Whether the policy after `step` is measured: the start policy (0), each of the `every`-th, and the last."""
        return step % self.every == 0 or step == last

    def measure(self, ranks: Ranks, engine: Engine, grader: Grader, should_stop: ShouldStop) -> float:
        """avg@k of the weights in the engine; NaN if any rank had to stop. All ranks call it; an engine has a share."""
        share = ranks.share(self.prompts)
        sampling = seeded(self.sampling, self.seed, share)
        groups: list[Group] = []
        mine: float
        try:
            draw_each(engine, grader, share, sampling, lambda _, group: groups.append(group), should_stop)
            mine = sum(group.num_correct for group in groups)
        except Stopped:
            mine = math.nan
        return sum(ranks.gather(mine)) / (len(self.prompts) * self.sampling.num_samples)


def of(prompts: Sequence[Prompt], sampling: Sampling, settings: Settings) -> Validation | None:
    """The validation of a run that draws by `sampling`; None without prompts."""
    sampling = replace(sampling, num_samples=settings.valid_samples, log_probs=False)
    return Validation(prompts, sampling, settings.valid_every, settings.seed) if prompts else None


def in_both(train: Iterable[Prompt], valid: Iterable[Prompt]) -> list[str]:
    """The ids of the validation problems whose prompt is trained on, too."""
    seen = {prompt.text for prompt in train}
    return [prompt.problem["id"] for prompt in valid if prompt.text in seen]


def figures(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What metrics.json says of it, from log.tsv; nothing if no step was measured."""
    by_step = {int(row["step"]): row["valid"] for row in rows if "valid" in row}
    if not by_step:
        return {}
    if "valid_start" in rows[0]:
        by_step = {0: rows[0]["valid_start"], **by_step}
    best = max(by_step, key=lambda step: by_step[step])  # the earliest of equals
    start = {"valid_start": by_step[0]} if 0 in by_step else {}
    last = by_step[max(by_step)]
    return {**start, "valid_last": last, "valid_best": by_step[best], "valid_best_step": best}
