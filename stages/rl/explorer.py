"""The loop of the rl stage: draw, verify, update, hand the weights over; resumable after every kill."""

import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from accelerate import Accelerator

from stages.core.drawing.engine import Engine, Sampling
from stages.core.drawing.rollouts import Group, Prompt
from stages.core.errors import CollapseError, InputError, in_one_line
from stages.core.grading.scores import Grader
from stages.core.lifetime import Stopped, StopSignal, granted_s
from stages.core.policy.acceleration import memory_in_use
from stages.core.progress import StepProgress, warn
from stages.core.ranks import Ranks
from stages.core.records import LogRow
from stages.rl import agreement, dapo, steplog
from stages.rl.agreement import Bound, LogProbDifference
from stages.rl.drawing import (
    Clock,
    StepDrawing,
    StepGroups,
    applicable,
    rewards_by_name,
    sampled_entropy,
    shaped_rewards,
)
from stages.rl.options import Settings
from stages.rl.rundir import RunDir
from stages.rl.saving import RunState, Saver
from stages.rl.steplog import StepOutcome
from stages.rl.trainer import TokenRollout, Trainer, UpdateStats
from stages.rl.validation import NOT_MEASURED, Measured, Validation

MAX_COLLAPSED_STEPS = 3  # in a row: every update was non-finite, or the engine was far from the trainer


class StartPolicy(NamedTuple):
    """The policy that a run begins with: its name in records, where it is on disk, and the digest of its files."""

    name: str
    path: Path
    digest: str


@dataclass
class Explorer:
    """One rank of a DAPO run: an engine that draws, a grader, a trainer, and the problems."""

    settings: Settings
    ranks: Ranks
    accelerator: Accelerator
    engine: Engine
    grader: Grader
    trainer: Trainer
    prompts: Sequence[Prompt]
    sampling: Sampling
    policy: StartPolicy
    validation: Validation | None = None
    stop: StopSignal = field(default_factory=StopSignal)
    start_mismatch: float = 0.0  # nats a token between engine and trainer, on average, when the run began
    entropy_coefficient: float = 0.0  # of the entropy term, which moves it towards --entropy-target

    def __post_init__(self) -> None:
        self.bound = Bound(self.accelerator.mixed_precision == "no", self.settings.mismatch_bound)
        self.drawing = StepDrawing(
            self.settings, self.ranks, self.engine, self.grader, self.prompts, self.sampling, self.policy.digest
        )
        self.last_valid = ""  # for the progress line: the last measurement of the validation set
        self.warned_of_short_batch = self.warned_of_grace = False
        self.constant: set[str] = set()  # rewards of one's own that were named for being the same over a whole step

    def check_hand_over(self) -> LogProbDifference:
        """Show that the engine takes the weights it is given, and computes with them what the trainer does.

        Also after it has slept. Every rank looks at its own engine, and the worst of all counts. All raise InputError
        if the difference is above the bound of the compute type.
        """
        faults = [fault for fault in self.ranks.gather(self.engine.swap_fault(self.trainer.weights)) if fault]
        if faults:
            raise InputError(f"this policy cannot be trained: vLLM cannot take new weights of its kind: {faults[0]}")
        self.engine.sleep()  # which must not cost it anything that the weights don't bring back
        self._wake_engine()
        by_rank = self.ranks.gather(agreement.difference(self.engine, self.trainer, self.prompts, self.sampling))
        worst = LogProbDifference(max(each.mean for each in by_rank), max(each.largest for each in by_rank))
        self.start_mismatch = worst.mean
        if breach := self.bound.breach(worst):
            raise InputError(
                f"the engine's log-probabilities differ from the trainer's by {breach} after the weights were "
                f"handed over (--mismatch-bound {self.bound.value:g}): vLLM does not compute this policy as "
                "transformers does, so training on its samples would go wrong"
            )
        return worst

    def run(self, directory: RunDir, done: int) -> None:
        """Do the steps from `done` + 1 on, writing everything below `directory`.

        Raises CollapseError when several steps in a row gave only non-finite updates, or drew far from what the
        trainer computes, InputError when the user's rewards fail, SystemExit after SIGTERM or Ctrl-C; on all ranks.
        """
        self.directory, self.saver = directory, Saver(directory, self.trainer, self.ranks)
        if done:
            state = self.saver.restore(done)
            self.drawing.cursor, self.start_mismatch = state.cursor, state.start_mismatch
            self.entropy_coefficient = state.entropy_coefficient
            if not self.settings.max_sequences:  # free memory may be another now, and the batches with it
                self.engine.max_sequences = state.max_sequences
            if not self.settings.tokens_per_microbatch:
                self.trainer.token_budget = state.token_budget
        rows, changes = self.ranks.on_first(lambda: (directory.log_rows()[-MAX_COLLAPSED_STEPS:], directory.changes))
        recent: deque[Mapping[str, Any]] = deque(rows, maxlen=MAX_COLLAPSED_STEPS)
        with StepProgress("rl", self.settings.steps, done, quiet=not self.ranks.is_first) as self.progress:
            for step in range(done + 1, self.settings.steps + 1):
                start = self._validate(0) if step == 1 else NOT_MEASURED
                outcome = self._step(step)
                outcome.valid_start, outcome.valid = start, self._validate(step)
                outcome.num_changes = sum(len(change["changed"]) for change in changes if change["step"] == step)
                far = self.bound.far(self.start_mismatch)
                row = self.ranks.on_first(partial(steplog.row, outcome, self.settings, far))
                self._report(row)
                recent.append(row)
                is_full = len(recent) == MAX_COLLAPSED_STEPS
                skipped = (row["skipped_updates"] > 0 and row["num_trained"] == 0 for row in recent)
                has_collapsed = is_full and all(skipped)
                is_ending = has_collapsed or self._is_stopped()
                self._save(step, with_checkpoint=has_collapsed, with_state=is_ending)
                if has_collapsed or (is_full and all(row["mismatch_alarms"] > 0 for row in recent)):
                    raise CollapseError(self._why(step, has_collapsed))
                if is_ending and step < self.settings.steps:
                    self._end_stopped(f"after step {step}")
        if done == self.settings.steps:  # resumed with nothing to do: the last step may have no checkpoint yet
            self.saver.keep_checkpoint(done)

    def _step(self, step: int) -> StepOutcome:
        """Draw a batch and update the policy on it; every rollout is on disk before the update."""
        clock, lr = Clock(), self.settings.lr * min(1.0, step / max(1, self.settings.warmup_steps))
        self._wake_engine()
        handover_s, num_preemptions = clock.lap(), self.engine.num_preemptions
        with self._in_memory(f"drawing in step {step}", "--memory-fraction, or --max-sequences"):
            groups = self._draw(step)
        memory_gib = memory_in_use()
        self.engine.sleep()
        clock.lap()
        self.progress.note("update")
        entropy, entropy_weight = self._entropy(groups)
        rollouts = [rollout for group in groups.kept for rollout in self._trainable(group)]
        with self._in_memory(f"updating in step {step}", "--tokens-per-microbatch, or --gradient-checkpointing"):
            stats = self.trainer.update(rollouts, lr, entropy_weight) if rollouts else UpdateStats()
        outcome = StepOutcome(step, groups, stats, lr, handover_s, clock.lap())
        outcome.entropy_drawn, outcome.entropy_weight = entropy, entropy_weight
        outcome.peak_memory_gib, outcome.num_preemptions = self._memory_and_preemptions(num_preemptions, memory_gib)
        self._write(step, groups, outcome.trained)
        return outcome

    def _entropy(self, groups: StepGroups) -> tuple[float, float]:
        """The entropy along all that was drawn, and what it weighs in this step's loss; moves the coefficient."""
        entropy = self.ranks.on_first(lambda: sampled_entropy(groups.drawn))
        coefficient = self.entropy_coefficient
        target = self.settings.entropy_target
        self.entropy_coefficient = dapo.next_coefficient(coefficient, entropy, target, self.settings.entropy_delta)
        return entropy, dapo.entropy_weight(coefficient, entropy, target)

    def _wake_engine(self) -> None:
        """Give the engine the GPU's memory and the weights."""
        self.trainer.release()
        self.engine.wake()
        self.engine.load(self.trainer.weights())

    def _draw(self, step: int) -> StepGroups:
        """The step's groups. If drawing is stopped, the state of the step before is saved and this one forgotten."""

        def on_round(groups: StepGroups) -> None:
            self._write(step, groups, [])
            self.progress.note(f"generate {len(groups.kept)}/{groups.rounds.batch_size} groups")

        self.progress.note(f"generate 0/{self.settings.problems_per_step} groups")
        try:
            groups = self.drawing.draw(step, on_round, self.stop.is_received)
        except (Stopped, InputError) as error:
            self.engine.sleep()
            if self.ranks.is_first:
                self.directory.forget_rollouts(step)
            if self.saver.saved < step - 1:
                self.saver.keep_state(step - 1, self._state())
            if isinstance(error, Stopped):
                self._end_stopped(f"while step {step} was drawn, with {step - 1} steps done")
            raise
        self._warn_of_short_batch(step, groups)
        self._warn_of_constant_rewards(step, groups.drawn)
        return groups

    @contextmanager
    def _in_memory(self, doing: str, remedy: str) -> Iterator[None]:
        """Turn the GPU's lack of memory, while `doing` something, into an InputError with a remedy."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"out of memory while {doing} ({in_one_line(error)}): lower {remedy}; the state of step "
                f"{self.saver.saved} is saved, from which the run then goes on"
            ) from error

    def _warn_of_constant_rewards(self, step: int, drawn: Sequence[Group]) -> None:
        """Warn once of each of the user's own rewards that is the same for a whole step: it teaches nothing."""
        for name, values in rewards_by_name(drawn).items():
            if len(set(values)) != 1 or name in self.constant:
                continue
            self.constant.add(name)
            if self.ranks.is_first:
                warn(
                    f"step {step}: the reward {name} is {values[0]:g} for all rollouts, so it teaches nothing; does it "
                    "look for text of the prompt, such as <think>? (a reward gets the prompt, too)"
                )

    def _trainable(self, group: Group) -> list[TokenRollout]:
        """The completions with their advantages among those of the group that a reward applies to."""
        completions = applicable(group, group.completions)
        rewards = applicable(group, shaped_rewards(group, self.settings))
        values = dapo.ADVANTAGES[self.settings.advantage](rewards, self.settings.advantage_eps)
        return [
            TokenRollout(group.prompt.token_ids, completion.token_ids, completion.log_probs, advantage)
            for completion, advantage in zip(completions, values, strict=True)
        ]

    def _write(self, step: int, groups: StepGroups, trained: Sequence[Group]) -> None:
        """Write all rollouts of a step. A group is made records of once, for its tokens take time to pack."""
        if not self.ranks.is_first:
            return
        first_sample = Counter(record["problem_id"] for records in groups.records for record in records)
        for group in groups.drawn[len(groups.records) :]:
            problem_id = group.prompt.problem["id"]
            rollouts = group.rollouts(self.policy.name, step, first_sample[problem_id])
            first_sample[problem_id] += len(rollouts)  # a problem may come twice in a step, at the seam of two epochs
            for rollout, reward in zip(rollouts, shaped_rewards(group, self.settings), strict=True):
                rollout["trained"], rollout["shaped_reward"] = False, reward
            groups.records.append(rollouts)
        in_update = {id(group) for group in trained}
        for group, records in zip(groups.drawn, groups.records, strict=True):
            for record in records if id(group) in in_update else ():
                record["trained"] = True
        self.directory.write_rollouts(step, chain.from_iterable(groups.records))

    def _validate(self, step: int) -> Measured:
        """Measure the policy after `step` on the validation set, if that is due and no rank is to stop."""
        due = self.validation is not None and self.validation.is_due(step, self.settings.steps)
        if self.validation is None or not due or self._is_stopped():
            return NOT_MEASURED
        self.progress.note("validate")
        clock = Clock()
        self._wake_engine()
        value = self.validation.measure(self.ranks, self.engine, self.grader, self.stop.is_received)
        self.engine.sleep()
        if value == value:
            self.last_valid = f"  valid {value:.2f} (step {step})"
            if step == 0:
                self.accelerator.log({"valid": value}, step=0)
        return Measured(value, clock.lap())

    def _report(self, row: LogRow) -> None:
        """Write a step's row to the log, to trackers and to the screen."""
        if self.ranks.is_first:
            self.directory.append_log(row)
            self._warn_of_short_grace(row["update_s"])
        self.accelerator.log({name: value for name, value in row.items() if value == value}, step=row["step"])
        reward = f"reward {row['reward']:.3g}  " if self.settings.has_own_rewards else ""
        note = f"{reward}pass rate {row['pass_rate']:.2f}  {row['tokens_per_s']:.0f} tokens/s{self.last_valid}"
        self.progress.step(row["step"], note)

    def _memory_and_preemptions(self, num_preemptions: int | None, memory_gib: float) -> tuple[float, float]:
        """The most memory in use on any GPU, and the preemptions of all engines since `num_preemptions`."""
        now = self.engine.num_preemptions
        since = math.nan if now is None or num_preemptions is None else now - num_preemptions
        by_rank = self.ranks.gather((since, max(memory_gib, memory_in_use())))
        return max(gib for _, gib in by_rank), sum(num for num, _ in by_rank)

    def _state(self) -> RunState:
        limits = {"max_sequences": self.engine.max_sequences, "token_budget": self.trainer.token_budget}
        return RunState(
            self.drawing.cursor, self.start_mismatch, entropy_coefficient=self.entropy_coefficient, **limits
        )

    def _save(self, step: int, with_checkpoint: bool, with_state: bool) -> None:
        """A checkpoint and the state to resume from, if they are due or the run ends here.

        A run that is stopped saves its state, and no checkpoint that an uninterrupted run would not have.
        """
        is_last = step == self.settings.steps
        if is_last or with_checkpoint or step % self.settings.checkpoint_every == 0:
            self.saver.keep_checkpoint(step)
        if is_last or with_state or step % self.settings.save_every == 0:
            self.saver.keep_state(step, self._state(), is_last)
        self.ranks.wait()

    def _is_stopped(self) -> bool:
        """Whether any rank is to stop, so that all leave together."""
        return any(self.ranks.gather(self.stop.received))

    def _end_stopped(self, when: str) -> NoReturn:
        self.ranks.wait()
        if self.ranks.is_first:
            warn(f"stopped {when}; the same command goes on from there")
        raise SystemExit(max(self.ranks.gather(self.stop.code if self.stop.received else 0)))

    def _why(self, step: int, has_collapsed: bool) -> str:
        """What made the last steps bad, and the last good policy."""
        if has_collapsed:
            return (
                f"the last {MAX_COLLAPSED_STEPS} steps gave only non-finite losses or gradients, none of which reached "
                f"the weights: lower --lr; {self.directory.checkpoint(step)} holds the last good policy"
            )
        far = self.bound.far(self.start_mismatch)
        good = self.directory.last_checkpoint(step - MAX_COLLAPSED_STEPS) or self.policy.name
        return (
            f"in the last {MAX_COLLAPSED_STEPS} steps engine and trainer were more than {far:.2g} nats a token "
            f"apart (mismatch in log.tsv; {self.start_mismatch:.2g} at the start), so the engine no longer draws from "
            f"the policy that is trained; {good} is the last policy saved before"
        )

    def _warn_of_short_batch(self, step: int, groups: StepGroups) -> None:
        """Warn of the first batch of this process that is not full."""
        if not groups.rounds.num_missing or self.warned_of_short_batch:
            return
        self.warned_of_short_batch = True
        if self.ranks.is_first:
            warn(
                f"step {step}: {len(groups.kept)} of {groups.rounds.batch_size} groups after --max-rounds "
                f"{groups.rounds.max_rounds}; a short batch is trained on as it is (log.tsv counts them: short_batch)"
            )

    def _warn_of_short_grace(self, update_s: float) -> None:
        """Warn once if an update takes longer than the launcher waits after SIGTERM: no state could be saved then."""
        granted = granted_s()
        if granted and not self.warned_of_grace and update_s > granted / 2:
            self.warned_of_grace = True
            enough = 60 * math.ceil(update_s / 20)
            warn(
                f"an update takes {update_s:.0f} s, and the launcher kills its processes {granted} s after "
                f"SIGTERM: a terminated run would lose steps; set TORCH_ELASTIC_SHUTDOWN_TIMEOUT={enough} before it"
            )
