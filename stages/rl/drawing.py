"""What a step draws: rounds of groups until enough of them teach something, and the rewards that enter the advantage.

Of the informative groups the first in the order of the stream fill the batch, for the first to be finished would be the
short ones. The surplus is drawn and not trained on, like the groups that teach nothing: it is written, counts in the
filter as all rollouts do, and its problems come again in the next epoch, as those of the others do.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple, TypeVar

from stages.core.drawing.engine import Engine, Sampling, ShouldStop, seed_of
from stages.core.drawing.rollouts import Group, Prompt, draw
from stages.core.errors import InputError
from stages.core.grading.scores import Grader
from stages.core.lifetime import Stopped
from stages.core.ranks import Ranks
from stages.core.records import Rollout
from stages.rl import dapo
from stages.rl.batching import ProblemStream
from stages.rl.options import Settings
from stages.rl.rounds import Acceptance, Rounds

T = TypeVar("T")


@dataclass
class Clock:
    """Seconds since it was last read."""

    since: float = field(default_factory=time.perf_counter)

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        return seconds


@dataclass
class StepGroups:
    """One step's groups: all that were drawn, their records so far, those that fill the batch, the seconds it took."""

    rounds: Rounds
    drawn: list[Group] = field(default_factory=list)
    records: list[list[Rollout]] = field(default_factory=list, repr=False)
    kept: list[Group] = field(default_factory=list)
    generate_s: float = 0.0
    verify_s: float = 0.0


class Cursor(NamedTuple):
    """Where the drawing is between two steps: how many problems it has taken from the stream, and the acceptance."""

    position: int = 0
    acceptance: Acceptance = Acceptance()


class StepDrawing:
    """Draws the groups of one step after another. Every rank has one, and all decide on the same gathered groups.

    `origin` is the digest of the start policy; it enters the seeds, so two iterations draw different samples.
    """

    def __init__(
        self,
        settings: Settings,
        ranks: Ranks,
        engine: Engine,
        grader: Grader,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        origin: str,
    ):
        self.settings, self.ranks, self.engine, self.grader = settings, ranks, engine, grader
        self.prompts, self.sampling, self.origin = prompts, sampling, origin
        self._stream = ProblemStream(len(prompts), settings.seed)
        self._acceptance = Acceptance()

    @property
    def cursor(self) -> Cursor:
        """Where it is; set it to go on from there."""
        return Cursor(self._stream.position, self._acceptance)

    @cursor.setter
    def cursor(self, cursor: Cursor) -> None:
        self._stream.position, self._acceptance = cursor

    def draw(self, step: int, on_round: Callable[[StepGroups], None], should_stop: ShouldStop) -> StepGroups:
        """Dynamic sampling: draw ahead, keep the first groups that teach something, draw again if some are missing.

        `on_round` sees the groups after each round. Raises Stopped once `should_stop` on any rank, and InputError if
        the user's own rewards failed on every group of the step; the cursor is then where it was.
        """
        before = self.cursor
        rounds = Rounds(self.settings.problems_per_step, self.settings.max_rounds, self._acceptance.faded())
        groups = StepGroups(rounds)
        try:
            while num_wanted := rounds.num_wanted:
                fresh = self._draw_round(num_wanted, step, groups, should_stop)
                groups.drawn += fresh
                informative = [group for group in fresh if dapo.is_informative(applicable(group, group.rewards))]
                groups.kept += informative[: rounds.num_missing]
                rounds.count(len(informative), len(fresh))
                on_round(groups)
                faults = [group.scores[0].fault for group in groups.drawn]
                if all(faults):
                    failed = f"the rewards failed on all {len(faults)} groups of step {step}"
                    raise InputError(f"{failed}: --reward {faults[0]}")
        except (Stopped, InputError):
            self.cursor = before
            raise
        self._acceptance = rounds.acceptance
        return groups

    def _draw_round(self, num_wanted: int, step: int, groups: StepGroups, should_stop: ShouldStop) -> list[Group]:
        """Draw a group for each of the next problems, every engine its share; all ranks get all groups, in order."""
        clock = Clock()
        first = self._stream.position
        wanted = self._stream.take(num_wanted)
        seeds = [self.seed(step, first + number) for number in range(num_wanted)]
        sampling = replace(self.sampling, seeds=self.ranks.share(seeds))
        try:
            share = [self.prompts[i] for i in self.ranks.share(wanted)]
            mine = draw(self.engine, self.grader, share, sampling, should_stop=should_stop)
        except Stopped:
            mine = []
        groups.generate_s += clock.lap()
        if any(self.ranks.gather(should_stop())):
            raise Stopped
        settled = [group.settled() for group in mine]
        groups.verify_s += clock.lap()
        return settled if self.ranks.is_alone else self._gathered(settled, num_wanted)

    def _gathered(self, mine: Sequence[Group], num_wanted: int) -> list[Group]:
        """The groups of all engines, in order."""
        numbers = self.ranks.share(range(num_wanted)) if self.ranks.keeps else []
        by_rank = self.ranks.gather([(number, group.packed()) for number, group in zip(numbers, mine, strict=True)])
        gathered: dict[int, Group] = dict(chain.from_iterable(by_rank))
        return [gathered[number] for number in range(num_wanted)]

    def seed(self, step: int, position: int) -> int:
        """The seed of the first sample of the problem at `position` in the stream, whichever rank and round draw it."""
        return seed_of(self.settings.seed, self.origin, step, position)


def applicable(group: Group, values: Sequence[T]) -> list[T]:
    """Those of the `values` of a group's completions to which a reward applies: all, by math-verify."""
    return [value for value, score in zip(values, group.scores, strict=True) if score.applies]


def sampled_entropy(groups: Sequence[Group]) -> float:
    """Entropy of the policy along all completions of `groups`: the mean of -log p of their tokens; NaN without any.

    Groups that an update is made on are those solved in part, so what is measured along them says less of the policy.
    """
    log_probs = [completion.log_probs for group in groups for completion in group.completions]
    return -math.fsum(chain.from_iterable(log_probs)) / num if (num := sum(map(len, log_probs))) else math.nan


def rewards_by_name(groups: Sequence[Group]) -> dict[str, list[float]]:
    """Each summand of the user's own rewards, on the rollouts that it applies to; {} by math-verify alone."""
    parts = [score.parts for group in groups for score in group.scores if score.parts]
    return {name: [one for part in parts if (one := part[name]) is not None] for name in (parts[0] if parts else ())}


def shaped_rewards(group: Group, settings: Settings) -> list[float]:
    """The rewards as they enter the advantage: math-verify's on the scale of the options, one's own as they are.

    The overlong penalty is added to both.
    """
    scaled = group.rewards
    if not settings.has_own_rewards:
        scaled = [settings.reward_correct if reward else settings.reward_wrong for reward in scaled]
    return [
        reward
        + dapo.overlong_penalty(
            len(completion.token_ids), settings.max_tokens, settings.overlong_buffer, settings.overlong_penalty
        )
        for completion, reward in zip(group.completions, scaled, strict=True)
    ]
