"""Prepare: a data set to problems.jsonl, each problem once, with an answer that can be verified.

To choose by difficulty or language, filter the rows first and give the file as --source.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from stages.core import jsonl, outputs
from stages.core.errors import InputError
from stages.core.grading import verifier
from stages.core.grading.verifier import Verifier
from stages.core.options import PATH, OptionGroup, at_least
from stages.core.progress import StepProgress
from stages.core.provenance import Identity, Inputs, identify, is_done, manifest, recorded
from stages.prepare import answers, curation, sources
from stages.prepare.sources import Source

PROBLEM_DEFAULT = f"if not given, the first of {', '.join(sources.PROBLEM_COLUMNS)}"
ANSWER_DEFAULT = f"if not given, the first of {', '.join(sources.ANSWER_COLUMNS)}"
OTHERS = "other_answers"  # beside "answer" in a file of problems that was prepared before
CHECKED_AT_ONCE = 128  # answers between two moves of the bar


@dataclass(frozen=True, kw_only=True)
class Options(OptionGroup):
    """What `rloop prepare` takes."""

    source: Annotated[
        str,
        "a preset (dapo-17k, aime-2024, minerva-math, omni-math, math-500, gsm8k-train, gsm8k-test), a hub id, or a "
        "local .jsonl, .ndjson, .json, .csv (comma, semicolon, tab or |), .tsv, .parquet or .arrow, packed as .gz, "
        ".xz or .zst, or a directory or a pattern of such files",
    ]
    out: Annotated[
        str, "the problems, a new JSONL file, or - for stdout; FILE.manifest.json is written beside it", PATH
    ]
    from_: Annotated[str, "read a preset or hub id from this local file, with the hub's columns", PATH] = ""
    problem_column: Annotated[
        str, f"column of the problem, such as prompt or prompt[-1].content; {PROBLEM_DEFAULT}"
    ] = ""
    answer_column: Annotated[
        str, f"column of the answer, or of a solution with the answer in its last \\boxed{{}}; {ANSWER_DEFAULT}"
    ] = ""
    keep_column: Annotated[
        list[str],
        "keep this column in the records under its own name; one called prompt (a text, or messages) is then shown to "
        "the policy as it is, instead of --template; repeatable",
    ] = field(default_factory=list)
    keep_system: Annotated[
        bool,
        "keep the system message of a chat: the problem gets a prompt of its own, which the policy's chat template "
        "renders whatever --template says",
    ] = False
    alternatives: Annotated[
        bool, "of a list of answers, such as ['2', '3'], any is right; without this such a row is refused"
    ] = False
    decimal_comma: Annotated[
        bool, "answers are written as 2,5 and 1.500,25; what then can be read in two ways is refused"
    ] = False
    encoding: Annotated[str, "encoding of --source, such as latin-1 or cp1252; UTF-16 is seen by itself"] = "utf-8"
    config: Annotated[str, "configuration of a hub id"] = ""
    split: Annotated[str, "split of a hub id, for example test or train[:100]"] = ""
    limit: Annotated[int, "keep at most N problems, drawn at random; 0 keeps all", at_least(0)] = 0
    seed: Annotated[int, "seed of the draw of --limit"] = 0
    decontaminate: Annotated[
        list[str], "drop the problems that this file of problems, in UTF-8, also holds; repeatable", PATH
    ] = field(default_factory=list)
    skip_bad: Annotated[
        bool, "leave out rows that cannot be read, or whose problem or answer cannot, and count them, instead of ending"
    ] = False
    drop_unparseable: Annotated[
        bool, "drop the problems whose answer the verifier cannot read; no rollout of theirs is ever rewarded"
    ] = False

    def __post_init__(self) -> None:
        """Raise InputError for a source that is not there, and for two prompts of one problem."""
        super().__post_init__()
        self.find_source()
        if self.keep_system and "prompt" in self.keep_column:
            raise InputError("--keep-system makes the prompt that --keep-column prompt keeps: leave out one")

    def find_source(self) -> Source:
        """The source that the options name."""
        return sources.find(self.source, self.from_, self.config, self.split, self.encoding)


def run(options: Options) -> None:
    """Make a file of problems from a data set: each problem once, answers exact.

    Problems with an empty answer or with contradictory answers are dropped, DAPO's wrapper is stripped, and ids stay
    the same whatever the order of the rows and the limit. What happened is printed to stderr and in the manifest.

    Example: rloop prepare --source loop/0/train.jsonl --limit 64 --out loop/problems.jsonl
    """
    start = time.monotonic()
    if options.out != "-":
        outputs.refuse_no_file(options.out)
        outputs.refuse_unwritable(options.out)
    origin = options.find_source()
    others = [sources.find(file, option="--decontaminate") for file in options.decontaminate]
    manifest_file = Path(options.out).with_suffix(".manifest.json")

    def identity() -> Identity:
        inputs = _inputs([origin, *others])
        return identify("prepare", options, inputs, verifier.VERSION, config=origin.config, split=origin.split)

    if is_done(options.out, manifest_file, identity):
        return
    with outputs.claimed(options.out, manifest_file):
        curated = _curate(origin, others, options)
        jsonl.write(options.out, curated.problems)
        print(curated.table(), file=sys.stderr)
        if options.out != "-":
            record = manifest(identity(), curated.counts, time.monotonic() - start, ids=curated.ids)
            outputs.write_json(manifest_file, record)


def _inputs(read: Sequence[Source]) -> Inputs:
    """Files by their digests, data sets of the hub by their revisions."""
    files = recorded(path for each in read for path in each.paths)
    revisions = {each.hub_id: sources.revision(each) for each in read if not each.paths}
    return files._replace(digests=files.digests | revisions)


def _curate(origin: Source, others: list[Source], options: Options) -> curation.Curated:
    """The problems to write; InputError if none is left."""
    limit, seed, drop_unparseable = options.limit, options.seed, options.drop_unparseable
    bad: list[str] = []

    def leave_out(error: InputError) -> None:
        bad.append(str(error).partition(": ")[0])

    rows = _rows(origin, options, leave_out if options.skip_bad else sources.refuse)
    with Verifier() as grader:
        curated = curation.collect(rows, origin.name, partial(_same_answer, grader))
        curated.counts.update({"rows": len(bad), "bad": len(bad)} if bad else {})
        curated.ids |= {"bad": bad} if bad else {}
        curation.decontaminate(curated, _problem_texts(others))
        if not drop_unparseable:
            curation.choose(curated, limit, seed)
        curation.find(curated, "wordy", answers.is_wordy)
        curation.find(curated, "comma", lambda answer: not options.decimal_comma and answers.looks_decimal(answer))
        curation.find_unparseable(curated, partial(_parseable, grader), drop_unparseable)
        if drop_unparseable:  # before the choice, so that the limit is reached
            curation.choose(curated, limit, seed)
    if not curated.problems:
        raise InputError(f"{options.source}: no problem is left of its rows\n{curated.table()}")
    return curated


class _ColumnNames(NamedTuple):
    problem: str
    answer: str
    own_id: str
    kept: list[str]


def _rows(source: Source, options: Options, on_bad: sources.OnBad) -> Iterator[curation.Row]:
    """What is needed of every row that can be read; the first such row decides which columns these are."""
    columns = None
    for where, row in _shown(sources.rows(source, on_bad)):
        columns = columns or _columns(row, options, where)
        try:
            taken = _row(source, row, where, columns, options)
        except InputError as error:
            on_bad(error)
        else:
            yield taken


def _columns(row: sources.Columns, options: Options, where: str) -> _ColumnNames:
    columns = _ColumnNames(
        sources.problem_column(row, options.problem_column, where),
        sources.answer_column(row, options.answer_column, where),
        sources.id_column(row),
        sources.kept_columns(row, options.keep_column, where),
    )
    ids = f"ids from {columns.own_id}" if columns.own_id else "ids from a hash of the problem"
    curation.refuse_taken(columns.kept)
    read = " and ".join([columns.answer, *([OTHERS] if columns.answer == "answer" and OTHERS in row else [])])
    said = f"problems are read from column {columns.problem}, answers from {read}, {ids}"
    print(said, file=sys.stderr)
    return columns


def _row(source: Source, row: sources.Columns, where: str, columns: _ColumnNames, options: Options) -> curation.Row:
    problem = sources.value(row, columns.problem, where)
    reading = answers.Reading(source.is_integers, options.alternatives, options.decimal_comma)
    others = row.get(OTHERS) if columns.answer == "answer" else None
    right = (
        *answers.answer_texts(sources.value(row, columns.answer, where), reading, where),
        *answers.answer_texts(others, reading._replace(alternatives=True), where),
    )
    kept = {name: sources.value(row, name, where) for name in columns.kept}
    if options.keep_system:
        kept["prompt"] = curation.with_system(problem, where)
    return curation.Row(
        curation.problem_text(problem, where),
        tuple(dict.fromkeys(right)),
        _own_id(row.get(columns.own_id)),
        curation.kept_fields(kept, where),
    )


def _own_id(value: Any) -> str:
    """The source's id as text, 1 of 1.0; "" if there is none."""
    if value is None or value != value or isinstance(value, list | dict):
        return ""
    is_whole = isinstance(value, float | Decimal) and value == int(value)
    return str(int(value) if is_whole else value)


def _same_answer(verifier: Verifier, first: str, second: str) -> bool:
    return verifier.verify([(f"\\boxed{{{second}}}", first)])[0].reward == 1


def _shown(rows: Iterable[tuple[str, sources.Columns]]) -> Iterable[tuple[str, sources.Columns]]:
    """The same rows, counted on a terminal."""
    from rich.console import Console
    from rich.progress import track

    return track(rows, "reading rows", console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def _parseable(verifier: Verifier, answers: list[str]) -> list[bool]:
    flags: list[bool] = []
    with StepProgress("checking answers", len(answers)) as progress:
        while len(flags) < len(answers):
            flags += verifier.parseable(answers[len(flags) : len(flags) + CHECKED_AT_ONCE])
            progress.step(len(flags), "")
    return flags


def _problem_texts(others: Iterable[Source]) -> Iterator[str]:
    for source in others:
        column = ""
        for where, row in sources.rows(source):
            column = column or sources.problem_column(row, "", where, "--decontaminate reads one so called: rename it")
            yield curation.problem_text(sources.value(row, column, where), where)
