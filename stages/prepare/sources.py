"""Sources of problems: the paper's sets by name, any data set of the hub, or a local file; read as rows of columns.

`datasets` loads from the hub, pyarrow from parquet. JSON and CSV are read here, since the usual loaders turn "025"
into 25, 0.10 into 0.1 and integers beyond 64 bits into floats, and none names the line of a fault.
"""

import codecs
import csv
import gzip
import io
import json
import lzma
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from stages.core import jsonl
from stages.core.errors import InputError

Columns = Mapping[str, Any]
OnBad = Callable[[InputError], None]  # is told of a row that cannot be read, and ends the call or not
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
PACKED = {".gz": b"\x1f\x8b", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd"}  # may follow each
OTHER_FORMS = {
    b"PK\x03\x04": "a ZIP archive or a spreadsheet: unpack it, or save it as CSV",
    b"version https://git-lfs": "a Git LFS pointer: fetch what it stands for by git lfs pull",
}
NO_ROWS = ("dataset_info.json", "state.json", "dataset_dict.json")  # of `save_to_disk`, beside its rows
SEPARATORS = ",;\t|"  # of a .csv: the one that cuts its header into most columns
PROBLEM_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("reward_model.ground_truth", "answer", "final_answer", "solution")
MAX_JSON_BYTES = 2**29  # of one JSON document, which takes several times as much memory when it is read
MAX_HEADER = 2**16  # characters of it that are looked at
BATCH_ROWS = 1000
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # what such a text begins with
ID_COLUMNS = ("unique_id", "id")


@dataclass(frozen=True)
class Source:
    """What to read: the files `paths` if it is local, else `hub_id` with its `config` and `split`.

    `name` begins the ids of its problems; `is_integers` says that every answer is one, so that "70.0" is 70;
    `encoding` is that of text files without a mark of their own.
    """

    name: str
    hub_id: str = ""
    config: str = ""
    split: str = "train"
    is_integers: bool = False
    paths: tuple[Path, ...] = ()
    encoding: str = "utf-8"


PRESETS = {
    source.name: source
    for source in (
        Source("dapo-17k", "BytedTsinghua-SIA/DAPO-Math-17k", is_integers=True),
        Source("aime-2024", "HuggingFaceH4/aime_2024", is_integers=True),
        Source("minerva-math", "math-ai/minervamath", split="test"),
        Source("omni-math", "KbsdJames/Omni-MATH", split="test"),
        Source("math-500", "HuggingFaceH4/MATH-500", split="test"),
        Source("gsm8k-train", "openai/gsm8k", config="main"),
        Source("gsm8k-test", "openai/gsm8k", config="main", split="test"),
    )
}


def find(
    name: str, file: str = "", config: str = "", split: str = "", encoding: str = "utf-8", option: str = "--source"
) -> Source:
    """The source that a user means by `name`: a preset, local files or a hub id; read from `file` if it is given.

    Local files are one, those of a directory (of shards, or as `save_to_disk` writes it), or what a pattern matches.

    Raises InputError, which names the `option`, if it is none of them, or if a local file is asked for a config
    or a split, or for an encoding that nobody knows.
    """
    try:
        "".encode(encoding)  # which also asks whether it is one of texts: base64 is none
        encoding = codecs.lookup(encoding).name
    except LookupError:
        raise InputError(
            f"--encoding {encoding}: Python knows none of that name; try utf-8, latin-1 or cp1252"
        ) from None
    if name in PRESETS:
        source = PRESETS[name]
    elif _suffix(Path(name)) in SUFFIXES or Path(name).exists() or "*" in name:
        source = Source(Path(_unpacked(Path(name))).stem.strip("*-_.") or "problems", paths=_local(name))
    elif "/" in name:
        source = Source(name, name)
    else:
        raise InputError(
            f"{option} {name}: neither a preset ({', '.join(PRESETS)}) nor a file nor a hub id such as org/name"
        )
    if file:
        source = replace(source, paths=_local(file))
    if source.paths and (config or split):
        raise InputError(f"{source.paths[0]}: a local file has neither --config nor --split")
    return replace(source, config=config or source.config, split=split or source.split, encoding=encoding)


def _local(name: str) -> tuple[Path, ...]:
    """The files that `name` stands for, in the order of their names; InputError if there are none that can be read."""
    path = Path(name)
    if path.is_dir() or "*" in name:
        within = path.glob("*") if path.is_dir() else path.parent.glob(path.name)
        files = sorted(file for file in within if _holds_rows(file))
        if not files:
            raise InputError(f"{name}: holds no file whose name ends in one of {', '.join(SUFFIXES)}")
        return tuple(files)
    if not path.is_file():
        raise InputError(f"{name}: no such file")
    if _suffix(path) not in SUFFIXES:
        packed = ", ".join(PACKED)
        raise InputError(f"{name}: its name must end in one of {', '.join(SUFFIXES)}, or in that and one of {packed}")
    return (path,)


def _holds_rows(path: Path) -> bool:
    return path.is_file() and _suffix(path) in SUFFIXES and path.name not in NO_ROWS


def _suffix(path: Path) -> str:
    """The suffix that says how to read it: ".csv" of "a.CSV" and of "a.csv.gz"."""
    return Path(_unpacked(path)).suffix.lower()


def _unpacked(path: Path) -> str:
    """The name of a file without the suffix that says how it is packed."""
    return path.stem if path.suffix.lower() in PACKED else path.name


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked if its content or its name says that it is packed; InputError if it cannot be."""
    with jsonl.opened(path) as file:
        begin = file.read(24)
        file.seek(0)
        if other := next((form for magic, form in OTHER_FORMS.items() if begin.startswith(magic)), ""):
            raise InputError(f"{path}: {other}")
        by_content = next((kind for kind, magic in PACKED.items() if begin.startswith(magic)), "")
        kind = by_content or path.suffix.lower()
        if kind not in PACKED:
            yield file
            return
        try:
            with _unpacking(file, kind) as unpacked:
                yield unpacked
        except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
            raise InputError(f"{path}: not a whole {kind[1:]} file ({error})") from None


def _unpacking(file: BinaryIO, kind: str) -> Any:
    if kind != ".zst":
        return gzip.open(file) if kind == ".gz" else lzma.open(file)
    import pyarrow  # has the decoder that Python lacks, but its stream can't be read from the begin again

    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 - whoever reads it closes it
    try:
        shutil.copyfileobj(pyarrow.CompressedInputStream(file, "zstd"), unpacked)
    except OSError as error:
        raise EOFError(str(error)) from None
    unpacked.seek(0)
    return unpacked


class _LocalFile(NamedTuple):
    """A local file, and how to read it."""

    path: Path
    encoding: str
    on_bad: OnBad


@contextmanager
def _text(each: _LocalFile) -> Iterator[BinaryIO]:
    """The bytes of a text file as UTF-8, without a mark."""
    with _opened(each.path) as file:
        begin = file.read(3)
        encoding = "utf-16" if begin.startswith(UTF_16) else each.encoding
        file.seek(3 if begin == codecs.BOM_UTF8 else 0)
        if encoding == "utf-8" or begin == codecs.BOM_UTF8:
            yield file
            return
        with tempfile.TemporaryFile() as recoded:
            try:
                for part in iter(partial(io.TextIOWrapper(file, encoding, newline="").read, MAX_HEADER), ""):
                    recoded.write(part.encode())
            except UnicodeError as error:
                raise InputError(f"{each.path}: not in {encoding} ({error})") from None
            recoded.seek(0)
            yield recoded


def refuse(error: InputError) -> None:
    """Raise it: no row may be bad."""
    raise error from None


def rows(source: Source, on_bad: OnBad = refuse) -> Iterator[tuple[str, Columns]]:
    """Yield (position such as "FILE row 3", columns) for every row of `source`; InputError if there is none."""
    empty = True

    def note(error: InputError) -> None:
        nonlocal empty
        empty = False
        on_bad(error)

    files = (_READERS[_suffix(path)](_LocalFile(path, source.encoding, note)) for path in source.paths)
    stream = chain.from_iterable(files) if source.paths else _hub(source)
    for row in stream:
        empty = False
        yield row
    if empty:
        raise InputError(f"{source.paths[0] if source.paths else source.hub_id}: holds no rows")


def revision(source: Source) -> str:
    """The revision of a data set of the hub; "" if it is unknown."""
    files = " ".join(_load(source).info.download_checksums or {})
    return match[1] if (match := re.search(r"@([0-9a-f]{40})/", files)) else ""


@cache
def _load(source: Source) -> Any:
    import datasets  # a second; only here is it needed
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # its retries would bury the one line below
    try:
        return datasets.load_dataset(source.hub_id, source.config or None, split=source.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{source.hub_id}: {reason}; to read a local copy use --source {source.name} --from FILE, "
            f"a file of {', '.join(SUFFIXES)} with the hub's columns"
        ) from None


def _hub(source: Source) -> Iterator[tuple[str, Columns]]:
    number = 0
    for batch in _load(source).iter(batch_size=BATCH_ROWS):  # one row at a time is ten times slower
        for values in zip(*batch.values(), strict=True):
            yield f"{source.hub_id} row {number}", dict(zip(batch, values, strict=True))
            number += 1


def _parquet(each: _LocalFile) -> Iterator[tuple[str, Columns]]:
    import pyarrow.parquet  # only here is it needed; `datasets` reads through it, but leaves a copy in its cache

    path = each.path
    try:
        with _opened(path) as file:
            batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=BATCH_ROWS)
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows):
                yield f"{path} row {number}", row
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a parquet file ({str(error).partition('.')[0]})") from None


def _arrow(each: _LocalFile) -> Iterator[tuple[str, Columns]]:
    import pyarrow

    path = each.path
    try:
        with _opened(path) as file:
            data = file.read()
        is_stream = not data.startswith(b"ARROW1")  # as `datasets` writes
        reader = pyarrow.ipc.open_stream(data) if is_stream else pyarrow.ipc.open_file(data)
        for number, row in enumerate(reader.read_all().to_pylist()):
            yield f"{path} row {number}", row
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not an arrow file ({str(error).partition('.')[0]})") from None


def _json_lines(each: _LocalFile) -> Iterator[tuple[str, Columns]]:
    with _text(each) as file:
        lines = iter(partial(file.readline, jsonl.MAX_LINE_BYTES + 1), b"")
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{each.path}:{number}"
                try:
                    row = _parse_exactly(line, where)
                    if fault := _row_fault(row) or "a line without an end" * (len(line) > jsonl.MAX_LINE_BYTES):
                        raise InputError(f"{where}: {fault}")
                except InputError as error:
                    each.on_bad(error)
                else:
                    yield where, row


def _json(each: _LocalFile) -> Iterator[tuple[str, Columns]]:
    path = each.path
    with _text(each) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise InputError(f"{path}: a JSON document of more than {MAX_JSON_BYTES // 2**20} MiB: save it as JSON lines")
    if not data.lstrip().startswith(b"[") and _is_object(data.lstrip().partition(b"\n")[0]):
        rows = _wrapped(_parse_exactly(data, str(path)), path) if _is_object(data) else None
        if rows is None:
            yield from _json_lines(each)
            return
    else:
        document = _parse_exactly(data, str(path))
        rows = document if isinstance(document, list) else _wrapped(document, path)
    if rows is None:
        raise InputError(f"{path}: expected a list of objects, one object a line, or an object that holds one list")
    for number, row in enumerate(rows):
        if fault := _row_fault(row):
            each.on_bad(InputError(f"{path} row {number}: {fault}"))
        else:
            yield f"{path} row {number}", row


_NOT_UTF_8 = "not in UTF-8 ({}): save it in UTF-8 or, of --source, name the encoding, such as --encoding latin-1"


def _row_fault(row: Any) -> str:
    if not isinstance(row, dict):
        return f"expected an object, found {type(row).__name__}"
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:  # "\\ud800", half a character, passes as JSON
        return f"not valid UTF-8 ({error.reason})"
    return ""


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _wrapped(document: Any, where: Path) -> list[Any] | None:
    """The rows of {"data": [{...}, ...]}: the one list of objects that an object holds; or of pandas' columns."""
    cells = list(document.values())
    numbers = cells[0].keys() if cells and isinstance(cells[0], dict) else ()
    if numbers and all(isinstance(cell, dict) and cell.keys() == numbers for cell in cells):
        if all(key.isdigit() for key in numbers):  # {"problem": {"0": ..., "1": ...}, ...}
            return [{name: cell[key] for name, cell in document.items()} for key in numbers]
        raise InputError(f"{where}: an object of objects ({', '.join(document):.60}): save them as a list")
    lists = [cell for cell in cells if isinstance(cell, list) and cell and isinstance(cell[0], dict)]
    if len(lists) > 1 and len(lists) == len(cells):
        raise InputError(f"{where}: holds several lists of rows ({', '.join(document)}): save the one that you mean")
    return lists[0] if len(lists) == 1 and len(document) - len(lists) <= 3 and "problem" not in document else None


def _parse_exactly(text: bytes, where: str) -> Any:
    """JSON with numbers as they are written: integers of any length, decimals with their digits."""
    try:
        return json.loads(text, parse_float=Decimal, parse_constant=lambda name: None)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: {_NOT_UTF_8.format(error)}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: not valid JSON ({error}): expected one object a line, or in a .json a list of them"
        ) from None


def _csv(each: _LocalFile) -> Iterator[tuple[str, Columns]]:
    csv.field_size_limit(jsonl.MAX_LINE_BYTES)
    path = each.path
    with _text(each) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as file:
        try:
            separator = _separator(path, file.readline())
            if len(separator) == 1:  # else the first line names it, as Excel has it, and the header is the next
                file.seek(0)
            reader = csv.DictReader(file, strict=True, delimiter=separator[-1])
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            if twice := [name for name, count in Counter(reader.fieldnames).items() if name and count > 1]:
                raise InputError(f"{path}:1: two columns are called {twice[0]!r}: rename one")
            for where, row in _csv_rows(reader, each):
                if None in row or None in row.values():
                    each.on_bad(InputError(f"{where}: expected {len(reader.fieldnames or ())} fields"))
                else:
                    yield where, row
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: {_NOT_UTF_8.format(error)}") from None


def _csv_rows(reader: Any, each: _LocalFile) -> Iterator[tuple[str, Columns]]:
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            each.on_bad(InputError(f"{each.path}:{reader.reader.line_num}: not valid CSV ({error})"))
        else:
            yield f"{each.path}:{reader.line_num}", row


def _separator(path: Path, header: str) -> str:
    """What stands between the cells: a tab in a .tsv; in a .csv what gives most columns, a comma if that is open.

    A first line "sep=;" is returned whole.
    """
    if re.fullmatch("sep=[^\\w\\s]", header.strip()):
        return header.strip()
    if _suffix(path) == ".tsv":
        return "\t"
    return max(SEPARATORS, key=lambda separator: len(next(csv.reader([header[:MAX_HEADER]], delimiter=separator), [])))


_READERS: dict[str, Callable[[_LocalFile], Iterator[tuple[str, Columns]]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}


def problem_column(row: Columns, wanted: str, where: str, remedy: str = "name one with --problem-column") -> str:
    """The name of the column of problems in `row`: `wanted`, or, if that is "", the first of the usual ones.

    Names are taken whatever their case; "a[0].b" is field b of the first item of column a. Raises InputError with the
    columns there are.
    """
    return _column(row, wanted, PROBLEM_COLUMNS, remedy, where)


def answer_column(row: Columns, wanted: str, where: str) -> str:
    """The name of the column of answers in `row`, as `problem_column`."""
    return _column(row, wanted, ANSWER_COLUMNS, "name one with --answer-column", where)


def kept_columns(row: Columns, wanted: Sequence[str], where: str) -> list[str]:
    """The names of the columns that --keep-column names; InputError for one that is not there."""
    return [_column(row, name, (), "name another with --keep-column", where) for name in wanted]


def _column(row: Columns, wanted: str, usual: tuple[str, ...], remedy: str, where: str) -> str:
    names = _names(row)
    for candidate in (wanted,) if wanted else usual:
        if candidate.lower() in names:
            return names[candidate.lower()]
    if wanted and _inner(row, wanted) is not _MISSING:
        return wanted
    missing = f"no column {wanted!r}" if wanted else f"no column named {' or '.join(usual)}"
    raise InputError(f"{where}: {missing} among {', '.join(row)}; {remedy}")


def id_column(row: Columns) -> str:
    """The name of the column of `row` that holds the source's own ids, or ""."""
    names = _names(row)
    return next((names[candidate] for candidate in ID_COLUMNS if candidate in names), "")


def _names(row: Columns) -> dict[str, str]:
    """Lower-case name to name, of columns and of the fields of columns that are objects."""
    names = [*row, *(f"{name}.{field}" for name, value in row.items() if isinstance(value, Mapping) for field in value)]
    return {name.lower(): name for name in reversed(names)}


_MISSING = object()


def value(row: Columns, name: str, where: str) -> Any:
    """The value of the column `name` ("a[0].b" is field b of the first item of column a) in `row`.

    Raises InputError if it is missing.
    """
    inner = row[name] if name in row else _inner(row, name)
    if inner is _MISSING:
        raise InputError(f"{where}: no column {name!r}, which earlier rows have")
    return inner


def _inner(row: Columns, path: str) -> Any:
    """The value at a path such as "a.b" or "a[0].b"; _MISSING if there is none."""
    inner: Any = row
    for part in re.findall(r"\[-?\d+\]|[^.\[\]]+", path):
        key = int(part[1:-1]) if part.startswith("[") else part
        if not isinstance(inner, list if isinstance(key, int) else Mapping):
            return _MISSING
        try:
            inner = inner[key]
        except LookupError:
            return _MISSING
    return inner
