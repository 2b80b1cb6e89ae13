"""One way of writing each thing: the many notations of an answer brought to plain LaTeX, and its numbers and units.

Nothing here knows algebra or imports sympy; every function is linear in its text (a short one: see answers.MAX_RAW)
but for a small factor. Left out on purpose: conversion between units, and number words beyond sixteen.
"""

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache

MAX_LENGTH = 1000  # characters
MAX_DEPTH = 24  # of brackets of all kinds, \\frac{}{} and the like included
MAX_EXPONENT = 400  # of a power of ten that is written out; beyond it a number stays an expression


class Refused(Exception):
    """An answer that is not looked into: too long, too deep, or asking for work that no answer needs."""


FUNCTIONS = [
    "arcsin",
    "arccos",
    "arctan",
    "sinh",
    "cosh",
    "tanh",
    "coth",
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "log",
    "ln",
    "lg",
    "exp",
    "sqrt",
    "gcd",
    "lcm",
    "max",
    "min",
    "det",
    "mod",
]
NUMBER_WORDS = dict(
    zip(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
        ],
        range(17),
        strict=True,
    )
)
MULTIPLIERS = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
# Words that change what stands before them: a number followed by one of these is no number with a unit.
_NOT_UNITS = {
    "is",
    "are",
    "was",
    "were",
    "be",
    "am",
    "not",
    "no",
    "never",
    "nor",
    "neither",
    "none",
    "or",
    "and",
    "but",
    "if",
    "then",
    "when",
    "where",
    "while",
    "for",
    "because",
    "since",
    "so",
    "maybe",
    "perhaps",
    "possibly",
    "probably",
    "about",
    "around",
    "approximately",
    "roughly",
    "almost",
    "nearly",
    "wrong",
    "incorrect",
    "false",
    "right",
    "correct",
    "true",
    "more",
    "less",
    "than",
    "fewer",
    "greater",
    "smaller",
    "larger",
    "at",
    "least",
    "most",
    "over",
    "under",
    "above",
    "below",
    "up",
    "down",
    "except",
    "only",
    "plus",
    "minus",
    "times",
    "divided",
    "multiplied",
    "by",
    "negative",
    "positive",
    "mod",
    "modulo",
    "squared",
    "cubed",
    "factorial",
    "half",
    "halves",
    "third",
    "thirds",
    "quarter",
    "fifth",
    "tenth",
    "double",
    "triple",
    "score",
    "pair",
    "pairs",
    "gross",
    "infinity",
    "infinitely",
    "do",
    "does",
    "did",
    "know",
    "cannot",
    "can't",
    "don't",
    "isn't",
    "unknown",
    "undefined",
    "base",
    "percent",
    "percentage",
} | set(NUMBER_WORDS)
_UNIT_WORDS = {
    "cm": "centimeter centimetre",
    "mm": "millimeter millimetre",
    "km": "kilometer kilometre",
    "m": "meter metre",
    "in": "inch",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "kg": "kilogram",
    "g": "gram gm",
    "mg": "milligram",
    "lb": "pound lbs",
    "oz": "ounce",
    "l": "liter litre L",
    "ml": "milliliter millilitre mL",
    "s": "second sec",
    "min": "minute mins",
    "h": "hour hr hrs",
    "day": "day",
    "year": "year yr yrs",
    "dollar": "dollar usd $ bucks",
    "cent": "cent ¢",
    "euro": "euro eur €",
    "degree": "degree deg °",
    "radian": "radian rad",
    "mph": "mph",
    "kph": "kph kmh",
    "hz": "hertz",
    "n": "newton",
    "j": "joule",
    "w": "watt",
    "v": "volt",
    "a": "ampere amp",
    "mol": "mole",
    "": "unit units",
}
_UNITS = {word: unit for unit, words in _UNIT_WORDS.items() for word in [unit, *words.split()] if word}
_SHORT_UNITS = sorted(w for w in _UNITS if 2 <= len(w) <= 3 and w.isalpha() and w not in ("in", "min", "mol", "rad"))

_SYMBOLS = {
    **dict.fromkeys("−–—‐‑﹣", "-"),
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "∙": r"\cdot ",
    "•": r"\cdot ",
    "÷": r"\div ",
    "π": r"\pi ",
    "∞": r"\infty ",
    "≤": r"\le ",
    "⩽": r"\le ",
    "≥": r"\ge ",
    "⩾": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}",
    "±": r"\pm ",
    "∓": r"\mp ",
    "√": r"\sqrt ",
    "°": r"^\circ ",
    "…": r"\ldots ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "∠": r"\angle ",
    "，": ",",
    "。": ".",
    "；": ";",
    "、": ",",
    "′": "'",
    "“": '"',
    "”": '"',
    "’": "'",
    **{
        letter: f"\\{name} "
        for letter, name in zip(
            "αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΠΣΦΨΩ",
            [
                "alpha",
                "beta",
                "gamma",
                "delta",
                "epsilon",
                "zeta",
                "eta",
                "theta",
                "iota",
                "kappa",
                "lambda",
                "mu",
                "nu",
                "xi",
                "rho",
                "sigma",
                "tau",
                "upsilon",
                "phi",
                "chi",
                "psi",
                "omega",
                "Gamma",
                "Delta",
                "Theta",
                "Lambda",
                "Xi",
                "Pi",
                "Sigma",
                "Phi",
                "Psi",
                "Omega",
            ],
            strict=True,
        )
    },
}
_SYMBOL_TABLE = str.maketrans(_SYMBOLS)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

# The commands that the grammar of math-verify turns into objects of bounded size. One that is in neither list is
# refused: some build huge objects (\\operatorname{zeros}), some hide text (\\phantom), the rest nobody can compare.
READABLE = frozenset(
    (
        "Delta Gamma Lambda Omega Phi Pi Psi Sigma Theta Upsilon Xi alpha arccos arcsin arctan bar begin beta "
        "binom cdot chi circ cos cosh cot coth csc ddot delta det div dot ell emptyset end epsilon eta exp "
        "frac gamma gcd hat hbar infty int iota kappa lambda langle lceil lcm lfloor lim ln log lvert mathbb "
        "max min mu nu omega overline partial phi pi prime prod psi rangle rceil rfloor rho rvert sec sigma "
        "sin sinh sqrt sum tan tanh tau theta times to upsilon varepsilon varphi varrho vartheta vec vert "
        "widehat xi zeta "
    ).split()
)
# Commands of honest answers that say something which only words can be compared on.
VERBAL = frozenset(
    (
        "ldots vdots ddots equiv bmod pmod pod mod mid nmid forall exists odot oplus otimes triangle parallel "
        "perp sim cong to rightarrow leftarrow Rightarrow Leftarrow implies iff Leftrightarrow "
        "Longleftrightarrow land lor neg subset subseteq supset supseteq not notin ni sup inf deg dim ker "
        "star ast underbrace overbrace bigcup bigcap mathcal mathfrak top bot square cap setminus le ge ne in "
        "approx cup pm mp lcm widetilde tilde imath jmath wedge vee propto hline "
    ).split()
)

# Applied in this order; each brings many spellings to one.
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\x0c(?=rac)", r"\\f"),  # a backslash lost to a string escape: form feed, tab and backspace are no answer's
        (r"\t(?=ext\{|imes|frac|heta)", r"\\t"),
        (r"\x08(?=inom|egin|oxed|eta|ar\{)", r"\\b"),
        (r"[\x00-\x20\x7f\u00a0]+", " "),
        (r"\\\\(?=circ|[dt]?frac|sqrt|text|pi|boxed|cdot|times|left|right)", r"\\"),
        (r"\\[([\])]", " "),  # \( \) \[ \]
        (r"\\(?:left|right|middle)(?![a-zA-Z])\s*\.?", ""),
        (r"\\[bB]igg?[lrm]?(?![a-zA-Z])", ""),
        (r"(?<=\d)(?:\\[,;:! ]|\{,\}|~|\{ \})(?=\d{3}(?!\d))", ""),  # thousands
        (r",\s*\\!\s*(?=\d)", ","),
        (r"(?<=\d)\{,\}(?=\d)", "."),
        (r"\{,\}", ","),
        (r"(?<!\\)\\!", ""),
        (
            r"(?<!\\)\\[,;:> ]|\\(?:quad|qquad|thinspace|enspace|hfill|displaystyle|textstyle|limits|nolimits)"
            r"(?![a-zA-Z])|\\[hv]space\*?\{[^{}]*\}|~",
            " ",
        ),
        (r"\\(?:d|t|c)frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:dbinom|tbinom)(?![a-zA-Z])", r"\\binom"),
        (r"\\textcolor\s*\{[^{}]*\}|\\color\s*\{[^{}]*\}", ""),
        (
            r"\\(?:underline|boxed|fbox|mathop|ensuremath|mathbf|mathit|mathnormal|boldsymbol|bm|bf|it|rm|bold|mathrm"
            r"(?=\s*\{\s*~?\s*[ied]\s*\}))(?![a-zA-Z])",
            "",
        ),
        (r"\\(?:mathrm|text(?:bf|it|rm|tt|sf|normal|up|md)?|mbox|hbox|mathsf|mathtt|emph)\s*\{", r"\\text{"),
        (r"\\operatorname\*?\s*\{\s*([a-zA-Z]+)\s*\}", lambda m: _operator(m.group(1))),
        (r"\\text\{\s*(?:%s)\s*\}" % "|".join(FUNCTIONS), lambda m: "\\" + m.group()[6:-1].strip() + " "),  # noqa: UP031
        (r"\\(?:leqslant|leqq|leq)(?![a-zA-Z])|<=", r"\\le "),
        (r"\\(?:geqslant|geqq|geq)(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\neq(?![a-zA-Z])|!=", r"\\ne "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\(?:varnothing|emptyset)(?![a-zA-Z])", r"\\emptyset "),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\(?:dots|cdots|dotsc|dotsb)(?![a-zA-Z])|\.\.\.+", r"\\ldots "),
        (r"\\(?:colon|mathrel\{:\})(?![a-zA-Z])", ":"),
        (r"\\(?:simeq|thickapprox|doteq)(?![a-zA-Z])", r"\\approx "),
        (r"\\degree(?![a-zA-Z])", r"^\\circ "),
        (r"\^\s*\{\s*\\circ\s*\}", r"^\\circ "),
        (r"\\(?:R|Z|Q|N|C)(?![a-zA-Z])", lambda m: "\\mathbb{%s}" % m.group()[1]),  # noqa: UP031
        (r"\\mathbb\s*([A-Z])", r"\\mathbb{\1}"),
        (r"(?<![a-zA-Z\\])(?:np|numpy|math|sympy|sp)\.(?=[a-z])", ""),
        (
            r"(?<![a-zA-Z\\])(%s)(?=[^a-zA-Z]|[a-zA-Z](?![a-zA-Z])|$)" % "|".join(FUNCTIONS),  # noqa: UP031
            r"\\\1 ",
        ),
        (r"(?<![a-zA-Z\\])(?:infinity|infty|inf|oo)(?![a-zA-Z])", r"\\infty "),
        (r"\+\s*\\infty", r"\\infty"),
        (r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi "),
        (r"(?<=[\w)\]}])\s*\*\*\s*(?=[\w({+-])", "^"),
        (r"\*\*|__", ""),
        (r"(?<=[\w)\]}])\s*\*\s*(?=[\w(\\{+-])", r"\\cdot "),
        (r"(?i:\\text\{\s*(?:percent|per cent|pct)\s*\})|\\%|(?<=[\d\s}])(?i:percent|per cent|pct)(?![a-zA-Z])", "%"),
        (r"(?<=\d)\s*[eE]([+-]?\d{1,3})(?![\d.a-zA-Z])", r"\\cdot 10^{\1}"),
        (r"(?<=\d)\.(?![\d\\])", ""),
        (r"(?<![\d.])\.(?=\d)", "0."),
    ]
]
_OUTER = re.compile(r"^[\s:=.,;]+(?=\S)|^\*+|[\s.,;:*]+$|(?:\\\\)+\s*$|^\\approx ?|^(?:\\displaystyle)")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_JOINER = re.compile(r",?\s*\\text\{\s*,?\s*(?:and|or)\s*,?\s*\}\s*,?|,?\s+(?:and|or)\s+|,\s*(?:and|or)(?![a-zA-Z])")
_UNIT_BEFORE = re.compile(r"[\d})\]/]\s*$")


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in re.findall(r"[()\[\]{}]", text):
        depth = depth + 1 if character in "([{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def _operator(name: str) -> str:
    return f"\\{name} " if name in FUNCTIONS else f"\\operatorname{{{name}}}"


@lru_cache(65536)
def canonical(text: str) -> str:
    """The text of an answer in one spelling; words stand in \\text{...}, choices between values become commas."""
    text = _unicode(text)
    if len(text) > MAX_LENGTH:
        raise Refused(f"longer than {MAX_LENGTH} characters")
    if _depth(text) > MAX_DEPTH:
        raise Refused(f"brackets deeper than {MAX_DEPTH}")
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _JOINER.sub(", ", _dollars(text.strip()))
    text = _TEXT.sub(_unwrap, text)
    text = _complete_arguments(_powers_and_roots(text))
    text = re.sub(r" +", " ", text)
    return strip_outer(text)


def strip_outer(text: str) -> str:
    """Without the punctuation, and the braces around everything, that carry no meaning."""
    while True:
        stripped = _OUTER.sub("", text.strip()).strip()
        if stripped[:1] == "{" and closing(stripped, 0) == len(stripped) - 1:
            stripped = stripped[1:-1].strip()
        if stripped == text:
            return text
        text = stripped


def _unicode(text: str) -> str:
    if text.isascii():
        return text
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: "^{" + m.group().translate(_RAISED) + "}", text)
    text = re.sub("[₀-₉]+", lambda m: "_{" + m.group().translate(_LOWERED) + "}", text)
    text = re.sub(
        "[¼-¾⅐-⅞]",
        lambda m: " \\frac{{{}}}{{{}}}".format(*tuple(unicodedata.normalize("NFKC", m.group()).split("⁄"))),
        text,
    )
    text = unicodedata.normalize("NFKC", text.translate(_SYMBOL_TABLE)).replace("⁄", "/").translate(_SYMBOL_TABLE)
    return "".join(c for c in text if c in "\t\n\r\f" or unicodedata.category(c) not in ("Cf", "Cs", "Co", "Cn"))


def _dollars(text: str) -> str:
    """Without the $ signs that only mark mathematics; a lone one before a number is money, and becomes \\$."""
    marks = re.findall(r"(?<!\\)\$", text)
    if len(marks) % 2 == 0:
        return re.sub(r"(?<!\\)\$", " ", text).strip()
    return (
        re.sub(r"(?<!\\)\$(?=\s*[\d.])", r"\\$", text, count=1)
        .replace("\\$", "\0")
        .replace("$", "")
        .replace("\0", "\\$")
    )


def _unwrap(match: re.Match[str]) -> str:
    """What \\text{...} holds, where that is mathematics; words, and a letter after a number (a unit), stay."""
    inside = match.group(1)
    letters = re.findall(r"[^\W\d_]+", inside)
    lone = len(letters) == 1 and len(letters[0]) == 1 and inside.strip() == letters[0]
    if not letters:
        return inside
    if lone and (letters[0] in "ied" or not _UNIT_BEFORE.search(match.string, 0, match.start())):
        return letters[0]
    return "\\text{" + inside.strip() + "}"


def _powers_and_roots(text: str) -> str:
    """x^(a+b) and sqrt(a+b) with braces: plain-text habits that LaTeX reads otherwise."""
    out: list[str] = []
    position = 0
    for match in re.finditer(r"(?:\^|\\sqrt|\\exp)\s*\(", text):
        end = closing(text, match.end() - 1)
        if match.start() < position or end is None:
            continue
        command = match.group()[:-1].strip()
        command = "e^" if command == "\\exp" else command
        out += [text[position : match.start()], command, "{", text[match.end() : end], "}"]
        position = end + 1
    return "".join([*out, text[position:]])


_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_ARGUMENTS = {"\\frac": 2, "\\binom": 2, "\\sqrt": 1, "^": 1, "_": 1}


def _complete_arguments(text: str) -> str:
    """\\frac12, \\frac1{2}, \\sqrt2, x^\\pi, 2^10: every argument in braces."""
    text = re.sub(r"([\^_])\s*(-?\d+)(?![\d}])", r"\1{\2}", text)
    out: list[str] = []
    open_groups: list[int] = []
    wanted = position = 0
    while match := _TOKEN.match(text, position):
        token, position = match.group(), match.end()
        if token == "{":
            open_groups.append(max(0, wanted - 1))
            wanted = 0
        elif token == "}":
            wanted = open_groups.pop() if open_groups else 0
        elif wanted and token == " ":
            continue
        elif wanted and token == "[" and out[-1] == "\\sqrt" and "]" in text[position:]:
            position = text.index("]", position) + 1
            token = text[match.start() : position]
        elif wanted and token not in _ARGUMENTS:
            token = "{" + token + "}"
            wanted -= 1
        else:
            wanted = _ARGUMENTS.get(token, 0)
        out.append(token)
    return "".join(out)


_OPEN = {"(", "[", "{", "\\{", "\\langle", "\\lfloor", "\\lceil", "\\begin"}
_CLOSE = {")", "]", "}", "\\}", "\\rangle", "\\rfloor", "\\rceil", "\\end"}


def tokens(text: str) -> Iterator[tuple[int, str, int]]:
    """(position, token, depth of brackets outside of it) for each LaTeX token; brackets of all kinds count alike."""
    depth = 0
    for match in _TOKEN.finditer(text):
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
    """The pieces of `text` between those separators that stand outside of all brackets, and the separators."""
    pieces, found, begin = [], [], 0
    for position, token, depth in tokens(text):
        if depth == 0 and token in separators:
            pieces.append(text[begin:position].strip())
            found.append(token)
            begin = position + len(token)
    return [*pieces, text[begin:].strip()], found


_DECIMAL = r"\d+(?:\.\d+)?"
_NUMBERS = [
    re.compile(pattern, re.ASCII)
    for pattern in (
        rf"(?P<sign>[+-]?)\s*(?P<num>{_DECIMAL})(?:\s*(?:\\cdot|\\times)\s*10\s*\^\s*\{{\s*(?P<exp>[+-]?\d{{1,4}})\s*\}})?",
        r"(?P<sign>[+-]?)\s*10\s*\^\s*\{\s*(?P<exp>[+-]?\d{1,4})\s*\}",
        rf"(?P<sign>[+-]?)\s*(?:(?P<whole>\d+)\s*)?\\frac\s*\{{\s*(?P<num>[+-]?{_DECIMAL})\s*\}}\s*\{{\s*(?P<den>[+-]?{_DECIMAL})\s*\}}",
        rf"(?P<sign>[+-]?)\s*(?:(?P<whole>\d+)\s+)?(?P<num>[+-]?{_DECIMAL})\s*/\s*(?P<den>[+-]?{_DECIMAL})",
        r"(?P<sign>[+-]?)\s*(?P<num>\d*\.?\d*)\\(?:overline|bar|dot)\s*\{?\s*(?P<again>\d+)\s*\}?",
        r"(?P<sign>[+-]?)\s*(?P<num>\d+)\s*\^\s*\{\s*(?P<power>\d{1,3})\s*\}",
    )
]


@lru_cache(65536)
def number(text: str) -> Fraction | None:
    """The exact value of a literal: integer, decimal, fraction, mixed or repeating number, power, 3\\times10^{8}."""
    for pattern in _NUMBERS:
        if match := pattern.fullmatch(text):
            return _number(match.groupdict())
    return None


def _number(part: dict[str, str | None]) -> Fraction | None:
    value = _repeating(part["num"] or "", part["again"] or "") if part.get("again") else Fraction(part.get("num") or 1)
    if value is None:
        return None
    if (power := part.get("power")) is not None:
        if len(part["num"] or "") * int(power) > MAX_EXPONENT:
            return None
        value **= int(power)
    if (exponent := part.get("exp")) is not None:
        if abs(int(exponent)) > MAX_EXPONENT:
            return None
        value *= Fraction(10) ** int(exponent)
    if (below := part.get("den")) is not None:
        if Fraction(below) == 0 or (part.get("whole") and value < 0):
            return None
        value /= Fraction(below)
    value += int(part.get("whole") or 0)
    return -value if part.get("sign") == "-" else value


def _repeating(start: str, again: str) -> Fraction | None:
    """0.1\\overline{6} as start "0.1" and again "6"."""
    if "." not in start or start == ".":
        return None
    shift = len(start.split(".")[1])
    return Fraction(start + "0") + Fraction(int(again), (10 ** len(again) - 1) * 10**shift)


def is_rounding_of(literal: str, value: Fraction) -> bool:
    """Whether a decimal of at least six significant digits is `value` to its last digit; 0.333333 for 1/3."""
    if not re.fullmatch(rf"[+-]?\s*{_DECIMAL}", literal, re.ASCII) or "." not in literal:
        return False
    digits = literal.strip("+- ").split(".")
    if len("".join(digits).lstrip("0")) < 6:
        return False
    return abs(Fraction(literal.replace(" ", "")) - value) < Fraction(1, 10 ** len(digits[1]))


def is_terminating(value: Fraction) -> bool:
    """Whether `value` has a finite decimal expansion, so that a decimal either is it or is not."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


_MONEY = re.compile(r"^([+-]?)\s*(\\\$|\$|€|£|¥|(?:US|HK|A|C)?\\\$|USD|EUR|Rs\.?)\s*(?=[\d.(\\+-])")
_UNIT_TAIL = re.compile(
    r"^(?P<value>.*?[\w)}\]!%])\s*"
    r"(?P<unit>(?:(?:/|\\cdot|\^\{\\circ\})?\s*\\text\{[^{}]*\}\s*(?:\^\{\s*-?\d\s*\})?\s*)+|\^\{\\circ\}\s*[CF]?"
    r"|(?<=[\s\d})])(?:[a-zA-Z]{4,}|SHORT)(?:\.|\^\{[23]\})?(?:\s*/\s*[a-zA-Z]+|\s+(?:per\s+)?[a-zA-Z]{2,}){0,3})$".replace(
        "SHORT", "|".join(map(re.escape, _SHORT_UNITS))
    )
)


def split_unit(text: str) -> tuple[str, str, int]:
    """(value, unit in one spelling, factor) of "5 square inches" -> ("5", "in^2", 1), "2 dozen" -> ("2", "", 12)."""
    if match := _MONEY.match(text):
        unit = {"€": "euro", "EUR": "euro", "£": "pound sterling", "¥": "yen"}.get(match.group(2), "dollar")
        value, more, factor = split_unit(match.group(1) + text[match.end() :])
        return (value, unit, factor) if more in ("", unit) else (text, "", 1)
    match = _UNIT_TAIL.match(text)
    if match is None or "\\text" in match.group("value"):
        return text, "", 1
    unit = _unit(match.group("unit"))
    if unit is None:
        return text, "", 1
    return match.group("value").strip(), *unit


@lru_cache(4096)
def _unit(text: str) -> tuple[str, int] | None:
    """The unit that words name, and a factor (dozen, million); None where they say something else than a unit."""
    text = text.replace("^{\\circ}", " degree ").replace("\\cdot", " ")
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    if not re.fullmatch(r"[\s\w.,/^{}$€¢°()-]*", text, re.ASCII) or "(" in text:
        return None
    words = re.findall(r"[a-zA-Z']+|/|\^\{?-?\d\}?|[$€¢]", text.replace(".", ""))
    factor = 1
    while words and words[0].lower() in MULTIPLIERS:
        factor *= MULTIPLIERS[words.pop(0).lower()]
    if len(words) > 6 or any(word.lower() in _NOT_UNITS or word.lower() in MULTIPLIERS for word in words):
        return None
    return _spell(words), factor


def _spell(words: list[str]) -> str:
    out: list[str] = []
    power = ""
    for word in words:
        if word.lower() in ("square", "sq", "squared"):
            power = "^2"
        elif word.lower() in ("cubic", "cu"):
            power = "^3"
        elif word[0] == "^":
            out.append("^" + word.strip("^{}"))
        elif word.lower() == "per":
            out.append("/")
        else:
            out.append((_singular(word) + power).removeprefix("^2").removeprefix("^3"))
            power = ""
    spelled = " ".join(part for part in out if part)
    return re.sub(r"\s*([/^])\s*", r"\1", spelled)


def _singular(word: str) -> str:
    if word in _UNITS:
        return _UNITS[word]
    word = word.lower()
    for ending in ("", "s", "es"):
        if word.endswith(ending) and (stem := word.removesuffix(ending)) in _UNITS:
            return _UNITS[stem]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word


def spelled_number(text: str) -> str:
    """A number word up to sixteen as digits; everything else as it is."""
    return str(NUMBER_WORDS.get(text.strip().lower(), text))
