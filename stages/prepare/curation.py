"""From rows to problems: texts cleaned, answers exact, each problem once, none leaked from a test set.

Reads and writes no files: it decides what a row's values mean, which problems are the same, and which to keep.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import compress, islice, product
from typing import Any, NamedTuple, cast

import orjson

from stages.core.drawing.templates import DAPO_AFTER, DAPO_BEFORE, user_turn
from stages.core.errors import InputError
from stages.core.records import Message, Problem, accepted, prompt_fault
from stages.core.tabular import aligned, some
from stages.prepare.answers import LOST_FRAC, literal

SPACE = " \t\r\n"  # not the form feed: it may be what is left of \frac
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
    "comma": "answers such as 2,5, read as lists (--decimal-comma)",
    "beyond_limit": "dropped: beyond --limit",
    "problems": "problems",
    "mended": "of all, with a lost \\frac mended",
}
_CHAT = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content)['"]\s*:""")
_LAYOUT = re.compile(r"\\left|\\right|[^\w+\-*/()=<>^]|_")


class Row(NamedTuple):
    """What is taken of a row: the problem, "" if there is none; every answer that is right; `own_id`, or "".

    `kept` are other columns that go into the record, as a JSON object.
    """

    problem: str
    answers: tuple[str, ...]
    own_id: str = ""
    kept: bytes = b"{}"


def problem_text(value: Any, where: str) -> str:
    """The problem in a cell: a text, or the user's turn of a chat; less DAPO's wrapper; "" if there is none."""
    value = chat(value, where)
    if isinstance(value, list):
        value = next(reversed(_turns(value, where, "user")), ...)
        if value is ...:
            raise InputError(f"{where}: expected messages with a user turn, found none")
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: a problem must be a text or a list of messages, found {type(value).__name__}")
    text = value.strip(SPACE).removeprefix(DAPO_BEFORE.strip()).removesuffix(DAPO_AFTER.strip())
    return text.strip(SPACE)


def chat(value: Any, where: str) -> Any:
    """The messages that a CSV file holds as a text; any other value as it is."""
    if not isinstance(value, str) or not _CHAT.match(value):
        return value
    try:
        return literal(value)
    except ValueError:
        raise InputError(f"{where}: messages in a text that is cut or in no form of JSON or Python") from None


def _turns(messages: Sequence[Any], where: str, *roles: str) -> list[Any]:
    turns = (turn for turn in messages if isinstance(turn, Mapping) and turn.get("role") in roles)
    return [_content(turn.get("content"), where) for turn in turns]


def _content(content: Any, where: str) -> Any:
    """What a message says; of one in parts, all texts together."""
    if not isinstance(content, list):
        return content
    if others := {str(part.get("type", "text")) for part in content if isinstance(part, Mapping)} - {"text"}:
        raise InputError(f"{where}: a message holds {', '.join(sorted(others))}, and only text can be a prompt")
    texts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where}: a message has a part without a text: {content!r:.60}")
    return "".join(texts)


def with_system(value: Any, where: str) -> list[Message]:
    """The problem in a cell with the system text before it, as messages of the problem's own."""
    value = chat(value, where)
    if not isinstance(value, list):
        raise InputError(f"{where}: --keep-system: found no messages: name their column, not a turn of them")
    system = [Message(role="system", content=text) for text in _turns(value, where, "system", "developer")[-1:] if text]
    return [*system, Message(role="user", content=user_turn(problem_text(value, where)))]


def refuse_taken(names: Iterable[str]) -> None:
    """Raise InputError for a column to keep that has the name of a Problem's field."""
    if taken := sorted({*names} & {*Problem.__required_keys__, "other_answers"}):
        raise InputError(f"--keep-column {taken[0]}: a problem has a field of that name already: rename the column")


def kept_fields(fields: Mapping[str, Any], where: str) -> bytes:
    """Further columns of a row as JSON; InputError for one that can't be.

    A kept column "prompt" becomes the problem's own, and must be one.
    """
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
        if not row.problem or not row.answers:
            counts["empty_answer" if row.problem else "empty_problem"] += 1
        elif key not in kept:
            kept[key] = row
            counts["mended"] += row.problem != raw.problem
        else:
            counts["duplicate"] += 1
            if not any(
                one == other or same_answer(one, other) for one, other in product(kept[key].answers, row.answers)
            ):
                contradictory.add(key)
            kept[key] = min(kept[key], row, key=_rank)
    curated = Curated(_problems(kept, source), counts)
    keys = dict(zip((problem["id"] for problem in curated.problems), kept, strict=True))
    _drop(curated, "contradictory", lambda problem: keys[problem["id"]] in contradictory)
    return curated


def _rank(copy: Row) -> tuple[bool, str, tuple[str, ...], str, bytes]:
    """Which of equal problems is kept, whatever the order of the rows: the one with the first id of its own."""
    return not copy.own_id, copy.own_id, copy.answers, copy.problem, copy.kept


def _problems(kept: Mapping[bytes, Row], source: str) -> list[Problem]:
    own = {row.own_id for row in kept.values()}
    has_own = "" not in own and len(own) == len(kept)
    return [
        cast(
            Problem,
            {
                "id": f"{source}/{row.own_id.removeprefix(source + '/') if has_own else key.hex()}",
                "problem": row.problem,
                "answer": row.answers[0],
                "source": source,
                **({"other_answers": list(row.answers[1:])} if row.answers[1:] else {}),
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
    flags = iter(parseable([answer for problem in problems for answer in accepted(problem)]))
    readable = {problem["id"] for problem in problems if any(list(islice(flags, len(accepted(problem)))))}
    _drop(curated, "unparseable", lambda problem: problem["id"] not in readable)
    if not drop:
        curated.problems = problems


def find(curated: Curated, kind: str, is_odd: Callable[[str], bool]) -> None:
    """Remember the ids of problems whose answer is odd, and keep them."""
    curated.note(kind, (problem for problem in curated.problems if is_odd(problem["answer"])))


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
