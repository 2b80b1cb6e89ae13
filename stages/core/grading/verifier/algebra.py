"""The expensive half of the verifier: sympy and math-verify, in worker processes of their own, under bounds.

Trees (`grammar`) become sympy's objects. Numbers then decide: both sides are evaluated to 30 digits at a few fixed
points, and what agrees is held against each other until the difference has a digit or none is left (math-verify
compares six decimals and simplifies what differs, which is slower and calls sqrt(2)*1e-20 equal to sqrt(3)*1e-20).
Only what cannot be evaluated goes to `math_verify.verify`, the answer first, as it wants them.

Each pair is under the bounds of `grading.bounds`: sympy can sit in C code that no handler interrupts.

Run as `python -m stages.core.grading.verifier.algebra DESCRIPTOR PARENT` by grading.verifier only.
"""

import logging
import operator
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache, partial, reduce
from typing import Any

import sympy
from math_verify import verify

from stages.core.grading import bounds
from stages.core.grading.bounds import Bounds, Deadline
from stages.core.grading.verifier import comparison, grammar, quantities
from stages.core.grading.verifier.grammar import Tree
from stages.core.records import Verdict

# --- from a tree to sympy ---------------------------------------------------------------------------------------------


@lru_cache(4096)
def build(tree: Tree) -> Any:
    """The sympy object of a tree; decimals become fractions, odd roots of negative numbers are real."""
    is_complex = "i" in grammar.names(tree, constants=True) - _bound(tree)
    return sympy.real_root(_build(tree, partial(_symbol, real=not is_complex, bound=_bound(tree))))


def _bound(tree: Tree) -> set[str]:
    """The names that a sum, product, limit or integral in it ranges over."""
    return {part.args[1].text for part in grammar.walk(tree) if part.op == "over"}


_CONSTANTS = {r"\pi": sympy.pi, r"\infty": sympy.oo, "e": sympy.E, "i": sympy.I}


def _symbol(name: str, real: bool, bound: set[str]) -> Any:
    if name in _CONSTANTS and name not in bound:
        return _CONSTANTS[name]
    return sympy.Symbol(name, real=True) if real else sympy.Symbol(name)


def _build(tree: Tree, symbol: Callable[[str], Any]) -> Any:
    if tree.op == "number":
        value = grammar.literal(tree.text)
        if value is None:
            raise ValueError(tree.text)
        return sympy.Rational(value.numerator, value.denominator)
    if tree.op == "name":
        return symbol(tree.text)
    args = [_build(arg, symbol) for arg in tree.args]
    if tree.op == "over":
        body, variable, *ends = args
        over = _LARGE[tree.text]
        return (over(body, variable, *ends) if tree.text == r"\lim" else over(body, (variable, *ends))).doit()
    return _OPERATIONS[tree.text if tree.op == "call" else tree.op](*args)


_LARGE = {r"\sum": sympy.Sum, r"\prod": sympy.Product, r"\int": sympy.Integral, r"\lim": sympy.Limit}
_NAMED = r"""
    + Add ! factorial binom binomial | Abs \lfloor floor \lceil ceiling \max Max \min Min \ln log \exp exp \sin sin
    \cos cos \tan tan \cot cot \sec sec \csc csc \sinh sinh \cosh cosh \tanh tanh \coth coth
    \arcsin asin \arccos acos \arctan atan
"""
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "neg": operator.neg,
    "*": operator.mul,
    "/": operator.truediv,
    "mixed": operator.add,
    "^": operator.pow,
    "root": lambda order, value: sympy.root(value, order),
    r"\gcd": lambda *args: reduce(sympy.gcd, args),
    r"\lcm": lambda *args: reduce(sympy.lcm, args),
    r"\lg": lambda arg: sympy.log(arg, 10),
    r"\log": lambda arg, base=10: sympy.log(arg, base),
    **{op: getattr(sympy, name) for op, name in zip(_NAMED.split()[::2], _NAMED.split()[1::2], strict=True)},
}


# --- comparing --------------------------------------------------------------------------------------------------------


def compare(answer: str, prediction: str) -> Verdict:
    """The verdict on a prediction, by algebra where needed; not bounded."""
    return comparison.verdict(answer, prediction, same)


def same(kind: str, gold: Tree, pred: Tree) -> bool:
    """Whether two expressions are equal ("value"), or have the same zeros or sign up to a constant factor.

    "decimal": whether the second is the first one rounded.
    """
    if gold == pred:
        return True
    left = build(gold)
    if kind == "decimal":
        value = _evaluate(left, {})
        return value is not None and _rounds(pred, value, min_digits=1)
    right = build(pred)
    if kind == "value":
        return _same_value(left, right, gold, pred)
    return _same_up_to_factor(left, right, positive=kind == "inequality")


_SIGNS = [(1, 1, 1), (1, -1, 1), (-1, 1, 1), (-1, -1, -1), (1, 1, -1), (1, 1, 1), (1, 1, 1)]  # of every third variable
_DIGITS = 30
_DUST = sympy.Float(10) ** -25
_NEEDED_POINTS = 3
_FAR = sympy.Rational(100003, 7)  # beyond all numbers that an expression with steps has: max(5,x) is not 5 everywhere
_STEPS = (sympy.floor, sympy.ceiling, sympy.Max, sympy.Min, sympy.Mod, sympy.sign, sympy.Abs)
_SLOW = (sympy.factorial, sympy.gamma, sympy.binomial, sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit)


def _points(*sides: Any) -> list[dict[Any, Any]]:
    """Where expressions are evaluated: some points of both signs, no two values alike, no integer.

    Where there are steps, as many beyond all their numbers, and within.
    """
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
        numbers = [abs(number) for side in sides for number in side.atoms(sympy.Rational) if number]
        scales = [_FAR * max([1, *numbers]), min([1, *numbers]) / _FAR]
        points += [{symbol: value * scale for symbol, value in point.items()} for scale in scales for point in points]
    return points


def _evaluate(side: Any, point: dict[Any, Any]) -> Any:
    """A finite number, real or complex, or None if there is none."""
    value = side.evalf(_DIGITS, subs=point or None)
    finite = all(part.is_Float or part.is_Rational for part in value.as_real_imag())
    return value if finite else None


def _close(left: Any, right: Any) -> bool:
    scale = max(abs(left), abs(right))
    return bool(abs(left - right) <= scale * sympy.Float(10) ** -20)


def _same_value(left: Any, right: Any, gold: Tree, pred: Tree) -> bool:
    points = _points(left, right)
    needed = min(_NEEDED_POINTS, len(points)) if len(points) <= len(_SIGNS) else len(points) // 2
    is_real = not left.has(sympy.I) and not right.has(sympy.I)
    agreed = []
    for point in points:
        one, two = _evaluate(left, point), _evaluate(right, point)
        if one is None or two is None or (point and is_real and not (one.is_real and two.is_real)):
            continue  # \sqrt{1/n} and 1/\sqrt{n} for negative n
        if not _close(one, two):
            if max(abs(one), abs(two)) < _DUST:  # rounding leaves it of a value that is exactly zero
                return _agree_exactly(left.subs(point), right.subs(point))
            return not point and (_rounds(pred, one) or _rounds(gold, two))
        agreed.append(point)
    if len(agreed) >= needed:
        return _agree_exactly(left.subs(agreed[-1]), right.subs(agreed[-1]))
    return bool(verify(left, right, timeout_seconds=None))


def _agree_exactly(left: Any, right: Any) -> bool:
    """For two numbers that agree to many digits: whether no difference remains that has a digit of its own."""
    difference = left.doit() - right.doit()
    digits = 60 if difference.has(*_SLOW) else 1000
    parts = difference.expand().evalf(5, maxn=digits).as_real_imag()
    return all(not part.is_Float or part._prec == 1 for part in parts)  # sympy marks a value lost in rounding with 1


def _rounds(literal: Tree, value: Any, min_digits: int = 6) -> bool:
    """Whether a decimal is a real value, rounded or cut: 3.14159265 for pi."""
    sign, digits = ("-", literal.args[0]) if literal.op == "neg" else ("", literal)
    if digits.op != "number" or "." not in digits.text or not value.is_real:
        return False
    rational = sympy.Rational(value)
    return quantities.is_rounding_of(sign + digits.text, Fraction(int(rational.p), int(rational.q)), min_digits)


def _same_up_to_factor(left: Any, right: Any, positive: bool) -> bool:
    """Whether left/right is one constant everywhere, as for x^2-1=0 and 2x^2=2."""
    values = [(_evaluate(left, point), _evaluate(right, point)) for point in _points(left, right)]
    ratios = [one / two for one, two in values if one and two]
    if len(ratios) < _NEEDED_POINTS or (positive and not ratios[0] > 0):
        return False
    return all(_close(ratio, ratios[0]) for ratio in ratios)


# --- the worker -------------------------------------------------------------------------------------------------------


_WARM_UP = r"""
    \frac{1}{2} \sqrt{2}+3\pi 2\sqrt{3}-\frac{\sqrt{5}}{7} x^{2}-3x+2 \sin(x)\cos(2y) e^{2x}\ln(3) \log_{2}(3) x_{1}!
    \frac{a+b}{c-d} -\frac{3}{4}i \sqrt[3]{16} \lfloor\frac{x}{2}\rfloor |x|
"""


def main() -> None:
    """Serve the parent."""
    pipe = bounds.connected()
    logging.disable()
    for tree in filter(None, map(grammar.parse, _WARM_UP.split())):  # sympy's caches fill
        same("value", tree, Tree("+", (tree, grammar.number("1"))))
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
