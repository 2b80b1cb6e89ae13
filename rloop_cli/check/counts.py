"""How much is done: steps and rollouts of RL, and which policies are evaluated on which sets."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from rloop_cli.check.calls import Call, maker


class EvalCall(NamedTuple):
    """How many policies one call evaluates on its sets, at least and at most."""

    call: Call
    fewest: int
    most: int

    @property
    def sets(self) -> list[str]:
        """The files of the sets."""
        return list(map(str, self.call.options.problems))

    @property
    def samples(self) -> int:
        """Completions for each problem."""
        return int(self.call.options.num_samples) + int(self.call.options.greedy)


class Range(NamedTuple):
    """A number between two bounds."""

    fewest: int
    most: int

    def __str__(self) -> str:
        return f"{self.fewest:,}" if self.fewest == self.most else f"{self.fewest:,} to {self.most:,}"


def num_checkpoints(run: Call) -> int:
    """The checkpoints that a call of rl leaves; the last step always has one."""
    return int(-(-run.options.steps // run.options.checkpoint_every))


def evaluations(calls: Sequence[Call]) -> list[EvalCall]:
    """Every call of eval that draws, with the number of policies that it evaluates."""
    return [_eval_call(call, calls) for call in calls if call.stage == "eval"]


def _eval_call(call: Call, calls: Sequence[Call]) -> EvalCall:
    num_named = sum(_num_policies(name, calls) for name in call.options.policy)
    fewest = most = num_named
    for output in map(str, call.options.selected):
        other = maker(calls, output)
        if other is None or other.stage != "eval":
            fewest, most = fewest + 1, most + 1  # one at least is selected; the rest is known when it is read
            continue
        each = [_num_policies(name, calls) for name in other.options.policy]
        counted = sum(each) if call.options.all_checkpoints else len(each)  # the last of each run, and what is no run
        fewest, most = fewest + counted, most + min(counted + 1, sum(each))
    return EvalCall(call, fewest, most)


def _num_policies(name: str, calls: Sequence[Call]) -> int:
    """The checkpoints in the directory `name`, or 1."""
    run = maker(calls, name)
    return num_checkpoints(run) if run is not None and run.stage == "rl" else 1


def pairs(evaluations: Sequence[EvalCall]) -> Range:
    """Policies times sets."""
    return _total(evaluations, lambda one: len(one.sets))


def rollouts(evaluations: Sequence[EvalCall], sizes: Mapping[str, int]) -> Range:
    """Completions to draw, by the number of problems of each set."""

    def of_policy(one: EvalCall) -> int:
        limit = one.call.options.limit
        return one.samples * sum(min(sizes[file], limit or sizes[file]) for file in one.sets)

    return _total(evaluations, of_policy)


def _total(evaluations: Sequence[EvalCall], of_policy: Callable[[EvalCall], int]) -> Range:
    return Range(
        sum(one.fewest * of_policy(one) for one in evaluations), sum(one.most * of_policy(one) for one in evaluations)
    )


class Exploration(NamedTuple):
    """All calls of rl together: `rollouts` if every step draws only what fills its batch, or as often as it may."""

    num_runs: int
    num_steps: int
    rollouts: Range


def exploration(calls: Sequence[Call]) -> Exploration:
    """What rl does in the whole graph."""
    runs = [call.options for call in calls if call.stage == "rl"]
    batches = [run.steps * run.problems_per_step * run.group_size for run in runs]
    most = sum(batch * run.max_rounds for batch, run in zip(batches, runs, strict=True))
    return Exploration(len(runs), sum(run.steps for run in runs), Range(sum(batches), most))
