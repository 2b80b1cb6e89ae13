"""How long it takes, by the figures of runs that are there."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rloop_cli.check.calls import Call
from rloop_cli.check.counts import Range
from stages.core.provenance import read_manifest
from stages.core.tabular import read_tsv

HOUR, MINUTE = 3600, 60


class Explored(NamedTuple):
    """A run of rl: its steps, seconds and drawn tokens in all, and the rollouts that fill a step's batch."""

    path: Path
    num_steps: int
    seconds: float
    num_tokens: float
    batch: int
    max_tokens: int


class PastEval(NamedTuple):
    """An evaluation: its rollouts and the seconds for all of them, the engine's start included."""

    path: Path
    num_rollouts: int
    seconds: float
    max_tokens: int


def estimates(calls: Sequence[Call], rollouts: Range | None, runs: Path) -> Iterator[str]:
    """Lines on the hours of rl and eval, each with the run it is reckoned from, or how to get one."""
    training = [call.options for call in calls if call.stage == "rl"]
    if any(call.is_stale and call.makes(str(runs)) and call.stage in ("", "toy") for call in calls):
        yield f"not known: what lies in {runs} is of another base policy"
        return
    if (run := explored(runs)) is None:
        yield f"rl: not known, for {runs} holds no log.tsv of rl: a run of two or three --steps tells"
    else:
        batches = sum(own.steps * own.problems_per_step * own.group_size for own in training)
        seconds = batches * run.seconds / run.num_steps / run.batch
        yield (
            f"rl: {_span(seconds)}, by {run.path}: {run.num_steps:,} steps, {run.seconds / run.num_steps:.3g} s for "
            f"{run.batch:,} rollouts, {run.num_tokens / run.seconds:,.0f} tokens/s"
            + _other(run.max_tokens, {own.max_tokens for own in training})
        )
    if (one := drawn(runs)) is None:
        yield f"eval: not known, for {runs} holds no finished eval"
    elif rollouts is None:
        yield "eval: not known before the sets are made"
    else:
        spans = dict.fromkeys(_span(number * one.seconds / one.num_rollouts) for number in rollouts)
        given = {call.options.max_tokens for call in calls if call.stage == "eval"}
        yield (
            f"eval: {' to '.join(spans)}, by {one.path}: {one.num_rollouts:,} rollouts in {one.seconds:,.0f} s, start "
            f"included{_other(one.max_tokens, given)}"
        )


def _other(max_tokens: int, given: set[int]) -> str:
    return "" if given == {max_tokens} else f" (of --max-tokens {max_tokens})"


def _span(seconds: float) -> str:
    if seconds < 2 * MINUTE:
        return f"{seconds:.0f} s"
    return f"{seconds / MINUTE:.0f} min" if seconds < 2 * HOUR else f"{seconds / HOUR:.1f} h"


def explored(runs: Path) -> Explored | None:
    """The run of rl in `runs` with the most steps."""
    each = (_explored(log, read_manifest(log.parent / "manifest.json")) for log in sorted(runs.glob("*/rl/log.tsv")))
    return max(filter(None, each), key=lambda run: run.num_steps, default=None)


def _explored(log: Path, record: dict[str, Any]) -> Explored | None:
    rows, given = read_tsv(log), record.get("parameters", {})
    if record.get("stage") != "rl" or not rows:
        return None
    seconds, tokens = (sum(row[name] for row in rows) for name in ("seconds", "rollout_tokens"))
    batch = given["problems_per_step"] * given["group_size"]
    return Explored(log.parent, len(rows), seconds, tokens, batch, given["max_tokens"])


def drawn(runs: Path) -> PastEval | None:
    """The evaluation below `runs` with the most rollouts."""
    evals = []
    for file in sorted(runs.glob("eval/**/manifest.json")):
        record = read_manifest(file)
        is_part = (file.parent.parent / "manifest.json").is_file()  # one set of several, whose seconds are no set's own
        if record.get("stage") != "eval" or is_part:
            continue
        parts = [record, *map(read_manifest, file.parent.glob("*/manifest.json"))]
        number = sum(part.get("counts", {}).get("rollouts", 0) for part in parts)
        if number and record.get("seconds"):
            evals.append(PastEval(file.parent, number, record["seconds"], record["parameters"]["max_tokens"]))
    return max(evals, key=lambda one: one.num_rollouts, default=None)
