"""The expensive half of the verifier: math-verify and sympy, in worker processes of their own, under bounds.

math-verify's grammar (latex2sympy2_extended) reads an expression. Numbers then decide: both sides are evaluated to 30
digits at a few fixed points, 100 digits where there is no variable (math-verify compares six decimals and simplifies
for what differs, which is slower and calls sqrt(2)*1e-20 equal to sqrt(3)*1e-20). Only what cannot be evaluated goes
to `math_verify.verify`, the answer first, as it wants them.

Bounds on each pair: DEADLINE_S of CPU time, then a signal; BACKSTOP_S more, then the kernel ends the worker, since
sympy can sit in C code that no handler interrupts; MAX_MEMORY. Wall time is not bounded here.

Run as `python -m stages.core.verifier.algebra DESCRIPTOR PARENT` by core.verifier only.
"""

import ctypes
import json
import logging
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import verify

from stages.core.records import Verdict
from stages.core.verifier import comparison, grammar, quantities
from stages.core.verifier.latex import Refused, letters

DEADLINE_S = 2.0  # an honest pair takes 2 to 60 ms, a few times as much when its kind is new to the parser
BACKSTOP_S = 2
MAX_MEMORY = 2**30  # bytes, beyond what the worker holds when it is ready
MAX_RESIDENT = 400 * 2**20  # a worker that has grown beyond it leaves, and is replaced


class _Unreadable(Exception):
    """Text that is not an expression."""


class _AnswerUnreadable(Exception):
    """The answer itself is not an expression: nothing can be compared with it."""


class _Deadline(BaseException):
    """The bound of CPU time."""


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
        return _is_decimal_of(pred, left)
    if kind == "value":
        return _same_value(left, right, gold, pred)
    return _same_up_to_factor(left, right, positive=kind == "inequality")


@lru_cache(4096)
def parse(text: str) -> Any:
    """The sympy object of an expression in canonical LaTeX; decimals become fractions, i the imaginary unit.

    Raises _Unreadable, and Refused for what no answer needs and would build a huge object.
    """
    if grammar.is_tower(text):
        raise Refused("a tower of powers or factorials")
    if grammar.judge(text) is not grammar.Kind.EXPRESSION:
        raise _Unreadable(text)
    is_complex = "i" in letters(text)
    text = re.sub(r"(\\[a-zA-Z]+)|([EI]|[ei](?=_))", _own_symbol, text)
    text = re.sub(r"(\d+!)(?=\^)", r"(\1)", text)
    try:
        found = latex2sympy(
            text,
            is_real=not is_complex,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except MemoryError:
        raise
    except Exception as error:
        raise _Unreadable(text) from error
    if not isinstance(found, (sympy.Basic, sympy.MatrixBase)):
        raise _Unreadable(text)
    return _exact(found)


def _own_symbol(match: re.Match[str]) -> str:
    """E, I and e_1 as symbols of their own: to the parser they are the base of the logarithm and the imaginary unit."""
    return match.group(1) or f"\\mathit{{{match.group(2)}}}"


def _exact(found: Any) -> Any:
    """Floats as the fractions they were written as; the symbol i as the imaginary unit; no UnevaluatedExpr."""
    swaps = {item: sympy.Rational(str(item)) for item in found.atoms(sympy.Float)}
    swaps |= {item: sympy.I for item in found.free_symbols if item.name == "i"}
    swaps |= {item: _real_root(item) for item in found.atoms(sympy.Pow) if _is_odd_root(item)}
    return found.xreplace(swaps) if swaps else found


def _is_odd_root(power: Any) -> bool:
    """Whether a power is an odd root of a negative number, as in \\sqrt[3]{-8}: -2 to all but sympy."""
    exponent, base = power.exp, power.base
    return exponent.is_Rational and exponent.q > 1 and exponent.q % 2 == 1 and not base.free_symbols and base < 0


def _real_root(power: Any) -> Any:
    return (-1) ** power.exp.p * (-power.base) ** power.exp


# Where expressions are evaluated: for the n-th variable of the k-th point. Of both signs, no two alike, no integer.
_POINTS = [
    [
        sympy.Rational(sign * (37 * n + 91 + 53 * k), 61 + 8 * n + 5 * k)
        for n, sign in zip(range(24), signs * 8, strict=False)
    ]
    for k, signs in enumerate([(1, 1, 1), (1, -1, 1), (-1, 1, 1), (-1, -1, -1), (1, 1, -1)])
]
_NEEDED_POINTS = 3
_FAR = sympy.Rational(100003, 7)  # so much further out, too, where a function has steps: max(5,x) is not 5 everywhere
_STEPS = (sympy.floor, sympy.ceiling, sympy.Max, sympy.Min, sympy.Mod, sympy.sign, sympy.Abs)


def _points(*sides: Any) -> list[dict[Any, Any]]:
    symbols = sorted(set().union(*(side.free_symbols for side in sides)), key=lambda symbol: symbol.name)
    if len(symbols) > len(_POINTS[0]):
        raise Refused("too many variables")
    points = [dict(zip(symbols, values, strict=False)) for values in (_POINTS if symbols else [[]])]
    if symbols and any(side.has(*_STEPS) for side in sides):
        points += [{symbol: value * _FAR for symbol, value in point.items()} for point in points]
    return points


def _evaluate(side: Any, point: dict[Any, Any], digits: int) -> Any:
    """A number, real or complex, or None where there is none."""
    value = side.evalf(digits, subs=point) if point else side.evalf(digits)
    if not isinstance(value, sympy.Basic) or not value.is_number or value.has(sympy.nan, sympy.zoo):
        return None
    if value in (sympy.oo, -sympy.oo):
        return value
    real, imaginary = value.as_real_imag()
    return value if real.is_Float or (real.is_Rational and (imaginary.is_Float or imaginary.is_Rational)) else None


def _close(left: Any, right: Any, digits: int) -> bool:
    if left == right:
        return True
    if left.is_infinite or right.is_infinite:
        return False
    scale = max(abs(left), abs(right))
    return bool(abs(left - right) <= scale * sympy.Float(10) ** -digits)


def _same_value(left: Any, right: Any, gold: str, pred: str) -> bool:
    if not isinstance(left, sympy.Expr) or not isinstance(right, sympy.Expr):
        return bool(verify(left, right, timeout_seconds=None))
    points = _points(left, right)
    digits = 30 if points[0] else 100
    agreed = 0
    for point in points:
        one, two = _evaluate(left, point, digits), _evaluate(right, point, digits)
        if one is None and two is None:
            continue
        if one is None or two is None:
            if points[0]:
                continue
            break
        if not _close(one, two, digits * 2 // 3):
            return (not point and _is_rounded(one, two, gold, pred)) or _both_zero(one, two, left, right)
        agreed += 1
        if agreed == (_NEEDED_POINTS if len(points) == len(_POINTS) else len(points)):
            if point and (left.has(sympy.Function) or right.has(sympy.Function)):
                return True
            return _agree_exactly(left.subs(point), right.subs(point))
    return bool(verify(left, right, timeout_seconds=None))


def _agree_exactly(left: Any, right: Any) -> bool:
    """For two numbers that agree to many digits: whether no difference remains that has a digit of its own."""
    difference = (left.doit() - right.doit()).expand()
    if difference.is_Rational:
        return bool(difference == 0)
    value = difference.evalf(5, maxn=1000)
    return not value.is_Float or value._prec == 1 or value == 0  # sympy marks a value lost in rounding with precision 1


def _both_zero(one: Any, two: Any, left: Any, right: Any) -> bool:
    """Rounding leaves dust where a value is exactly zero: whether dust is all that the two differ by."""
    if max(abs(one), abs(two)) > sympy.Float(10) ** -25:
        return False
    return sympy.simplify(left - right) == 0


def _is_rounded(one: Any, two: Any, gold: str, pred: str) -> bool:
    """3.14159265 for pi: a decimal of six digits or more that the other value rounds or is cut to."""
    for literal, other, text in ((pred, one, gold), (gold, two, pred)):
        if other.is_real and "." in literal and quantities.number(text) is None:
            exact = sympy.Rational(other)
            if quantities.is_rounding_of(literal, Fraction(int(exact.p), int(exact.q))):
                return True
    return False


def _is_decimal_of(literal: str, exact: Any) -> bool:
    """Whether a decimal of any length is the value of an expression, rounded or cut."""
    value = _evaluate(exact, {}, 30) if isinstance(exact, sympy.Expr) and not exact.free_symbols else None
    if value is None or not value.is_real or value.is_infinite:
        return False
    rational = sympy.Rational(value)
    return quantities.is_rounding_of(literal, Fraction(int(rational.p), int(rational.q)), 1)


def _same_up_to_factor(left: Any, right: Any, positive: bool) -> bool:
    """Whether left/right is one constant everywhere, as for x^2-1=0 and 2x^2=2."""
    if not isinstance(left, sympy.Expr) or not isinstance(right, sympy.Expr):
        return False
    if left.free_symbols != right.free_symbols:
        return False
    ratios = []
    for point in _points(left, right):
        one, two = _evaluate(left, point, 30), _evaluate(right, point, 30)
        if one is not None and two is not None and one != 0 and two != 0:
            ratios.append(one / two)
    if len(ratios) < _NEEDED_POINTS or (positive and not ratios[0] > 0):
        return False
    return all(_close(ratio, ratios[0], 20) for ratio in ratios)


# --- the worker ---------------------------------------------------------------------------------------------------


class _Bounds:
    """Ends a call at its bounds, of which memory holds for the process from now on.

    At the bound of CPU time by an exception, or, where none gets through, the whole process by the kernel.
    """

    def __init__(self) -> None:
        self._armed = False
        signal.signal(signal.SIGPROF, self._expire)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        most = _mapped() + MAX_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))

    def _expire(self, *_: Any) -> None:
        if self._armed:  # at most once, so that nothing can escape from the handling of the first
            self._armed = False
            raise _Deadline

    def __call__(self, call: Callable[[], Verdict]) -> Verdict:
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(used + DEADLINE_S + BACKSTOP_S), hard))
        try:
            signal.setitimer(signal.ITIMER_PROF, DEADLINE_S)
            self._armed = True
            verdict = call()
            self._armed = False
        except _Deadline:
            verdict = "timeout"
        except (Exception, MemoryError, RecursionError):
            self._armed = False
            verdict = "error"
        signal.setitimer(signal.ITIMER_PROF, 0)
        return verdict


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
    """Serve the parent over the socket whose descriptor is the first argument; the second is the parent's id."""
    _die_with(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption from the keyboard is the parent's to act on
    logging.disable()
    pipe = Connection(int(sys.argv[1]))
    for text in _WARM_UP:  # the parser's tables fill as it reads; without this the first pairs take ten times as long
        same("value", text, text + "+1")
    bounded = _Bounds()
    pipe.send_bytes(b"ready")
    while True:
        try:
            answer, predictions = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        for prediction in predictions:
            verdict = bounded(partial(compare, answer, prediction))
            pipe.send_bytes(verdict.encode())
        if _resident() > MAX_RESIDENT:
            return


def _die_with(parent: int) -> None:
    """Be killed when the parent dies, however it dies, and whatever this process is doing (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit()


def _mapped() -> int:
    """Bytes of address space in use."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _resident() -> int:
    """Bytes of memory in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
