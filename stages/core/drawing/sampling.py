"""Sample several policies on the same problems with one engine, in groups of rollouts.

`rollouts` samples all policies of a request, `draw_scored` one of them. Of several ranks each has an engine, or some in
a row have one, and each engine draws its share of a policy's prompts.

The samples of a problem come from a generator seeded by (seed, problem id, sample), never from a stream that several
problems share. So they depend neither on the order nor on the choice of the problems, nor on the other policies of
the call. What the engine cannot promise: logits are rounded as the batch they were computed in has it, so
other sequences in the batch may change a sample, about once in many thousands of tokens in bfloat16 and rarely in
float32.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, TypeVar

from stages.core.drawing.engine import Engine, Sampling
from stages.core.drawing.request import Request, RequestOptions
from stages.core.drawing.rollouts import Group, Prompt, draw_each
from stages.core.errors import InputError
from stages.core.grading.scores import Grader
from stages.core.options import at_least
from stages.core.policy import checkpoints
from stages.core.progress import StepProgress, warn
from stages.core.ranks import Ranks
from stages.core.records import Rollout

MAX_WAITING = 32  # groups whose scores may be under way before the engine waits for the verifier
MAX_COMPLETIONS = 8192  # in one call of the engine, which holds them all: about 1 GB if each has 2,048 tokens
GATHERED_GROUPS = 32  # of each rank in one message, which NCCL takes through the memory of all GPUs

T = TypeVar("T")
StartEngine = Callable[[Request, Path], Engine]  # Request.start_engine, or a test's


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(RequestOptions):
    """The options that sample and eval share."""

    limit: Annotated[int, "use only the first N problems; 0 uses all", at_least(0)] = 0
    bare: Annotated[bool, "a completion without box and 'Answer:' line counts by its bare final expression"] = False


def refuse_alike(temperature: float, num_samples: int) -> None:
    """Raise InputError where all samples of a problem would be the same."""
    if temperature == 0 and num_samples > 1:
        raise InputError(f"--temperature 0 gives the same sample {num_samples} times: add --num-samples 1")


def rollouts(request: Request, start_engine: StartEngine, grader: Grader) -> Iterator[Rollout]:
    """Sample every policy on every problem; rollouts by policy, problem and sample, in the order of the request.

    All ranks must iterate; each gets all rollouts.
    """
    ranks, prompts = request.ranks, request.prompts
    engines = Engines(request, start_engine)
    with Meter(len(request.policies) * len(prompts), ranks) as meter:
        for name, path in request.policies.items():
            engine = engines.holding(path)
            meter.start(name, len(prompts))
            for part in parts(request, prompts, ranks.num_engines):
                share = ranks.share(part)
                groups: dict[int, Group] = {}
                with ranks.raise_once():
                    draw_scored(engine, grader, share, request.seeded(share), meter, groups.__setitem__)
                mine = [groups[number].rollouts(name) for number in sorted(groups)]
                for group in _in_order(ranks, mine, len(part)):
                    yield from group


def parts(request: Request, prompts: Sequence[T], num_engines: int = 1) -> Iterator[Sequence[T]]:
    """The prompts in parts that `num_engines` can hold, each in one call."""
    size = num_engines * max(1, MAX_COMPLETIONS // request.sampling.num_samples)
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


def _in_order(ranks: Ranks, mine: Sequence[list[Rollout]], num_groups: int) -> Iterator[list[Rollout]]:
    """The groups of all ranks, `num_groups` together, in the order in which they were shared out."""
    for start in range(0, -(-num_groups // ranks.num_engines), GATHERED_GROUPS):
        shares = ranks.gather(mine[start : start + GATHERED_GROUPS])[:: ranks.tensor_parallel]
        for row in zip_longest(*shares):
            yield from (group for group in row if group is not None)


def draw_scored(
    engine: Engine,
    grader: Grader,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    meter: "Meter",
    keep: Callable[[int, Group], None],
) -> None:
    """Draw a group for each prompt; `keep` gets each with its prompt's number as soon as it is scored.

    Of the ranks that share an engine only the first scores and keeps. Groups on which rewards of the user's own failed
    are kept once another has succeeded; if none has so far, that is an InputError.
    """
    waiting: deque[tuple[int, Group]] = deque()
    held: list[tuple[int, Group]] = []

    def hand_over(max_waiting: int) -> None:
        while waiting and (len(waiting) > max_waiting or waiting[0][1].is_scored):
            number, group = waiting.popleft()
            meter.scored(group.num_correct, len(group.scores))
            held.append((number, group))
            if not group.scores[0].fault:
                keep_all()

    def keep_all() -> None:
        for number, group in held:
            keep(number, group)
        held.clear()

    def drawn(number: int, group: Group) -> None:
        meter.drawn(group.num_tokens)
        waiting.append((number, group))
        hand_over(MAX_WAITING)

    draw_each(engine, grader, prompts, sampling, drawn)
    hand_over(0)
    grader.refuse_failed()
    keep_all()


class Engines:
    """An engine for one policy after another: their weights are swapped, once the engine has shown that it can.

    An engine starts on all ranks at the same time, so each must ask for the same policies in the same order.
    """

    def __init__(self, request: Request, start: StartEngine) -> None:
        self._start = partial(start, request)
        self._ranks = request.ranks
        self._engine: Engine | None = None
        self._policy = Path()
        self._can_swap: bool | None = None  # not known before the second policy

    def holding(self, policy: Path) -> Engine:
        """The engine with the weights of `policy`; started anew if these cannot be swapped in."""
        if self._engine is not None and self._takes(policy):
            self._engine.load(checkpoints.disk_weights(policy))
        else:
            if self._engine is not None:
                self._engine.close()
            self._engine = self._start(policy)
        self._policy = policy
        return self._engine

    def close(self) -> None:
        """Free the engine's memory, if one was started."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _takes(self, policy: Path) -> bool:
        if checkpoints.is_tied(policy) != checkpoints.is_tied(self._policy):
            return False
        if self._can_swap is None and self._engine is not None:
            faults = self._ranks.gather(self._engine.swap_fault(lambda: checkpoints.disk_weights(self._policy)))
            fault = next(filter(None, faults), None)
            self._can_swap = fault is None
            if fault and self._ranks.is_first:
                warn(f"the engine is started anew for each policy, for it cannot swap weights of this kind: {fault}")
        return bool(self._can_swap)


class Meter:
    """Shows groups as they come, with the policy at work, its average so far and tokens a second.

    Of several engines only this rank's is seen, and counted as if the others were as far.
    """

    def __init__(self, num_groups: int, ranks: Ranks) -> None:
        self._progress = StepProgress("groups", num_groups, quiet=not ranks.is_first)
        self._num_engines = ranks.num_engines
        self._num_groups = self._end = 0
        self.start("", 0)

    def __enter__(self) -> "Meter":
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)

    def start(self, policy: str, num_missing: int, num_done: int = 0) -> None:
        """Restart the counts for `policy`, which lacks `num_missing` groups, while `num_done` are there already."""
        self._policy = policy
        self._num_groups = self._end + num_done
        self._end = self._num_groups + num_missing
        self._num_tokens = self._num_scored = 0
        self._num_correct = 0
        self._start = time.monotonic()

    def drawn(self, num_tokens: int) -> None:
        """Count a drawn group, with its completions' tokens."""
        self._num_groups = min(self._num_groups + self._num_engines, self._end)
        self._num_tokens += num_tokens
        self._progress.step(self._num_groups, self._note())

    def scored(self, num_correct: int, num_completions: int) -> None:
        """Count a group for the average so far."""
        self._num_scored += num_completions
        self._num_correct += num_correct

    def _note(self) -> str:
        speed = self._num_engines * self._num_tokens / max(1e-9, time.monotonic() - self._start)
        about = "about " if self._num_engines > 1 else ""
        average = f"avg {100 * self._num_correct / self._num_scored:.1f} %, " if self._num_scored else ""
        return f"{average}{about}{speed:,.0f} tokens/s, {self._policy}"
