"""Which texts are expressions: a strict check before any algebra, in one pass over the tokens.

math-verify's parser is lenient in silence: it adds numbers that stand side by side, and drops primes, subscripts of
numbers and exponents such as T or a degree sign. A reward must not rest on such a reading, so a text reaches it only
if every token has one meaning here. All others are compared as words.
"""

import re
import string
from enum import Enum, auto

from stages.core.grading.verifier.latex import MAX_DEPTH, Refused


class Kind(Enum):
    """What a text is."""

    EXPRESSION = auto()
    ODD = auto()  # tokens that have no meaning, or more than one, in an expression
    BROKEN = auto()  # an operator, argument or bracket lacks its other side


class _Odd(Exception):
    pass


class _Broken(Exception):
    pass


_TOKEN = re.compile(r"\d+(?:\.\d+)?|\\[a-zA-Z]+|\\.|.", re.ASCII | re.DOTALL)
_LETTERS = """
    alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi rho varrho sigma tau
    upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar infty
"""
_FUNCTION_NAMES = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp"
_NAMES = frozenset("\\" + name for name in _LETTERS.split()) | frozenset(string.ascii_letters)
_FUNCTIONS = frozenset("\\" + name for name in _FUNCTION_NAMES.split())
_OF_LISTS = frozenset([r"\gcd", r"\lcm", r"\max", r"\min"])
_OF_INTEGERS = frozenset([r"\gcd", r"\lcm"])
_INTEGERS = re.compile(r"[\d\s,+*/!^{}-]*\)", re.ASCII)  # gcd(12x,18) is 6 to the parser: of polynomials
_ACCENTS = frozenset([r"\bar", r"\overline", r"\hat", r"\vec", r"\dot", r"\ddot"])
_LARGE = frozenset([r"\sum", r"\prod", r"\int", r"\lim"])
_BINARY = frozenset(["+", "-", "*", "/", r"\cdot", r"\times", r"\div"])
_CLOSERS = {"(": ")", "[": "]", "{": "}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil", r"\lvert": r"\rvert"}
_ARGUMENTS = {r"\frac": 2, r"\binom": 2, r"\sqrt": 1}
COMMANDS = {
    token[1:]
    for tokens in (_NAMES, _FUNCTIONS, _OF_LISTS, _ACCENTS, _LARGE, _BINARY, _CLOSERS, _CLOSERS.values(), _ARGUMENTS)
    for token in tokens
    if len(token) > 1
}
_ACCENTED = re.compile(r"(?:[a-zA-Z]|\\[a-zA-Z]+(?![a-zA-Z]) ?)+(?:_\{[a-zA-Z0-9]+\})?", re.ASCII)
_SUBSCRIPT = re.compile(r"[a-zA-Z0-9+\- ]+|\\[a-zA-Z]+", re.ASCII)
_DROPPED = re.compile(r"T|\\top|(?:\\prime|\\circ|\*|\\dagger)+")  # exponents that the parser drops or misreads
_DERIVATIVE = re.compile(r"\(\d+\)", re.ASCII)  # y^{(2)}
_DIGITS = re.compile(r"\{\d+\}\{\d+\}", re.ASCII)
_BOUND = re.compile(r"[a-zA-Z]\s*(=|\\to(?![a-zA-Z]))\s*(.+)", re.DOTALL)


def judge(text: str) -> Kind:
    """Whether a text in canonical LaTeX is an expression. Raises Refused for a tower of powers or factorials."""
    if _is_tower(text):
        raise Refused("a tower of powers or factorials")
    try:
        _Reader(text).read()
    except _Odd:
        return Kind.ODD
    except _Broken:
        return Kind.BROKEN
    return Kind.EXPRESSION


_TOWER = re.compile(r"\^\{-?\d{6,}|!!!|\\(?:binom|Gamma)\s*[{(]\d{6,}|[\d.]\s*[eE][+-]?\d{4,}", re.ASCII)


def _is_tower(text: str) -> bool:
    """Whether a text asks for a number of more digits than any answer has; sympy would write out every one."""
    if _TOWER.search(text):
        return True
    for base, exponent in re.findall(r"\^\{\(?(\d+)\^\{(\d+)", text, re.ASCII):
        if len(base) > 6 or len(exponent) > 2 or int(base) ** int(exponent) > 10**5:
            return True
    return any(int(n) > 5000 for n in re.findall(r"(?<!\d)(\d+)\)?!", text, re.ASCII))


class _Reader:
    """Reads tokens left to right, knowing only what came last and which brackets are open."""

    def __init__(self, text: str, depth: int = 0) -> None:
        if depth > MAX_DEPTH:
            raise _Odd
        self._depth = depth
        self._text = text
        self._tokens = [match for match in _TOKEN.finditer(text) if match.group() != " "]
        self._next = 0
        self._last = ""  # the kind of operand just read, or "" where one has to come
        self._open: list[str] = []  # what closes the open brackets, each with the function whose arguments it holds

    def read(self) -> None:
        """Raise _Odd or _Broken unless all of the text is one expression."""
        while self._next < len(self._tokens):
            self._operand_or_operator(self._take())
        if not self._last or self._open:
            raise _Broken

    def _take(self) -> str:
        if self._next == len(self._tokens):
            raise _Broken
        self._next += 1
        return self._tokens[self._next - 1].group()

    def _peek(self) -> str:
        return self._tokens[self._next].group() if self._next < len(self._tokens) else ""

    def _operand_or_operator(self, token: str) -> None:
        if token in _BINARY:
            self._operator(token)
        elif self._open and token == self._open[-1].split()[0] and self._last:
            self._open.pop()
            self._last = "other"
        elif token == "," and self._open and " " in self._open[-1]:
            self._expect(bool(self._last))
            self._last = ""
        elif token in "^_!" and len(token) == 1:
            self._postfix(token)
        else:
            self._operand(token)

    def _expect(self, holds: bool) -> None:
        if not holds:
            raise _Broken

    def _operator(self, token: str) -> None:
        self._expect(bool(self._last) or token in "+-")
        self._last = ""

    def _postfix(self, token: str) -> None:
        self._expect(bool(self._last))
        if token == "!":
            if self._last == "factorial":
                raise _Odd
            self._last = "factorial"
        elif token == "^":
            inside = self._group()
            if self._last == "power" or _DROPPED.fullmatch(inside):
                raise _Odd
            if self._last == "name" and _DERIVATIVE.fullmatch(inside):
                raise _Odd
            self._nested(inside)
            self._last = "power"
        else:
            if self._last != "name" or not _SUBSCRIPT.fullmatch(self._group()):
                raise _Odd
            self._last = "other"

    def _operand(self, token: str) -> None:
        before, self._last = self._last, "other"
        if token[0] in string.digits:
            if before:  # 3 4, x2, (x+1)2
                raise _Odd
            self._last = "number"
        elif token in _NAMES:
            self._last = "name"
        elif token in _ARGUMENTS:
            self._command(token, before)
        elif token in _FUNCTIONS:
            self._function(token)
        elif token in _OF_LISTS:
            self._list(token)
        elif token in _ACCENTS:
            if not _ACCENTED.fullmatch(self._group()):
                raise _Odd
            self._last = "name"
        elif token in _LARGE:
            self._large(token)
        else:
            self._bracket(token, before)

    def _bracket(self, token: str, before: str) -> None:
        if token == "|":
            self._open.append("|")
        elif token not in _CLOSERS or (token == "{" and before):
            raise _Odd
        else:
            self._open.append(_CLOSERS[token])
        self._last = ""

    def _group(self) -> str:
        """The inside of the braces that come next."""
        if self._peek() != "{":
            raise _Broken
        begin, depth = self._tokens[self._next].end(), 0
        while True:
            token = self._take()
            depth += {"{": 1, "}": -1}.get(token, 0)
            if depth == 0:
                return self._text[begin : self._tokens[self._next - 1].start()]

    def _nested(self, text: str) -> None:
        _Reader(text, self._depth + 1).read()

    def _command(self, token: str, before: str) -> None:
        if token == r"\frac" and before == "number" and _DIGITS.match(self._text, self._tokens[self._next - 1].end()):
            raise _Odd  # 2\frac{1}{2}\pi: mixed, or a product?
        if token == r"\sqrt" and self._peek() == "[":
            begin = self._tokens[self._next].end()
            while self._take() != "]":
                pass
            self._nested(self._text[begin : self._tokens[self._next - 1].start()])
        for _ in range(_ARGUMENTS[token]):
            self._nested(self._group())

    def _function(self, token: str) -> None:
        """A function's own index and power; its argument is the operand that has to follow."""
        if token == r"\log" and self._peek() == "_":
            self._take()
            self._nested(self._group())
        if self._peek() == "^":
            self._take()
            self._nested(self._group())
        self._last = ""

    def _list(self, token: str) -> None:
        if self._take() != "(":
            raise _Odd
        if token in _OF_INTEGERS and not _INTEGERS.match(self._text, self._tokens[self._next - 1].end()):
            raise _Odd
        self._open.append(f") {token}")
        self._last = ""

    def _large(self, token: str) -> None:
        """A sum, product, integral or limit: its bounds; what it ranges over has to follow."""
        for mark in "_^":
            if self._peek() == mark:
                self._take()
                inside = self._group()
                if mark == "_" and token != r"\int":
                    if (match := _BOUND.fullmatch(inside.strip())) is None:
                        raise _Odd
                    inside = match.group(2)
                self._nested(inside)
        self._last = ""
