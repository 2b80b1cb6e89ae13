"""What an answer is: a value with its unit, words, a tuple, a list, a relation, a matrix; and reading one from text."""

import re
from collections.abc import Iterable
from fractions import Fraction
from functools import lru_cache
from itertools import repeat
from typing import NamedTuple

from stages.core.grading.verifier import grammar, latex, notation, quantities
from stages.core.grading.verifier.grammar import Tree
from stages.core.grading.verifier.latex import Refused

MAX_SIGNS = 3  # plus-minus signs in one value: 8 values


class Value(NamedTuple):
    """An expression, as canonical LaTeX and as a tree; its value where that is rational (percent not yet applied)."""

    text: str
    tree: Tree
    number: Fraction | None
    unit: str = ""
    is_percent: bool = False
    base: int = 10


class Words(NamedTuple):
    """Text that is no mathematics, without case, spaces and punctuation."""

    plain: str


class Ordered(NamedTuple):
    """(1,2), [1,2): a tuple or an interval."""

    opening: str
    closing: str
    items: tuple["Form", ...]


class Several(NamedTuple):
    """1, 2 or {1,2} (with braces) or a union: the order does not count."""

    items: tuple["Form", ...]
    braces: bool


class Relation(NamedTuple):
    """x = 3, 2 < x < 5, y = 2x+1: members and the signs between them."""

    members: tuple[str, ...]
    signs: tuple[str, ...]


class Approximation(NamedTuple):
    """\\sqrt{2} \\approx 1.41: an exact value, or a relation that ends in one, and a decimal."""

    exact: "Form"
    decimal: "Form"


class Rows(NamedTuple):
    """Rows of a matrix, whatever its brackets; of a scaled one each cell is the product of the factor and a cell."""

    rows: tuple[tuple["Form", ...], ...]
    is_scaled: bool = False


class Congruence(NamedTuple):
    """n \\equiv 3 \\pmod 7."""

    name: str
    residue: Fraction
    modulus: int


Form = Congruence | Value | Words | Ordered | Several | Relation | Approximation | Rows
_COMMA = frozenset([",", ";"])
_UNION = frozenset([r"\cup"])
_SIGNS = frozenset(["=", "<", ">", r"\le", r"\ge", r"\ne", r"\in", r"\approx"])
_COMMA_TWICE = re.compile(r"(\d+),\1", re.ASCII)  # 5,5: twice the same, or five and a half?
_MATRIX = re.compile(
    r"\\begin\{((?:p|b|B|small)?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}(?:\^\{(T|\\top|\\text\{T\})\})?",
    re.DOTALL,
)
_THOUSANDS = re.compile(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])", re.ASCII)
_SPACED_THOUSANDS = re.compile(r"(?<![\d.])(?<!\d )([1-9]\d{0,2}(?: \d{3})+)(?![\d /]|\s*\\frac)", re.ASCII)
_DIGITS = r"(?P<digits>\d[0-9A-Z]*|[A-Z]+\d[0-9A-Z]*)"
_BASED = re.compile(  # 101_{2}, (101)_{(2)}, \\overline{101}_{\\text{base 2}}, 101\\text{ base two}
    rf"(?:\(\s*|\\(?:overline|text)\{{\s*)?{_DIGITS}\s*[)}}]?\s*"
    r"(?:_\{\s*\(?\s*(?:\\text\{)?\s*(?:base)?\s*\}?\s*(?P<index>\w+?)\s*\}?\s*\)?\s*\}"
    r"|\(?\s*(?:\\text\{)?\s*\(?\s*(?:in\s*)?base\s*\}?\s*(?:\\text\{)?(?P<base>\w+?)\s*\}?\s*\)?\s*\}?)",
    re.ASCII,
)
_RATIO = re.compile(r"(\d+(?:\.\d+)?)(?:\s*:\s*\d+(?:\.\d+)?)+", re.ASCII)
_TIME = re.compile(r"\d{1,2}:[0-5]\d", re.ASCII)
_ELEMENT = re.compile(r"(?P<name>[a-zA-Z]|\\[a-z]+)\s*(?:\\in\s*\\mathbb\{R\})?")
_WORD = re.compile(
    r"(?<![a-zA-Z\\])(?:[a-zA-Z]{4,}|(?i:yes|no|odd|all|any|not|the|of|is|to)|[B-DF-HJ-NP-TV-Z]{3,})(?![a-zA-Z])|^[B-DF-HJ-NP-TV-Z]{2}$"
)


@lru_cache(2048)
def read(text: str) -> Form:
    """Read an answer. Raises Refused for one that is not worth reading; never fails otherwise."""
    text = notation.canonical(text)
    outside = {position for position, _, depth in latex.tokens(text) if depth == 0}  # there 2,500 is 2500
    joined = _THOUSANDS.sub(lambda match: _join(match) if match.start() in outside else match.group(), text)
    return read_canonical(joined, 0)


def read_canonical(text: str, depth: int = 1) -> Form:
    """Read a part, `depth` levels inside, of what notation.canonical made of an answer."""
    text = notation.strip_outer(text)
    if depth > 6:
        raise Refused("nested too deeply")
    for reader in (_union, _congruence, _list, _braces, _plus_minus, _relation, _brackets, _matrix, _constant, _ratio):
        if (form := reader(text, depth)) is not None:
            return form
    return value(text)


def _several(items: Iterable[Form]) -> Form:
    """A list, flat and without what is said twice; one item is itself."""
    flat: list[Form] = []
    for item in items:
        flat += item.items if isinstance(item, Several) and not item.braces else [item]
    unique = tuple(dict.fromkeys(flat))
    return unique[0] if len(unique) == 1 else Several(unique, False)


def _union(text: str, depth: int) -> Form | None:
    """Of sets: those that list their elements as one, then intervals and what else there is."""
    pieces, signs = latex.split(text, _UNION)
    if not signs:
        return None
    parts = [read_canonical(piece, depth + 1) for piece in pieces]
    elements = [item for part in parts if isinstance(part, Several) and part.braces for item in part.items]
    others = [part for part in parts if not (isinstance(part, Several) and part.braces)]
    return _several([*others, *([Several(tuple(dict.fromkeys(elements)), True)] if elements else [])])


_CONGRUENCE = re.compile(r"(?P<name>[^,;]+?)\\equiv(?P<residue>[^,;]+?)\\pmod\{(?P<modulus>[1-9]\d{0,8})\}", re.ASCII)


def _congruence(text: str, _: int) -> Form | None:
    match = _CONGRUENCE.fullmatch(text)
    residue = value(match.group("residue").strip()) if match else None
    if (
        match is None
        or not isinstance(residue, Value)
        or residue.number is None
        or not is_name(match.group("name").strip())
    ):
        return None
    return Congruence(_spaceless(match.group("name")), residue.number, int(match.group("modulus")))


def _list(text: str, depth: int) -> Form | None:
    pieces, signs = latex.split(text, _COMMA)
    if signs and _COMMA_TWICE.fullmatch(text):
        return Words(plain(text))
    return _several(map(read_canonical, pieces, repeat(depth + 1))) if signs else None


def _braces(text: str, depth: int) -> Form | None:
    if not (text.startswith("\\{") and text.endswith("\\}") and latex.closing(text, 0) == len(text) - 2):
        return None
    inside = text[2:-2].strip()
    if not inside:
        return Several((), True)
    if (built := _builder(inside, depth)) is not None:
        return built
    pieces, _ = latex.split(_bracketed_thousands(inside), _COMMA)
    items = _several(read_canonical(piece, depth + 1) for piece in pieces)
    return Several(items.items if isinstance(items, Several) and not items.braces else (items,), True)


def _builder(inside: str, depth: int) -> Form | None:
    """{x | 1<x<5} is what its condition says of x; any other set-builder is compared by its two sides as text."""
    split = re.split(r"\\mid(?![a-zA-Z])|\||:", inside, maxsplit=1)
    if len(split) == 1:
        return None
    of, condition = (part.strip() for part in split)
    if named := _ELEMENT.fullmatch(of):
        name, form = _spaceless(named.group("name")), read_canonical(condition, depth + 1)
        said = form.items if isinstance(form, Several) and not form.braces else (form,)
        if all(isinstance(item, Relation) and name in map(_spaceless, item.members) for item in said):
            return form
    return Ordered("\\{", "\\}", (Words(_spaceless(of)), Words(_spaceless(condition))))


def _spaceless(text: str) -> str:
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


def _bracketed_thousands(text: str) -> str:
    """Thousands joined where the spaces after other commas, or a group 0xx, tell them from items."""
    if re.search(r",\s", text):
        return _THOUSANDS.sub(_join, text)
    return text


def _plus_minus(text: str, depth: int) -> Form | None:
    count = len(re.findall(r"\\pm(?![a-zA-Z])", text))
    if not count:
        return None
    if count > MAX_SIGNS:
        raise Refused(f"more than {MAX_SIGNS} plus-minus signs")
    variants = [text]
    for _ in range(count):
        variants = [re.sub(r"\\pm(?![a-zA-Z])", sign, item, count=1) for item in variants for sign in "+-"]
    return _several(read_canonical(item, depth + 1) for item in variants)


def _relation(text: str, depth: int) -> Form | None:
    members, signs = latex.split(text, _SIGNS)
    if not signs:
        return None
    if signs == [r"\in"] and is_name(members[0]):
        form = read_canonical(members[1], depth + 1)
        is_set = not isinstance(form, Value | Words) or "\\mathbb" in members[1]
        return form if is_set else Words(plain(text))
    if signs[-1] == r"\approx" and set(signs[:-1]) <= {"="}:
        if not is_name(members[-2]):
            exact = read_canonical("=".join(members[:-1]), depth + 1)
            return Approximation(exact, read_canonical(members[-1], depth + 1))
        if isinstance(decimal := value(members[-1]), Value) and decimal.number is not None:
            signs = [*signs[:-1], "="]
    if signs == ["="] and (named := _each_named(members[0], members[1])):
        return named
    return Relation(tuple(members), tuple(signs))


def _each_named(names: str, values: str) -> Form | None:
    """(x,y)=(1,2) as x=1, y=2."""
    if not (names[:1] == "(" == values[:1] and names[-1:] == ")" == values[-1:]):
        return None
    left, right = (latex.split(side[1:-1], _COMMA)[0] for side in (names, values))
    if not 1 < len(left) == len(right) or not all(map(is_name, left)) or any(map(is_name, right)):
        return None
    return Several(tuple(Relation(pair, ("=",)) for pair in zip(left, right, strict=True)), False)


def _brackets(text: str, depth: int) -> Form | None:
    opening = next((mark for mark in ("(", "[", r"\langle") if text.startswith(mark)), None)
    closing = next((mark for mark in (")", "]", r"\rangle") if text.endswith(mark)), None)
    if opening is None or closing is None or (opening == r"\langle") != (closing == r"\rangle"):
        return None
    if latex.closing(text, 0) != len(text) - len(closing):
        return None
    inside = text[len(opening) : len(text) - len(closing)].strip()
    pieces, signs = latex.split(_bracketed_thousands(inside), _COMMA)
    if signs:
        marks = ("(", ")") if opening == r"\langle" else (opening, closing)
        return Ordered(*marks, tuple(read_canonical(piece, depth + 1) for piece in pieces))
    return read_canonical(inside, depth + 1) if (opening, closing) in (("(", ")"), ("[", "]")) and inside else None


def _matrix(text: str, depth: int) -> Form | None:
    """Rows in brackets of any kind, and a number or name times that."""
    match = _MATRIX.search(text)
    if match is None or match.end() < len(text):
        return None
    rows = [row.split("&") for row in re.split(r"\\\\", match.group(2)) if row.strip()]
    if any(len(row) != len(rows[0]) for row in rows):
        if match.start():
            return None
        raise Refused("a ragged matrix")
    cells = tuple(tuple(read_canonical(cell, depth + 1) for cell in row) for row in rows)
    matrix = Rows(tuple(zip(*cells, strict=True)) if match.group(3) else cells)
    return matrix if not match.start() else _scaled(text[: match.start()], matrix)


def _scaled(factor: str, matrix: Rows) -> Form | None:
    if factor.strip() == "-":
        factor = "-1"
    times = value(re.sub(r"\\(?:cdot|times)\s*$|\*\s*$", "", factor).strip())
    cells = [cell for row in matrix.rows for cell in row]
    if not isinstance(times, Value) or not all(isinstance(cell, Value) for cell in cells):
        return None
    return Rows(tuple(tuple(_product(times, cell) for cell in row) for row in matrix.rows), is_scaled=True)


def _product(times: Value, cell: Form) -> Form:
    assert isinstance(cell, Value)
    return of_tree(Tree("*", (times.tree, cell.tree)))


def of_tree(tree: Tree) -> Value:
    """The value that a tree is."""
    return Value("", tree, grammar.exact(tree))


def _constant(text: str, depth: int) -> Form | None:
    if text == r"\mathbb{R}":
        return Ordered("(", ")", (value(r"-\infty"), value(r"\infty")))
    return Several((), True) if text == r"\emptyset" else None


def _ratio(text: str, depth: int) -> Form | None:
    """3:4 is the number 3/4; 2:4:6 is 1:2:3, 6:1 is no plain 6; what may be a time of day is words."""
    if not _RATIO.fullmatch(text):
        return None
    if _TIME.fullmatch(text):
        return Words(text)
    pieces = [piece.strip() for piece in text.split(":")]
    parts = [Fraction(piece) for piece in pieces]
    if 0 in parts:
        return Words(text)
    if len(parts) == 2 and parts[0] % parts[1]:
        return of_tree(Tree("/", (grammar.number(pieces[0]), grammar.number(pieces[1]))))
    return Ordered(":", ":", tuple(of_number(part / parts[0]) for part in parts))


def value(text: str) -> Form:
    """One expression with its unit; words, where it is none. Raises Refused for a command that nobody can read."""
    bare, unit, factor = quantities.split_unit(text)
    is_percent = bare.endswith("%")
    bare = expression(bare.removesuffix("%").strip())
    if based := _BASED.fullmatch(bare):
        return _in_base(based.group("digits"), quantities.spelled_number(based.group("index") or based.group("base")))
    commands = set(re.findall(r"\\\\|\\([a-zA-Z]+)", bare)) - {""}  # not the end of a row: \\frac
    if unknown := commands - grammar.COMMANDS - notation.VERBAL:
        raise Refused(f"the command \\{min(unknown)}")
    if not bare or _WORD.search(bare):
        return Words(plain(text))
    tree = grammar.parse(bare)
    if tree is None:
        return Words(plain(text))
    known = grammar.exact(tree)
    if factor == 1:
        return Value(bare, tree, known, unit, is_percent)
    return Words(plain(text)) if known is None else of_number(known * factor)._replace(unit=unit, is_percent=is_percent)


def of_number(number: Fraction) -> Value:
    """The value that a number is."""
    above, below = grammar.number(str(abs(number.numerator))), grammar.number(str(number.denominator))
    tree = above if number.denominator == 1 else Tree("/", (above, below))
    return Value(str(number), grammar.negative(tree) if number < 0 else tree, number)


def _in_base(digits: str, base: str) -> Form:
    """1011_{2} is its value; digits that the base lacks, or a base that nobody uses, are words."""
    text = f"{digits}_{{{base}}}"
    if not re.fullmatch(r"[1-9]\d?", base, re.ASCII) or not 2 <= int(base) <= 36:
        return Words(plain(text))
    if any(int(digit, 36) >= int(base) for digit in digits):
        return Words(plain(text))
    return of_number(Fraction(int(digits, int(base))))._replace(base=int(base))


def expression(text: str) -> str:
    """With thousands joined, and a number word as a number."""
    return quantities.spelled_number(_SPACED_THOUSANDS.sub(_join, text))


def _join(match: re.Match[str]) -> str:
    return match.group().replace(",", "").replace(" ", "")


def plain(text: str) -> str:
    """Words without case, spaces and idle punctuation; what could change a number stays, two numbers stay two."""
    text = re.sub(r"\\text(?![a-zA-Z])|\\[,; ]|\.(?!\d)", " ", text)
    text = re.sub(r"[\s{}$,;\\]+", " ", text).strip()
    return re.sub(r"(?<!\d) | (?!\d)", "", text).casefold()


_SUBSCRIPT = re.compile(r"(?<=[a-zA-Z])\^\{-1\}(?=\()|_(?:\{[^{}]*\}|\w)|'|\^\{(?:\\prime|\*)+\}")
_ARGUMENT = re.compile(r"(?<=[a-zA-Z}])\s*\([^()]*\)")
_CONSTANTS = re.compile(r"(?<![a-zA-Z\\])[ei](?![a-zA-Z])|\\(?:pi|infty|frac|cdot|times|text|angle|circ)(?![a-zA-Z])")
_NAMING = re.compile(r"(?![\s+*/,-])[a-zA-Z\\{}()\s+*/,|-]+(?<![\s+*/,-])")  # -x = 5 says that x is -5
_NAMING_COMMANDS = grammar.COMMANDS - {"sqrt"}
_NAMING_COMMANDS |= {"text", "angle", "triangle", "mathcal", "mathfrak", "mathbb", "partial", "det", "tilde", "widehat"}


@lru_cache(2048)
def is_name(text: str) -> bool:
    """Whether the text names a quantity: x, f(2), S_{ABC}, \\angle ABC, (x,y), a+b, \\text{Area}; without digits."""
    text = _ARGUMENT.sub("", _SUBSCRIPT.sub("", text))
    words = re.findall(r"[a-zA-Z]+", " ".join(re.findall(r"\\text\{([^{}]*)\}", text)))
    if len(words) > 3 or any(word.lower() in quantities.CHANGING_WORDS for word in words):
        return False
    if not _NAMING.fullmatch(text) or not set(re.findall(r"\\([a-zA-Z]+)", text)) <= _NAMING_COMMANDS:
        return False
    return re.search(r"[a-zA-Z]", _CONSTANTS.sub("", re.sub(r"\\text(?=\{)", "", text))) is not None
