"""From rows to problems: texts cleaned, answers exact, each problem once, none leaked from a test set.

Reads and writes no files: it decides what a row's values mean, which problems are the same, and which to keep.
"""

import ast
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import compress
from typing import Any, NamedTuple, cast

import orjson

from stages.core.drawing.templates import DAPO_AFTER, DAPO_BEFORE
from stages.core.errors import InputError
from stages.core.grading.verifier.extraction import extract
from stages.core.records import Problem, prompt_fault
from stages.core.tabular import aligned, some

LOST_FRAC = "\x0crac{"  # "\frac{" that once passed through a language in which \f is a form feed
SPACE = " \t\r\n"  # not the form feed: it may be what is left of \frac
MAX_EXACT_FLOAT = 2**53
MAX_WORDS = 12  # an answer of more is named as one that may be a worked solution
MAX_SHOWN = 5  # ids of a kind in the printed table; the manifest has them all
TITLES = {
    "rows": "rows read",
    "bad": "dropped: rows that cannot be read",
    "empty_problem": "dropped: no problem",
    "empty_answer": "dropped: no answer",
    "duplicate": "dropped: copies of another row",
    "contradictory": "dropped: contradictory answers",
    "contaminated": "dropped: in --decontaminate",
    "unparseable": "answers that the verifier cannot read",
    "wordy": "answers of many words: solutions?",
    "beyond_limit": "dropped: beyond --limit",
    "problems": "problems",
    "mended": "of all, with a lost \\frac mended",
}
_LIST = re.compile(r"""\[\s*(['"]).*\1\s*\]""", re.DOTALL)  # of texts: [1, 2] may be an interval
_INTEGER = re.compile(r"[+-]?[0-9]+")
_INTEGER_WITH_POINT = re.compile(r"([+-]?[0-9]+)\.0*")
_LAYOUT = re.compile(r"\\left|\\right|[^\w+\-*/()=<>^]|_")


class Row(NamedTuple):
    """What is taken of a row: problem and answer as texts, "" if there is none; `own_id` is the source's, or "".

    `kept` are other columns that go into the record, as a JSON object.
    """

    problem: str
    answer: str
    own_id: str = ""
    kept: bytes = b"{}"


def problem_text(value: Any, where: str) -> str:
    """The problem in a cell: a text, or the user's turn of a chat; less DAPO's wrapper; "" if there is none."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = _user_turn(value, where)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: a problem must be a text or a list of messages, found {type(value).__name__}")
    text = value.strip(SPACE).removeprefix(DAPO_BEFORE.strip()).removesuffix(DAPO_AFTER.strip())
    return text.strip(SPACE)


def _user_turn(messages: Sequence[Any], where: str) -> Any:
    turns = [turn.get("content") for turn in messages if isinstance(turn, Mapping) and turn.get("role") == "user"]
    if not turns:
        raise InputError(f"{where}: expected messages with a user turn, found none")
    return turns[-1]


def answer_text(value: Any, is_integers: bool, where: str) -> str:
    """The answer in a cell as text, its digits exact; "" if there is none.

    The answer of a worked solution follows its last "####" (GSM8K, thousands separators dropped) or is in its last
    \\boxed{}. Integers lose leading zeros and a plus sign: AIME's "025" is 25. With `is_integers`, "70.0" is 70.
    """
    value = _unpacked(value, where)
    if value is None or (isinstance(value, float | Decimal) and value != value):
        return ""
    if isinstance(value, float | Decimal):
        value = _decimal_text(value, where)
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise InputError(f"{where}: an answer must be a text or a number, found {type(value).__name__}")
    text = str(value).strip()
    if "####" in text:
        text = text.rpartition("####")[2].strip().replace(",", "")
    elif "\\boxed" in text:
        text = extract(text) or ""
    if is_integers and (match := _INTEGER_WITH_POINT.fullmatch(text)):
        text = match[1]
    return _plain_integer(text) if _INTEGER.fullmatch(text) else text


def _unpacked(value: Any, where: str) -> Any:
    """The one answer of a list, also of one that a CSV file holds as a text: 18 of ['18'].

    Raises InputError for several, of which nobody says whether all are asked for or any.
    """
    if isinstance(value, str) and _LIST.fullmatch(value.strip()):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            return value
    if not isinstance(value, list) or not value:
        return value
    if len(value) > 1:
        raise InputError(f"{where}: {len(value)} answers, {value!r:.60}: write them as one, such as 2, 3 or {{2, 3}}")
    return value[0]


def _plain_integer(text: str) -> str:
    digits = text.lstrip("+-").lstrip("0") or "0"
    return f"-{digits}" if text.startswith("-") and digits != "0" else digits


def _decimal_text(value: float | Decimal, where: str) -> str:
    """A number that is whole as an integer, another with the digits that it was written with."""
    is_exact = -MAX_EXACT_FLOAT < value < MAX_EXACT_FLOAT
    if isinstance(value, float) and not is_exact:
        raise InputError(f"{where}: the answer {value!r} is a float beyond 2**53: store such answers as text")
    return str(int(value)) if is_exact and value == int(value) else str(value)


def kept_fields(fields: Mapping[str, Any], where: str) -> bytes:
    """Further columns of a row as JSON; InputError for one that has the name of a Problem's field, or can't be JSON.

    A kept column "prompt" becomes the problem's own, and must be one.
    """
    if taken := sorted(fields.keys() & Problem.__required_keys__):
        raise InputError(f"--keep-column {taken[0]}: a problem has a field of that name already: rename the column")
    if fault := prompt_fault(fields.get("prompt")):
        raise InputError(f"{where}: --keep-column prompt: {fault}")
    try:
        return orjson.dumps(fields, default=_as_json)
    except orjson.JSONEncodeError as error:
        raise InputError(f"{where}: --keep-column {', '.join(fields)}: {error}: store it as text") from None


def _as_json(value: Any) -> Any:
    """What JSON has no type for: an exact decimal as a number, a date and the like as text."""
    return float(value) if isinstance(value, Decimal) else str(value)


def same_text(text: str) -> str:
    """What two problems share if one is a copy of the other: everything but white space."""
    return " ".join(text.split())


def normalized(text: str) -> str:
    """What two problems share if one leaks the other: letters, digits and operators, whatever case and layout.

    Operators and parentheses stay, so that 3 + 4 and 3 * 4 are two problems; braces, punctuation and spaces go, which
    differ between copies of a problem in public sets.
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("−", "-")
    return _LAYOUT.sub("", text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))


@dataclass
class Curated:
    """Problems kept, and what became of the others: counts, and the ids that a user may want to look up."""

    problems: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # of rows or problems, by what became of them
    ids: dict[str, list[str]] = field(default_factory=dict)

    def note(self, kind: str, problems: Iterable[Problem]) -> None:
        """Count these problems as `kind` and remember their ids."""
        self.ids[kind] = [problem["id"] for problem in problems]
        self.counts[kind] = len(self.ids[kind])

    def table(self) -> str:
        """What happened, a line a count, with the first ids of a kind."""
        shown = {name: some(self.ids.get(name, []), MAX_SHOWN) for name in TITLES}
        return aligned([(title, f"{self.counts[name]:,}", shown[name]) for name, title in TITLES.items()], "lrl")


def collect(rows: Iterable[Row], source: str, same_answer: Callable[[str, str], bool]) -> Curated:
    """Every problem once.

    A text with contradictory answers is dropped: none of them can be trusted. Ids are
    `source`/own id if every problem has one of its own, else `source`/hash of the text: they don't depend on the
    order of the rows.
    """
    counts: Counter[str] = Counter()
    kept: dict[bytes, Row] = {}
    contradictory: set[bytes] = set()
    for raw in rows:
        counts["rows"] += 1
        row = raw._replace(problem=raw.problem.replace(LOST_FRAC, "\\frac{"))
        key = _hash(same_text(row.problem))
        if not row.problem or not row.answer:
            counts["empty_answer" if row.problem else "empty_problem"] += 1
        elif key not in kept:
            kept[key] = row
            counts["mended"] += row.problem != raw.problem
        else:
            counts["duplicate"] += 1
            if kept[key].answer != row.answer and not same_answer(kept[key].answer, row.answer):
                contradictory.add(key)
            kept[key] = min(kept[key], row, key=_rank)
    curated = Curated(_problems(kept, source), counts)
    keys = dict(zip((problem["id"] for problem in curated.problems), kept, strict=True))
    _drop(curated, "contradictory", lambda problem: keys[problem["id"]] in contradictory)
    return curated


def _rank(copy: Row) -> tuple[bool, str, str, str, bytes]:
    """Which of equal problems is kept, whatever the order of the rows: the one with the first id of its own."""
    return not copy.own_id, copy.own_id, copy.answer, copy.problem, copy.kept


def _problems(kept: Mapping[bytes, Row], source: str) -> list[Problem]:
    own = {row.own_id for row in kept.values()}
    has_own = "" not in own and len(own) == len(kept)
    return [
        cast(
            Problem,
            {
                "id": f"{source}/{row.own_id.removeprefix(source + '/') if has_own else key.hex()}",
                "problem": row.problem,
                "answer": row.answer,
                "source": source,
                **orjson.loads(row.kept),
            },
        )
        for key, row in kept.items()
    ]


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _drop(curated: Curated, kind: str, is_out: Callable[[Problem], bool]) -> None:
    flags = [is_out(problem) for problem in curated.problems]
    curated.note(kind, compress(curated.problems, flags))
    curated.problems = [problem for problem, out in zip(curated.problems, flags, strict=True) if not out]


def decontaminate(curated: Curated, others: Iterable[str]) -> None:
    """Drop the problems whose normalised text is among `others`, and remember their ids."""
    leaked = {normalized(text) for text in others}
    _drop(curated, "contaminated", lambda problem: normalized(problem["problem"]) in leaked)


def find_unparseable(curated: Curated, parseable: Callable[[list[str]], list[bool]], drop: bool) -> None:
    """Remember the ids of problems whose answer the verifier cannot read, and drop them if `drop`."""
    problems = curated.problems
    flags = parseable([problem["answer"] for problem in problems])
    readable = {problem["id"] for problem, flag in zip(problems, flags, strict=True) if flag}
    _drop(curated, "unparseable", lambda problem: problem["id"] not in readable)
    if not drop:
        curated.problems = problems


def find_wordy(curated: Curated) -> None:
    """Remember the ids of problems whose answer is so long that it may be a solution without a box."""
    problems = curated.problems
    _drop(curated, "wordy", lambda problem: len(problem["answer"].split()) > MAX_WORDS)
    curated.problems = problems


def choose(curated: Curated, limit: int, seed: int) -> None:
    """Keep at most `limit` problems (0 for all), chosen at random by `seed`, in their order.

    The choice depends only on the seed and the ids, so a smaller limit keeps a part of what a greater one keeps.
    """
    if 0 < limit < len(curated.problems):
        shuffled = sorted(curated.problems, key=lambda problem: _hash(f"{seed}/{problem['id']}"))
        kept = {problem["id"] for problem in shuffled[:limit]}
        curated.counts["beyond_limit"] = len(curated.problems) - limit
        curated.problems = [problem for problem in curated.problems if problem["id"] in kept]
    curated.counts["problems"] = len(curated.problems)
