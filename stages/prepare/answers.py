"""What the value in a column of answers says: every answer that is right, as texts, their digits exact."""

import ast
import json
import re
from contextlib import suppress
from decimal import Decimal
from typing import Any, NamedTuple

from stages.core.errors import InputError
from stages.core.grading.verifier.extraction import extract

MAX_EXACT_FLOAT = 2**53
MAX_INTEGER = 10**1000  # of a decimal such as 1e30, which is exact
MAX_WORDS = 12  # an answer of more is named as one that may be a worked solution
LOST_FRAC = "\x0crac{"  # "\frac{" that once passed through a language in which \f is a form feed
_QUOTED = r"""(?:'[^']*'|"[^"]*")"""
_LIST = re.compile(r"""\[\s*(['"]).*\1\s*\]""", re.DOTALL)  # of texts: [1, 2] may be an interval
_ARRAY = re.compile(rf"\[\s*{_QUOTED}(?:\s+{_QUOTED})*\s*\]")  # as numpy prints it: ['2' '3']
_LONE = re.compile(r"(?<!\\)\\(?!n|u[0-9a-fA-F]{4})[a-zA-Z]{2}")  # of \frac, which JSON and Python double
_INTEGER = re.compile(r"[+-]?[0-9]+")
_INTEGER_WITH_POINT = re.compile(r"([+-]?[0-9]+)\.0*")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_WITH_COMMA = re.compile(r"([^\d,.;(\[{]*)(\d{1,3}(?:\.\d{3})+|\d+)(?:,|\{,\})(\d+)([^\d,;(\[].*)?", re.DOTALL)
_DOUBTFUL = re.compile(r"\d(?:,|\{,\})\d|\d\.\d{3}(?!\d)")
_LOOKS_DECIMAL = re.compile(r"[\s$]*[+-]?(?![1-9]\d{0,2}(?:,\d{3})+(?!\d))\d+,\d+[\s$]*")
_ENCLOSED = re.compile(r"""(['"`])([^'"`]+)\1""")  # "3" is 3, `3` too


class Reading(NamedTuple):
    """What is known of a source's answers: all are integers; a list holds alternatives; 2,5 is two and a half."""

    is_integers: bool = False
    alternatives: bool = False
    decimal_comma: bool = False


def answer_texts(value: Any, reading: Reading, where: str) -> tuple[str, ...]:
    """Every answer in a cell that is right, each once; () if there is none.

    Raises InputError for several that nobody has called alternatives: they may be asked for together.
    """
    values = _listed(value)
    if len(values) > 1 and not reading.alternatives:
        raise InputError(
            f"{where}: {len(values)} answers, {values!r:.60}: if any of them is right, --alternatives; if all are "
            "asked for, write them as one, such as 2, 3 or {2, 3}"
        )
    return tuple(dict.fromkeys(filter(None, (answer_text(each, reading, where) for each in values))))


def answer_text(value: Any, reading: Reading, where: str) -> str:
    r"""One answer as text; "" if there is none.

    The answer of a worked solution follows its last "####" (GSM8K, thousands separators dropped) or is in its last
    \boxed{}. Integers lose leading zeros and a plus sign: AIME's "025" is 25. Of integers, "70.0" is 70.
    """
    if value is None or (isinstance(value, float | Decimal) and value != value):
        return ""
    if isinstance(value, float | Decimal):
        value = _decimal_text(value, where)
    elif isinstance(value, str) and reading.decimal_comma:
        value = _with_point(_marked(value, reading), where)
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise InputError(
            f"{where}: an answer must be a text or a number, found {type(value).__name__}: name a column or field of "
            "such with --answer-column"
        )
    text = _marked(str(value), reading)
    if match := _ENCLOSED.fullmatch(text):
        text = match[2]
    if reading.is_integers and (match := _INTEGER_WITH_POINT.fullmatch(text)):
        text = match[1]
    return _plain_integer(text) if _INTEGER.fullmatch(text) else text


def is_wordy(answer: str) -> bool:
    """Whether it is so long that it may be a worked solution without a box."""
    return len(answer.split()) > MAX_WORDS


def looks_decimal(answer: str) -> bool:
    """Whether it is a number with a comma that separates no thousands: the list 2, 5, or two and a half."""
    return _LOOKS_DECIMAL.fullmatch(answer) is not None


def _listed(value: Any) -> list[Any]:
    """The items of a list, also of one that a CSV file holds as a text, ['18'] or numpy's ['2' '3']."""
    if isinstance(value, str) and (is_array := _ARRAY.fullmatch(value.strip()) or _LIST.fullmatch(value.strip())):
        text = value.replace("\\", "\\\\") if _LONE.search(value) else value
        with suppress(ValueError):
            if is_array.re is _ARRAY:
                return [literal(item) for item in re.findall(_QUOTED, text)]
            items = literal(text)
            return items if isinstance(items, list) else [value]
    return value if isinstance(value, list) else [value]


def literal(text: str) -> Any:
    """What a text says in JSON or Python; ValueError if it is neither, or not valid UTF-8."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(text.strip())
        except (SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(str(error)) from None
    json.dumps(value, ensure_ascii=False, skipkeys=True, default=str).encode()
    return value


def _marked(text: str, reading: Reading) -> str:
    """What a worked solution marks as its answer; the text itself if it marks none."""
    text = text.replace(LOST_FRAC, "\\frac{").strip()
    if "####" in text:
        answer = text.rpartition("####")[2].strip()
        return answer if reading.decimal_comma or looks_decimal(answer) else _THOUSANDS.sub("", answer)
    return extract(text) or "" if "\\boxed" in text else text


def _with_point(text: str, where: str) -> str:
    """The same number with a decimal point for its comma, 1500.25 of 1.500,25; InputError where that is in doubt."""
    if match := _WITH_COMMA.fullmatch(text):
        before, whole, fraction, after = match.groups(default="")
        text = f"{before}{whole.replace('.', '')}.{fraction}{after}"
        if not _DOUBTFUL.search(after):
            return text
    elif not _DOUBTFUL.search(text):
        return text
    raise InputError(
        f"{where}: --decimal-comma: the answer {text!r:.60} can be read in two ways: write it as 1500.25 is, with a "
        "decimal point and no mark of thousands"
    )


def _plain_integer(text: str) -> str:
    digits = text.lstrip("+-").lstrip("0") or "0"
    return f"-{digits}" if text.startswith("-") and digits != "0" else digits


def _decimal_text(value: float | Decimal, where: str) -> str:
    """A number that is whole as an integer, another with the digits that it was written with."""
    limit: int = MAX_EXACT_FLOAT if isinstance(value, float) else MAX_INTEGER
    is_exact = -limit < value < limit
    if isinstance(value, float) and not is_exact:
        raise InputError(f"{where}: the answer {value!r} is a float beyond 2**53: store such answers as text")
    return str(int(value)) if is_exact and value == int(value) else str(value)
