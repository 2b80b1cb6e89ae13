"""Strict JSON lines: every line is an object, or an InputError that names file and line.

`read` streams; `write` leaves a whole file or none. The path `-` is stdin or stdout.
"""

import codecs
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import orjson

from stages.core.errors import InputError
from stages.core.outputs import whole_file

MAX_LINE_BYTES = 64 * 2**20  # no real record is longer; a file that is not JSONL often has one endless line
BUFFER_BYTES = 128 * 2**10  # measured: a fifth faster than the default of 8 KiB on rollouts, no gain beyond


class LineSource(Protocol):
    """The part of a binary file that `scan` needs."""

    def readline(self, limit: int, /) -> bytes:
        """The next line with its end, at most `limit` bytes; b"" at the end."""
        ...


def read(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for each line of `path`.

    Raises InputError for a missing or empty file and for a line that is cut, over-long or not an object.
    """
    with opened(path) as file:
        for number, _, record in scan(file, name_of(path)):
            yield number, record


def scan(
    file: LineSource, name: str, check: Callable[[dict[str, Any]], str | None] | None = None
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield (line number from 1, offset of the line in bytes, object) for each line of an open file.

    Holds one line at a time. Raises InputError as `read` does, and for what `check` says of an object.
    """
    number = offset = 0
    loads, limit = orjson.loads, MAX_LINE_BYTES
    for line in iter(partial(file.readline, limit + 1), b""):
        number += 1
        try:
            record = loads(line)
        except orjson.JSONDecodeError:
            record = None
        size = len(line)
        if type(record) is not dict or size > limit:
            record = parse_line(line, f"{name}:{number}")
        if check is not None and (fault := check(record)) is not None:
            raise InputError(f"{name}:{number}: {fault}")
        yield number, offset, record
        offset += size
    if number == 0:
        raise InputError(f"{name} is empty: expected one JSON object a line")


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """One line to one object; `where` ("file:line") begins the message of the InputError."""
    if len(line) > MAX_LINE_BYTES:
        raise InputError(f"{where}: the line is longer than {MAX_LINE_BYTES} bytes: is this a JSONL file?")
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if line.startswith(codecs.BOM_UTF8):
            raise InputError(f"{where}: begins with a byte order mark: save the file as plain UTF-8") from None
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


@contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """Open `path`, or stdin for `-`, for reading bytes; InputError if it cannot be opened."""
    if str(path) == "-":
        yield sys.stdin.buffer
        return
    try:
        file = Path(path).open("rb", buffering=BUFFER_BYTES)  # noqa: SIM115 (a `with` would catch the caller's errors)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory: expected a JSONL file") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    with file:
        yield file


def name_of(path: str | Path) -> str:
    """The name of `path` in messages: "stdin" for `-`."""
    return "stdin" if str(path) == "-" else str(path)
