"""Tables: tab-separated files, written, appended to and read back, and text in columns for a terminal."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.core.errors import InputError


def write_tsv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `rows` tab-separated, columns in order of first appearance; numbers with six digits, NaN empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)


def append_tsv(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line, with the header before the first."""
    fresh = not path.exists()
    with path.open("a", encoding="utf-8") as file:
        if fresh:
            file.write("\t".join(row) + "\n")
        file.write("\t".join(map(_cell, row.values())) + "\n")


def read_tsv(path: Path) -> list[dict[str, float]]:
    """Rows of numbers, empty cells not in them; [] if there is no such file, or nothing in it.

    A last line without its newline is unfinished and is not read. Raises InputError for
    a line that does not fit its header.
    """
    if not path.is_file():
        return []
    header, *lines = path.read_bytes().split(b"\n")[:-1] or [b""]
    try:
        names = header.decode().split("\t")
        return [_numbers(names, line.decode(), f"{path}:{number}") for number, line in enumerate(lines, start=2)]
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text in UTF-8: restore it, or remove it") from None


def aligned(rows: Sequence[Sequence[str]], sides: str = "") -> str:
    """Rows of cells as text in columns, by `sides` ("lrr") to the left or right; else all but the first right."""
    from tabulate import tabulate

    words = {"l": "left", "r": "right"}
    sides = sides or "l" + "r" * (len(rows[0]) - 1)
    rows = [list(map(one_line, row)) for row in rows]
    text = tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=[words[side] for side in sides])
    return "\n".join(line.rstrip() for line in text.splitlines())


def some(names: Sequence[str], most: int = 5) -> str:
    """The first of `names`: "a, b, c, ..."."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.6g}"
    return str(value)


def _numbers(names: Sequence[str], line: str, where: str) -> dict[str, float]:
    cells = line.split("\t")
    if len(cells) != len(names):
        raise InputError(f"{where}: {len(cells)} cells under a header of {len(names)}: restore the line, or remove it")
    try:
        return {name: float(cell) for name, cell in zip(names, cells, strict=True) if cell}
    except ValueError as error:
        raise InputError(f"{where}: {error}: restore the line, or remove it") from None


def one_line(text: str) -> str:
    r"""`text` in a cell of a table: a line break or another control character becomes its escape, such as \n."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
