"""Filter: rollouts to examples, the successes on the problems that stayed hard, from which rft learns.

A problem's pass rate is taken over all its rollouts of the whole phase, those that no update saw included, so it is
known only at the end: the first pass checks and counts every line, the second goes back to the successes that count.
To rank successes by length, likelihood or a judge, drop examples from the file before rft.
"""

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated

from stages.core import jsonl, outputs, records, tabular
from stages.core.errors import InputError
from stages.core.options import PATH, WITHOUT_EFFECT, OptionGroup, above, at_least, at_most, following
from stages.core.progress import warn
from stages.core.provenance import (
    Identity,
    Inputs,
    digest,
    digest_of_files,
    identify,
    is_done,
    manifest,
    read_manifest,
    recorded,
)
from stages.filter import passes
from stages.filter.descent import with_earlier
from stages.filter.passes import Counts, RolloutFile
from stages.filter.selection import Choice, Hardness, Tally, can_select, yield_table


@dataclass(frozen=True, kw_only=True)
class Options(OptionGroup):
    """What `rloop filter` takes."""

    rollouts: Annotated[list[str], "rollouts: a JSONL file, an rl output directory, or - for stdin; repeatable", PATH]
    out: Annotated[str, "the examples, a new JSONL file, or - for stdout; not needed with --dry-run", PATH] = ""
    problems: Annotated[Path | None, "write the hard ones of these problems (JSONL) instead of examples", PATH] = None
    policy: Annotated[str, "use only the rollouts of this policy; needed where there are several"] = ""
    per_policy: Annotated[
        bool, "use the rollouts of several policies, such as those of several iterations, with pass rates of their own"
    ] = False
    accumulate: Annotated[
        bool,
        "also use the rollouts of the iterations before, found by the manifests of the rl outputs, with pass rates of "
        "their own",
    ] = False
    steps: Annotated[str, "use only the rollouts of these steps of RL, both included: 1:100, 50: or :50"] = ""
    max_pass_rate: Annotated[
        float | None,
        "a problem is hard if its pass rate is below this; 10 % is 0.1, 1 is no bound",
        above(0),
        at_most(1),
    ] = following("0.1, or none with --hardest", lambda options: 0.1 if options.hardest is None else None)
    hardest: Annotated[
        float | None,
        "the share of the solved problems that is hard: those with the lowest pass rates; with --max-pass-rate, at "
        "least this share",
        above(0),
        at_most(1),
    ] = None
    min_problems: Annotated[int, "at least N of the solved problems are hard", at_least(0)] = 0
    min_reward: Annotated[float, "a rollout is a success if its reward is this or more"] = 1.0
    max_per_problem: Annotated[
        int, "keep at most N successes of a problem, drawn at random; 0 keeps all", at_least(0)
    ] = 0
    failures: Annotated[
        int, "also keep at most N failures of a hard problem, drawn at random, with a negative weight", at_least(0)
    ] = 0
    failure_weight: Annotated[
        float, "the weight of a failure is minus this, beside 1 of a success", above(0), at_most(1)
    ] = 0.1
    seed: Annotated[int, "seed of the random choice by --max-per-problem, and among equally hard problems"] = 0
    keep_truncated: Annotated[bool, "keep successes that were cut at the token limit"] = False
    keep_duplicates: Annotated[bool, "keep every copy of a completion that was sampled more than once"] = False
    accept_edited: Annotated[
        bool, "use rollouts of a finished rl run that have been changed, added or removed since", WITHOUT_EFFECT
    ] = False
    dry_run: Annotated[bool, "write nothing; print the yield by threshold as a table", WITHOUT_EFFECT] = False

    def __post_init__(self) -> None:
        """Raise InputError if there is nowhere to write to, or for options that exclude each other."""
        super().__post_init__()
        if not self.out and not self.dry_run:
            raise InputError("--out is missing: name a file, or - for stdout, or give --dry-run")
        several = "--accumulate" if self.accumulate else "--per-policy"
        if self.policy and self.takes_several:
            raise InputError(f"--policy and {several} exclude each other")
        if self.problems is not None and self.takes_several:
            raise InputError(f"{several} gives a problem several pass rates: leave it out with --problems")
        self.step_range()

    def step_range(self) -> range | None:
        """The steps that --steps names; None for all."""
        if not self.steps:
            return None
        match = re.fullmatch(r"(\d*):(\d*)", self.steps)
        steps = range(int(match[1] or 0), int(match[2] or sys.maxsize - 1) + 1) if match else range(0)
        if not steps:
            raise InputError(
                f"--steps {self.steps}: must be two numbers in order, such as 1:100; one of them may be missing"
            )
        return steps

    @property
    def takes_several(self) -> bool:
        """Whether the rollouts of several policies count, each with pass rates of its own."""
        return self.per_policy or self.accumulate

    @property
    def hardness(self) -> Hardness:
        return Hardness(self.max_pass_rate, self.hardest, self.min_problems, self.seed)


def run(options: Options) -> None:
    """Choose the successes on hard problems as examples to fine-tune on.

    The pass rate of a problem is its share of successes among all rollouts given, whether an update saw them or not.
    Successes on the problems strictly below --max-pass-rate are chosen, in their order. A success is a correct rollout
    or, where rewards are not just 1 or 0, one of --min-reward or more. Standard input is kept in a temporary file (see
    TMPDIR), since every rollout must be counted before the first is chosen. FILE.manifest.json, beside FILE.jsonl, says
    how it was made.

    For balanced examples, at most n successes of every solved problem, hard or not: --max-pass-rate 1
    --max-per-problem n. For late iterations, in which few problems are hard: --hardest .3 takes the hardest 30 % of the
    solved problems whatever their pass rates, and --max-pass-rate .1 --hardest .3 as many if fewer are below .1.

    For examples of all iterations together: --rollouts loop/3/rl --accumulate, which finds earlier ones by the
    manifests, back to the base, or --rollouts loop/1/rl --rollouts loop/2/rl --per-policy.

    With --problems, the file that the rollouts were drawn for, its hard problems are written instead of examples, for
    rl: those below --max-pass-rate that were solved at least once, each with its pass rate.

    Example: rloop filter --rollouts loop/1/rl --out loop/1/examples.jsonl --max-pass-rate 0.5
    """
    start = time.monotonic()
    if not options.dry_run and options.out != "-":
        outputs.refuse_no_file(options.out)
        outputs.refuse_unwritable(options.out)
    rollouts = with_earlier(options.rollouts) if options.accumulate else options.rollouts
    sources = passes.sources(rollouts, options.step_range())
    _warn_of_running(rollouts)
    inputs = recorded(_inputs(rollouts, options.problems))
    if not options.accept_edited:
        _refuse_edited(inputs)
    if options.dry_run:
        print(_yield(sources, options))
        return
    manifest_file = Path(options.out).with_suffix(".manifest.json")

    def identity() -> Identity:
        return identify("filter", options, inputs)

    if is_done(options.out, manifest_file, identity):
        return
    with outputs.claimed(options.out, manifest_file):
        counts = (_choose if options.problems is None else _choose_problems)(sources, options)
        if options.out != "-":
            record = manifest(identity(), counts, time.monotonic() - start, rollouts=rollouts)
            outputs.write_json(manifest_file, record)


def _inputs(rollouts: list[str], problems: Path | None) -> list[Path]:
    """What the output is made from: of an rl output its rollouts; standard input leaves none."""
    paths = [Path(path, "rollouts") if Path(path).is_dir() else Path(path) for path in rollouts]
    return [path for path in [*paths, *([problems] if problems else [])] if str(path) != "-"]


def _yield(sources: list[RolloutFile], options: Options) -> str:
    """What each threshold would give, as a table."""
    counts = _count(sources, options)
    choice = Choice(options.seed, options.keep_duplicates)
    choice.add(passes.candidates(sources, counts.successes, range(len(counts.tallies))))
    cap = options.max_per_problem
    examples = {number: min(count, cap or count) for number, count in choice.num_candidates().items()}
    return yield_table(counts.tallies, options.max_pass_rate, examples)


def _count(sources: list[RolloutFile], options: Options) -> Counts:
    keep_truncated = options.keep_truncated or options.problems is not None
    counts = Counts(
        options.policy,
        options.takes_several,
        options.step_range(),
        options.min_reward,
        keep_truncated,
        options.failures > 0,
    )
    counts.read(sources)
    if options.accumulate:
        numbers = ", ".join(f"{number:,} of {run}" for run, number in counts.num_of_run.items())
        print(f"filter: takes together the rollouts of all iterations so far: {numbers}", file=sys.stderr)
    return counts


def _hard(tallies: Sequence[Tally], options: Options) -> list[Tally]:
    """The problems to choose from; InputError if there is none."""
    solved = [tally for tally in tallies if tally.num_usable]
    hard = options.hardness.hard(solved)
    if not hard:
        raise InputError(_nothing_selected(tallies, options.max_pass_rate))
    num_below = sum(tally.is_below(options.max_pass_rate) for tally in solved)
    if options.max_pass_rate is not None and num_below < len(hard):
        print(
            f"filter: {num_below:,} problems have a pass rate below {options.max_pass_rate:g}; instead of these the "
            f"hardest {len(hard):,} of {len(solved):,} solved ones are taken, up to {hard[-1].pass_rate:.3g}",
            file=sys.stderr,
        )
    return hard


def _choose(sources: list[RolloutFile], options: Options) -> dict[str, int]:
    """Write the examples; return the counts of the manifest."""
    counts = _count(sources, options)
    tallies, hard = counts.tallies, _hard(counts.tallies, options)
    choice = Choice(options.seed, options.keep_duplicates)
    choice.add(passes.candidates(sources, counts.successes, {tally.number for tally in hard}))
    written = [passes.examples(sources, choice.chosen(options.max_per_problem), tallies)]
    if options.failures:
        failed = Choice(options.seed, options.keep_duplicates)
        failed.add(passes.candidates(sources, counts.failures, {tally.number for tally in hard}))
        chosen = failed.chosen(options.failures)
        written.append(passes.examples(sources, chosen, tallies, -options.failure_weight))
    count = jsonl.write(options.out, chain(*written))
    sizes = choice.num_candidates().values()
    num_kept = sum(min(size, options.max_per_problem or size) for size in sizes)
    print(_summary(tallies, hard, sum(sizes), num_kept, options, count - num_kept), file=sys.stderr)
    num_rollouts = sum(tally.num_rollouts for tally in tallies)
    return {"rollouts": num_rollouts, "problems": len(tallies), "hard_problems": len(hard), "examples": count}


def _choose_problems(sources: list[RolloutFile], options: Options) -> dict[str, int]:
    """Write the hard ones of --problems, in their order, each with its pass rate; return the counts of the manifest."""
    assert options.problems is not None
    by_id = {problem["id"]: problem for problem in records.read_problems(options.problems)}
    tallies = _count(sources, options).tallies
    if strange := [tally.problem_id for tally in tallies if tally.problem_id not in by_id]:
        raise InputError(
            f"--problems {options.problems}: lacks {tabular.some(strange)}: name the file that the rollouts are of"
        )
    rates = {tally.problem_id: tally.pass_rate for tally in _hard(tallies, options)}
    written = ({**problem, "pass_rate": rates[name]} for name, problem in by_id.items() if name in rates)
    count = jsonl.write(options.out, written)
    unsolved = sum(not tally.num_correct for tally in tallies)
    print(
        f"filter: of {len(tallies):,} problems with rollouts {count:,} are solved{_below(options)}; "
        f"{unsolved:,} were never solved -> {_shown(options.out)}",
        file=sys.stderr,
    )
    num_rollouts = sum(tally.num_rollouts for tally in tallies)
    return {"rollouts": num_rollouts, "problems": len(tallies), "hard_problems": count}


def _below(options: Options) -> str:
    bound = options.max_pass_rate
    if bound is None or options.hardest is not None or options.min_problems:
        return " and hard"
    return f", with a pass rate below {bound:g}" if bound < 1 else ""


def _refuse_edited(inputs: Inputs) -> None:
    """Raise InputError if the rollouts of a finished rl run are no longer those that it wrote, and name the file."""
    for path, now in inputs.digests.items():
        written = read_manifest(Path(path).with_name("manifest.json")).get("rollout_digests") or {}
        if Path(path).name != "rollouts" or not written or digest_of_files(written) == now:
            continue
        there = {file.name: digest(file) for file in sorted(Path(path).iterdir())}
        name = next(name for name in sorted({*there, *written}) if there.get(name) != written.get(name))
        what = "is gone" if name not in there else "was changed" if name in written else "was added"
        raise InputError(
            f"{path}/{name} {what} since rl wrote its rollouts: restore it, or take them as they are: --accept-edited"
        )


def _warn_of_running(paths: list[str]) -> None:
    """Warn of rl outputs that are still growing: pass rates would be over a part of the phase."""
    for path in paths:
        if not Path(path).is_dir():
            continue
        if outputs.is_locked(path):
            warn(f"{path} is still being written: pass rates are over the steps that are there now")
        elif not (Path(path) / "manifest.json").exists():
            warn(f"{path} is no finished rl run (no manifest.json): pass rates are over the steps that are there")


def _nothing_selected(tallies: Sequence[Tally], max_pass_rate: float | None) -> str:
    """The message if no problem is hard enough."""
    most = max(tally.num_rollouts for tally in tallies)
    if max_pass_rate is None or not any(tally.num_usable for tally in tallies):
        return "no rollout succeeded within the token limit: start from a stronger policy or easier problems"
    if not can_select(tallies, max_pass_rate):
        fault = (
            f"--max-pass-rate {max_pass_rate:g} can select nothing: no problem has more than {most} rollouts, and one "
            f"success in {most} is {1 / most:.3g} already; raise it above that, or draw more rollouts a problem"
        )
    else:
        fault = (
            f"no problem with a success has a pass rate below --max-pass-rate {max_pass_rate:g}: raise it, "
            "take the hardest by --hardest, or explore for more steps"
        )
    lowest = min((tally for tally in tallies if tally.num_usable), key=lambda tally: tally.pass_rate)
    return f"{fault}. The lowest is {lowest.pass_rate:.3g} ({lowest.problem_id}); --dry-run shows them by threshold"


def _summary(
    tallies: Sequence[Tally], hard: Sequence[Tally], num_distinct: int, count: int, options: Options, num_failures: int
) -> str:
    num_correct = sum(tally.num_correct for tally in hard)
    num_usable = sum(tally.num_usable for tally in hard)
    num_rollouts = sum(tally.num_rollouts for tally in tallies)
    failures = f" and {num_failures:,} failures" if options.failures else ""
    below = _below(options).replace(" and hard", " that are hard").lstrip(",")
    return (
        f"filter: {num_rollouts:,} rollouts of {len(tallies):,} problems; {num_correct:,} successes on {len(hard):,} "
        f"problems{below}; dropped {num_correct - num_usable:,} truncated, {num_usable - num_distinct:,} duplicates, "
        f"{num_distinct - count:,} over the cap; {count:,} examples{failures} -> {_shown(options.out)}"
    )


def _shown(out: str) -> str:
    return "stdout" if out == "-" else out
