"""The countdown game: reach a target with +, -, * and / from given numbers, each used once at most.

{"id": "1", "problem": "Reach 24 from 2, 3 and 8: ...", "answer": "8 * 3", "source": "countdown", "numbers": [2, 3, 8],
 "target": 24}

`numbers` and `target` are columns of the problems; any solution counts, so `answer` is only one of them.

rloop rl ... --reward examples/rewards/countdown.py:reward
"""

import ast
import operator
import re
from collections import Counter
from fractions import Fraction
from typing import Any

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
MAX_LENGTH = 200  # characters of an expression: what is longer is no solution
SIGNS = {"\\times": "*", "\\cdot": "*", "\\div": "/"}
BOX = re.compile(r"\\boxed\{([^{}]*)\}")


def reward(completions: list[str], numbers: list[list[int]], target: list[int], **columns: Any) -> list[float]:
    """1 for an expression in the last box that reaches the target, 0.1 for another one from the numbers, else 0."""
    return [_reward(*row) for row in zip(completions, numbers, target, strict=True)]


def _reward(completion: str, numbers: list[int], target: int) -> float:
    boxes = BOX.findall(completion)
    if not boxes or len(boxes[-1]) > MAX_LENGTH:
        return 0.0
    text = boxes[-1].partition("=")[0].strip()
    for sign, plain in SIGNS.items():
        text = text.replace(sign, plain)
    try:
        expression = ast.parse(text, mode="eval").body
        used = Counter(_numbers(expression))
        value = _value(expression)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return 0.0  # text that is no such expression is a wrong answer, not an error
    if used - Counter(numbers):
        return 0.0
    return 1.0 if value == target else 0.1


def _numbers(expression: ast.expr) -> list[int]:
    """The numbers of an expression, each as often as it occurs."""
    return [node.value for node in ast.walk(expression) if isinstance(node, ast.Constant) and type(node.value) is int]


def _value(node: ast.expr) -> Fraction:
    """The exact value; what is neither a whole number nor one of the four operations is a ValueError, never run."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return Fraction(OPERATORS[type(node.op)](_value(node.left), _value(node.right)))
    raise ValueError(ast.dump(node))
