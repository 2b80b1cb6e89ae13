"""Strict JSON lines: every line is one object or an error that names file and line; nothing is skipped.

Reading streams. Writing appears whole or not at all. `-` is stdin or stdout.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from stages.core.errors import InputError
from stages.core.outputs import whole_file

MAX_LINE_BYTES = 64 * 2**20  # no honest record is longer; a file that is not JSONL at all often has one endless line


def read(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for each line of `path`.

    Raises InputError for a missing or empty file and for a line that is cut, over-long or not an object.
    """
    name = "stdin" if str(path) == "-" else str(path)
    number = 0
    with _open(path, name) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            yield number, parse_line(line, f"{name}:{number}")
    if number == 0:
        raise InputError(f"{name} is empty: expected one JSON object a line")


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """One line to one object; `where` ("file:line") begins the message of the InputError."""
    if len(line) > MAX_LINE_BYTES:
        raise InputError(f"{where}: the line is longer than {MAX_LINE_BYTES} bytes: is this a JSONL file?")
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        state = "the line is blank" if not line.strip() else f"not valid JSON ({error})"
        raise InputError(f"{where}: {state}: expected one JSON object a line; was the file cut?") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(record).__name__}")
    return record


def write(path: str | Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write `records` to `path`, whole or not at all; return how many there were."""
    if str(path) == "-":
        return _write_lines(sys.stdout.buffer, records)
    with whole_file(path) as beside, beside.open("wb") as file:
        return _write_lines(file, records)


def _write_lines(file: BinaryIO, records: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    for record in records:
        file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
        count += 1
    file.flush()
    return count


def _open(path: str | Path, name: str) -> Any:
    if str(path) == "-":
        return nullcontext(sys.stdin.buffer)
    try:
        return Path(path).open("rb")
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{name} is a directory: expected a JSONL file") from None
