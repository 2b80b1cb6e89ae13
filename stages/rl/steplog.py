"""A step's row of log.tsv, and what metrics.json says of all of them. The columns are those of `records.LogRow`."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from stages.core.drawing.rollouts import Group
from stages.core.records import LogRow, columns
from stages.rl import validation
from stages.rl.drawing import StepGroups, applicable, rewards_by_name, shaped_rewards
from stages.rl.options import Settings
from stages.rl.trainer import UpdateStats
from stages.rl.validation import NOT_MEASURED, Measured


@dataclass
class StepOutcome:
    """What became of a step: its groups, those that an update was made on, the update, seconds and measurements."""

    step: int
    groups: StepGroups
    stats: UpdateStats
    lr: float
    handover_s: float
    update_s: float
    peak_memory_gib: float = math.nan
    num_preemptions: float = math.nan
    num_changes: int = 0
    entropy_drawn: float = math.nan
    entropy_weight: float = 0.0
    valid_start: Measured = NOT_MEASURED
    valid: Measured = NOT_MEASURED

    @property
    def trained(self) -> list[Group]:
        """The groups that entered an update: none if each update was skipped."""
        return self.groups.kept if self.stats.num_skipped < len(self.stats.grad_norms) else []


def row(outcome: StepOutcome, settings: Settings, far: float) -> LogRow:
    """The step's row; means are over all rollouts drawn, or over the tokens trained on.

    From `far` on, in nats a token, the difference between engine and trainer is an alarm.
    """
    first = {"step": outcome.step, **_mean_rewards(outcome.groups.drawn, settings)}
    values = _of_groups(outcome.groups) | _of_update(outcome, settings, far) | _of_rollouts(outcome)
    return cast(LogRow, first | {name: values[name] for name in columns(LogRow) if name not in first})


def _of_groups(groups: StepGroups) -> dict[str, float]:
    rounds = groups.rounds
    return {
        "num_groups": len(groups.drawn),
        "num_kept": len(groups.kept),
        "num_surplus": rounds.num_informative - len(groups.kept),
        "num_dropped": rounds.num_drawn - rounds.num_informative,
        "num_rounds": rounds.num_rounds,
        "acceptance": rounds.acceptance.share,
        "short_batch": int(rounds.num_missing > 0),
        "generate_s": groups.generate_s,
        "verify_s": groups.verify_s,
    }


def _of_update(outcome: StepOutcome, settings: Settings, far: float) -> dict[str, float]:
    stats = outcome.stats
    norms = [norm for norm in stats.grad_norms if math.isfinite(norm)]
    return {
        "num_trained": sum(len(applicable(group, group.completions)) for group in outcome.trained),
        "loss": stats.mean("loss"),
        "entropy": stats.mean("entropy"),
        "entropy_drawn": outcome.entropy_drawn,
        "entropy_weight": outcome.entropy_weight,
        "grad_norm": _mean(norms),
        "grad_norm_max": max(norms, default=math.nan),
        "grad_alarms": sum(norm > settings.alarm_grad_norm for norm in norms),
        "skipped_updates": stats.num_skipped,
        "clip_low_frac": stats.mean("clipped_low"),
        "clip_high_frac": stats.mean("clipped_high"),
        "mismatch": stats.mean("mismatch"),
        "mismatch_max": stats.mismatch_max if stats.num_tokens else math.nan,
        "mismatch_alarms": int(stats.mean("mismatch") > far),
        "lr": outcome.lr,
        "update_tokens": stats.num_tokens,
        "update_s": outcome.update_s,
        "handover_s": outcome.handover_s,
        "peak_memory_gib": outcome.peak_memory_gib,
        "num_preemptions": outcome.num_preemptions,
        "halvings": stats.num_halvings,
        "rounding_changes": outcome.num_changes,
    }


def _of_rollouts(outcome: StepOutcome) -> dict[str, float]:
    groups = outcome.groups
    completions = [completion for group in groups.drawn for completion in group.completions]
    lengths = [len(completion.token_ids) for completion in completions]
    verdicts = Counter(score.verdict for group in groups.drawn for score in group.scores)
    share = {verdict: count / len(completions) for verdict, count in verdicts.items()}
    step_s = outcome.handover_s + outcome.update_s + groups.generate_s + groups.verify_s
    valid_s = outcome.valid_start.seconds + outcome.valid.seconds
    return {
        "pass_rate": share.get("correct", 0.0),
        "num_rollouts": len(completions),
        "mean_tokens": _mean(lengths),
        "max_tokens": max(lengths),
        "truncated": _mean([completion.finish_reason != "stop" for completion in completions]),
        "no_answer": share.get("no_answer", 0.0),
        "unevaluated": share.get("unevaluated", 0.0),
        "timeouts": verdicts["timeout"],
        "errors": verdicts["error"],
        "rollout_tokens": sum(lengths),
        "tokens_per_s": sum(lengths) / step_s,
        "seconds": step_s + valid_s,
        "valid": outcome.valid.value,
        "valid_start": outcome.valid_start.value,
        "valid_s": valid_s,
    }


def metrics(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """What metrics.json holds of the rows of a log, as `records.LogRow` says it; an empty column has no largest."""
    totals: dict[str, Any] = {}
    for name, column in columns(LogRow).items():
        values = [row[name] for row in rows if name in row]
        if column.total:
            totals[name] = sum(values) if column.total == "sum" else max(values, default=None)
    ends: dict[str, Any] = {"pass_rate_first": rows[0]["pass_rate"], "pass_rate_last": rows[-1]["pass_rate"]}
    ends |= {"entropy_last": rows[-1].get("entropy")}
    return {"steps": len(rows), **totals, **ends, **validation.figures(rows)}


def _mean_rewards(groups: Sequence[Group], settings: Settings) -> dict[str, float]:
    """The mean reward as it enters the advantage, then of each of one's own where it applies."""
    by_name = {name: _mean(values) for name, values in rewards_by_name(groups).items()}
    shaped = [reward for group in groups for reward in shaped_rewards(group, settings)]
    return {"reward": _mean(shaped), **{f"rewards/{name}": mean for name, mean in by_name.items()}}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
