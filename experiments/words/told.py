"""Arithmetic told in words: problems of one or two operations in plain English, worked out in one of several ways.

    python experiments/words/told.py --out told.jsonl --num 2000 --seed 0

A line is a problem with its answer and, as `rationale`, a worked solution that is always right. The way of solving is
drawn without a look at the problem, so that a policy fine-tuned on them knows several for each. No text is taken from
a public set; `rloop prepare --decontaminate` takes care of chance.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from base import in_one_line

from stages.core import jsonl, outputs

NAMES = (
    "Ada", "Ben", "Carla", "Dev", "Elif", "Finn", "Gita", "Hugo", "Ines", "Jonas",
    "Kofi", "Lena", "Mira", "Noor", "Otto", "Priya", "Rosa", "Sami", "Tess", "Yusuf",
)  # fmt: skip
THINGS = (
    "apples", "books", "cards", "coins", "marbles", "pencils", "stickers",
    "shells", "stamps", "eggs", "buttons", "flowers", "cookies", "tickets",
)  # fmt: skip
PLACES = ("boxes", "bags", "baskets", "shelves", "jars", "drawers", "crates", "trays")
NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip
WORD_RATE = 0.2  # of small numbers: they are spelled out


class Story(NamedTuple):
    """A text with {a}, {b} and perhaps {c}, and the operations, from left to right, that answer its question."""

    text: str
    operators: str


STORIES = (
    Story("{name} has {a} {things} and finds {b} more. How many {things} does {name} have now?", "+"),
    Story("There are {a} {things} on the table and {b} on the floor. How many {things} are there in all?", "+"),
    Story("{name} collected {a} {things}. {other} collected {b}. How many did they collect together?", "+"),
    Story("{other} has {a} {things}. {name} has {b} more than {other}. How many {things} does {name} have?", "+"),
    Story("{name} gave away {b} {things} and has {a} left. How many {things} did {name} have at first?", "+"),
    Story("{name} had {a} {things} and gave {b} of them to {other}. How many {things} are left?", "-"),
    Story("Of {a} {things} in a shop, {b} were sold. How many were not sold?", "-"),
    Story("{name} needs {a} {things} and has {b}. How many more does {name} need?", "-"),
    Story("{name} has {a} {things}, {other} has {b}. How many more {things} has {name} than {other}?", "-"),
    Story("There were {b} {things} in a jar. Some were added, and now there are {a}. How many were added?", "-"),
    Story("{name} has {a} {places} with {b} {things} in each. How many {things} are there?", "*"),
    Story("One of the {things} costs {a} dollars. How many dollars do {b} of them cost?", "*"),
    Story("{name} reads {a} pages a day. How many pages are read in {b} days?", "*"),
    Story("{name} shares {a} {things} equally among {b} friends. How many does each friend get?", "/"),
    Story("{name} puts {a} {things} into {places}, {b} in each. How many {places} are needed?", "/"),
    Story("{b} tickets cost {a} dollars together. How many dollars does one ticket cost?", "/"),
    Story("{name} has {a} {places} of {b} {things} and {c} more beside them. How many {things} is that?", "*+"),
    Story("{name} bought {a} {places} of {b} {things} and used {c} {things}. How many are left?", "*-"),
    Story("{name} had {a} {things}, got {b} from {other} and lost {c}. How many does {name} have now?", "+-"),
    Story("{name} had {a} {things}, lost {b} and then bought {c}. How many does {name} have now?", "-+"),
    Story("{name} and {other} put their {a} and {b} {things} together and share them among {c}. How many each?", "+/"),
)


class Operation(NamedTuple):
    """One operation; `str` writes it as in a solution: `12 + 30 = 42`."""

    left: int
    operator: str
    right: int

    @property
    def result(self) -> int:
        operations: dict[str, Callable[[int, int], int]] = {
            "+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__,
        }  # fmt: skip
        return operations[self.operator](self.left, self.right)

    def __str__(self) -> str:
        return f"{self.left} {self.operator} {self.right} = {self.result}"


def briefly(operations: list[Operation]) -> str:
    """`3 * 12 = 36, 36 + 4 = 40`."""
    return ", ".join(map(str, operations))


def in_words(operations: list[Operation]) -> str:
    """A sentence an operation, and the answer once more."""
    verbs = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}
    sentences = [f"We {verbs[each.operator]}: {each}." for each in operations]
    return " ".join([*sentences, f"The answer is {operations[-1].result}."])


def in_parts(operations: list[Operation]) -> str:
    """Each operation by tens and ones, or checked by its opposite."""
    return "; ".join(map(_parts, operations))


def _parts(operation: Operation) -> str:
    left, operator, right = operation
    tens, ones = divmod(right if operator in "+-" else left, 10)
    if operator == "/":
        return f"{right} * {operation.result} = {left}, so {operation}"
    if not (tens and ones):
        return str(operation)
    if operator == "*":
        first, second = Operation(10 * tens, "*", right), Operation(ones, "*", right)
        return f"{first}, {second}, {Operation(first.result, '+', second.result)}"
    first = Operation(left, operator, 10 * tens)
    return f"{first}, {Operation(first.result, operator, ones)}"


WAYS = (briefly, in_words, in_parts)


def draw(rng: random.Random) -> dict[str, Any]:
    """A problem, its answer and a worked solution."""
    story = rng.choice(STORIES)
    numbers, operations = _draw_numbers(rng, story.operators)
    name, other = rng.sample(NAMES, 2)
    told = dict(zip("abc", (_told(number, rng) for number in numbers), strict=False))
    names = {"name": name, "other": other, "things": rng.choice(THINGS), "places": rng.choice(PLACES)}
    text = story.text.format(**told, **names)
    return {
        "problem": text[0].upper() + text[1:],
        "answer": str(operations[-1].result),
        "rationale": rng.choice(WAYS)(operations),
        "source": "told",
    }


def _draw_numbers(rng: random.Random, operators: str) -> tuple[list[int], list[Operation]]:
    """Numbers with which every result is a whole number of 1 to 200, and the operations on them."""
    most = rng.choice((12, 30, 100))
    while True:
        numbers = [rng.randint(2, most) for _ in range(len(operators) + 1)]
        if operators == "/":
            numbers[0] = numbers[1] * rng.randint(2, 12)
        operations, total = [], numbers[0]
        for operator, number in zip(operators, numbers[1:], strict=True):
            operations.append(Operation(total, operator, number))
            total = operations[-1].result
        exact = all(each.left % each.right == 0 for each in operations if each.operator == "/")
        if exact and all(1 <= each.result <= 200 for each in operations):
            return numbers, operations


def _told(number: int, rng: random.Random) -> str:
    return NUMBER_WORDS[number] if number < len(NUMBER_WORDS) and rng.random() < WORD_RATE else str(number)


def problems(num: int, seed: int) -> Iterator[dict[str, Any]]:
    """`num` different problems."""
    rng, seen = random.Random(f"told/{seed}"), set[str]()
    while len(seen) < num:
        problem = draw(rng)
        if problem["problem"] not in seen:
            seen.add(problem["problem"])
            yield {"id": f"told-{seed}-{len(seen):05d}", **problem}


@in_one_line
def main() -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new JSONL file")
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with outputs.claimed(options.out):
        jsonl.write(options.out, problems(options.num, options.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
