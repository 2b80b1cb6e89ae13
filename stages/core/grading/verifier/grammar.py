"""One expression, from canonical LaTeX to a tree: what each construct means is said here, and nowhere else.

    parse(r"2\\sqrt{3}-1")  ->  +( *(number 2, root(number 2, number 3)), neg(number 1) )

Side by side is a product, 2(8) and 40(\\frac12) as well as 2x; only an integer before a proper fraction of integers is
a mixed number: 2\\frac13, 2 1/3. Two numbers side by side are nothing. A function without brackets takes the product
that follows, up to the next sign, function, bracket, dot or cross. What two readers may read in two ways is no
expression: 1/2x, \\ln 2/3, a power of a power without braces, primes, indices of numbers, exponents such as T.
"""

import math
import re
import string
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from stages.core.grading.verifier.latex import MAX_DEPTH, Refused

MAX_BITS = 20_000  # of a power that is written out here; a greater one is left to algebra
MAX_FACTORIAL = 1000
MAX_PRODUCTS = 150  # in an expression: they nest, the next in the one before


class Tree(NamedTuple):
    """An operation and what it works on; `text` is a number's digits, a name, or what a call or a sum is called."""

    op: str
    args: tuple["Tree", ...] = ()
    text: str = ""


class _Odd(Exception):
    """A token that has no meaning in an expression, or more than one."""


_TOKEN = re.compile(
    r"\d*\.\d*\\(?:overline|bar|dot)\s*\{?\s*\d+\s*\}?(?:\d*\\dot\s*\{?\d\}?)?|\d+\.\(\d+\)|\d+\.\d+\s*\\ldots(?![a-zA-Z])"
    r"|\d+(?:\.\d+)?|\\[a-zA-Z]+|\\.|.",
    re.ASCII | re.DOTALL,
)
_LETTERS = """
    alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi rho varrho sigma tau
    upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar infty
"""
_FUNCTION_NAMES = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh coth log lg ln exp"
CONSTANTS = frozenset([r"\pi", r"\infty", "e", "i"])
_NAMES = frozenset("\\" + name for name in _LETTERS.split()) | frozenset(string.ascii_letters)
_FUNCTIONS = frozenset("\\" + name for name in _FUNCTION_NAMES.split())
_INVERSE = {r"\sin": r"\arcsin", r"\cos": r"\arccos", r"\tan": r"\arctan"}
_OF_LISTS = frozenset([r"\gcd", r"\lcm", r"\max", r"\min"])
_ACCENTS = frozenset([r"\bar", r"\overline", r"\hat", r"\vec", r"\dot", r"\ddot"])
_LARGE = frozenset([r"\sum", r"\prod", r"\int", r"\lim"])
_TIMES = frozenset(["*", r"\cdot", r"\times"])
_OVER = frozenset(["/", r"\div"])
_BRACKETS = {"(": ")", "[": "]", "{": "}", "|": "|"}
_CALLING = {r"\lfloor": r"\rfloor", r"\lceil": r"\rceil", r"\lvert": r"\rvert"}
_CLOSERS = frozenset([*_BRACKETS.values(), *_CALLING.values()])
_OTHERS = frozenset([r"\frac", r"\binom", r"\sqrt"])
COMMANDS = {
    token[1:]
    for tokens in (_NAMES, _FUNCTIONS, _OF_LISTS, _ACCENTS, _LARGE, _TIMES, _OVER, _CALLING, _CLOSERS, _OTHERS)
    for token in tokens
    if len(token) > 1
}
_ACCENTED = re.compile(r"(?:[a-zA-Z]|\\[a-zA-Z]+)+(?:_\{[a-zA-Z0-9]+\})?", re.ASCII)
_INDEX = re.compile(r"[a-zA-Z0-9+,\-]+|\\[a-zA-Z]+", re.ASCII)
_NO_POWER = re.compile(r"T|\\top|(?:\\prime|\*|\\dagger)+|", re.ASCII)
_DERIVATIVE = re.compile(r"\(\d+\)", re.ASCII)  # y^{(2)}
_TOWER = re.compile(r"\^\{-?\d{6,}|!!!|\\binom\s*\{\d{6,}|[\d.]\s*[eE][+-]?\d{4,}", re.ASCII)


@lru_cache(4096)
def parse(text: str) -> Tree | None:
    """The tree of a text in canonical LaTeX; None if it is no expression of one meaning.

    Raises Refused where an operator, argument or bracket lacks its other side, and for a tower of powers or factorials.
    """
    if _is_tower(text):
        raise Refused("a tower of powers or factorials")
    try:
        return _Reader(text).read()
    except _Odd:
        return None


def _is_tower(text: str) -> bool:
    """Whether a text asks for a number of more digits than any answer has; sympy would write out every one."""
    if _TOWER.search(text):
        return True
    for base, exponent in re.findall(r"\^\{\(?(\d+)\^\{(\d+)", text, re.ASCII):
        if len(base) > 6 or len(exponent) > 2 or int(base) ** int(exponent) > 10**5:
            return True
    return any(int(n) > 5000 for n in re.findall(r"(?<!\d)(\d+)\)?!", text, re.ASCII))


def number(text: str) -> Tree:
    """The leaf of a number."""
    return Tree("number", (), text)


def negative(tree: Tree) -> Tree:
    """Less the tree."""
    return Tree("neg", (tree,))


def _is_number(token: str) -> bool:
    return token.isascii() and token[:1].isdigit()


class _Reader:
    """Recursive descent, a method a level: sum, term, factor (with its power), operand."""

    def __init__(self, text: str) -> None:
        matches = [match for match in _TOKEN.finditer(text) if match.group() != " "]
        self._tokens = [match.group() for match in matches]
        self._after_gap = {
            index for index, match in enumerate(matches) if text[match.start() - 1 : match.start()] == " "
        }
        self._next = self._depth = self._num_products = 0
        self._bars = 0  # open |, in the innermost bracket of another kind

    def read(self) -> Tree:
        """All of the text as one expression."""
        tree = self._sum()
        if self._next < len(self._tokens):
            raise _Odd
        return tree

    def _peek(self, ahead: int = 0) -> str:
        index = self._next + ahead
        return self._tokens[index] if index < len(self._tokens) else ""

    def _take(self, wanted: str = "") -> str:
        token = self._peek()
        if not token or (wanted and token != wanted):
            raise (
                _Odd if token and wanted != "{" else Refused("an operator, argument or bracket without its other side")
            )
        self._next += 1
        return token

    def _sum(self) -> Tree:
        terms = [self._term()]
        while self._peek() in ("+", "-"):
            is_minus = self._take() == "-"
            term = self._term()
            terms.append(negative(term) if is_minus else term)
        return Tree("+", tuple(terms)) if len(terms) > 1 else terms[0]

    def _signed(self, read: Callable[[], Tree]) -> Tree:
        num_minus = 0
        while self._peek() in ("+", "-"):
            num_minus += self._take() == "-"
        tree = read()
        return [tree, negative(tree), negative(negative(tree))][num_minus and 2 - num_minus % 2]

    def _term(self) -> Tree:
        return self._signed(self._product)

    def _product(self) -> Tree:
        tree = self._factor()
        while True:
            token = self._peek()
            self._num_products += 1
            if self._num_products > MAX_PRODUCTS:
                raise _Odd
            if token in _TIMES:
                self._take()
                tree = Tree("*", (tree, self._signed(self._factor)))
            elif token in _OVER:
                self._take()
                tree = Tree("/", (tree, self._signed(self._factor)), token)
                if self._has_operand() and not self._is_plain_fraction(tree):
                    raise _Odd  # 1/2x
            elif self._has_operand():
                if _is_number(token) or (token == "{" and self._peek(1)[:1] in (*string.digits, "\\")):
                    raise _Odd  # 3 4, x2, 3{4}
                tree = Tree("*", (tree, self._factor()))
            else:
                return tree

    def _has_operand(self) -> bool:
        """Whether what comes is an operand, so that the one before is multiplied by it."""
        token = self._peek()
        if token == "|":
            return self._bars == 0
        known = token in _NAMES or token[1:] in COMMANDS or token in _BRACKETS
        return bool(token) and (_is_number(token) or (known and token not in _CLOSERS | _TIMES | _OVER))

    def _is_plain_fraction(self, tree: Tree) -> bool:
        """Whether a quotient is 1/2 before a bracket or a space, so that it is meant as one factor."""
        literal = all(side.op == "number" for side in tree.args)
        return literal and (self._peek() in ("(", "[") or self._next in self._after_gap)

    def _factor(self) -> Tree:
        is_bracket = self._peek() in _BRACKETS
        tree = self._operand()
        last = tree.op if tree.op in ("mixed", "name") and not is_bracket else ""
        while self._peek() in ("^", "!"):
            mark = self._take()
            if last in ("mixed", mark):
                raise _Odd
            tree = Tree("!", (tree,)) if mark == "!" else self._power(tree, last == "name")
            last = mark
        if self._peek() == "_":
            raise _Odd
        return tree

    def _power(self, base: Tree, is_name: bool) -> Tree:
        inside, num = self._inside()
        if inside == r"\circ" and base.op == "number":
            self._next += num
            return Tree("*", (base, Tree("/", (Tree("name", (), r"\pi"), number("180")))), "degrees")
        if (_NO_POWER.fullmatch(inside) and inside) or (is_name and _DERIVATIVE.fullmatch(inside)):
            raise _Odd
        return Tree("^", (base, self._group()))

    def _inside(self) -> tuple[str, int]:
        """The tokens in the braces that come next, which are not taken, and how many all of these are."""
        depth = 0
        for num in range(len(self._tokens) - self._next):
            depth += {"{": 1, "}": -1}.get(self._peek(num), 0)
            if depth == 0:
                return "".join(self._tokens[self._next + 1 : self._next + num]), num + 1
        raise Refused("braces that are not closed")

    def _group(self, opening: str = "{") -> Tree:
        self._take(opening)
        return self._until(_BRACKETS[opening])

    def _until(self, closing: str) -> Tree:
        """The sum up to a bracket, whose opening was taken."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _Odd
        bars, self._bars = self._bars, self._bars + 1 if closing == "|" else 0
        if closing == "}" and self._peek() == "}":
            raise Refused("empty braces")
        tree = self._sum()
        self._take(closing)
        self._bars = bars
        self._depth -= 1
        return tree

    def _operand(self) -> Tree:
        token = self._take()
        if _is_number(token) or (token[0] == "." and len(token) > 1):
            return self._number(token)
        if token in _NAMES:
            return Tree("name", (), token + self._index())
        if token in (r"\frac", r"\binom"):
            return Tree({r"\frac": "/", r"\binom": "binom"}[token], (self._group(), self._group()))
        if token == r"\sqrt":
            order = self._group("[") if self._peek() == "[" else number("2")
            return Tree("root", (order, self._group()))
        if token in _FUNCTIONS:
            return self._call(token)
        if token in _OF_LISTS:
            return self._of_list(token)
        if token in _ACCENTS:
            return Tree("name", (), f"{token}{{{self._matching(_ACCENTED)}}}")
        if token in _LARGE:
            return self._large(token)
        if token in _CALLING:
            return Tree("call", (self._until(_CALLING[token]),), {r"\lvert": "|"}.get(token, token))
        if token not in _BRACKETS:
            if token in _TIMES | _OVER or token == "^":
                raise Refused("an operator without its other side")
            raise _Odd
        tree = self._until(_BRACKETS[token])
        return Tree("call", (tree,), "|") if token == "|" else tree

    def _number(self, text: str) -> Tree:
        """A number, and the proper fraction of a mixed one."""
        tree = number(text)
        if literal(text) is None:
            raise _Odd  # 0.12\ldots
        if text.isdigit() and self._peek() == r"\frac":
            marks, (above, below) = [self._peek(n) for n in (1, 3, 4, 6)], (self._peek(2), self._peek(5))
            if marks == ["{", "}", "{", "}"] and above.isdigit() and below.isdigit():
                self._next += 7
                return self._mixed(tree, above, below)
        elif text.isdigit() and self._peek().isdigit() and self._peek(1) == "/" and self._peek(2).isdigit():
            self._next += 3
            return self._mixed(tree, self._peek(-3), self._peek(-1))
        return tree

    def _mixed(self, whole: Tree, above: str, below: str) -> Tree:
        if int(above) >= int(below):
            raise _Odd
        return Tree("mixed", (whole, Tree("/", (number(above), number(below)))))

    def _index(self) -> str:
        """The index of a name, as _{max}."""
        if self._peek() != "_":
            return ""
        self._take()
        return "_" + self._matching(_INDEX)

    def _matching(self, pattern: re.Pattern[str]) -> str:
        """What the next braces hold, if it is of this form."""
        inside, num = self._inside()
        inside = re.sub(r"\\text\{([^{}]*)\}", r"\1", inside)
        if not pattern.fullmatch(inside):
            raise _Odd
        self._next += num
        return inside

    def _call(self, token: str) -> Tree:
        """A function with its own index and power, and its argument."""
        base: tuple[Tree, ...] = ()
        power = None
        if token == r"\log" and self._peek() == "_":
            self._take()
            base = (self._group(),)
        if self._peek() == "^":
            self._take()
            power = self._group()
            if power == negative(number("1")):
                if token not in _INVERSE:
                    raise _Odd
                token, power = _INVERSE[token], None
        call = Tree("call", (self._argument(), *base), token)
        return call if power is None else Tree("^", (call, power))

    def _argument(self) -> Tree:
        if self._peek() in ("(", "[", "{"):
            return self._until(_BRACKETS[self._take()])
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _Odd
        tree = self._signed(self._factor)
        while self._has_operand() and self._peek() not in _FUNCTIONS | {"(", "[", "{"}:
            if _is_number(self._peek()):
                raise _Odd
            tree = Tree("*", (tree, self._factor()))
        if self._peek() in _OVER:
            if r"\pi" not in names(tree, constants=True):
                raise _Odd  # \ln 2/3; but \cos 2\pi/7
            tree = Tree("/", (tree, self._factor())) if self._take() else tree
        self._depth -= 1
        return tree

    def _of_list(self, token: str) -> Tree:
        opening = self._take()
        if opening not in ("(", r"\{"):
            raise _Odd
        args = [self._sum()]
        while self._peek() == ",":
            self._take()
            args.append(self._sum())
        self._take({"(": ")", r"\{": r"\}"}[opening])
        values = [exact(arg) for arg in args]
        if token in (r"\gcd", r"\lcm") and not all(value and value.denominator == 1 for value in values):
            raise _Odd  # of polynomials?
        return Tree("call", tuple(args), token)

    def _large(self, token: str) -> Tree:
        """A sum, product, limit or integral: its variable, what it ranges over, and its bounds."""
        bounds: list[Tree] = []
        variable = ""
        if token != r"\int":
            self._take("_")
            self._take("{")
            variable = self._take()
            if variable not in _NAMES or self._take() != (r"\to" if token == r"\lim" else "="):
                raise _Odd
            bounds.append(self._until("}"))
        for mark in "_^" if token == r"\int" else "^" if token != r"\lim" else "":
            if token == r"\int" and not bounds and self._peek() != mark:
                raise _Odd
            self._take(mark)
            bounds.append(self._group())
        if token != r"\int":
            return Tree("over", (self._term(), Tree("name", (), variable), *bounds), token)
        body = self._before_differential()
        return Tree("over", (body, Tree("name", (), self._take()), *bounds), token)

    def _before_differential(self) -> Tree:
        """The integrand: all up to a d before a name, which is taken."""
        depth = 0
        for end in range(self._next, len(self._tokens) - 1):
            depth += {"{": 1, "(": 1, "}": -1, ")": -1}.get(self._tokens[end], 0)
            if depth == 0 and self._tokens[end] == "d" and self._tokens[end + 1] in _NAMES:
                rest, self._tokens = self._tokens[end:], self._tokens[:end]
                tree = self._sum() if self._next < end else number("1")
                if self._next < end:
                    raise _Odd
                self._tokens += rest
                self._next += 1
                return tree
        raise _Odd


# --- what a tree says -------------------------------------------------------------------------------------------------


def walk(tree: Tree) -> Iterator[Tree]:
    """The tree and all that it is made of."""
    yield tree
    for arg in tree.args:
        yield from walk(arg)


def names(tree: Tree, constants: bool = False) -> set[str]:
    """The names in it, those that a sum binds among them; pi, e, i and infinity only on demand."""
    all_names = {part.text for part in walk(tree) if part.op == "name"}
    return all_names if constants else all_names - CONSTANTS


@lru_cache(4096)
def literal(text: str) -> Fraction | None:
    """The value of a number as it is written: 12, 0.5, 0.1\\overline{6}, 0.(3), 0.333\\ldots; None for 0.12\\ldots."""
    if match := re.fullmatch(
        r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?\s*(\d+)\s*\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?", text
    ):
        whole, start, again = match.group(1), match.group(2), "".join(filter(None, match.groups()[2:]))
    elif match := re.fullmatch(r"(\d+)\.()\((\d+)\)", text):
        whole, start, again = match.groups()
    elif match := re.fullmatch(
        r"(\d+)\.(?:(\d{0,20}?)(\d)\3{2,}|()(\d{1,20}?)\5+|(\d{0,20}?)(\d{2,20}?)\7+)\s*\\ldots", text
    ):
        whole, (start, again) = match.group(1), [part for part in match.groups()[1:] if part is not None]
    else:
        return None if "\\" in text else Fraction(text)
    return Fraction(f"{whole or 0}.{start}0") + Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(start))


def exact(tree: Tree) -> Fraction | None:
    """The value of a tree that is a rational number, by arithmetic on fractions; None where that does not say."""
    if tree.op == "number":
        return literal(tree.text)
    if tree.op in ("name", "over"):
        return None
    values = [exact(arg) for arg in tree.args]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    try:
        return _VALUES[tree.text if tree.op == "call" else tree.op](*known)
    except (KeyError, ValueError, ZeroDivisionError, OverflowError, TypeError):
        return None


def _to_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        root = _root(Fraction(exponent.denominator), base)
        return None if root is None else _to_power(root, Fraction(exponent.numerator))
    bits = base.numerator.bit_length() + base.denominator.bit_length()
    if bits * abs(exponent) > MAX_BITS or (base == 0 and exponent <= 0):
        return None
    return base ** int(exponent)


def _root(order: Fraction, value: Fraction) -> Fraction | None:
    """The real root, if it is rational."""
    if order.denominator != 1 or not 1 <= order <= 64 or (value < 0 and order % 2 == 0):
        return None
    above, below = (_whole_root(abs(n), int(order)) for n in (value.numerator, value.denominator))
    return None if above is None or below is None else Fraction(above if value >= 0 else -above, below)


def _whole_root(value: int, order: int) -> int | None:
    low, high = 0, 1 << value.bit_length() // order + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if middle**order < value else (low, middle)
    return low if low**order == value else None


def _choose(top: Fraction, below: Fraction) -> Fraction | None:
    whole = top.denominator == below.denominator == 1 and 0 <= top <= MAX_FACTORIAL and below >= 0
    return Fraction(math.comb(int(top), int(below))) if whole else None


_VALUES: dict[str, Callable[..., Fraction | None]] = {
    "+": lambda *terms: sum(terms, Fraction(0)),
    "neg": lambda value: -value,
    "*": lambda left, right: left * right,
    "/": lambda above, below: above / below,
    "mixed": lambda whole, part: whole + part,
    "^": _to_power,
    "root": _root,
    "!": lambda n: Fraction(math.factorial(int(n))) if n.denominator == 1 and 0 <= n <= MAX_FACTORIAL else None,
    "binom": _choose,
    "|": abs,
    r"\lfloor": lambda value: Fraction(math.floor(value)),
    r"\lceil": lambda value: Fraction(math.ceil(value)),
    r"\gcd": lambda *values: Fraction(math.gcd(*map(int, values))),
    r"\lcm": lambda *values: Fraction(math.lcm(*map(int, values))),
    r"\max": lambda *values: max(values),
    r"\min": lambda *values: min(values),
}
