"""Filter: rollouts to examples, the successes on the problems that stayed hard, from which rft learns.

A problem's pass rate is taken over all its rollouts of the whole phase, those that no update saw included, so it is
known only at the end: the first pass checks and counts every line, the second goes back to the successes that count.
To rank successes by length, likelihood or a judge, drop examples from the file before rft.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from stages.core import jsonl, outputs, records, tabular
from stages.core.errors import InputError
from stages.core.options import PATH, WITHOUT_EFFECT, OptionGroup, above, at_least, at_most
from stages.core.progress import warn
from stages.core.provenance import Identity, identify, is_done, manifest, recorded
from stages.filter import passes
from stages.filter.passes import Source
from stages.filter.selection import Choice, Positions, Tally, can_select, yield_table


@dataclass(frozen=True, kw_only=True)
class Options(OptionGroup):
    """What `rloop filter` takes."""

    rollouts: Annotated[list[str], "rollouts: a JSONL file, an rl output directory, or - for stdin; repeatable", PATH]
    out: Annotated[str, "the examples, a new JSONL file, or - for stdout; not needed with --dry-run", PATH] = ""
    problems: Annotated[Path | None, "write the hard ones of these problems (JSONL) instead of examples", PATH] = None
    policy: Annotated[str, "use only the rollouts of this policy; needed where there are several"] = ""
    max_pass_rate: Annotated[
        float, "a problem is hard if its pass rate is below this; 10 % is 0.1, 1 is no bound", above(0), at_most(1)
    ] = 0.1
    min_reward: Annotated[float, "a rollout is a success if its reward is this or more"] = 1.0
    max_per_problem: Annotated[
        int, "keep at most N successes of a problem, drawn at random; 0 keeps all", at_least(0)
    ] = 0
    seed: Annotated[int, "seed of the draw of --max-per-problem"] = 0
    keep_truncated: Annotated[
        bool, "keep successes that were cut at the token limit; rft then teaches to stop there"
    ] = False
    keep_duplicates: Annotated[bool, "keep every copy of a completion that was drawn more than once"] = False
    dry_run: Annotated[bool, "write nothing; print the yield by threshold as a table", WITHOUT_EFFECT] = False

    def __post_init__(self) -> None:
        """Raise InputError if there is nowhere to write to."""
        super().__post_init__()
        if not self.out and not self.dry_run:
            raise InputError("--out is missing: name a file, or - for stdout, or ask for --dry-run")


def run(options: Options) -> None:
    """Choose the successes on hard problems as examples to fine-tune on.

    The pass rate of a problem is its share of successes among all rollouts given, whether an update saw them or not.
    Chosen are successes of the problems strictly below --max-pass-rate, in the order in which they come. A success is a
    correct rollout or, where rewards are not just 1 or 0, one with --min-reward. Standard
    input is kept in a temporary file (see TMPDIR), since every rollout must be counted before the first is chosen.
    Beside FILE.jsonl FILE.manifest.json says how it came about.

    Balanced examples, at most n successes of every problem that was solved, hard or not, are
    --max-pass-rate 1 --max-per-problem n.

    With --problems, the file that the rollouts are of, its hard problems are written instead of examples, for rl:
    those below --max-pass-rate that were solved at least once, each with its pass rate.

    Example: rloop filter --rollouts loop/1/rl --out loop/1/examples.jsonl --max-pass-rate 0.5
    """
    start = time.monotonic()
    if not options.dry_run and options.out != "-":
        outputs.refuse_no_file(options.out)
        outputs.refuse_unwritable(options.out)
    sources = passes.sources(options.rollouts)
    _warn_of_running(options.rollouts)
    if options.dry_run:
        print(_yield(sources, options))
        return
    manifest_file = Path(options.out).with_suffix(".manifest.json")

    def identity() -> Identity:
        return identify("filter", options, recorded(_inputs(options)))

    if is_done(options.out, manifest_file, identity):
        return
    with outputs.claimed(options.out, manifest_file):
        counts = (_choose if options.problems is None else _choose_problems)(sources, options)
        if options.out != "-":
            record = manifest(identity(), counts, time.monotonic() - start, rollouts=options.rollouts)
            outputs.write_json(manifest_file, record)


def _inputs(options: Options) -> list[Path]:
    """What the output is made from: of an rl output its rollouts; standard input leaves none."""
    rollouts = [Path(path, "rollouts") if Path(path).is_dir() else Path(path) for path in options.rollouts]
    problems = [options.problems] if options.problems else []
    return [path for path in [*rollouts, *problems] if str(path) != "-"]


def _yield(sources: list[Source], options: Options) -> str:
    """What each threshold would give, as a table."""
    tallies, successes = _count(sources, options)
    choice = Choice(options.seed, options.keep_duplicates)
    choice.add(passes.candidates(sources, successes, set(range(len(tallies)))))
    cap = options.max_per_problem
    examples = {number: min(count, cap or count) for number, count in choice.num_candidates().items()}
    return yield_table(tallies.values(), options.max_pass_rate, examples)


def _count(sources: list[Source], options: Options) -> tuple[dict[str, Tally], Positions]:
    keep_truncated = options.keep_truncated or options.problems is not None
    return passes.count(sources, options.policy, options.min_reward, keep_truncated)


def _choose(sources: list[Source], options: Options) -> dict[str, int]:
    """Write the examples; return the counts of the manifest."""
    max_pass_rate = options.max_pass_rate
    tallies, successes = _count(sources, options)
    hard = {tally.number: tally for tally in tallies.values() if tally.num_usable and tally.is_below(max_pass_rate)}
    if not hard:
        raise InputError(_nothing_selected(tallies, max_pass_rate))
    choice = Choice(options.seed, options.keep_duplicates)
    choice.add(passes.candidates(sources, successes, hard))
    chosen = choice.chosen(options.max_per_problem)
    count = jsonl.write(options.out, passes.examples(sources, chosen, tallies))
    print(_summary(tallies, hard, sum(choice.num_candidates().values()), count, options), file=sys.stderr)
    num_rollouts = sum(tally.num_rollouts for tally in tallies.values())
    return {"rollouts": num_rollouts, "problems": len(tallies), "hard_problems": len(hard), "examples": count}


def _choose_problems(sources: list[Source], options: Options) -> dict[str, int]:
    """Write the hard ones of --problems, in their order, each with its pass rate; return the counts of the manifest."""
    assert options.problems is not None
    by_id = {problem["id"]: problem for problem in records.read_problems(options.problems)}
    tallies, _ = _count(sources, options)
    if strange := [name for name in tallies if name not in by_id]:
        raise InputError(
            f"--problems {options.problems}: lacks {tabular.some(strange)}: name the file that the rollouts are of"
        )
    max_pass_rate = options.max_pass_rate
    hard = [
        name for name in by_id if (tally := tallies.get(name)) and tally.num_correct and tally.is_below(max_pass_rate)
    ]
    if not hard:
        raise InputError(_nothing_selected(tallies, max_pass_rate))
    count = jsonl.write(options.out, ({**by_id[name], "pass_rate": tallies[name].pass_rate} for name in hard))
    unsolved = sum(not tally.num_correct for tally in tallies.values())
    print(
        f"filter: of {len(tallies):,} problems with rollouts {count:,} are solved, with a pass rate below "
        f"{max_pass_rate:g}; {unsolved:,} were never solved -> {_shown(options.out)}",
        file=sys.stderr,
    )
    num_rollouts = sum(tally.num_rollouts for tally in tallies.values())
    return {"rollouts": num_rollouts, "problems": len(tallies), "hard_problems": count}


def _warn_of_running(paths: list[str]) -> None:
    """Warn of rl outputs that are still growing: pass rates would be over a part of the phase."""
    for path in paths:
        if not Path(path).is_dir():
            continue
        if outputs.is_locked(path):
            warn(f"{path} is still being written: pass rates are over the steps that are there now")
        elif not (Path(path) / "manifest.json").exists():
            warn(f"{path} is no finished rl run (no manifest.json): pass rates are over the steps that are there")


def _nothing_selected(tallies: Mapping[str, Tally], max_pass_rate: float) -> str:
    """The message if no problem is hard enough, with the yield table below it."""
    most = max(tally.num_rollouts for tally in tallies.values())
    if not any(tally.num_usable for tally in tallies.values()):
        fault = "no rollout succeeded within the token limit: start from a stronger policy or easier problems"
    elif not can_select(tallies.values(), max_pass_rate):
        fault = (
            f"--max-pass-rate {max_pass_rate:g} can select nothing: no problem has more than {most} rollouts, and one "
            f"success in {most} is {1 / most:.3g} already; raise it above that, or draw more rollouts a problem"
        )
    else:
        fault = (
            f"no problem with a success has a pass rate below --max-pass-rate {max_pass_rate:g}: raise it, "
            "or explore for more steps"
        )
    return f"{fault}. The yield by threshold:\n{yield_table(tallies.values(), max_pass_rate)}"


def _summary(
    tallies: Mapping[str, Tally], hard: Mapping[int, Tally], num_distinct: int, count: int, options: Options
) -> str:
    num_correct = sum(tally.num_correct for tally in hard.values())
    num_usable = sum(tally.num_usable for tally in hard.values())
    num_rollouts = sum(tally.num_rollouts for tally in tallies.values())
    below = f" with a pass rate below {options.max_pass_rate:g}" if options.max_pass_rate < 1 else ""
    return (
        f"filter: {num_rollouts:,} rollouts of {len(tallies):,} problems; {num_correct:,} successes on {len(hard):,} "
        f"problems{below}; dropped {num_correct - num_usable:,} truncated, {num_usable - num_distinct:,} duplicates, "
        f"{num_distinct - count:,} over the cap; {count:,} examples -> {_shown(options.out)}"
    )


def _shown(out: str) -> str:
    return "stdout" if out == "-" else out
