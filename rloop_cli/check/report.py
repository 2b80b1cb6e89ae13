"""What is known of a params file before anything runs: its commands, files, prompts, memory, numbers and time."""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rloop_cli.check import counts, files, fit, prompts, times
from rloop_cli.check.calls import Call
from rloop_cli.check.counts import Range
from rloop_cli.check.notes import notes
from rloop_cli.check.prompts import Seen
from stages.core.outputs import set_aside

WIDTH, LABEL = 100, 12


class Report(NamedTuple):
    """Faults, a line each, and the summary for a terminal."""

    faults: list[str]
    summary: str


def report(calls: Sequence[Call], runs: Path, gpu_gib: float) -> Report:
    """Judge the calls of a graph; `runs` holds the run whose figures say how long they take.

    Raises InputError if the figures of `runs` can't be read.
    """
    seen = prompts.seen(calls)
    plans, unplanned = fit.plans(calls, gpu_gib)
    faults = [*files.faults(calls), *fit.process_faults(calls), *seen.faults]
    faults += [] if seen.faults else fit.policy_faults(calls)  # of policies that can be read
    faults += fit.faults(plans, gpu_gib, seen.longest)
    sections = {
        "commands": [_commands(calls)],
        "prompt": [prompts.shortened(seen.first)] if seen.first else [],
        "tokens": seen.lines,
        "memory": [*fit.lines(plans, gpu_gib, seen.longest), *(f"not planned: {line}" for line in unplanned)],
        "rl": list(_exploration(calls)),
        "eval": list(_evaluations(calls, seen)),
        "time": list(times.estimates(calls, _rollouts(calls, seen), runs)),
        "note": [*seen.notes, *notes(calls), *set_aside(runs)],
        "not yet": list(prompts.waiting(calls)),
    }
    text = "\n".join(
        _paragraph("" if number else label, line)
        for label, lines in sections.items()
        for number, line in enumerate(lines)
    )
    return Report(list(dict.fromkeys(faults)), text)


def _paragraph(label: str, line: str) -> str:
    indent = " " * LABEL
    return textwrap.fill(
        line, WIDTH, initial_indent=label.ljust(LABEL), subsequent_indent=indent, break_on_hyphens=False
    )


def _commands(calls: Sequence[Call]) -> str:
    ours = [call for call in calls if call.stage]
    return (
        f"{len(ours)} commands of {len(calls)} stages, read as they would run: every option is known and within bounds"
    )


def _exploration(calls: Sequence[Call]) -> Iterator[str]:
    whole = counts.exploration(calls)
    if whole.num_runs:
        yield f"{whole.num_runs} runs, {whole.num_steps:,} steps, {whole.rollouts} rollouts"


def _evaluations(calls: Sequence[Call], seen: Seen) -> Iterator[str]:
    evaluated = counts.evaluations(calls)
    if evaluated:
        known = _rollouts(calls, seen)
        said = "as many rollouts as the sets say, once they are made" if known is None else f"{known} rollouts"
        yield f"{len(evaluated)} calls, {counts.pairs(evaluated)} policies x sets, {said}"


def _rollouts(calls: Sequence[Call], seen: Seen) -> Range | None:
    """Completions of all evaluations; None if a set is not there to be counted."""
    evaluated = counts.evaluations(calls)
    if any(file not in seen.sizes for one in evaluated for file in one.sets):
        return None
    return counts.rollouts(evaluated, seen.sizes)
