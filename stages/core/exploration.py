"""The rl stage at work: one step after another of draw, verify, update, hand over; resumable after every kill.

A step is a function of the weights, the optimizer, the position in the stream of problems and the seed. So the state
on disk is just these, and a run that is started again repeats what it lost, to the same rollouts.

`knobs` is stages.rl.Knobs everywhere here: the stage defines each knob, this module only reads them.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from stages.core import dapo
from stages.core.batching import ProblemStream
from stages.core.engine import Engine, Sampling, seed_of
from stages.core.errors import CollapseError, InputError
from stages.core.lifetime import TERMINATED, StopSignal
from stages.core.outputs import whole_dir
from stages.core.progress import StepProgress, warn
from stages.core.records import Rollout
from stages.core.rollouts import Group, Prompt, draw
from stages.core.rundir import RunDir
from stages.core.trainer import TokenRollout, Trainer, UpdateStats
from stages.core.verifier import Verifier

MAX_COLLAPSED_STEPS = 3  # steps in a row of which every update was non-finite
CHECK_PROMPTS = 8
CHECK_TOKENS = 32


@dataclass
class Batch:
    """What one step drew: all groups, the informative ones among them, and how long that took."""

    drawn: list[Group] = field(default_factory=list)
    kept: list[Group] = field(default_factory=list)
    num_rounds: int = 0
    generate_s: float = 0.0
    verify_s: float = 0.0


@dataclass
class Clock:
    """Seconds since it was last read."""

    since: float = field(default_factory=time.perf_counter)

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        return seconds


class Explorer:
    """One rank of a DAPO run: an engine that draws, a verifier, a trainer, and the stream of problems."""

    def __init__(
        self,
        knobs: Any,
        accelerator: Accelerator,
        engine: Engine,
        verifier: Verifier,
        trainer: Trainer,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        origin: str = "",
    ):
        """`origin` is the digest of the start policy: it keeps the noise of two iterations apart."""
        self.knobs = knobs
        self.accelerator = accelerator
        self.engine = engine
        self.verifier = verifier
        self.trainer = trainer
        self.prompts = prompts
        self.sampling = sampling
        self.origin = origin
        self.stream = ProblemStream(len(prompts), knobs.seed)
        self.num_short = 0  # steps of this process whose batch was not full; the first is said aloud

    def run(self, directory: RunDir, stop: StopSignal, done: int, policy: str) -> None:
        """Do the steps from `done` + 1 on, writing everything below `directory`.

        Raises CollapseError when several steps in a row gave only non-finite updates, SystemExit(143) after SIGTERM.
        """
        if done:
            self._restore(directory, done)
        collapsed = 0
        with StepProgress("rl", self.knobs.steps, done, quiet=not self.accelerator.is_main_process) as progress:
            for step in range(done + 1, self.knobs.steps + 1):
                row, stats = self._step(step, directory, progress, policy)
                collapsed = collapsed + 1 if stats.grad_norms and stats.num_skipped == len(stats.grad_norms) else 0
                if self.accelerator.is_main_process:
                    directory.append_log(row)
                self.accelerator.log({k: v for k, v in row.items() if v == v}, step=step)
                progress.step(step, f"pass rate {row['pass_rate']:.2f}  {row['tokens_per_s']:.0f} tokens/s")
                has_collapsed = collapsed == MAX_COLLAPSED_STEPS
                ending = has_collapsed or self._agree(stop.received)
                self._save(directory, step, with_checkpoint=has_collapsed, with_state=ending)
                if has_collapsed:
                    raise CollapseError(
                        f"the last {collapsed} steps gave only non-finite losses or gradients, none of which reached "
                        f"the weights: lower --lr; {directory.checkpoint(step)} holds the last good policy"
                    )
                if ending and step < self.knobs.steps:
                    warn(f"terminated after step {step}; the same command goes on from there")
                    raise SystemExit(TERMINATED)

    def check_hand_over(self) -> float:
        """The largest difference between the engine's and the trainer's log-probabilities of fresh samples, in nats.

        The engine must have started with weights that are not the trainer's, so that a hand-over that does nothing
        shows. Raises InputError in float32 where the difference is above the bound.
        """
        self.hand_over()
        few = self.prompts[:CHECK_PROMPTS]
        tokens = min(CHECK_TOKENS, self.knobs.max_tokens)
        sampling = Sampling(2, tokens, self.knobs.temperature, seeds=[self.draw_seed(0, i) for i in range(len(few))])
        groups = self.engine.generate([prompt.token_ids for prompt in few], sampling, lambda *_: None)
        rollouts = [
            TokenRollout(prompt.token_ids, completion.token_ids, completion.log_probs, 0.0)
            for prompt, group in zip(few, groups, strict=True)
            for completion in group
        ]
        own = self.trainer.log_probs(rollouts)
        worst = max(
            float((mine - torch.tensor(rollout.engine_log_probs)).abs().max())
            for mine, rollout in zip(own, rollouts, strict=True)
        )
        if self.trainer.accelerator.mixed_precision == "no" and not worst <= self.knobs.mismatch_bound:
            raise InputError(
                f"the engine's log-probabilities differ from the trainer's by up to {worst:.2g} after the weights were "
                f"handed over (--mismatch-bound {self.knobs.mismatch_bound:g}): vLLM does not compute this policy as "
                "transformers does, so training on its samples would go wrong"
            )
        return worst

    def draw_seed(self, step: int, place: int) -> int:
        """The seed of the first sample of the problem at `place` in the stream, whichever rank and round draw it."""
        return seed_of(self.knobs.seed, self.origin, step, place)

    def hand_over(self) -> None:
        """Give the trainer's weights to the engine."""
        self.engine.load(self.trainer.weights())

    def _step(
        self, step: int, directory: RunDir, progress: StepProgress, policy: str
    ) -> tuple[dict[str, Any], UpdateStats]:
        clock = Clock()
        self.engine.wake()
        self.hand_over()
        seconds = {"handover_s": clock.lap()}
        batch = self._collect(step, directory, progress, policy)
        self.engine.sleep()
        clock.lap()
        rollouts = [rollout for group in batch.kept for rollout in self._trainable(group)]
        progress.note("update")
        stats = self.trainer.update(rollouts, self._lr(step)) if rollouts else UpdateStats()
        seconds |= {"update_s": clock.lap(), "generate_s": batch.generate_s, "verify_s": batch.verify_s}
        trained = batch.kept if stats.num_skipped < len(stats.grad_norms) else []
        self._write(step, directory, batch.drawn, trained, policy)
        return self._row(step, batch, stats, trained, seconds), stats

    def _collect(self, step: int, directory: RunDir, progress: StepProgress, policy: str) -> Batch:
        """Dynamic sampling: draw, drop the groups that teach nothing, draw fresh problems in their place.

        All ranks decide on the same gathered groups. Every rollout is on disk before the decision.
        """
        batch = Batch()
        while len(batch.kept) < self.knobs.problems_per_step and batch.num_rounds < self.knobs.max_rounds:
            batch.num_rounds += 1
            progress.note(f"generate {len(batch.kept)}/{self.knobs.problems_per_step} groups")
            wanted = self.stream.take(self.knobs.problems_per_step - len(batch.kept))
            groups = self._draw(wanted, step, batch)
            batch.drawn += groups
            self._write(step, directory, batch.drawn, [], policy)
            batch.kept += [group for group in groups if dapo.is_informative(group.rewards)]
        if len(batch.kept) < self.knobs.problems_per_step and not self.num_short and self.accelerator.is_main_process:
            warn(
                f"step {step}: {len(batch.kept)} of {self.knobs.problems_per_step} groups after --max-rounds "
                f"{batch.num_rounds}; a batch not full is trained on as it is (log.tsv counts them: short_batch)"
            )
        self.num_short += len(batch.kept) < self.knobs.problems_per_step
        return batch

    def _draw(self, wanted: Sequence[int], step: int, batch: Batch) -> list[Group]:
        """Draw a group for each problem number, every rank its share; all ranks get all groups, in order."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        clock = Clock()
        first = self.stream.position - len(wanted)  # where in the stream they were taken
        seeds = [self.draw_seed(step, first + place) for place in range(len(wanted))]
        sampling = replace(self.sampling, seeds=seeds[rank::ranks])
        mine = draw(self.engine, self.verifier, [self.prompts[i] for i in wanted[rank::ranks]], sampling)
        batch.generate_s += clock.lap()
        settled = [group.settled() for group in mine]
        batch.verify_s += clock.lap()
        if ranks == 1:
            return settled
        places = list(range(len(wanted)))[rank::ranks]
        gathered: dict[int, Group] = dict(gather_object(list(zip(places, settled, strict=True))))
        return [gathered[place] for place in range(len(wanted))]

    def _trainable(self, group: Group) -> list[TokenRollout]:
        values = dapo.advantages(self._shaped(group), self.knobs.advantage_eps)
        return [
            TokenRollout(group.prompt.token_ids, completion.token_ids, completion.log_probs, advantage)
            for completion, advantage in zip(group.completions, values, strict=True)
        ]

    def _shaped(self, group: Group) -> list[float]:
        knobs = self.knobs
        return [
            (knobs.reward_correct if reward else knobs.reward_wrong)
            + dapo.overlong_penalty(
                len(completion.token_ids), knobs.max_tokens, knobs.overlong_buffer, knobs.overlong_penalty
            )
            for completion, reward in zip(group.completions, group.rewards, strict=True)
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
        """The step's line of log.tsv; means are over all rollouts drawn, or over the tokens trained on."""
        rollouts = [rollout for group in batch.drawn for rollout in group.rollouts("", step)]
        lengths = [rollout["num_tokens"] for rollout in rollouts]
        shaped = [reward for group in batch.drawn for reward in self._shaped(group)]
        norms = [norm for norm in stats.grad_norms if math.isfinite(norm)]
        total_s = sum(seconds.values())
        return {
            "step": step,
            "reward": _mean(shaped),
            "pass_rate": _mean([rollout["reward"] for rollout in rollouts]),
            "num_groups": len(batch.drawn),
            "num_kept": len(batch.kept),
            "num_dropped": len(batch.drawn) - len(batch.kept),
            "num_rounds": batch.num_rounds,
            "short_batch": int(len(batch.kept) < self.knobs.problems_per_step),
            "num_rollouts": len(rollouts),
            "num_trained": sum(len(group.completions) for group in trained),
            "loss": stats.mean("loss"),
            "entropy": stats.mean("entropy"),
            "grad_norm": _mean(norms),
            "grad_norm_max": max(norms, default=math.nan),
            "grad_alarms": sum(norm > self.knobs.alarm_grad_norm for norm in norms),
            "skipped_updates": stats.num_skipped,
            "clip_low_frac": stats.mean("clipped_low"),
            "clip_high_frac": stats.mean("clipped_high"),
            "mismatch": stats.mean("mismatch"),
            "mismatch_max": stats.mismatch_max if stats.num_tokens else math.nan,
            "lr": self._lr(step),
            "mean_tokens": _mean(lengths),
            "max_tokens": max(lengths),
            "truncated": _mean([rollout["finish_reason"] == "length" for rollout in rollouts]),
            "no_answer": _mean([rollout["verdict"] == "no_answer" for rollout in rollouts]),
            "timeouts": sum(rollout["verdict"] == "timeout" for rollout in rollouts),
            "rollout_tokens": sum(lengths),
            "update_tokens": stats.num_tokens,
            "tokens_per_s": sum(lengths) / total_s,
            "seconds": total_s,
            **seconds,
        }

    def _lr(self, step: int) -> float:
        """Linear warm-up over training steps, then constant."""
        return float(self.knobs.lr * min(1.0, step / max(1, self.knobs.warmup_steps)))

    def _save(self, directory: RunDir, step: int, with_checkpoint: bool, with_state: bool) -> None:
        """A checkpoint and the state to resume from, where their turn has come or the run ends here.

        A run that was asked to stop has its state, and no checkpoint that an uninterrupted run would not have.
        """
        last = step == self.knobs.steps
        if last or with_checkpoint or step % self.knobs.checkpoint_every == 0:
            dtype = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else None
            self._write_whole(directory.checkpoint(step), lambda path: self.trainer.save_checkpoint(path, dtype))
        if last or with_state or step % self.knobs.save_every == 0:
            self._write_whole(directory.state_dir(step), self._save_state)
            if self.accelerator.is_main_process:
                directory.forget_states_before(step)
        self.accelerator.wait_for_everyone()

    def _save_state(self, path: Any) -> None:
        self.trainer.save_state(path)
        if self.accelerator.is_main_process:
            (path / "position").write_text(str(self.stream.position))

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
        self.stream.position = int((path / "position").read_text())

    def _agree(self, here: bool) -> bool:
        """Whether it is true on the main rank; the others follow, so that all leave the loop together."""
        if self.accelerator.num_processes == 1:
            return here
        return bool(broadcast_object_list([here])[0])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
