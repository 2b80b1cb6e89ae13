"""The cheap half of the verifier: finding the answer in a completion, and comparing it as far as text decides.

An answer is read into a form: a value with its unit, words, a tuple or interval, a list or set, an equation or
inequality, a matrix. Forms are compared part by part; only where two values are neither the same literal nor both
numbers does a `Leaf` (core.algebra) have to say. Where math-verify alone errs, and what is done here instead:

- It takes any number out of the text when a box does not parse: here the box or the "Answer:" line is all there is.
- It cuts units off wrongly (6t is 6, "2 million" is 2, "2 is wrong" is 2): see notation.split_unit.
- It takes the last side of any equation (1=2 is 2): here only behind a name, and every other number must agree.
- It compares numbers by six decimals (6.63e-34 is 1.05e-34): here literals are exact fractions; a decimal of six or
  more digits also stands for the value that it rounds.
- It ignores base subscripts, splits words into letters (east is seat), loses percentages under ANTLR before 4.13.

Where convention decides: 50% equals 0.5 and, for want of a unit, 50; (1,2) equals "1, 2" in this order; an answer
with a unit equals the same number without one, but not one with another unit.
"""

import re
import signal
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import lru_cache
from typing import Literal, NamedTuple

from stages.core import notation
from stages.core.notation import Refused, number
from stages.core.records import Verdict

MAX_RAW = notation.MAX_LENGTH  # characters of a prediction that are looked at; one that is longer is rejected
DEADLINE_SIGNALS = (signal.SIGXCPU, signal.SIGPROF)
MAX_ITEMS = 64  # of a list
MAX_SIGNS = 3  # plus-minus signs in one value: 8 values

Leaf = Callable[[Literal["value", "equation", "inequality"], str, str], bool]


class NeedsAlgebra(Exception):
    """The text alone does not decide."""


# --- finding the answer -------------------------------------------------------------------------------------------

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BETWEEN_BOXES = re.compile(r"[\s$]*(?:,|;|(?:,\s*)?(?:\\text\s*\{\s*)?(?:and|or)(?:\s*\})?)[\s$]*")
_ANSWER_LINE = re.compile(
    r"^[ \t>*#_-]{0,9}(?:(?:the|my)[ \t]+)?(?:final[ \t]+)?answer[*_ \t]{0,9}:[*_ \t]{0,9}(.*)$", re.I | re.M
)
_BARE = re.compile(r"(?:####|\banswer\s+is:?|\banswer\s*[:=]|=)\s*(?P<rest>[^=]+)$", re.I)
_BARE_MATHS = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]")


def extract(completion: str, bare: bool = False) -> str | None:
    """The text of the last closed box, else of the last "Answer:" line, else None.

    Boxes joined by nothing but a comma, "and" or "or" count as one list. What stands after the end of a thought
    (</think>) goes before the thought itself. With `bare`, the expression that ends the last line counts as well.
    """
    thought, mark, rest = completion.rpartition("</think>")
    finders = (_boxed, _answer_line, _bare_expression) if bare else (_boxed, _answer_line)
    for text in (rest, thought) if mark else (completion,):
        for finder in finders:
            if found := finder(text):
                return found
    return None


def _boxed(text: str) -> str | None:
    box = _last_box(text, len(text))
    if box is None:
        return None
    begin, inside, end = box
    contents = [text[inside:end]]
    while len(contents) < MAX_ITEMS and (before := _last_box(text, begin, quick=True)) is not None:
        if not _BETWEEN_BOXES.fullmatch(text, before[2] + 1, begin):
            break
        contents.insert(0, text[before[1] : before[2]])
        begin = before[0]
    return ", ".join(contents).strip() or None


def _last_box(text: str, stop: int, quick: bool = False) -> tuple[int, int, int] | None:
    """(where the last closed box before `stop` begins, where its content begins, where it ends)."""
    begin = max(text.rfind("\\boxed", 0, stop), text.rfind("\\fbox", 0, stop))
    if begin < 0:
        return None
    if (match := _BOX.match(text, begin, stop)) and (end := _closing(text, match.end(), min(stop, begin + 4096))):
        return begin, match.end(), end
    return None if quick else _last_of_all_boxes(text, stop)


def _closing(text: str, begin: int, stop: int) -> int | None:
    depth = 1
    for match in _BRACE.finditer(text, begin, stop):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None


def _last_of_all_boxes(text: str, stop: int) -> tuple[int, int, int] | None:
    """As _last_box, in one pass over the text, since many boxes may stand open at its end."""
    boxes = {match.end() - 1: match.start() for match in _BOX.finditer(text, 0, stop)}
    opened: list[int] = []
    last = None
    for match in re.finditer(r"\\\\|\\[{}]|[{}]", text[:stop]):
        if match.group() == "{":
            opened.append(match.start())
        elif match.group() == "}" and opened:
            brace = opened.pop()
            if brace in boxes and (last is None or boxes[brace] > last[0]):
                last = (boxes[brace], brace + 1, match.start())
    return last


def _answer_line(text: str) -> str | None:
    last = None
    for last in _ANSWER_LINE.finditer(text):
        pass
    if last is None:
        return None
    line = last.group(1).strip() or next(filter(None, map(str.strip, text[last.end() :].splitlines())), "")
    return line.strip() or None


def _bare_expression(text: str) -> str | None:
    line = text.strip().rpartition("\n")[2][-notation.MAX_LENGTH :].strip().rstrip(".")
    spans = list(_BARE_MATHS.finditer(line))
    if spans and not re.search(r"[a-zA-Z]{2}", line[spans[-1].end() :]):
        inside = next(filter(None, spans[-1].groups()))
        return inside.strip() or None
    if match := _BARE.search(line):
        return match.group("rest").strip() or None
    return line if line and not re.search(r"[a-zA-Z]{2,}\s+[a-zA-Z]{2,}", line) else None


# --- forms --------------------------------------------------------------------------------------------------------


class Value(NamedTuple):
    """An expression in canonical LaTeX; `number` where it is a literal (its factor and percent not yet applied)."""

    text: str
    unit: str
    is_percent: bool
    number: Fraction | None


class Words(NamedTuple):
    """Text that is no mathematics, without case, spaces and punctuation."""

    plain: str


class Ordered(NamedTuple):
    """(1,2), [1,2): a tuple or an interval."""

    opening: str
    closing: str
    items: tuple["Form", ...]


class Several(NamedTuple):
    """1, 2 or {1,2} or a union: the order does not count."""

    items: tuple["Form", ...]
    braces: bool


class Relation(NamedTuple):
    """x = 3, 2 < x < 5, y = 2x+1: members and the signs between them."""

    members: tuple[str, ...]
    signs: tuple[str, ...]


class Matrix(NamedTuple):
    """Rows of a matrix, whatever its brackets."""

    rows: tuple[tuple["Form", ...], ...]


Form = Value | Words | Ordered | Several | Relation | Matrix

_COMMA = frozenset([",", ";"])
_UNION = frozenset([r"\cup"])
_SIGNS = frozenset(["=", "<", ">", r"\le", r"\ge", r"\ne", r"\in", r"\approx"])
_MATRIX = re.compile(
    r"\\begin\{((?:p|b|B|small)?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}(?:\^\{(T|\\top|\\text\{T\})\})?",
    re.DOTALL,
)
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])", re.ASCII)
_SPACED_THOUSANDS = re.compile(r"(?<![\d.])(\d{1,3}(?: \d{3})+)(?![\d /]|\s*\\frac)", re.ASCII)
_BASED = re.compile(
    r"(?P<digits>\d[0-9A-Z]*|[A-Z]+\d[0-9A-Z]*)_\{\s*(?:\\text\{)?\s*(?:base)?\s*(?P<base>\w+?)\s*\}?\s*\}", re.ASCII
)
_RATIO = re.compile(r"(\d+(?:\.\d+)?)(?:\s*:\s*\d+(?:\.\d+)?)+", re.ASCII)
_POINTS = re.compile(r"(?:\([^()]*,[^()]*\)\s*){2,}")
_ADJACENT = re.compile(r"\)\s*\(")
_CLOCK = re.compile(r"\d{1,2}:\d\d(?::\d\d)?(?:[ap]m)?", re.ASCII)
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\{\\circ\}")
_WORD = re.compile(
    r"(?<![a-zA-Z\\])(?:[a-zA-Z]{4,}|(?i:yes|no|odd|all|any|not|the|of|is|to)|[B-DF-HJ-NP-TV-Z]{2,})(?![a-zA-Z])"
)


@lru_cache(65536)
def form(text: str) -> Form:
    """Read an answer. Raises Refused for one that is not worth reading; never fails otherwise."""
    return _form(notation.canonical(text), 0)


def _form(text: str, depth: int) -> Form:
    text = notation.strip_outer(text)
    if depth > 6:
        raise Refused("nested too deeply")
    text = _ADJACENT.sub("),(", text) if _POINTS.fullmatch(text) else text
    for reader in (_union, _list, _braces, _plus_minus, _relation, _brackets, _matrix, _constant, _ratio):
        if (found := reader(text, depth)) is not None:
            return found
    return _value(text)


def _several(items: Iterable[Form], braces: bool) -> Form:
    flat: list[Form] = []
    for item in items:
        flat += item.items if isinstance(item, Several) and not item.braces else [item]
    unique = tuple(dict.fromkeys(flat))
    if len(unique) > MAX_ITEMS:
        raise Refused(f"more than {MAX_ITEMS} items")
    return unique[0] if len(unique) == 1 else Several(unique, braces)


def _union(text: str, depth: int) -> Form | None:
    pieces, signs = notation.split(text, _UNION)
    return _several((_form(piece, depth + 1) for piece in pieces), False) if signs else None


def _list(text: str, depth: int) -> Form | None:
    if depth == 0 or "," not in text:
        text = _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text) if _top_level(text) else text
    pieces, signs = notation.split(text, _COMMA)
    if not signs:
        return None
    if len(pieces) > MAX_ITEMS:
        raise Refused(f"more than {MAX_ITEMS} items")
    return _several((_form(piece, depth + 1) for piece in pieces if piece), False)


def _top_level(text: str) -> bool:
    """Whether a comma in the text stands outside of all brackets."""
    return any(token == "," and depth == 0 for _, token, depth in notation.tokens(text))


def _braces(text: str, depth: int) -> Form | None:
    if not (text.startswith("\\{") and text.endswith("\\}") and notation.closing(text, 0) == len(text) - 2):
        return None
    inside = text[2:-2].strip()
    if not inside:
        return Several((), True)
    condition = re.split(r"\\mid(?![a-zA-Z])|\||:", inside, maxsplit=1)
    if len(condition) == 2:
        return _form(condition[1], depth + 1)
    pieces, _ = notation.split(_bracketed_thousands(inside), _COMMA)
    if len(pieces) > MAX_ITEMS:
        raise Refused(f"more than {MAX_ITEMS} items")
    return _several((_form(piece, depth + 1) for piece in pieces), True)


def _bracketed_thousands(text: str) -> str:
    """Thousands joined where the spaces after other commas, or a group 0xx, tell them from items."""
    if re.search(r",\s", text) or re.search(r",0\d\d(?!\d)", text):
        return _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)
    return text


def _plus_minus(text: str, depth: int) -> Form | None:
    count = len(re.findall(r"\\[pm]m(?![a-zA-Z])", text))
    if not count:
        return None
    if count > MAX_SIGNS:
        raise Refused(f"more than {MAX_SIGNS} plus-minus signs")
    if r"\mp" in text:
        choices = [("+", "-"), ("-", "+")]
        variants = [re.sub(r"\\pm(?![a-zA-Z])", a, re.sub(r"\\mp(?![a-zA-Z])", b, text)) for a, b in choices]
    else:
        variants = [text]
        for _ in range(count):
            variants = [re.sub(r"\\pm(?![a-zA-Z])", sign, item, count=1) for item in variants for sign in "+-"]
    return _several((_form(re.sub(r"(?<![\w)}\]])\s*\+\s*", "", item), depth + 1) for item in variants), False)


def _relation(text: str, depth: int) -> Form | None:
    members, signs = notation.split(text, _SIGNS)
    if not signs:
        return None
    if not members[-1] or not members[0]:
        return Words(_plain(text))
    if signs == [r"\in"] and _is_name(members[0]):
        return _form(members[1], depth + 1)
    if signs[-1] == r"\approx":  # an exact value and its approximation: the exact one, unless it is but a name
        members, signs = (members[:-1], signs[:-1]) if not _is_name(members[-2]) else (members, [*signs[:-1], "="])
        if not signs:
            return _form(members[0], depth + 1)
    right = _form(members[-1], depth + 1)
    if isinstance(right, Several) and not right.braces and set(signs) == {"="} and len(members) == 2:
        items = [f"{members[0]}={piece}" for piece in notation.split(members[1], _COMMA | _UNION)[0]]
        return _several((_form(item, depth + 1) for item in items), False) if len(items) > 1 else right
    return Relation(tuple(members), tuple(signs))


def _brackets(text: str, depth: int) -> Form | None:
    opening = next((mark for mark in ("(", "[", r"\langle") if text.startswith(mark)), None)
    closing = next((mark for mark in (")", "]", r"\rangle") if text.endswith(mark)), None)
    if opening is None or closing is None or notation.closing(text, 0) != len(text) - len(closing):
        return None
    inside = text[len(opening) : len(text) - len(closing)].strip()
    pieces, signs = notation.split(_bracketed_thousands(inside), _COMMA)
    if signs:
        marks = ("(", ")") if opening == r"\langle" else (opening, closing)
        return Ordered(*marks, tuple(_form(piece, depth + 1) for piece in pieces if piece))
    return _form(inside, depth + 1) if (opening, closing) in (("(", ")"), ("[", "]")) and inside else None


def _matrix(text: str, depth: int) -> Form | None:
    match = _MATRIX.fullmatch(text)
    if match is None or "\\begin" in match.group(2):
        return None
    rows = [row.split("&") for row in re.split(r"\\\\", match.group(2)) if row.strip()]
    if sum(map(len, rows)) > MAX_ITEMS or not rows or any(len(row) != len(rows[0]) for row in rows):
        raise Refused("a matrix that is ragged or too large")
    cells = tuple(tuple(_form(cell, depth + 1) for cell in row) for row in rows)
    return Matrix(tuple(zip(*cells, strict=True)) if match.group(3) else cells)


def _constant(text: str, depth: int) -> Form | None:
    if text == r"\mathbb{R}":
        return Ordered("(", ")", (_value(r"-\infty"), _value(r"\infty")))
    return Several((), True) if text == r"\emptyset" else None


def _ratio(text: str, depth: int) -> Form | None:
    """3:4 is the number 3/4; 2:4:6 is 1:2:3; what may be a time of day is words."""
    if _CLOCK.fullmatch(_plain(text)):
        return Words(_plain(text))
    if not _RATIO.fullmatch(text):
        return None
    parts = [Fraction(part) for part in text.split(":")]
    if 0 in parts:
        return Words(text)
    if len(parts) == 2:
        return Value(text, "", False, parts[0] / parts[1])
    return Ordered(":", ":", tuple(Value(str(part / parts[0]), "", False, part / parts[0]) for part in parts))


def _value(text: str) -> Form:
    stripped, unit, factor = notation.split_unit(text)
    stripped = notation.strip_outer(stripped) if unit or factor > 1 else stripped
    if unit or factor > 1:
        inner = _form(stripped, 1)
        if not isinstance(inner, Value) or inner.unit:
            return Words(_plain(text))
        stripped = inner.text
    is_percent = stripped.endswith("%")
    stripped = _expression(stripped[:-1].strip() if is_percent else stripped)
    known = number(stripped)
    if based := _BASED.fullmatch(stripped):
        base = notation.spelled_number(based.group("base"))
        stripped = f"{based.group('digits')}_{{{base}}}"
        known = _in_base(based.group("digits"), base)
    elif not stripped or "%" in stripped or _WORD.search(stripped) or _is_verbal(stripped):
        return Words(_plain(text))
    if factor > 1:
        if known is None:
            return Words(_plain(text))
        known *= factor
        stripped = str(known)
    return Value(stripped, unit, is_percent, known)


def _is_verbal(text: str) -> bool:
    """Whether commands make a text one that no algebra reads. Raises Refused for a command that nobody can read."""
    commands = set(re.findall(r"\\([a-zA-Z]+)", text)) - notation.READABLE
    if unknown := commands - notation.VERBAL - {"text"}:
        raise Refused(f"the command \\{min(unknown)}")
    return bool(commands)


def _expression(text: str) -> str:
    """What is left to algebra: thousands joined, angles in degrees as radians, no idle spaces."""
    text = _SPACED_THOUSANDS.sub(lambda match: match.group().replace(" ", ""), _THOUSANDS.sub(_join, text))
    text = _DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)
    text = re.sub(r"^\+\s*", "", text)
    text = re.sub(r"(\\[a-zA-Z]+) (?=[a-zA-Z])", r"\1\0", text)
    if not re.search(r"\d \d", text):
        text = text.replace(" ", "")
    return str(notation.spelled_number(text.replace("\0", " ")))


def _join(match: re.Match[str]) -> str:
    return match.group().replace(",", "")


def _in_base(digits: str, base: str) -> Fraction | None:
    if not base.isdecimal() or not 2 <= int(base) <= 36:
        return None
    try:
        return Fraction(int(digits, int(base)))
    except ValueError:
        return None


def _plain(text: str) -> str:
    return re.sub(r"[^\w+\-*/=<>^%:]", "", re.sub(r"\\text|\\[,; ]", "", text)).casefold()


# --- comparing ----------------------------------------------------------------------------------------------------


def decide(answer: str, prediction: str) -> Verdict | None:
    """The verdict where the text alone gives one, else None."""
    try:
        return "correct" if equal(answer, prediction, _ask) else "wrong"
    except NeedsAlgebra:
        return None
    except Refused:
        return "rejected"


def _ask(*_: str) -> bool:
    raise NeedsAlgebra


def equal(answer: str, prediction: str, leaf: Leaf) -> bool:
    """Whether a prediction is the answer. Raises Refused for a prediction or answer that is not looked into."""
    if len(prediction) > MAX_RAW:
        raise Refused(f"longer than {MAX_RAW} characters")
    if (letter := _choice(answer)) and (chosen := _choice(prediction, labelled=True)) is not None:
        return chosen == letter
    return _equal(form(answer), form(prediction), leaf)


_CHOICE = re.compile(r"\(?\s*([A-Z])\s*\)?\s*[.:]?")
_LABELLED = re.compile(
    r"(?:(?:option|choice|answer)\s*:?\s*)?(?:\(\s*([A-Z])\s*\)|([A-Z])\s*[.:)](?=\s|$)|([A-Z])$).*", re.I | re.S
)


@lru_cache(65536)
def _choice(text: str, labelled: bool = False) -> str | None:
    """The letter of a multiple choice: B, (B), \\text{(B)}; labelled: also "(B) 5", "B. 5", "Option B"."""
    if len(text) > 200:
        return None
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", notation.canonical(text)).strip().rstrip(".")
    match = (_LABELLED if labelled else _CHOICE).fullmatch(text)
    letter = next(filter(None, match.groups()), None) if match else None
    return letter if letter and letter.isupper() else None


def _equal(gold: Form, pred: Form, leaf: Leaf) -> bool:
    if isinstance(gold, Words) or isinstance(pred, Words):
        return _words(gold) == _words(pred) != ""
    if isinstance(gold, Value) and isinstance(pred, Value):
        return _equal_values(gold, pred, leaf)
    if isinstance(gold, Several) or isinstance(pred, Several):
        return _equal_several(gold, pred, leaf)
    if isinstance(gold, Relation) or isinstance(pred, Relation):
        return _equal_relations(gold, pred, leaf)
    if isinstance(gold, Ordered) and isinstance(pred, Ordered):
        marks = (gold.opening, gold.closing) == (pred.opening, pred.closing)
        return marks and _all(gold.items, pred.items, leaf)
    if isinstance(gold, Matrix) and isinstance(pred, Matrix):
        same = len(gold.rows) == len(pred.rows)
        return same and _all([c for row in gold.rows for c in row], [c for row in pred.rows for c in row], leaf)
    return False


def _words(item: Form) -> str:
    if isinstance(item, Words):
        return item.plain
    return _plain(item.text) if isinstance(item, Value) else ""


def _all(golds: Iterable[Form], preds: Iterable[Form], leaf: Leaf) -> bool:
    """Whether all are equal in order; one that is unequal by its text spares the algebra of the others."""
    golds, preds = list(golds), list(preds)
    if len(golds) != len(preds):
        return False
    asked = False
    for gold, pred in zip(golds, preds, strict=True):
        try:
            if not _equal(gold, pred, leaf):
                return False
        except NeedsAlgebra:
            asked = True
    if asked:
        raise NeedsAlgebra
    return True


def _equal_values(gold: Value, pred: Value, leaf: Leaf) -> bool:
    if gold.unit and pred.unit and gold.unit != pred.unit:
        return False
    factors = {Fraction(1, 100) if gold.is_percent else 1, Fraction(1, 100) if pred.is_percent else 1}
    if gold.number is not None and pred.number is not None:
        left = gold.number / 100 if gold.is_percent else gold.number
        right = pred.number / 100 if pred.is_percent else pred.number
        if left == right or (len(factors) == 2 and gold.number == pred.number):
            return True
        if gold.is_percent or pred.is_percent:
            return False
        return (not notation.is_terminating(left) and notation.is_rounding_of(pred.text, left)) or (
            not notation.is_terminating(right) and notation.is_rounding_of(gold.text, right)
        )
    if (based := _BASED.fullmatch(gold.text)) and based.group("digits") == pred.text:
        return True
    if gold.text == pred.text and re.fullmatch(r"-?(?:[a-zA-Z]|\\(?:pi|infty|theta|alpha|beta))", gold.text):
        return True
    if {gold.text, pred.text} & {r"\infty", r"-\infty"} and (gold.number is not None or pred.number is not None):
        return False
    texts = [f"\\frac{{{v.text}}}{{100}}" if v.is_percent and len(factors) == 2 else v.text for v in (gold, pred)]
    return leaf("value", *texts) or (len(factors) == 2 and leaf("value", gold.text, pred.text))


def _equal_several(gold: Form, pred: Form, leaf: Leaf) -> bool:
    golds, preds = _items(gold), _items(pred)
    if isinstance(gold, Ordered) or isinstance(pred, Ordered):
        return _equal_tuple_and_list(gold, pred, leaf)
    if len(golds) != len(preds):
        return False
    left = list(preds)
    asked = False
    for item in golds:
        for index, other in enumerate(left):
            try:
                if _equal(item, other, leaf):
                    del left[index]
                    break
            except NeedsAlgebra:
                asked = True
        else:
            if not asked:
                return False
    if left:
        raise NeedsAlgebra
    return True


def _items(item: Form) -> tuple[Form, ...]:
    return item.items if isinstance(item, Several) else (item,)


def _equal_tuple_and_list(gold: Form, pred: Form, leaf: Leaf) -> bool:
    """(3,5) and "x=3, y=5" or "3, 5": the order counts; names go by the alphabet."""
    tuple_, other = (gold, pred) if isinstance(gold, Ordered) else (pred, gold)
    assert isinstance(tuple_, Ordered)
    if not isinstance(other, Several) or other.braces or (tuple_.opening, tuple_.closing) != ("(", ")"):
        return False
    items = list(other.items)
    if all(isinstance(item, Relation) and item.signs == ("=",) and _is_name(item.members[0]) for item in items):
        items = [_form(r.members[1], 1) for r in sorted(items, key=lambda r: r.members[0])]  # type: ignore[union-attr]
    return _all(tuple_.items, items, leaf) if isinstance(gold, Ordered) else _all(items, tuple_.items, leaf)


def _equal_relations(gold: Form, pred: Form, leaf: Leaf) -> bool:
    if isinstance(gold, Relation) and isinstance(pred, Relation):
        return _equal_two_relations(gold, pred, leaf)
    if isinstance(gold, Relation):
        side = _side(gold, leaf)
    else:
        assert isinstance(pred, Relation)
        side = _side(pred, leaf)
    if side is None:
        if isinstance(pred, Relation) and set(pred.signs) == {"="} and isinstance(gold, Value):
            return _all([gold] * len(pred.members), [_form(member, 1) for member in pred.members], leaf)
        return False
    return _equal(side, pred, leaf) if isinstance(gold, Relation) else _equal(gold, side, leaf)


def _equal_two_relations(gold: Relation, pred: Relation, leaf: Leaf) -> bool:
    if set(gold.signs) == set(pred.signs) == {"="}:
        if _is_name(gold.members[0]) and _is_name(pred.members[0]):
            if _name(gold.members[0]) == _name(pred.members[0]):
                sides = _side(gold, leaf), _side(pred, leaf)
                return sides[0] is not None and sides[1] is not None and _equal(sides[0], sides[1], leaf)
            if number(gold.members[-1]) is not None and number(pred.members[-1]) is not None:
                return False
        if len(gold.members) == len(pred.members) == 2:
            return leaf("equation", _difference(gold), _difference(pred))
        return False
    intervals = _interval(gold), _interval(pred)
    if intervals[0] is not None and intervals[1] is not None:
        return intervals[0][0] == intervals[1][0] and _equal(intervals[0][1], intervals[1][1], leaf)
    if len(gold.members) == len(pred.members) == 2:
        kinds = gold.signs[0], pred.signs[0]
        if kinds[0] == kinds[1]:
            return leaf("inequality", _difference(gold), _difference(pred))
        if kinds[0] == _FLIPPED.get(kinds[1]):
            return leaf("inequality", _difference(gold), _difference(Relation(pred.members[::-1], kinds[:1])))
        return False
    return (
        _all([_form(m, 1) for m in gold.members], [_form(m, 1) for m in pred.members], leaf)
        if (gold.signs == pred.signs)
        else False
    )


def _difference(relation: Relation) -> str:
    left, right = (_text(member) for member in relation.members)
    return left if right == "0" else f"({left})-({right})"


def _text(member: str) -> str:
    return _expression(notation.split_unit(member)[0])


_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}


def _side(relation: Relation, leaf: Leaf) -> Form | None:
    """What a relation says of its name: the value behind "x = ", or the interval of an inequality; else None.

    In a chain behind a name every member that is a number must equal the last: x = 1 = 2 says nothing.
    """
    if set(relation.signs) != {"="}:
        found = _interval(relation)
        return found[1] if found else None
    if not _is_name(relation.members[0]):
        return None
    last = _form(relation.members[-1], 1)
    for member in relation.members[1:-1]:
        if not re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", member)) and not _equal(last, _form(member, 1), leaf):
            return None
    return last


def _interval(relation: Relation) -> tuple[str, Form] | None:
    """(name, interval) of x < 3, 2 \\le x < 5, x \\ne 1."""
    members, signs = relation.members, relation.signs
    if len(members) == 2 and not _is_name(members[0]) and _is_name(members[1]) and signs[0] in _FLIPPED:
        members, signs = members[::-1], (_FLIPPED[signs[0]],)
    low, high = _value(r"-\infty"), _value(r"\infty")
    if len(members) == 2 and _is_name(members[0]) and signs[0] in _FLIPPED:
        bound = _form(members[1], 1)
        if signs[0] == r"\ne":
            return _name(members[0]), Several(
                (Ordered("(", ")", (low, bound)), Ordered("(", ")", (bound, high))), False
            )
        if signs[0] in ("<", r"\le"):
            return _name(members[0]), Ordered("(", "]" if signs[0] == r"\le" else ")", (low, bound))
        return _name(members[0]), Ordered("[" if signs[0] == r"\ge" else "(", ")", (bound, high))
    if len(members) == 3 and _is_name(members[1]):
        if set(signs) <= {">", r"\ge"}:
            members, signs = members[::-1], tuple(_FLIPPED[sign] for sign in signs[::-1])
        if set(signs) <= {"<", r"\le"}:
            marks = "[" if signs[0] == r"\le" else "(", "]" if signs[1] == r"\le" else ")"
            return _name(members[1]), Ordered(*marks, (_form(members[0], 1), _form(members[2], 1)))
    return None


_SUBSCRIPT = re.compile(r"_(?:\{[^{}]*\}|\w)|'|\^\{(?:\\prime|\*)+\}")
_ARGUMENT = re.compile(r"(?<=[a-zA-Z}])\s*\([^()]*\)")
_CONSTANTS = re.compile(r"(?<![a-zA-Z\\])[ei](?![a-zA-Z])|\\(?:pi|infty|frac|cdot|times|text|angle|circ)(?![a-zA-Z])")


@lru_cache(65536)
def _is_name(text: str) -> bool:
    """Whether the text names a quantity: x, f(2), S_{ABC}, \\angle ABC, (x,y), a+b, \\text{Area}; no digits, no words."""
    text = _ARGUMENT.sub("", _SUBSCRIPT.sub("", text))
    words = re.findall(r"[a-zA-Z]+", " ".join(re.findall(r"\\text\{([^{}]*)\}", text)))
    if len(words) > 3 or any(word.lower() in notation._NOT_UNITS for word in words):
        return False
    if not re.fullmatch(r"[a-zA-Z\\{}()\s+*/,|-]+", text):
        return False
    return re.search(r"[a-zA-Z]", _CONSTANTS.sub("", re.sub(r"\\text(?=\{)", "", text))) is not None


def _name(text: str) -> str:
    return re.sub(r"[\s{}]|\\text|\\left|\\right", "", text)
