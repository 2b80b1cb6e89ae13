"""Numbers and units: the exact value of a literal, and what a unit says.

Units are not converted: 1 hour is not 60 minutes. Number words go up to sixteen.
"""

import re
import string
from fractions import Fraction
from functools import lru_cache

MAX_EXPONENT = 400  # of a power of ten that is written out; beyond it a number stays an expression
_NUMBER_WORDS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
"""
NUMBER_WORDS = {word: number for number, word in enumerate(_NUMBER_WORDS.split())}
MULTIPLIERS = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
# Words that change what stands before them: a number followed by one of these is no number with a unit.
_CHANGING_WORDS = """
    is are was were be am not no never nor neither none or and but if then when where while for because
    since so maybe perhaps possibly probably about around approximately roughly almost nearly wrong
    incorrect false right correct true more less than fewer greater smaller larger at least most over under
    above below up down except only plus minus times divided multiplied by negative positive mod modulo
    squared cubed factorial double triple quadruple twice thrice score pair couple gross infinity infinitely
    does did do know cannot can't don't isn't unknown undefined base percent percentage
    xor vs versus instead rather either unless without opposite wrongly guess unsure
"""
# Words that say how large the number is: nouns, which may well name a quantity ("remainder = 5").
_SCALING_WORDS = """
    pct percentile prime hat bar
    permille promille permil permyriad ppm ppb ppt bps basis
    grand doubled tripled halved quartered inverted negated rounded inverse reciprocal conjugate complement
    power exponent root log binary ternary octal decimal hexadecimal hex radix modulus remainder rem residue
    to till until through thru between from into off short ago too
    kilo mega giga tera milli centi micro nano pico deci deca hecto mio mrd mln mlrd mil mill mn bil bn tn th ths debt
    lakh crore myriad dz doz tens twenty thirty forty fifty sixty seventy eighty ninety
    hundredweight ignoring lower higher transpose invalid impossible rejected extraneous discarded eliminated fail idk
    tausend hundert dutzend mille millones
    half halve third quarter fourth fifth sixth seventh eighth ninth tenth eleventh twelfth hundredth thousandth
"""
CHANGING_WORDS = frozenset(_CHANGING_WORDS.split()) | set(NUMBER_WORDS)
_ALL_CHANGING = CHANGING_WORDS | set(_SCALING_WORDS.split()) | set(MULTIPLIERS)
_CHANGING_ENDINGS = re.compile(r".+(?:illion|illiard)(?:th|en)?|.*(?:fold|ish|teen|teenth|tieth)")


def changes(word: str) -> bool:
    """Whether a word says something else of the number before it than what is counted or measured."""
    word = word.lower().strip("'")
    stems = {word, word.removesuffix("s"), re.sub(r"(?<=[sxhz])es$", "", word), word.replace("halves", "half")}
    return bool(stems & _ALL_CHANGING) or any(map(_CHANGING_ENDINGS.fullmatch, stems))


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
    "mi/h": "mph",
    "km/h": "kph kmh",
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
_LETTER_UNITS = frozenset("msghlLNJWVACF")  # the others, as in 5\\text{k} and 5\\text{M}, may well multiply
_SHORT_UNITS = sorted(w for w in _UNITS if 2 <= len(w) <= 3 and w.isalpha() and w not in ("in", "min", "mol", "rad"))
_DECIMAL = r"\d+(?:\.\d+)?"
_NUMBERS = [
    re.compile(pattern, re.ASCII)
    for pattern in (
        rf"(?P<sign>[+-]?)\s*(?P<num>{_DECIMAL})",
        rf"(?P<sign>[+-]?)\s*(?:(?P<num>{_DECIMAL})\s*(?:\\cdot|\\times|\*)\s*)?"
        r"10\s*\^\s*\{\s*(?P<exp>[+-]?\d{1,4})\s*\}",
        rf"(?P<sign>[+-]?)\s*(?:(?P<whole>\d+)\s*)?\\frac\s*"
        rf"\{{\s*(?P<num>[+-]?{_DECIMAL})\s*\}}\s*\{{\s*(?P<den>[+-]?{_DECIMAL})\s*\}}",
        rf"(?P<sign>[+-]?)\s*(?:(?P<whole>\d+)\s+)?(?P<num>[+-]?{_DECIMAL})\s*/\s*(?P<den>[+-]?{_DECIMAL})",
        r"(?P<sign>[+-]?)\s*(?P<num>\d*\.?\d*)\\(?:overline|bar|dot)\s*(?:(?P<digit>\d)|\{\s*(?P<again>\d+)\s*\})",
        r"(?P<sign>[+-]?)\s*(?P<num>\d+)\s*\^\s*\{\s*(?P<power>\d{1,3})\s*\}",
    )
]


@lru_cache(2048)
def number(text: str) -> Fraction | None:
    """The exact value of a literal: integer, decimal, fraction, mixed or repeating number, power, 3\\times10^{8}."""
    for pattern in _NUMBERS:
        if match := pattern.fullmatch(text):
            return _number(match.groupdict())
    return None


def _number(part: dict[str, str | None]) -> Fraction | None:
    again = part.get("again") or part.get("digit")
    value = _repeating(part["num"] or "", again) if again else Fraction(part.get("num") or 1)
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
        if Fraction(below) == 0 or (part.get("whole") and not 0 <= value < Fraction(below)):
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


def is_rounding_of(literal: str, value: Fraction, min_digits: int = 6) -> bool:
    """Whether a decimal of so many significant digits is `value` rounded or cut: 0.333333 for 1/3."""
    if not re.fullmatch(rf"[+-]?\s*{_DECIMAL}", literal, re.ASCII) or "." not in literal:
        return False
    digits = literal.strip("+- ").split(".")
    if len("".join(digits).lstrip("0")) < min_digits:
        return False
    beyond = abs(value) - abs(Fraction(literal.replace(" ", "")))
    last_place = Fraction(1, 10 ** len(digits[1]))
    return (literal.strip()[0] == "-") == (value < 0) and -last_place <= 2 * beyond and beyond < last_place


def is_terminating(value: Fraction) -> bool:
    """Whether `value` has a finite decimal expansion, so that a decimal either is it or is not."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


_MONEY = re.compile(r"^([+-]?)\s*(\\\$|€|£|¥)\s*(?=[\d.(\\+-])")
_UNIT_TAIL = re.compile(
    r"(?P<value>.*?[\w)}\]!%])(?P<gap>\s*)(?P<unit>"
    r"(?:(?:(?:/|\\cdot|\^\{\\circ\})\s*)?\\text\{[^{}]*\}\s*(?:\^\{\s*-?\d\s*\}\s*)?)+"  # \text{cm}^{2}
    r"|\^\{\\circ\}\s*[CF]?"
    r"|(?<=[\s\d})])(?:[a-zA-Z]{3,}|SHORT)(?:\.|\^\{[23]\})?(?:\s*/\s*[a-zA-Z]+|\s+(?:per\s+)?[a-zA-Z]{2,}){0,3}"
    r")".replace("SHORT", "|".join(map(re.escape, _SHORT_UNITS)))
)
_ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")  # what follows is its argument's unit
_RUNS = "abcdefghijklmnopqrstuvwxyz"


def split_unit(text: str) -> tuple[str, str, int]:
    """(value, unit in one spelling, factor) of "5 square inches" -> ("5", "in^2", 1), "2 dozen" -> ("2", "", 12)."""
    if match := _MONEY.match(text):
        unit = {"€": "euro", "£": "pound sterling", "¥": "yen"}.get(match.group(2), "dollar")
        value, more, factor = _split_tail(match.group(1) + text[match.end() :])
        return (value, unit, factor) if more in ("", unit) else (text, "", 1)
    return _split_tail(text)


def _split_tail(text: str) -> tuple[str, str, int]:
    match = _UNIT_TAIL.fullmatch(text)
    if match is None or re.search(r"\\text|%$", match.group("value")) or _ANGLE_FUNCTION.search(match.group("value")):
        return text, "", 1
    word = re.match(r"[a-zA-Z]+", match.group("unit"))
    if word and not _is_word(word.group(), apart=match.group("gap") != ""):
        return text, "", 1
    unit = _unit(match.group("unit"))
    return (match.group("value").strip(), *unit) if unit else (text, "", 1)


def _is_word(letters: str, apart: bool) -> bool:
    """Whether letters outside of \\text{...} are the name of a unit, and not a product of variables: 5xyz, 5 abc."""
    if _singular(letters) in _UNIT_WORDS or letters in _UNITS:
        return True
    return apart and re.search(r"[aeiou]", letters) is not None and letters.lower() not in _RUNS


_UNIT_TOKEN = re.compile(r"[a-zA-Z]+(?:['-][a-zA-Z]+)*|\^\{\s*-?\d\s*\}|.", re.ASCII)


@lru_cache(2048)
def _unit(text: str) -> tuple[str, int] | None:
    """The unit that words name, and a factor (dozen, million); None where they say something else than a unit."""
    text = text.replace("^{\\circ}", " degree ").replace("\\cdot", " ")
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    words = [word for word in _UNIT_TOKEN.findall(text.replace(".", "")) if not word.isspace()]
    if not all(word[0] in string.ascii_letters or word[0] in "^/$€¢°" for word in words):
        return None
    factor = 1
    while words and (times := MULTIPLIERS.get(words[0].lower().removesuffix("s"))):
        factor *= times
        del words[0]
    if len(words) > 6 or not all(map(_may_measure, words)):
        return None
    return _spell(words), factor


def _may_measure(word: str) -> bool:
    if word[0] == "^":
        return len(word) > 1
    if word == "/":
        return True
    return not any(map(changes, word.split("-"))) and (len(word) > 1 or word in _LETTER_UNITS or not word.isalpha())


def _spell(words: list[str]) -> str:
    out: list[str] = []
    power = ""
    for word in words:
        if word.lower() in ("square", "sq", "squared"):
            power = "^2"
        elif word.lower() in ("cubic", "cu"):
            power = "^3"
        elif word[0] == "^":
            out.append("^" + word.strip("^{} "))
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
