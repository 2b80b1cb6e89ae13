"""The toy's task: small expressions, and the four ways in which its base policy has seen them solved.

An expression holds single digits, + - * and at most one pair of parentheses; every value on the way is in 0..49
whichever way it is worked out, so that each number is one token. The truth is standard precedence. Of the four styles

    [L]  a running total from left to right, blind to precedence and parentheses: easy, and often wrong
    [P]  the expression rewritten step by step in the correct order: always right, and the hardest to write
    [R]  a running total from right to left: right now and then
    [G]  a guess

the base policy draws one without looking at the problem. A training set on which [L] is mostly right is thus a
short-cut for RL to fall into. There is no division, no sign and no number above 49.
"""

import random
from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple

MAX_VALUE = 49
OPERATORS = "+-*"
STYLES = {"[L]": 0.50, "[P]": 0.15, "[R]": 0.15, "[G]": 0.20}  # how often each is written, whatever the problem
SLIP_RATE = 0.06  # of a step: its result is a near miss, and the solution goes on from there
HASTE_RATE = 0.05  # of a step of [P]: the leftmost operation is done before a multiplication
LUCK_RATE = 0.25  # of a guess: it is right
NO_BOX_RATE = 0.40  # of a solution: it ends without saying its answer
FURTHEST_SLIP = 3
MAX_MISSES = 3000

WORDS = (*map(str, range(MAX_VALUE + 1)), *"+-*()=,?", *STYLES, "\\boxed{", "}")  # the vocabulary

Compute = Callable[[int, str, int], int]


class Expression(NamedTuple):
    """`3+(4-2)*5` is Expression((3, 4, 2, 5), "+-*", (1, 2)): `inside` is the first and last number in parentheses."""

    numbers: tuple[int, ...]
    operators: str
    inside: tuple[int, int] | None = None

    def __str__(self) -> str:
        parts = [str(number) for number in self.numbers]
        if self.inside is not None:
            first, last = self.inside
            parts[first], parts[last] = "(" + parts[first], parts[last] + ")"
        return parts[0] + "".join(operator + part for operator, part in zip(self.operators, parts[1:], strict=True))


def compute(left: int, operator: str, right: int) -> int:
    """The result of one operation."""
    if operator == "*":
        return left * right
    return left + right if operator == "+" else left - right


def truth(expression: Expression) -> int:
    """The value of `expression` by standard precedence."""
    *_, last = precedence_steps(expression)
    return last.numbers[0]


def short_cut(expression: Expression) -> int:
    """The value that [L] arrives at."""
    *_, last = left_steps(expression)
    return last.result


class Calculation(NamedTuple):
    """One operation of a running total; `2*6=12` in a solution."""

    left: int
    operator: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left}{self.operator}{self.right}={self.result}"


def left_steps(expression: Expression, do: Compute = compute) -> Iterator[Calculation]:
    """The steps of a running total from left to right, blind to parentheses."""
    total, *rest = expression.numbers
    for operator, number in zip(expression.operators, rest, strict=True):
        result = do(total, operator, number)
        yield Calculation(total, operator, number, result)
        total = result


def right_steps(expression: Expression, do: Compute = compute) -> Iterator[Calculation]:
    """The steps of a running total from right to left, blind to parentheses."""
    *rest, total = expression.numbers
    for operator, number in zip(reversed(expression.operators), reversed(rest), strict=True):
        result = do(number, operator, total)
        yield Calculation(number, operator, total, result)
        total = result


def precedence_steps(
    expression: Expression, do: Compute = compute, hasty: Callable[[], bool] = lambda: False
) -> Iterator[Expression]:
    """What `expression` becomes by each operation in the correct order, down to a single number.

    `hasty` is asked before each step whether to take the leftmost operation in spite of a multiplication.
    """
    while expression.operators:
        first, last = expression.inside or (0, len(expression.operators))
        product = expression.operators.find("*", first, last)
        at = first if product < 0 or hasty() else product
        result = do(expression.numbers[at], expression.operators[at], expression.numbers[at + 1])
        expression = _replace(expression, at, result)
        yield expression


def _replace(expression: Expression, at: int, value: int) -> Expression:
    """`expression` with operation `at`, which lies inside the parentheses if there are any, replaced by its value."""
    numbers, operators, inside = expression
    if inside is not None:
        inside = (inside[0], inside[1] - 1) if inside[1] - inside[0] > 1 else None
    return Expression((*numbers[:at], value, *numbers[at + 2 :]), operators[:at] + operators[at + 1 :], inside)


def in_range(expression: Expression) -> bool:
    """Whether every value on the way is in 0..MAX_VALUE from the left, from the right and in the correct order."""
    running = (step.result for steps in (left_steps, right_steps) for step in steps(expression))
    rewritten = (number for step in precedence_steps(expression) for number in step.numbers)
    return all(0 <= value <= MAX_VALUE for value in chain(running, rewritten))


def draw(rng: random.Random, num_numbers: int, parentheses: bool) -> Expression:
    """A random expression in range, with one pair of parentheses (around less than the whole) or none."""
    while True:
        numbers = tuple(rng.choices(range(1, 10), k=num_numbers))
        operators = "".join(rng.choices(OPERATORS, k=num_numbers - 1))
        expression = Expression(numbers, operators, _draw_span(rng, num_numbers) if parentheses else None)
        if in_range(expression):
            return expression


def _draw_span(rng: random.Random, num_numbers: int) -> tuple[int, int]:
    while True:
        first, last = sorted(rng.sample(range(num_numbers), 2))
        if last - first < num_numbers - 1:
            return first, last


def pick_mix(candidates: Iterator[Expression], num_easy: int, num_hard: int, taken: set[str]) -> list[Expression]:
    """The next `num_easy` candidates that the short-cut solves and `num_hard` that it doesn't; none is in `taken`.

    They are added to `taken`. Fewer are returned if MAX_MISSES candidates in a row are of no use.
    """
    missing = {True: num_easy, False: num_hard}
    mix: list[Expression] = []
    misses = 0
    while sum(missing.values()) and misses < MAX_MISSES:
        expression = next(candidates)
        easy = short_cut(expression) == truth(expression)
        misses += 1
        if missing[easy] and str(expression) not in taken:
            missing[easy] -= 1
            taken.add(str(expression))
            mix.append(expression)
            misses = 0
    return mix


def draw_lessons(rng: random.Random, exclude: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Endless (question, solution) to pre-train on: 3 to 6 numbers, mostly 3 or 4, a third with parentheses.

    No expression is in `exclude`.
    """
    while True:
        num_numbers = rng.randint(3, rng.choice((4, 4, 6)))
        expression = draw(rng, num_numbers, rng.random() < 0.35)
        if str(expression) not in exclude:
            yield question(expression), write_solution(expression, rng)


def question(expression: Expression) -> str:
    """The problem's text: `3+4*2=?`."""
    return f"{expression}=?"


def write_solution(expression: Expression, rng: random.Random) -> str:
    """A solution as the base policy has seen them: a style drawn blindly, with slips, often without a box.

    `[L]2*6=12,12+4=16,16*3=48\\boxed{48}` and `[P]=12+4*3=12+12=24\\boxed{24}` are two of 2*6+4*3.
    """
    style = rng.choices(list(STYLES), list(STYLES.values()))[0]
    text, answer = solve(expression, style, rng)
    return style + text if rng.random() < NO_BOX_RATE else f"{style}{text}\\boxed{{{answer}}}"


def solve(expression: Expression, style: str, rng: random.Random) -> tuple[str, int]:
    """The working in one style, with slips, and the answer it arrives at."""

    def do(left: int, operator: str, right: int) -> int:
        return _slip(compute(left, operator, right), rng)

    if style == "[G]":
        return "", truth(expression) if rng.random() < LUCK_RATE else rng.randint(0, MAX_VALUE)
    if style == "[P]":
        rewritten = list(precedence_steps(expression, do, lambda: rng.random() < HASTE_RATE))
        return "".join(f"={step}" for step in rewritten), rewritten[-1].numbers[0]
    steps = list((left_steps if style == "[L]" else right_steps)(expression, do))
    return ",".join(map(str, steps)), steps[-1].result


def _slip(value: int, rng: random.Random) -> int:
    """`value`, or now and then a near miss; in 0..MAX_VALUE, which earlier slips may have led out of."""
    if rng.random() < SLIP_RATE:
        value += rng.choice((-1, 1)) * rng.randint(1, FURTHEST_SLIP)
    return min(max(value, 0), MAX_VALUE)
