"""LaTeX as a row of tokens: brackets, and splitting outside of them. Linear in the text."""

import re
from collections.abc import Iterator

MAX_LENGTH = 1000  # of an answer or prediction that is looked at, in characters
MAX_WRITTEN = 2 * MAX_LENGTH  # of the same in canonical notation: below the 4,300 digits that int() and str() take
MAX_ITEMS = 64  # of a list
MAX_DEPTH = 24  # of brackets of all kinds, \\frac{}{} and the like included
FUNCTIONS = """
    arcsin arccos arctan sinh cosh tanh coth sin cos tan cot sec csc log ln lg exp sqrt gcd lcm max min det mod
""".split()  # noqa: SIM905


class Refused(Exception):
    """An answer that is not looked into: too long, too deep, or asking for work that no answer needs."""


TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_OPEN = {"(", "[", "{", "\\{", "\\langle", "\\lfloor", "\\lceil", "\\begin"}
_CLOSE = {")", "]", "}", "\\}", "\\rangle", "\\rfloor", "\\rceil", "\\end"}


def depth_of(text: str) -> int:
    """How deep brackets of all kinds nest, matched or not."""
    depth = deepest = 0
    for character in re.findall(r"[()\[\]{}]", text):
        depth = depth + 1 if character in "([{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def tokens(text: str) -> Iterator[tuple[int, str, int]]:
    """(position, token, depth of brackets outside of it) for each LaTeX token; brackets of all kinds count alike."""
    depth = 0
    for match in TOKEN.finditer(text):
        token = match.group()
        if token in _CLOSE:
            depth -= 1
        yield match.start(), token, depth
        if token in _OPEN:
            depth += 1


def closing(text: str, start: int) -> int | None:
    """Where the bracket at `start` is closed."""
    for position, token, depth in tokens(text[start:]):
        if depth == 0 and token in _CLOSE:
            return start + position
        if depth < 0:
            return None
    return None


def split(text: str, separators: frozenset[str]) -> tuple[list[str], list[str]]:
    """The pieces of `text` between those separators that stand outside of all brackets, and the separators.

    Raises Refused for more than MAX_ITEMS pieces.
    """
    pieces, signs, begin = [], [], 0
    for position, token, depth in tokens(text):
        if depth == 0 and token in separators:
            pieces.append(text[begin:position].strip())
            signs.append(token)
            begin = position + len(token)
    if len(pieces) >= MAX_ITEMS:
        raise Refused(f"more than {MAX_ITEMS} items")
    return [*pieces, text[begin:].strip()], signs


def letters(text: str) -> set[str]:
    """Letters that stand for something, not those of commands and environments."""
    return set(re.findall(r"[a-zA-Z]", re.sub(r"\\(?:begin|end)\{\w+\}|\\[a-zA-Z]+", " ", text)))
