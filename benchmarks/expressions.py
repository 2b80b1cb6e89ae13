"""Random expressions of exact value in LaTeX: all operators, brackets and spacings, products without a sign.

for answer, text, is_equal in pairs(seed=1, count=1000): ...
"""

import math
import random
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

GAPS = ["", "", "", " ", r"\,", r"\ ", "~", r"\;"]
BRACKETS = [("(", ")")] * 3 + [("[", "]"), (r"\left(", r"\right)"), (r"\left[", r"\right]"), (r"\Bigl(", r"\Bigr)")]
SUM, PRODUCT, QUOTIENT, SIGNED, POWER, ATOM = range(6)  # how tightly the outermost operation binds
MAX_LENGTH = 300


class Made(NamedTuple):
    """An expression: what it comes to, how it is written, how tightly it binds."""

    value: Fraction
    text: str
    level: int


class Expressions:
    """Draws expressions; each method but a few makes one kind, or None where the numbers don't suit it."""

    LEAVES = ("integer", "integer", "decimal", "fraction", "mixed")
    NODES = (
        "sum_of",
        "sum_of",
        "difference",
        "product",
        "product",
        *["side_by_side"] * 3,
        "quotient",
        "frac",
        "power",
        "root",
        "binomial",
        "factorial",
        "negative",
        "absolute",
        "rounded",
        "of_list",
    )

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw

    def make(self, depth: int) -> Made:
        """An expression of so many levels at most, whose numbers stay small."""
        while True:
            made: Made | None = getattr(self, self.draw.choice(self.NODES if depth else self.LEAVES))(depth - 1)
            if made and abs(made.value.numerator) < 10**12 and made.value.denominator < 10**9:
                return made

    def below(self, depth: int) -> Made:
        """An operand."""
        return self.make(self.draw.randint(0, max(0, depth)))

    def gap(self, share: float = 0.4) -> str:
        """Some space, or none."""
        return self.draw.choice(GAPS) if self.draw.random() < share else ""

    def bracketed(self, text: str) -> str:
        """In brackets of some kind."""
        left, right = self.draw.choice(BRACKETS)
        return f"{left}{self.gap(0.2)}{text}{self.gap(0.2)}{right}"

    def at_least(self, made: Made, level: int) -> str:
        """In brackets if it binds less tightly, and sometimes without need."""
        return made.text if made.level >= level and self.draw.random() < 0.9 else self.bracketed(made.text)

    def integer(self, _: int) -> Made:
        n = self.draw.choice([self.draw.randint(0, 12), self.draw.randint(0, 12), self.draw.randint(10, 999)])
        return Made(Fraction(n), str(n), ATOM)

    def decimal(self, _: int) -> Made:
        text = f"{self.draw.randint(0, 20)}.{self.draw.choice(['5', '25', '2', '125', '75', '4'])}"
        return Made(Fraction(text), text, ATOM)

    def fraction(self, _: int) -> Made:
        a, b = self.draw.randint(1, 12), self.draw.randint(2, 12)
        shapes = [
            r"\frac{%d}{%d}",
            r"\dfrac{%d}{%d}",
            r"\tfrac{%d}{%d}",
            *[r"\frac%d%d", r"\frac %d %d"] * (a < 10 > b),
        ]
        return Made(Fraction(a, b), self.draw.choice(shapes) % (a, b), POWER)

    def mixed(self, _: int) -> Made:
        b = self.draw.randint(2, 9)
        whole, a = self.draw.randint(1, 12), self.draw.randint(1, b - 1)
        shapes = [r"%d\frac{%d}{%d}", r"%d\frac%d%d", r"%d\,\frac{%d}{%d}", "%d %d/%d", r"%d \dfrac{%d}{%d}"]
        text = self.draw.choice(shapes) % (whole, a, b)
        return Made(whole + Fraction(a, b), text, QUOTIENT if "/" in text else SIGNED)

    def sum_of(self, depth: int) -> Made:
        a, b = self.below(depth), self.below(depth)
        right = self.at_least(b, SUM + (b.text[0] in "-+"))
        return Made(a.value + b.value, f"{self.at_least(a, SUM)}{self.gap()}+{self.gap()}{right}", SUM)

    def difference(self, depth: int) -> Made:
        a, b = self.below(depth), self.below(depth)
        right = self.at_least(b, POWER if b.text[0] == "-" else PRODUCT)
        sign = self.draw.choice("--−")
        return Made(a.value - b.value, f"{self.at_least(a, SUM)}{self.gap()}{sign}{self.gap()}{right}", SUM)

    def product(self, depth: int) -> Made:
        a, b = self.below(depth), self.below(depth)
        sign = self.draw.choice([r"\cdot ", r"\cdot ", r"\times ", "*", "×", "·"])
        right = self.at_least(b, SIGNED + (b.text[0] == "-"))
        return Made(a.value * b.value, f"{self.at_least(a, PRODUCT)}{self.gap()}{sign}{self.gap()}{right}", PRODUCT)

    def side_by_side(self, depth: int) -> Made:
        a, b = self.below(depth), self.below(depth)
        left = self.at_least(a, self.draw.choice([SIGNED, SIGNED, PRODUCT]))
        if a.level == QUOTIENT and left == a.text:
            left = self.bracketed(left)
        starts = (r"\binom", r"\sqrt", r"\lfloor", r"\gcd", r"\max", *[r"\frac{"] * (left[-1] in ")]}!"))
        right = b.text if b.level >= POWER and b.text.startswith(starts) else self.bracketed(b.text)
        return Made(a.value * b.value, left + self.gap() + right, PRODUCT)

    def quotient(self, depth: int) -> Made | None:
        a, b = self.below(depth), self.below(depth)
        sign = self.draw.choice(["/", "/", r"\div ", "÷"])
        text = f"{self.at_least(a, PRODUCT)}{self.gap()}{sign}{self.gap()}{self.at_least(b, POWER)}"
        return Made(a.value / b.value, text, QUOTIENT) if b.value else None

    def frac(self, depth: int) -> Made | None:
        a, b = self.below(depth), self.below(depth)
        text = f"\\{self.draw.choice(['frac', 'dfrac'])}{{{a.text}}}{{{b.text}}}"
        level = SIGNED if a.text.isdigit() and b.text.isdigit() else POWER
        return Made(a.value / b.value, text, level) if b.value else None

    def power(self, depth: int) -> Made | None:
        a, n = self.below(depth), self.draw.choice([0, 1, 2, 2, 3, 4, -1, -2])
        if a.value == 0 or abs(a.value) > 50:
            return None
        base = a.text if a.level == ATOM else self.bracketed(a.text)
        shapes = ["^{%d}", "^{%d}", "**(%d)", "^(%d)", *["^%d", "**%d"] * (n >= 0)]
        shown = self.draw.choice(shapes) % n if self.draw.random() < 0.8 else f"^{{{n + 2}-2}}"
        return Made(a.value**n, base + shown, POWER)

    def root(self, depth: int) -> Made | None:
        a, n = self.below(depth), self.draw.choice([2, 2, 2, 3])
        power = a.value**n
        if abs(a.value.numerator) > 1000 or a.value.denominator > 100 or (n == 2 and a.value < 0):
            return None
        inside = self.draw.choice([answer(power), f"{self.bracketed(a.text)}^{n}", f"{self.bracketed(a.text)}^{{{n}}}"])
        shape = "\\sqrt[3]{%s}" if n == 3 else self.draw.choice(["\\sqrt{%s}"] * 5 + ["sqrt(%s)"])
        return Made(a.value, shape.replace("%s", inside), POWER)

    def binomial(self, _: int) -> Made:
        n = self.draw.randint(1, 12)
        k = self.draw.randint(0, n)
        shapes = [r"\binom{%d}{%d}", r"\dbinom{%d}{%d}", *[r"\binom%d%d", r"\binom %d %d"] * (k <= n < 10)]
        return Made(Fraction(math.comb(n, k)), self.draw.choice(shapes) % (n, k), ATOM)

    def factorial(self, depth: int) -> Made:
        a = self.below(depth)
        if a.value.denominator > 1 or not 0 <= a.value <= 8:
            n = self.draw.randint(0, 8)
            return Made(Fraction(math.factorial(n)), f"{n}!", POWER)
        return Made(Fraction(math.factorial(int(a.value))), self.bracketed(a.text) + "!", POWER)

    def negative(self, depth: int) -> Made:
        a = self.below(depth)
        return Made(-a.value, f"-{self.gap(0.1)}{self.at_least(a, POWER if a.text[0] in '-+' else PRODUCT)}", SUM)

    def absolute(self, depth: int) -> Made | None:
        a = self.below(depth)
        left, right = self.draw.choice([("|", "|"), (r"\left|", r"\right|"), (r"\lvert ", r"\rvert ")])
        return Made(abs(a.value), left + a.text + right, POWER) if "|" not in a.text else None

    def rounded(self, depth: int) -> Made:
        a = self.below(depth)
        if self.draw.random() < 0.5:
            return Made(Fraction(math.floor(a.value)), rf"\lfloor {a.text}\rfloor", POWER)
        return Made(Fraction(math.ceil(a.value)), rf"\left\lceil {a.text}\right\rceil", POWER)

    def of_list(self, depth: int) -> Made:
        a, b = self.draw.randint(1, 60), self.draw.randint(1, 60)
        one, two = self.below(depth), self.below(depth)
        gap = self.gap()
        kinds = [
            Made(Fraction(math.gcd(a, b)), rf"\gcd({a},{gap}{b})", POWER),
            Made(Fraction(math.lcm(a, b)), rf"\operatorname{{lcm}}({a},{gap}{b})", POWER),
            Made(max(one.value, two.value), rf"\max({one.text}, {two.text})", POWER),
            Made(min(one.value, two.value), rf"\min({one.text}, {two.text})", POWER),
        ]
        return self.draw.choice(kinds)


def answer(value: Fraction) -> str:
    """A number as an answer has it."""
    if value.denominator == 1:
        return str(value.numerator)
    return f"{'-' if value < 0 else ''}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def pairs(seed: int, count: int, depth: int = 3) -> Iterator[tuple[str, str, bool]]:
    """(answer, expression, whether they are equal): of the unequal ones, the answer is off by a little, or doubled."""
    draw = random.Random(seed)
    expressions = Expressions(draw)
    while count:
        value, text, _ = expressions.make(draw.randint(1, depth))
        off = draw.choice([1, -1, Fraction(1, 2), 2, 10, value + 1]) if draw.random() < 0.4 else 0
        if len(text) <= MAX_LENGTH and len(answer(value + off)) < 60:
            count -= 1
            yield answer(value + off), text, off == 0
