"""Prepare: a data set to problems.jsonl, each problem once, with an answer that can be verified.

To choose by difficulty or language, filter the rows first and give the file as --source.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

from stages.core import jsonl, outputs
from stages.core.errors import InputError
from stages.core.grading import verifier
from stages.core.grading.verifier import Verifier
from stages.core.options import PATH, OptionGroup, at_least
from stages.core.progress import StepProgress
from stages.core.provenance import Identity, Inputs, identify, is_done, manifest, recorded
from stages.prepare import curation, sources
from stages.prepare.sources import Source

PROBLEM_DEFAULT = f"if not given, the first of {', '.join(sources.PROBLEM_COLUMNS)}"
ANSWER_DEFAULT = f"if not given, the first of {', '.join(sources.ANSWER_COLUMNS)}"
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
    config: Annotated[str, "configuration of a hub id"] = ""
    split: Annotated[str, "split of a hub id, for example test or train[:100]"] = ""
    limit: Annotated[int, "keep at most N problems, drawn at random; 0 keeps all", at_least(0)] = 0
    seed: Annotated[int, "seed of the draw of --limit"] = 0
    decontaminate: Annotated[list[str], "drop the problems that this file of problems also holds; repeatable", PATH] = (
        field(default_factory=list)
    )
    skip_bad: Annotated[
        bool, "leave out rows whose problem or answer cannot be read, and count them, instead of ending"
    ] = False
    drop_unparseable: Annotated[
        bool, "drop the problems whose answer the verifier cannot read; no rollout of theirs is ever rewarded"
    ] = False

    def __post_init__(self) -> None:
        """Raise InputError for a source that is not there."""
        super().__post_init__()
        self.find_source()

    def find_source(self) -> Source:
        """The source that the options name."""
        return sources.find(self.source, self.from_, self.config, self.split)


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
    takers = _rows(origin, options.problem_column, options.answer_column, options.keep_column)
    rows = _readable(takers, bad if options.skip_bad else None)
    with Verifier() as grader:
        curated = curation.collect(rows, origin.name, partial(_same_answer, grader))
        curated.counts.update({"rows": len(bad), "bad": len(bad)} if bad else {})
        curated.ids |= {"bad": bad} if bad else {}
        curation.decontaminate(curated, _problem_texts(others))
        if not drop_unparseable:
            curation.choose(curated, limit, seed)
        curation.find_wordy(curated)
        curation.find_unparseable(curated, partial(_parseable, grader), drop_unparseable)
        if drop_unparseable:  # before the choice, so that the limit is reached
            curation.choose(curated, limit, seed)
    if not curated.problems:
        raise InputError(f"{options.source}: no problem is left of its rows\n{curated.table()}")
    return curated


def _readable(rows: Iterator[Callable[[], curation.Row]], bad: list[str] | None) -> Iterator[curation.Row]:
    """The rows that can be read; what is wrong with the others goes into `bad`, or is raised if that is None."""
    for row in rows:
        try:
            yield row()
        except InputError as error:
            if bad is None:
                raise
            bad.append(str(error).partition(": ")[0])


def _rows(
    source: Source, problem_column: str, answer_column: str, keep: list[str]
) -> Iterator[Callable[[], curation.Row]]:
    """How to take what is needed of every row; the first row decides which columns these are."""
    id_column = None
    for where, row in _shown(sources.rows(source)):
        if id_column is None:
            problem_column = sources.problem_column(row, problem_column, where)
            answer_column = sources.answer_column(row, answer_column, where)
            id_column = sources.id_column(row)
            keep = sources.kept_columns(row, keep, where)
            _say_columns(problem_column, answer_column, id_column)
        yield partial(_row, source, row, where, problem_column, answer_column, id_column, keep)


def _row(
    source: Source, row: sources.Columns, where: str, problem: str, answer: str, own_id: str, keep: list[str]
) -> curation.Row:
    return curation.Row(
        curation.problem_text(sources.value(row, problem, where), where),
        curation.answer_text(sources.value(row, answer, where), source.is_integers, where),
        str(row[own_id]) if row.get(own_id) is not None else "",
        curation.kept_fields({name: sources.value(row, name, where) for name in keep}, where),
    )


def _say_columns(problem: str, answer: str, own_id: str) -> None:
    ids = f"ids from {own_id}" if own_id else "ids from a hash of the problem"
    print(f"problems are read from column {problem}, answers from {answer}, {ids}", file=sys.stderr)


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
