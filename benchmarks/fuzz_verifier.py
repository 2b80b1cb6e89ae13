"""Look for completions that break the verifier, and for wrong ones that it rewards.

    python benchmarks/fuzz_verifier.py --seconds 300 --seed 1
    python benchmarks/fuzz_verifier.py --seconds 300 --answers problems.jsonl     the "answer" of each line, not ours

Three searches, a third of the time each. `border`: hostile text goes through the caller's half of the verifier, which
may neither raise nor meet anything that it did not foresee; the slowest texts are told, and how the time of a
repetition grows from 25 to 100 KB. `values`: answers are changed by mutations whose effect is known. One that changes
the value must never be rewarded; of those that keep it, the share that still is gets counted. `trees`: random
expressions of exact value (benchmarks/expressions.py) are held against a number; each wrong verdict is a fault. Exit
code 1 if a fault was found.
"""

import argparse
import faulthandler
import json
import logging
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from benchmarks import expressions
from stages.core.grading.verifier import Verifier, comparison, grammar, notation
from stages.core.grading.verifier.extraction import boxed, extract
from stages.core.grading.verifier.latex import Refused
from stages.core.records import Verdict


def _rows(table: str, separator: str = "¦") -> list[str]:
    """The items of a table of several lines."""
    return [item for line in table.strip("\n").splitlines() for item in line.split(separator)]


_ANSWERS = r"""
7¦-12¦25¦144¦2500¦98765¦0.25¦3.75¦-0.125¦12.5¦\frac{3}{8}¦-\frac{7}{12}¦\frac{22}{7}¦2\sqrt{3}¦\frac{\sqrt{5}}{7}
3+2\sqrt{2}¦\sqrt{7+4\sqrt{3}}¦\frac{\pi}{3}¦25\pi¦2^{10}+7¦\ln 5¦x^2-5x+6¦(x+2)(x-3)¦\frac{n(n+1)}{2}¦3t^2+6t
a^2b-c¦2x+3y¦y=3x-2¦(2,7)¦(3,-5,8)¦(1,4]¦[0,5)¦(-3,12)¦\{2,3,5\}¦2, 9, 14¦\frac{x+2}{3}¦35\%¦8\text{ cm}¦45^\circ
\text{Tuesday}¦\text{Yes}¦\begin{pmatrix}1&2\\3&4\end{pmatrix}¦2+5i¦312_5¦B¦(C)¦x>5¦2:5¦\{2n \mid n\in\mathbb{Z}\}
"""
ANSWERS = _rows(_ANSWERS)

# --- hostile text -------------------------------------------------------------------------------------------------

_PIECES = r"""
\frac{ \frac12 \sqrt \sqrt[3]{ \text{ \text{or} \boxed{ \boxed \left( \right) \{ \} \mid \pm \mp \approx \cup \in \le
\begin{pmatrix} \end{pmatrix} \\ & \overline{ \circ ^\circ \% \$ $ ^ _ ^{ _{ ! !! ' " ` ~ # @ ? | : ; , . .. ...
= < > != + - * ** / // ( ) [ ] { } 0 1 9 00 1,000 \1,000 1. .5 e5 E99 1e999999999 million tenths percent
and or not x pi inf sqrt \operatorname{zeros} \phantom{ \color{red} \infty \emptyset \mathbb{R} (A) B) Answer:
</think> True None \x00 \u0041 \, \! {,}
"""
PIECES = _PIECES.split()
ODD = list(
    "\x00\x08\x0c\x1b\x7f\x85\n\r\t\u2028\u200b\u2063\u202e\ufeff\ud800\udfff\ud83d\U0010ffff\ue000\u0301\u0338"
    "٣५๗𝟛③Ⅳ㊿½⅟²₃¾＋−–×÷√∞≤≠∪π°‰％：，。ﷺßİé"
)
_REPEATED = r"""
1¦12,¦{}¦{1}¦\boxed{1}, ¦answer: ¦a b¦\text{a} .¦(1,2)¦0.¦1/¦x^¦\frac{1}{¦$1$ ,¦\{1\}¦1:¦x=¦x<¦\$¦m/¦\text{,}¦**¦½½¦- ,
"""
REPEATED = [*PIECES, *ODD, *_rows(_REPEATED), " ", "1 ", "\\", "- ", "\\text{a} ", "$1$ ", "\n\n"]
_SHAPES = r"""
\boxed{%s}¦%s¦\boxed{1}%s¦Answer: %s¦\boxed{%s¦%s}¦\boxed{2%s2}¦$%s$¦The answer is %s.
"""
SHAPES = _rows(_SHAPES)
HANG_S = 30


def mutated(draw: random.Random, text: str) -> str:
    """A text with a few pieces put in, taken out, doubled or exchanged."""
    for _ in range(draw.choice((1, 1, 2, 3, 6))):
        at, to = sorted((draw.randint(0, len(text)), draw.randint(0, len(text))))
        piece = draw.choice(draw.choice((PIECES, PIECES, ODD)))
        text = draw.choice(
            (
                text[:at] + piece + text[at:],
                text[:at] + text[to:],
                text[:at] + text[at:to] * draw.choice((2, 3, 40)) + text[to:],
                text[:at] + piece + text[to:],
                text[to:] + text[:at],
            )
        )[:5000]
    return text


def nested(draw: random.Random, size: int) -> str:
    """Brackets inside of brackets."""
    left, right = draw.choice(
        [("(", ")"), ("{", "}"), ("[", "]"), ("\\{", "\\}"), ("\\frac{1}{", "}"), ("\\sqrt{", "}")]
    )
    depth = draw.choice((5, 12, 24, 25, 60, size // (len(left) + len(right))))
    return left * depth + draw.choice("1x") + right * draw.choice((depth, depth - 1))


def large_number(draw: random.Random, size: int) -> str:
    """A number of many digits, in some notation."""
    digits = str(draw.randint(1, 9)) * draw.choice((999, 1000, 1001, 4299, 4301, size))
    grouped = ",".join(["1"] + ["234"] * (len(digits) // 3))
    return draw.choice(
        [
            digits,
            "-" + digits,
            "0." + digits,
            f"{digits}/{digits}",
            grouped,
            f"\\frac{{1}}{{{digits}}}",
            f"2^{{{digits}}}",
            f"{digits}!",
            f"{digits}\\%",
            f"10^{{-{digits}}}",
            f"0.\\overline{{{digits}}}",
            f"{digits}_{{7}}",
            f"{digits}:{digits}",
            f"1e{digits}",
            f"{digits} million",
            f"x_{{{digits}}}",
        ]
    )


def hostile(draw: random.Random, answers: list[str], size: int = 100_000) -> str:
    """A completion that no honest policy writes."""
    kind = draw.random()
    if kind < 0.6:
        inside = mutated(draw, draw.choice(answers))
    elif kind < 0.8:
        unit = "".join(draw.choice((" ", *REPEATED)) for _ in range(draw.choice((1, 2, 3))))
        inside = unit * (draw.choice((3, 30, 300, 1000)) if kind < 0.79 else size // 8)
        inside = draw.choice(PIECES) + inside[: draw.choice((900, 900, 995, size))] + draw.choice(PIECES)
    elif kind < 0.9:
        inside = nested(draw, draw.choice((900, 900, 900, size)))
    else:
        inside = large_number(draw, draw.choice((900, 900, 900, size)))
    return draw.choice(SHAPES) % inside if draw.random() < 0.5 else SHAPES[0] % inside


class Unforeseen(logging.Handler):
    """Keeps what the verifier logs: texts that its caller's half met without having foreseen them."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self._logger = logging.getLogger(comparison.__name__)

    def __enter__(self) -> "Unforeseen":
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Take note of the message and of what was raised."""
        self.messages.append(f"{record.getMessage()}: {record.exc_info and record.exc_info[1]!r}")


def read_here(completion: str, answer: str) -> Verdict | None:
    """What the caller's process does with a completion, as prediction and (as if it stood in the data) as answer."""
    extracted = extract(completion)
    extract(completion, bare=True)
    if extracted is None:
        return "no_answer"
    comparison.decide(extracted, answer)
    comparison.decide(extracted, extracted)
    return comparison.decide(answer, extracted)


def search_border(answers: list[str], seconds: float, seed: int) -> list[str]:
    """Faults found in the time given; prints the slowest texts and how time grows with length."""
    draw = random.Random(seed)
    slowest: list[tuple[float, str]] = []
    verdicts: Counter[Verdict | None] = Counter()
    end = time.monotonic() + seconds
    with Unforeseen() as unforeseen, tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as last:
        print(f"border: a text that takes over {HANG_S} s ends the search; it is in {last.name}", flush=True)
        while time.monotonic() < end:
            text, answer = hostile(draw, answers), draw.choice(answers)
            last.seek(0)
            last.truncate()
            json.dump([text, answer], last)
            last.flush()
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            start = time.process_time()
            try:
                verdicts[read_here(text, answer)] += 1
            except Exception as error:
                unforeseen.messages.append(f"{text[:200]!r} for {answer!r} raised {error!r}")
            slowest = sorted([*slowest, (time.process_time() - start, text)], reverse=True)[:5]
    faulthandler.cancel_dump_traceback_later()
    print(f"border: {sum(verdicts.values())} texts, {dict(verdicts)}")
    for spent, text in slowest:
        print(f"  {1000 * spent:6.0f} ms for {len(text):,} characters: {text[:60]!r}")
    growths = sorted(((growth(unit, shape), unit, shape) for unit in REPEATED for shape in SHAPES), reverse=True)
    for (ratio, spent), unit, shape in growths[:5]:
        print(f"  100 KB of {unit!r} in {shape!r}: {1000 * spent:.0f} ms, {ratio:.1f} times as long as 25 KB")
    return unforeseen.messages


def growth(unit: str, shape: str) -> tuple[float, float]:
    """How many times as long 100 KB of a repetition take as 25 KB, and how long (0 where it is too short to tell)."""
    spent = []
    for size in (25_000, 100_000):
        text = shape % (unit * (size // len(unit)))
        start = time.process_time()
        read_here(text, "2")
        spent.append(time.process_time() - start)
    return (spent[1] / max(spent[0], 1e-3) if spent[1] > 0.02 else 0.0), spent[1]


# --- mutations of known effect ------------------------------------------------------------------------------------

NUMBER = re.compile(r"-?\d+(?:\.\d+)?|-?\\frac\{\d+\}\{\d+\}", re.ASCII)
_SCALES = """
    million millions billions thousand thousands hundred hundreds dozen dozens tenths hundredths thirds halves quarters
    permille ppm fold lakh crore mio bn pairs score squared cubed factorial grand doubled more less off
"""
SCALES = _SCALES.split()
_NO_UNITS = """
    phi alpha delta choose repeating infinite nope nay dunno permute reversed flipped point hexa ought wrongs correctly
"""
NO_UNITS = _NO_UNITS.split()
_DOUBTS = r"""
 is wrong¦ or not¦ maybe¦?¦ is not right¦ (wrong)¦ or more¦ at most¦ to start with, then more
"""
DOUBTS = _rows(_DOUBTS)
_OPERATORS = r"""
\approx¦\ne¦\neq¦<¦>¦\le¦\to¦\sim¦\pm¦:¦\mid¦\mod¦-¦+¦/¦,¦;¦ or ¦ and ¦|
"""
OPERATORS = _rows(_OPERATORS)
_PREFIXES = r"""
not ¦\neq ¦\text{not }¦at least ¦<¦\ge ¦\pm ¦x\ne ¦-x=¦half of ¦\neg ¦x>¦!
"""
PREFIXES = _rows(_PREFIXES)
_SUFFIXES = r"""
'¦''¦!!¦^{T}¦_2¦_{7}¦_000¦i¦x¦^{2}¦!¦T¦\infty¦|¦^¦\%0¦\overline{3}5¦k¦K5
"""
SUFFIXES = _rows(_SUFFIXES)
_WRAPS = r"""
\overline{%s}¦\sqrt{%s}¦-(%s)¦2(%s)¦(%s)+1¦\frac{%s}{2}¦\frac{1}{%s}¦|%s¦\{%s¦10^{%s}¦f(%s)
"""
WRAPS = _rows(_WRAPS)


class Mutation(NamedTuple):
    """A change of an answer's text; `apply` gives None where its effect on the value would not be sure."""

    name: str
    keeps: bool
    apply: Callable[[random.Random, str], str | None]


def exact(text: str) -> Fraction | None:
    """The value of an expression in canonical LaTeX, if it is a rational number."""
    tree = parsed(text)
    return None if tree is None else grammar.exact(tree)


def parsed(text: str) -> grammar.Tree | None:
    """The tree of a text, if it is an expression."""
    try:
        return grammar.parse(text)
    except Refused:
        return None


def is_plain_number(text: str) -> bool:
    """Whether a text is one number, and none of those that some operation leaves as they are (-2 to 2, and 10)."""
    value = exact(text) if NUMBER.fullmatch(text) else None
    return value is not None and value not in (-2, -1, 0, 1, 2, 10)


def is_expression(text: str) -> bool:
    """Whether a text is one expression of letters, in which no function could undo a change."""
    try:
        plain = notation.canonical(text)
    except Refused:
        return False
    commands = set(re.findall(r"\\[a-zA-Z]+", plain)) <= {"\\frac", "\\sqrt", "\\cdot", "\\pi"}
    return commands and len(plain) < 80 and not re.search(r"0|[|!_]", plain) and parsed(plain) is not None


def for_numbers(texts: Iterable[str]) -> Callable[[random.Random, str], str | None]:
    """Templates of one place that all change a number put there."""
    choices = list(texts)
    return lambda draw, text: draw.choice(choices).replace("%s", text) if is_plain_number(text) else None


def other_digit(draw: random.Random, text: str) -> str | None:
    """One digit of a number or expression as another; none that an exponent, a zero or a one could make idle."""
    if not (is_plain_number(text) or is_expression(text)) or re.search(r"(?<!\d)1(?![\d.])", text):
        return None
    places = [match.start() for match in re.finditer(r"[2-9]", text)]
    if not places:
        return None
    at = draw.choice(places)
    return text[:at] + str((int(text[at]) + draw.randint(1, 5)) % 8 + 2).replace(text[at], "1") + text[at + 1 :]


def other_items(draw: random.Random, text: str) -> str | None:
    """A tuple or interval with two different items exchanged, or a bracket of the other kind."""
    match = re.fullmatch(r"([(\[])([^()\[\]{}\\]+)([)\]])", text)
    items = match.group(2).split(",") if match else []
    if match is None or not 2 <= len(items) <= 5 or not all(NUMBER.fullmatch(item.strip()) for item in items):
        return None
    if len({item.strip() for item in items}) < len(items) or any(re.match(r"0\d\d$", item) for item in items):
        return None
    if draw.random() < 0.5 and len(items) == 2:
        return {"(": "[", "[": "("}[match.group(1)] + match.group(2) + match.group(3)
    turned = items[1:] + items[:1]
    return match.group(1) + ",".join(turned) + match.group(3)


def other_symbol(draw: random.Random, text: str) -> str | None:
    """One letter of an expression with a prime, an accent or an index, or as another letter."""
    if not is_expression(text):
        return None
    places = [match.start() for match in re.finditer(r"(?<![a-zA-Z\\])[a-df-hj-z](?![a-zA-Z])", text)]
    if not places:
        return None
    at = draw.choice(places)
    made = draw.choice(
        ["%s'", "{%s'}", r"\bar{%s}", "%s_{3}", r"\hat{%s}", "%s^{T}", "W", "%sW", "(%s+1)", "%s^{\\prime}"]
    )
    return text[:at] + made.replace("%s", text[at]) + text[at + 1 :]


def other_value(draw: random.Random, text: str) -> str | None:
    """An expression plus one, doubled, or beside another number."""
    if not is_expression(text) or exact(notation.canonical(text)) is not None:
        return None
    return draw.choice(
        [
            "(%s)+1",
            "2(%s)",
            "%s 3",
            r"%s\approx 987654",
            r"%s \to 3",
            "%s:3",
            "%s'",
            "(%s)_3",
            "%s or 3",
            "%s, 3",
            r"%s\ne 3",
            r"\{x \mid %s\}",
            r"%s\text{ thousand}",
            "(%s",
            "%s+",
            r"%s\text{ is wrong}",
            "not %s",
        ]
    ).replace("%s", text)


def beside(draw: random.Random, text: str) -> str | None:
    """A number with an operator and another number behind or before it."""
    if not is_plain_number(text):
        return None
    other, sign, gap = draw.randint(3, 9), draw.choice(OPERATORS), draw.choice(["", " "])
    value = exact(text)
    if value is None or other in (value, 2 * value, value**2) or (sign in ("|", r"\mod", ",") and not gap):
        return None
    pair = [text, str(other)] if draw.random() < 0.7 or sign == r"\mod" else [str(other), text]
    return f"{pair[0]}{gap}{sign if sign[0] != chr(92) else sign + ' '}{gap}{pair[1]}"


def adjacent(draw: random.Random, text: str) -> str | None:
    """Two numbers that add up, or multiply, to the answer, side by side."""
    if not re.fullmatch(r"\d{1,4}", text) or int(text) < 4:
        return None
    first = draw.randint(1, int(text) - 1)
    second = int(text) - first
    return draw.choice(
        ["%d %d", "%d{%d}", "{%d}{%d}", r"%d\ %d", "%d~%d", r"%d\quad %d", "%d;%d", "%d, %d", "%d & %d", "(%d,%d)"]
    ) % (first, second)


def decimal_comma(draw: random.Random, text: str) -> str | None:
    """The digits of a number with a comma, or an underscore, where none belongs."""
    if not re.fullmatch(r"\d{2,9}", text) or text[0] == "0":
        return None
    mark = draw.choice([",", "_", ";", "{,}"])
    at = draw.randint(1, len(text) - 1)
    if mark == "_" or len(text) - at != 3 or at > 3:
        return text[:at] + mark + text[at:]
    return "0" + mark + text if len(text) == 3 else None


def several_choices(draw: random.Random, text: str) -> str | None:
    """More than one choice in one box."""
    match = re.fullmatch(r"\(?([A-E])\)?", text)
    if match is None:
        return None
    letter = match.group(1)
    other = draw.choice([c for c in "ABCDE" if c != letter])
    shape = draw.choice(
        [
            "(%s) or (%s)",
            "%s or %s",
            "%s) no, %s) yes",
            "%s, %s",
            "(%s)(%s)",
            "%s/%s",
            "%s) is wrong, %s) is right",
            "(%s), not (%s)",
            "(%s) 5 (%s) 6",
            "%s. 5, %s. 6",
            "not %s but %s",
            "Option %s or %s",
            "either (%s) or (%s)",
            "(%s) %s",
            "%s and %s",
        ]
    )
    return shape % draw.choice([(letter, other), (other, letter)])


def other_builder(draw: random.Random, text: str) -> str | None:
    """A set-builder of other elements."""
    match = re.fullmatch(r"\\\{(.+?)\s*\\mid(.+)\\\}", text)
    return (
        f"\\{{{draw.choice(['2(%s)', '%s+1', '-(%s)']) % match.group(1)} \\mid{match.group(2)}\\}}" if match else None
    )


def anywhere(shapes: list[str]) -> Callable[[random.Random, str], str | None]:
    """Decorations that leave any answer as it is."""
    return lambda draw, text: draw.choice(shapes).replace("%s", text) if "$" not in text and "\n" not in text else None


def spaced(draw: random.Random, text: str) -> str | None:
    """A space behind a comma or round an operator."""
    return (
        re.sub(r"(?<![\d,.])([+=<>])|,(?!\d{3})", lambda m: f" {m.group().strip()} ", text)
        if "\\text" not in text
        else None
    )


MUTATIONS = [
    Mutation(
        "scale word",
        False,
        for_numbers(f"%s{gap}{word}{end}" for word in SCALES for gap, end in ((" ", ""), ("\\text{ ", "}"))),
    ),
    Mutation("word that is no unit", False, for_numbers(f"%s {word}" for word in NO_UNITS)),
    Mutation("outer box", False, for_numbers([r"-\boxed{%s}", r"4, \boxed{%s}", r"x\ne\boxed{%s}", r"2\boxed{%s}"])),
    Mutation("word of doubt", False, for_numbers([*("%s" + d for d in DOUBTS), *(f"%s\\text{{{d}}}" for d in DOUBTS)])),
    Mutation("prefix", False, for_numbers(p + "%s" for p in PREFIXES)),
    Mutation("suffix", False, for_numbers("%s" + s for s in SUFFIXES)),
    Mutation("wrap", False, for_numbers(WRAPS)),
    Mutation("another number beside it", False, beside),
    Mutation("side by side", False, adjacent),
    Mutation("comma or underscore", False, decimal_comma),
    Mutation("another digit", False, other_digit),
    Mutation("another order or bracket", False, other_items),
    Mutation("another symbol", False, other_symbol),
    Mutation("another value", False, other_value),
    Mutation("several choices", False, several_choices),
    Mutation("another set", False, other_builder),
    Mutation(
        "dollars and brackets of LaTeX",
        True,
        anywhere(["$%s$", r"\(%s\)", r"\displaystyle %s", "{%s}", " %s ", "%s.", r"\quad %s", r"%s\,"]),
    ),
    Mutation(
        "name before a number",
        True,
        lambda draw, text: draw.choice(["x=", "x = ", r"\text{Area}="]) + text if is_plain_number(text) else None,
    ),
    Mutation("spaces", True, spaced),
    Mutation(
        "other fraction command",
        True,
        lambda draw, text: text.replace(r"\frac", r"\dfrac") if r"\frac" in text else None,
    ),
    Mutation("thousands", True, lambda draw, text: f"{int(text):,}" if re.fullmatch(r"[1-9]\d{3,8}", text) else None),
    Mutation(
        "zeros of a decimal",
        True,
        lambda draw, text: text + draw.choice((".0", ".00")) if re.fullmatch(r"-?\d{1,9}", text) else None,
    ),
    Mutation(
        "sum with zero",
        True,
        lambda draw, text: (
            draw.choice(("%s+0", "0+%s", r"1\cdot(%s)")).replace("%s", text) if is_expression(text) else None
        ),
    ),
    Mutation(
        "unit",
        True,
        lambda draw, text: (
            text + draw.choice((r"\text{ cm}", " apples", r"\,\mathrm{kg}")) if is_plain_number(text) else None
        ),
    ),
]


def mutants(draw: random.Random, answers: list[str]) -> Iterator[tuple[Mutation, str, str]]:
    """(mutation, answer, mutant) without end."""
    while True:
        answer, mutation = draw.choice(answers), draw.choice(MUTATIONS)
        mutant = mutation.apply(draw, answer)
        if mutant is not None and mutant != answer:
            yield mutation, answer, mutant


def search_values(answers: list[str], seconds: float, seed: int) -> list[str]:
    """Wrong mutants that were rewarded, found in the time given; prints how many right ones were."""
    made = mutants(random.Random(seed), answers)
    faults: dict[str, None] = {}
    counts: dict[str, Counter[Verdict]] = {mutation.name: Counter() for mutation in MUTATIONS}
    end = time.monotonic() + seconds
    with Verifier(workers=1, accept_unevaluated=True) as verifier:
        while time.monotonic() < end:
            batch = [next(made) for _ in range(500)]
            scores = verifier.verify([(f"\\boxed{{{mutant}}}", answer) for _, answer, mutant in batch])
            for (mutation, answer, mutant), score in zip(batch, scores, strict=True):
                counts[mutation.name][score.verdict] += 1
                if score.reward and not mutation.keeps:
                    faults[f"{mutation.name}: {mutant!r} was rewarded for {answer!r}"] = None
    for mutation in MUTATIONS:
        count = counts[mutation.name]
        share = count["correct"] / max(1, count.total())
        effect = "keeps" if mutation.keeps else "changes"
        print(f"  {effect:<9}{mutation.name:<32}{count.total():>8}{share:>8.1%} {dict(count)}")
    return list(faults)


def search_trees(seconds: float, seed: int) -> list[str]:
    """Expressions that were misjudged, found in the time given."""
    faults: list[str] = []
    end = time.monotonic() + seconds
    num = 0
    with Verifier(workers=1, accept_unevaluated=True) as verifier:
        while time.monotonic() < end:
            num += 1000
            pairs = list(expressions.pairs(seed * 10**6 + num, 1000))
            scores = verifier.verify([(f"\\boxed{{{text}}}", answer) for answer, text, _ in pairs])
            for (answer, text, is_equal), score in zip(pairs, scores, strict=True):
                if (score.reward == 1.0) != is_equal:
                    faults.append(f"tree: {text!r} is {score.verdict} for {answer!r}")
    print(f"trees: {num} expressions, {len(faults)} misjudged")
    return faults


def main() -> None:
    """Search, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of all searches together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--answers", action="append", help="a .jsonl file of problems whose answers are mutated")
    options = parser.parse_args()
    answers = ANSWERS
    if options.answers:
        lines = [line for name in options.answers for line in Path(name).read_text().splitlines()]
        read = (json.loads(line)["answer"] for line in lines)
        answers = list(dict.fromkeys(boxed(answer) or answer for answer in read))
    print(f"{len(answers)} answers, seed {options.seed}")
    faults = search_border(answers, options.seconds / 3, options.seed)
    faults += search_values(answers, options.seconds / 3, options.seed)
    faults += search_trees(options.seconds / 3, options.seed)
    print(f"\n{len(faults)} faults", *faults[:200], sep="\n  ")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
