"""The loop of the rl stage: draw, verify, update, hand the weights over; resumable after every kill.

A step is a function of the weights, the optimizer, the position in the stream of problems and the seed. So the state
on disk is just these, and a run that is started again repeats what it lost, to the same rollouts. With them go the
running acceptance, which says how many groups to draw, and the difference between engine and trainer that the run began
with, which later steps are held against.

Of the informative groups of a step the first in the order of the stream fill the batch, for the first to be finished
would be the short ones. The surplus is drawn and not trained on, like the groups that teach nothing: it is written,
counts in the filter as all rollouts do, and its problems come again in the next epoch, as those of the others do.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any, NoReturn, TypeVar

import orjson
import torch
from accelerate import Accelerator

from stages.core.drawing.engine import Engine, Sampling, seed_of
from stages.core.drawing.rollouts import Group, Prompt, draw
from stages.core.errors import CollapseError, InputError
from stages.core.grading.scores import Grader
from stages.core.lifetime import TERMINATED, Stopped, StopSignal, granted_s
from stages.core.outputs import whole_dir
from stages.core.policy.acceleration import memory_in_use
from stages.core.progress import StepProgress, warn
from stages.core.ranks import Ranks
from stages.core.records import Rollout
from stages.rl import Options, agreement, dapo, validation
from stages.rl.agreement import Bound, Difference
from stages.rl.batching import ProblemStream
from stages.rl.rounds import Acceptance, Rounds
from stages.rl.rundir import RunDir
from stages.rl.trainer import TokenRollout, Trainer, UpdateStats
from stages.rl.validation import NOT_MEASURED, Measured, Validation

MAX_COLLAPSED_STEPS = 3  # in a row: every update was non-finite, or the engine was far from the trainer
T = TypeVar("T")
PLACE = "place.json"  # beside weights and optimizer in a state: position in the stream, acceptance, first difference


@dataclass
class Batch:
    """One step's groups: all that were drawn, those that fill the batch, and the seconds that took."""

    rounds: Rounds
    drawn: list[Group] = field(default_factory=list)
    kept: list[Group] = field(default_factory=list)
    generate_s: float = 0.0
    verify_s: float = 0.0


@dataclass
class Clock:
    """Seconds since it was last read."""

    since: float = field(default_factory=time.perf_counter)

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        return seconds


class Explorer:
    """One rank of a DAPO run: an engine that draws, a grader, a trainer, and the stream of problems."""

    def __init__(
        self,
        options: Options,
        accelerator: Accelerator,
        engine: Engine,
        grader: Grader,
        trainer: Trainer,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        origin: str = "",
    ):
        """`origin` is the digest of the start policy; it enters the seeds, so two iterations draw different samples."""
        self.options = options
        self.accelerator = accelerator
        self.ranks = Ranks(options.tensor_parallel, accelerator.process_index, accelerator.num_processes)
        self.engine = engine
        self.grader = grader
        self.trainer = trainer
        self.prompts = prompts
        self.sampling = sampling
        self.origin = origin
        self.validation: Validation | None = None
        self.stream = ProblemStream(len(prompts), options.seed)
        self.acceptance = Acceptance()
        self.stop = StopSignal()
        self.bound = Bound(accelerator.mixed_precision == "no", options.mismatch_bound)
        self.saved = 0  # the step whose state is on disk
        self.start_mismatch = 0.0  # nats a token between engine and trainer, on average, when the run began
        self.warned_of_grace = False
        self.last_valid = ""  # for the progress line: the last measurement of the validation set
        self.num_short = 0  # steps of this process whose batch was not full; the first gives a warning

    def run(self, directory: RunDir, stop: StopSignal, done: int, policy: str) -> None:
        """Do the steps from `done` + 1 on, writing everything below `directory`.

        Raises CollapseError when several steps in a row gave only non-finite updates, or drew far from what the
        trainer computes, and SystemExit(143) after SIGTERM.
        """
        self.stop = stop
        if done:
            self._restore(directory, done)
        recent = self._recent_rows(directory)
        with StepProgress("rl", self.options.steps, done, quiet=not self.accelerator.is_main_process) as progress:
            for step in range(done + 1, self.options.steps + 1):
                start = self._validate(0, progress) if step == 1 else NOT_MEASURED
                try:
                    row = self._step(step, directory, progress, policy)
                except Stopped:
                    self._abandon(directory, step)
                row |= validation.columns(start, self._validate(step, progress))
                row["seconds"] += row["valid_s"]
                recent.append(row)
                self._report(row, directory, progress)
                has_collapsed = _all_of(recent, _is_collapsed)
                ending = has_collapsed or self._any(self.stop.received)
                self._save(directory, step, with_checkpoint=has_collapsed, with_state=ending)
                if has_collapsed or _all_of(recent, _has_drifted):
                    self._end(CollapseError(self._why(directory, step, policy, has_collapsed)))
                if ending and step < self.options.steps:
                    self._end_terminated(f"after step {step}")
        if done == self.options.steps:  # resumed with nothing to do: the last step may have no checkpoint yet
            self._keep_checkpoint(directory, done)

    def check_hand_over(self) -> Difference:
        """Show that the engine takes the weights it is given, and computes with them what the trainer does.

        Every rank looks at its own engine, and the worst of all counts. Raises InputError on the main rank, and
        SystemExit(2) on the others, if the difference is above the bound of the compute type.
        """
        parts = self.engine, self.trainer, self.prompts, self.sampling
        faults = [fault for fault in self.ranks.gather(self.engine.swap_fault(self.trainer.weights)) if fault]
        if faults:
            self._end(
                InputError(f"this policy cannot be trained: vLLM cannot take new weights of its kind: {faults[0]}")
            )
        self.hand_over()
        by_rank = self.ranks.gather(agreement.difference(*parts))
        worst = Difference(max(each.mean for each in by_rank), max(each.largest for each in by_rank))
        self.start_mismatch = worst.mean
        if breach := self.bound.breach(worst):
            self._end(
                InputError(
                    f"the engine's log-probabilities differ from the trainer's by {breach} after the weights were "
                    f"handed over (--mismatch-bound {self.bound.value:g}): vLLM does not compute this policy as "
                    "transformers does, so training on its samples would go wrong"
                )
            )
        return worst

    def draw_seed(self, step: int, place: int) -> int:
        """The seed of the first sample of the problem at `place` in the stream, whichever rank and round draw it."""
        return seed_of(self.options.seed, self.origin, step, place)

    def hand_over(self) -> None:
        self.engine.load(self.trainer.weights())

    def _step(self, step: int, directory: RunDir, progress: StepProgress, policy: str) -> dict[str, Any]:
        clock = Clock()
        self._before = self.stream.position, self.acceptance
        self.trainer.release()
        self.engine.wake()
        self.hand_over()
        seconds = {"handover_s": clock.lap()}
        num_preemptions = self.engine.num_preemptions
        batch = self._collect(step, directory, progress, policy)
        memory_gib = memory_in_use()
        self.engine.sleep()
        clock.lap()
        rollouts = [rollout for group in batch.kept for rollout in self._trainable(group)]
        progress.note("update")
        stats = self.trainer.update(rollouts, self._lr(step)) if rollouts else UpdateStats()
        seconds |= {"update_s": clock.lap(), "generate_s": batch.generate_s, "verify_s": batch.verify_s}
        trained = batch.kept if stats.num_skipped < len(stats.grad_norms) else []
        strain = self._strain(num_preemptions, memory_gib)
        self._write(step, directory, batch.drawn, trained, policy)
        return self._row(step, batch, stats, trained, seconds) | strain

    def _report(self, row: dict[str, Any], directory: RunDir, progress: StepProgress) -> None:
        """Write a step's row to the log, to trackers and to the screen."""
        step = row["step"]
        if self.accelerator.is_main_process:
            directory.append_log(row)
            self._warn_of_short_grace(row)
        self.accelerator.log({name: value for name, value in row.items() if value == value}, step=step)
        note = f"pass rate {row['pass_rate']:.2f}  {row['tokens_per_s']:.0f} tokens/s{self.last_valid}"
        progress.step(step, note)

    def _validate(self, step: int, progress: StepProgress) -> Measured:
        """Measure the policy after `step` on the validation set, if that is due and no one is to stop."""
        due = self.validation is not None and self.validation.is_due(step, self.options.steps)
        if self.validation is None or not due or self._any(self.stop.received):
            return NOT_MEASURED
        progress.note("validate")
        clock = Clock()
        self.trainer.release()
        self.engine.wake()
        self.hand_over()
        value = self.validation.measure(self.ranks, self.engine, self.grader, self.stop.is_received)
        self.engine.sleep()
        if value == value:
            self.last_valid = f"  valid {value:.2f} (step {step})"
            if step == 0:
                self.accelerator.log({"valid": value}, step=0)
        return Measured(value, clock.lap())

    def _collect(self, step: int, directory: RunDir, progress: StepProgress, policy: str) -> Batch:
        """Dynamic sampling: draw ahead, keep the first groups that teach something, draw again if some are missing.

        All ranks decide on the same gathered groups. Every rollout is on disk before the decision.
        """
        rounds = Rounds(self.options.problems_per_step, self.options.max_rounds, self.acceptance.faded())
        batch = Batch(rounds)
        while num_wanted := rounds.num_wanted:
            progress.note(f"generate {len(batch.kept)}/{rounds.batch_size} groups")
            groups = self._draw(self.stream.take(num_wanted), step, batch)
            batch.drawn += groups
            self._write(step, directory, batch.drawn, [], policy)
            self._refuse_failed_rewards(step, directory, batch.drawn)
            informative = [group for group in groups if dapo.is_informative(_applicable(group, group.rewards))]
            batch.kept += informative[: rounds.num_missing]
            rounds.count(len(informative), len(groups))
        self.acceptance = rounds.acceptance
        if rounds.num_missing and not self.num_short and self.accelerator.is_main_process:
            warn(
                f"step {step}: {len(batch.kept)} of {rounds.batch_size} groups after --max-rounds "
                f"{rounds.max_rounds}; a batch not full is trained on as it is (log.tsv counts them: short_batch)"
            )
        self.num_short += bool(rounds.num_missing)
        return batch

    def _refuse_failed_rewards(self, step: int, directory: RunDir, drawn: Sequence[Group]) -> None:
        """End if rewards of the user's own failed on every group of the step, which a round fills at least."""
        faults = [group.scores[0].fault for group in drawn]
        if all(faults):
            self._leave(directory, step)
            self._end(
                InputError(f"the rewards failed on all {len(faults)} groups of step {step}: --reward {faults[0]}")
            )

    def _draw(self, wanted: Sequence[int], step: int, batch: Batch) -> list[Group]:
        """Draw a group for each problem number, every engine its share; all ranks get all groups, in order."""
        clock = Clock()
        first = self.stream.position - len(wanted)  # where in the stream they were taken
        seeds = [self.draw_seed(step, first + place) for place in range(len(wanted))]
        sampling = replace(self.sampling, seeds=self.ranks.share(seeds))
        try:
            share = [self.prompts[i] for i in self.ranks.share(wanted)]
            mine = draw(self.engine, self.grader, share, sampling, should_stop=self.stop.is_received)
        except Stopped:
            mine = []
        batch.generate_s += clock.lap()
        if self._any(self.stop.received):
            raise Stopped
        settled = [group.settled() for group in mine]
        batch.verify_s += clock.lap()
        if self.ranks.is_alone:
            return settled
        places = self.ranks.share(range(len(wanted))) if self.ranks.keeps else []
        by_rank = self.ranks.gather(list(zip(places, settled, strict=True)))
        gathered: dict[int, Group] = dict(chain.from_iterable(by_rank))
        return [gathered[place] for place in range(len(wanted))]

    def _trainable(self, group: Group) -> list[TokenRollout]:
        """The completions with their advantages among those of the group that a reward applies to."""
        completions = _applicable(group, group.completions)
        values = dapo.advantages(_applicable(group, self._shaped(group)), self.options.advantage_eps)
        return [
            TokenRollout(group.prompt.token_ids, completion.token_ids, completion.log_probs, advantage)
            for completion, advantage in zip(completions, values, strict=True)
        ]

    def _shaped(self, group: Group) -> list[float]:
        """The rewards as they enter the advantage: math-verify's on the scale of the options, one's own as they are."""
        options = self.options
        scaled = group.rewards
        if not options.has_own_rewards:
            scaled = [options.reward_correct if reward else options.reward_wrong for reward in scaled]
        return [
            reward
            + dapo.overlong_penalty(
                len(completion.token_ids), options.max_tokens, options.overlong_buffer, options.overlong_penalty
            )
            for completion, reward in zip(group.completions, scaled, strict=True)
        ]

    def _write(
        self, step: int, directory: RunDir, drawn: Sequence[Group], trained: Sequence[Group], policy: str
    ) -> None:
        if not self.accelerator.is_main_process:
            return
        in_update = {id(group) for group in trained}
        first_sample: Counter[str] = Counter()  # a problem may come twice in a step, at the seam of two epochs
        records: list[Rollout] = []
        for group in drawn:
            problem_id = group.prompt.problem["id"]
            rollouts = group.rollouts(policy, step, first_sample[problem_id])
            first_sample[problem_id] += len(rollouts)
            for rollout, shaped in zip(rollouts, self._shaped(group), strict=True):
                extra = {"trained": id(group) in in_update, "shaped_reward": shaped}
                records.append({**rollout, **extra})  # type: ignore[typeddict-item]
        directory.write_rollouts(step, records)

    def _row(
        self, step: int, batch: Batch, stats: UpdateStats, trained: Sequence[Group], seconds: dict[str, float]
    ) -> dict[str, Any]:
        """The step's line of log.tsv; means are over all rollouts drawn, or over the tokens trained on.

        `acceptance` is the running one, by which the next step draws.
        """
        rounds = batch.rounds
        rollouts = [rollout for group in batch.drawn for rollout in group.rollouts("", step)]
        lengths = [rollout["num_tokens"] for rollout in rollouts]
        norms = [norm for norm in stats.grad_norms if math.isfinite(norm)]
        total_s = sum(seconds.values())
        return {
            "step": step,
            **self._mean_rewards(batch.drawn),
            "pass_rate": _mean([rollout["verdict"] == "correct" for rollout in rollouts]),
            "num_groups": len(batch.drawn),
            "num_kept": len(batch.kept),
            "num_surplus": rounds.num_informative - len(batch.kept),
            "num_dropped": rounds.num_drawn - rounds.num_informative,
            "num_rounds": rounds.num_rounds,
            "acceptance": rounds.acceptance.share,
            "short_batch": int(rounds.num_missing > 0),
            "num_rollouts": len(rollouts),
            "num_trained": sum(len(_applicable(group, group.completions)) for group in trained),
            "loss": stats.mean("loss"),
            "entropy": stats.mean("entropy"),
            "grad_norm": _mean(norms),
            "grad_norm_max": max(norms, default=math.nan),
            "grad_alarms": sum(norm > self.options.alarm_grad_norm for norm in norms),
            "skipped_updates": stats.num_skipped,
            "clip_low_frac": stats.mean("clipped_low"),
            "clip_high_frac": stats.mean("clipped_high"),
            "mismatch": stats.mean("mismatch"),
            "mismatch_max": stats.mismatch_max if stats.num_tokens else math.nan,
            "mismatch_alarms": int(stats.mean("mismatch") > self.bound.far(self.start_mismatch)),
            "lr": self._lr(step),
            "mean_tokens": _mean(lengths),
            "max_tokens": max(lengths),
            "truncated": _mean([rollout["finish_reason"] == "length" for rollout in rollouts]),
            "no_answer": _mean([rollout["verdict"] == "no_answer" for rollout in rollouts]),
            "timeouts": sum(rollout["verdict"] == "timeout" for rollout in rollouts),
            "errors": sum(rollout["verdict"] == "error" for rollout in rollouts),
            "rollout_tokens": sum(lengths),
            "update_tokens": stats.num_tokens,
            "tokens_per_s": sum(lengths) / total_s,
            "seconds": total_s,
            **seconds,
        }

    def _mean_rewards(self, groups: Sequence[Group]) -> dict[str, float]:
        """The mean reward as it enters the advantage, then of each of one's own where it applies."""
        parts = [score.parts for group in groups for score in group.scores if score.parts]
        names = parts[0] if parts else ()
        by_name = {name: _mean([one for part in parts if (one := part[name]) is not None]) for name in names}
        shaped = [reward for group in groups for reward in self._shaped(group)]
        return {"reward": _mean(shaped), **{f"rewards/{name}": mean for name, mean in by_name.items()}}

    def _strain(self, num_preemptions: int | None, memory_gib: float) -> dict[str, float]:
        """The most memory in use on any GPU, and the preemptions of all engines since there were so many."""
        now = self.engine.num_preemptions
        since = math.nan if now is None or num_preemptions is None else now - num_preemptions
        by_rank = self.ranks.gather((since, max(memory_gib, memory_in_use())))
        return {"peak_memory_gib": max(gib for _, gib in by_rank), "num_preemptions": sum(num for num, _ in by_rank)}

    def _lr(self, step: int) -> float:
        """Linear warm-up over training steps, then constant."""
        return float(self.options.lr * min(1.0, step / max(1, self.options.warmup_steps)))

    def _save(self, directory: RunDir, step: int, with_checkpoint: bool, with_state: bool) -> None:
        """A checkpoint and the state to resume from, if they are due or the run ends here.

        A run that is stopped saves its state, and no checkpoint that an uninterrupted run would not have.
        """
        last = step == self.options.steps
        if last or with_checkpoint or step % self.options.checkpoint_every == 0:
            self._keep_checkpoint(directory, step)
        if last or with_state or step % self.options.save_every == 0:
            self._keep_state(directory, step)
        self.accelerator.wait_for_everyone()

    def _keep_checkpoint(self, directory: RunDir, step: int) -> None:
        path = directory.checkpoint(step)
        if any(self.ranks.gather(path.is_dir())):
            return
        dtype = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else None
        self._write_whole(path, lambda beside: self.trainer.save_checkpoint(beside, dtype))

    def _keep_state(self, directory: RunDir, step: int) -> None:
        self._write_whole(directory.state_dir(step), self._save_state)
        if self.accelerator.is_main_process:
            directory.forget_states_before(step)
        self.saved = step

    def _save_state(self, path: Any) -> None:
        self.trainer.save_state(path)
        if self.accelerator.is_main_process:
            place = {
                "position": self.stream.position,
                "acceptance": asdict(self.acceptance),
                "start_mismatch": self.start_mismatch,
            }
            (path / PLACE).write_bytes(orjson.dumps(place))

    def _write_whole(self, path: Any, write: Callable[[Any], None]) -> None:
        """All ranks write into one directory beside `path`, which the main one then renames."""
        if self.accelerator.num_processes == 1:
            with whole_dir(path) as beside:
                write(beside)
            return
        beside = path.with_name(f".{path.name}.partial")
        write(beside)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            beside.rename(path)

    def _restore(self, directory: RunDir, step: int) -> None:
        path = directory.state_dir(step)
        self.trainer.load_state(path)
        place = orjson.loads((path / PLACE).read_bytes())
        self.stream.position, self.start_mismatch = place["position"], place["start_mismatch"]
        self.acceptance = Acceptance(**place["acceptance"])
        self.saved = step

    def _recent_rows(self, directory: RunDir) -> deque[dict[str, Any]]:
        """The last rows of the log, which a resumed run goes on counting from; the main rank reads and broadcasts."""
        rows = directory.log_rows()[-MAX_COLLAPSED_STEPS:] if self.accelerator.is_main_process else []
        return deque(self.ranks.gather(rows)[0], maxlen=MAX_COLLAPSED_STEPS)

    def _warn_of_short_grace(self, row: Mapping[str, Any]) -> None:
        """Warn once if an update takes longer than the launcher waits after SIGTERM: no state could be saved then."""
        granted = granted_s()
        if granted and not self.warned_of_grace and row["update_s"] > granted / 2:
            self.warned_of_grace = True
            enough = 60 * math.ceil(row["update_s"] / 20)
            warn(
                f"an update takes {row['update_s']:.0f} s, and the launcher kills its processes {granted} s after "
                f"SIGTERM: a terminated run would lose steps; set TORCH_ELASTIC_SHUTDOWN_TIMEOUT={enough} before it"
            )

    def _abandon(self, directory: RunDir, step: int) -> NoReturn:
        """Leave a step in which nothing was updated yet because of SIGTERM."""
        self._leave(directory, step)
        self._end_terminated(f"while step {step} was drawn, with {step - 1} steps done")

    def _leave(self, directory: RunDir, step: int) -> None:
        """Forget a step in which nothing was updated yet; the state of the one before is on disk."""
        self.engine.sleep()
        self.stream.position, self.acceptance = self._before
        if self.accelerator.is_main_process:
            directory.forget_rollouts(step)
        if self.saved < step - 1:
            self._keep_state(directory, step - 1)

    def _end(self, error: InputError | CollapseError) -> NoReturn:
        """End on all ranks at once, and say why on one."""
        if self.accelerator.is_main_process:
            raise error
        raise SystemExit(2 if isinstance(error, InputError) else 1)

    def _end_terminated(self, when: str) -> NoReturn:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            warn(f"terminated {when}; the same command goes on from there")
        raise SystemExit(TERMINATED)

    def _why(self, directory: RunDir, step: int, policy: str, has_collapsed: bool) -> str:
        """What made the last steps bad, and the last good policy."""
        if has_collapsed:
            return (
                f"the last {MAX_COLLAPSED_STEPS} steps gave only non-finite losses or gradients, none of which reached "
                f"the weights: lower --lr; {directory.checkpoint(step)} holds the last good policy"
            )
        far = self.bound.far(self.start_mismatch)
        good = directory.last_checkpoint(step - MAX_COLLAPSED_STEPS) or policy
        return (
            f"in the last {MAX_COLLAPSED_STEPS} steps engine and trainer were more than {far:.2g} nats a token "
            f"apart (mismatch in log.tsv; {self.start_mismatch:.2g} at the start), so the engine no longer draws from "
            f"the policy that is trained; {good} is the last policy saved before"
        )

    def _any(self, here: bool) -> bool:
        """Whether it is true on any rank, so that all leave together."""
        return any(self.ranks.gather(here))


def _all_of(recent: Sequence[Mapping[str, Any]], is_bad: Callable[[Mapping[str, Any]], bool]) -> bool:
    return len(recent) == MAX_COLLAPSED_STEPS and all(map(is_bad, recent))


def _is_collapsed(row: Mapping[str, Any]) -> bool:
    """Whether every update of a step was skipped."""
    return row["skipped_updates"] > 0 and row["num_trained"] == 0


def _has_drifted(row: Mapping[str, Any]) -> bool:
    return row["mismatch_alarms"] > 0


def _applicable(group: Group, values: Sequence[T]) -> list[T]:
    """Those of the `values` of a group's completions to which a reward applies: all, by math-verify."""
    return [value for value, score in zip(values, group.scores, strict=True) if score.applies]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
