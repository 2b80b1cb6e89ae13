"""The expensive half of the verifier: math-verify and sympy, in worker processes of their own, under bounds.

math-verify's grammar (latex2sympy2_extended) reads an expression. Numbers then decide: both sides are evaluated to 30
digits at a few fixed points, 100 digits where there is no variable (math-verify compares six decimals and simplifies
for what differs, which is slower and calls sqrt(2)*1e-20 equal to sqrt(3)*1e-20). Only what cannot be evaluated goes
to `math_verify.verify`, the answer first, as it wants them.

Each pair is under the bounds of `grading.bounds`: sympy can sit in C code that no handler interrupts.

Run as `python -m stages.core.grading.verifier.algebra DESCRIPTOR PARENT` by grading.verifier only.
"""

import logging
import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import verify

from stages.core.grading import bounds
from stages.core.grading.bounds import Bounds, Deadline
from stages.core.grading.verifier import comparison, grammar, quantities
from stages.core.grading.verifier.latex import Refused, letters
from stages.core.records import Verdict


class _Unreadable(Exception):
    """Text that is not an expression."""


class _AnswerUnreadable(Exception):
    """The answer itself is not an expression: nothing can be compared with it."""


# --- comparing ----------------------------------------------------------------------------------------------------


def compare(answer: str, prediction: str) -> Verdict:
    """The verdict on a prediction, by algebra where needed; not bounded."""
    try:
        return "correct" if comparison.equal(answer, prediction, same) else "wrong"
    except Refused:
        return "rejected"
    except _AnswerUnreadable:
        return "error"


def same(kind: str, gold: str, pred: str) -> bool:
    """Whether two expressions are equal ("value"), or have the same zeros or sign up to a constant factor."""
    try:
        left = parse(gold)
    except _Unreadable as error:
        raise _AnswerUnreadable(str(error)) from None
    if gold == pred:
        return True
    try:
        right = parse(pred)
    except _Unreadable:
        return False
    if kind == "decimal":
        value = _evaluate(left, {})
        return value is not None and _rounds(pred, value, min_digits=1)
    if kind == "value":
        return _same_value(left, right, gold, pred)
    return _same_up_to_factor(left, right, positive=kind == "inequality")


@lru_cache(4096)
def parse(text: str) -> Any:
    """The sympy object of an expression in canonical LaTeX; decimals become fractions, i the imaginary unit.

    Raises _Unreadable, and Refused for what no answer needs and would build a huge object.
    """
    if grammar.judge(text) is not grammar.Kind.EXPRESSION:
        raise _Unreadable(text)
    is_complex = "i" in letters(text)
    text = re.sub(r"(\\[a-zA-Z]+)|([EI]|[ei](?=_))", _own_symbol, text)
    text = re.sub(r"(\d+!)(?=\^)", r"(\1)", text)
    try:
        parsed = latex2sympy(
            text,
            is_real=not is_complex,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except MemoryError:
        raise
    except Exception as error:
        raise _Unreadable(text) from error
    if not isinstance(parsed, sympy.Expr):
        raise _Unreadable(text)
    return _exact(parsed)


def _own_symbol(match: re.Match[str]) -> str:
    """E, I and e_1 as symbols of their own: to the parser they are the base of the logarithm and the imaginary unit."""
    return match.group(1) or f"\\mathit{{{match.group(2)}}}"


def _exact(expression: Any) -> Any:
    """Floats as the fractions they were written as, the symbol i as the imaginary unit, \\sqrt[3]{-8} as -2."""
    swaps = {item: sympy.Rational(str(item)) for item in expression.atoms(sympy.Float)}
    swaps |= {item: sympy.I for item in expression.free_symbols if item.name == "i"}
    return sympy.real_root(expression.xreplace(swaps))


_SIGNS = [(1, 1, 1), (1, -1, 1), (-1, 1, 1), (-1, -1, -1), (1, 1, -1)]  # of every third variable, by point
_DIGITS = 30
_DUST = sympy.Float(10) ** -25
_NEEDED_POINTS = 3
_FAR = sympy.Rational(100003, 7)  # so much further out, too, if a function has steps: max(5,x) is not 5 everywhere
_STEPS = (sympy.floor, sympy.ceiling, sympy.Max, sympy.Min, sympy.Mod, sympy.sign, sympy.Abs)


def _points(*sides: Any) -> list[dict[Any, Any]]:
    """Where expressions are evaluated: five points of both signs, no two values alike, no integer; ten for steps."""
    symbols = sorted(set().union(*(side.free_symbols for side in sides)), key=lambda symbol: symbol.name)
    if not symbols:
        return [{}]
    points = [
        {
            symbol: sympy.Rational(signs[n % 3] * (37 * n + 91 + 53 * k), 61 + 8 * n + 5 * k)
            for n, symbol in enumerate(symbols)
        }
        for k, signs in enumerate(_SIGNS)
    ]
    if any(side.has(*_STEPS) for side in sides):
        points += [{symbol: value * _FAR for symbol, value in point.items()} for point in points]
    return points


def _evaluate(side: Any, point: dict[Any, Any]) -> Any:
    """A finite number, real or complex, or None if there is none."""
    value = side.evalf(_DIGITS, subs=point or None)
    finite = all(part.is_Float or part.is_Rational for part in value.as_real_imag())
    return value if finite else None


def _close(left: Any, right: Any) -> bool:
    scale = max(abs(left), abs(right))
    return bool(abs(left - right) <= scale * sympy.Float(10) ** -20)


def _same_value(left: Any, right: Any, gold: str, pred: str) -> bool:
    points = _points(left, right)
    needed = _NEEDED_POINTS if len(points) == len(_SIGNS) else len(points)
    for point in points:
        one, two = _evaluate(left, point), _evaluate(right, point)
        if one is None or two is None:
            continue
        if not _close(one, two):
            if max(abs(one), abs(two)) < _DUST:  # rounding leaves it of a value that is exactly zero
                return _agree_exactly(left.subs(point), right.subs(point))
            return not point and (_rounds(pred, one) or _rounds(gold, two))
        needed -= 1
        if not needed:
            has_function = left.has(sympy.Function) or right.has(sympy.Function)
            return bool(point and has_function) or _agree_exactly(left.subs(point), right.subs(point))
    return bool(verify(left, right, timeout_seconds=None))


def _agree_exactly(left: Any, right: Any) -> bool:
    """For two numbers that agree to many digits: whether no difference remains that has a digit of its own."""
    difference = left.doit() - right.doit()
    parts = difference.expand().evalf(5, maxn=1000).as_real_imag()
    return all(not part.is_Float or part._prec == 1 for part in parts)  # sympy marks a value lost in rounding with 1


def _rounds(literal: str, value: Any, min_digits: int = 6) -> bool:
    """Whether a decimal is a real value, rounded or cut: 3.14159265 for pi."""
    if "." not in literal or not value.is_real:
        return False
    exact = sympy.Rational(value)
    return quantities.is_rounding_of(literal, Fraction(int(exact.p), int(exact.q)), min_digits)


def _same_up_to_factor(left: Any, right: Any, positive: bool) -> bool:
    """Whether left/right is one constant everywhere, as for x^2-1=0 and 2x^2=2."""
    values = [(_evaluate(left, point), _evaluate(right, point)) for point in _points(left, right)]
    ratios = [one / two for one, two in values if one and two]
    if len(ratios) < _NEEDED_POINTS or (positive and not ratios[0] > 0):
        return False
    return all(_close(ratio, ratios[0]) for ratio in ratios)


# --- the worker ---------------------------------------------------------------------------------------------------


_WARM_UP = (
    "\\frac{1}{2}",
    "\\sqrt{2}+3\\pi",
    "2\\sqrt{3}-\\frac{\\sqrt{5}}{7}",
    "x^{2}-3x+2",
    "(x-1)(x+1)",
    "\\sin(x)\\cos(2y)",
    "e^{2x}\\ln(3)",
    "\\log_{2}(3)",
    "\\binom{5}{2}+4!",
    "\\frac{a+b}{c-d}",
    "-\\frac{3}{4}i",
    "2^{10}\\cdot3",
    "\\sqrt[3]{16}",
    "\\frac{n(n+1)}{2}",
    "\\lfloor\\frac{x}{2}\\rfloor",
    "x_{1}+\\alpha",
    "|x|",
    "0.5x",
)


def main() -> None:
    """Serve the parent."""
    pipe = bounds.connected()
    logging.disable()
    for text in _WARM_UP:  # the parser's tables fill as it reads; without this the first pairs take ten times as long
        same("value", text, text + "+1")
    bounded = Bounds()
    bounded.limit_memory()

    def work(answer: str, predictions: list[str]) -> Iterator[bytes]:
        for prediction in predictions:
            yield bounded(partial(compare, answer, prediction), _failed).encode()

    bounds.serve(pipe, work)


def _failed(error: BaseException) -> Verdict:
    return "timeout" if isinstance(error, Deadline) else "error"


if __name__ == "__main__":
    main()
