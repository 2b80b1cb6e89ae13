"""Units and rounding: what the words behind a number say, and which decimals stand for an exact value.

A unit is a word of the list below, or one that the answer or the problem names; every other word behind a number makes
words of both. Units are not converted: 1 hour is not 60 minutes. Number words go up to sixteen.
"""

import re
import string
from fractions import Fraction
from functools import lru_cache

from stages.core.grading.verifier.latex import FUNCTIONS

_NUMBER_WORDS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
"""
NUMBER_WORDS = {word: number for number, word in enumerate(_NUMBER_WORDS.split())}
MULTIPLIERS = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# Words that change or doubt what stands before them: no unit, even where a problem has them, and no name's.
_CHANGING_WORDS = """
    is are was were be am not no never nor neither none or and but if then when where while for because
    since so maybe perhaps possibly probably about around approximately roughly almost nearly wrong
    incorrect false right correct true more less than fewer greater smaller larger at least most over under
    above below up down except only plus minus times divided multiplied by negative positive mod modulo
    squared cubed factorial double triple quadruple twice thrice score pair couple gross infinity infinitely
    does did do know cannot can't don't isn't unknown undefined base percent percentage point choose repeating infinite
    xor vs versus instead rather either unless without opposite wrongly guess unsure equal thus has this his its
"""
# Words that say how large the number is: nouns, which may well name a quantity ("remainder = 5").
_SCALING_WORDS = """
    pct percentile prime permille permil ppm grand power exponent root remainder modulus radix inverse reciprocal ten
    twenty thirty forty fifty sixty seventy eighty ninety lakh crore half halve third quarter fourth fifth sixth seventh
    eighth ninth tenth eleventh twelfth hundredth thousandth
"""
CHANGING_WORDS = frozenset(_CHANGING_WORDS.split()) | set(NUMBER_WORDS)
_ALL_CHANGING = CHANGING_WORDS | set(_SCALING_WORDS.split()) | set(MULTIPLIERS)
_CHANGING_ENDINGS = re.compile(r".+(?:illion|illiard)(?:th)?|.*(?:fold|ish|teen|teenth|tieth)")

_SPELLED = """
cm centimeter centimetre | mm millimeter millimetre | km kilometer kilometre | m meter metre | in inch | ft foot feet
yd yard | mi mile | kg kilogram kilo | g gram gm | mg milligram | lb pound lbs | oz ounce | l liter litre L
ml milliliter millilitre mL | s second sec | min minute mins | h hour hr hrs | year yr yrs | dollar usd $ bucks
cent ¢ | euro eur € | degree deg ° | radian rad | mi/h mph | km/h kph kmh | hz hertz | n newton | j joule | w watt
v volt | a ampere amp | mol mole | penny pennies pence | person people | child children | man men | woman women
"""
_OTHER_UNITS = """
    dm nm um km pm micron angstrom parsec acre hectare gallon quart pint cup tablespoon teaspoon tbsp tsp barrel cc ton
    tonne stone ms ns day week month decade century centuries knot rupee yuan yen peso rouble ruble franc krona won
    sterling pa kpa atm torr pascal kelvin celsius fahrenheit calorie kcal cal ev kev mev gev erg dyne ohm coulomb tesla
    farad henry gauss weber kw kwh khz mhz ghz rpm byte kb mb gb steradian lumen lux candela
    boy girl student teacher family families team player friend worker apple orange banana egg book page pencil pen
    marble ball coin card ticket chair car bus box bag bottle piece slice cookie candy candies flower tree animal dog
    cat bird fish sheep cow horse chicken way game meal trip lap room house seat item
"""
_UNITS = {word: word for word in _OTHER_UNITS.split()} | {"unit": "", "units": ""}
_UNITS |= {word: row.split()[0] for row in re.split(r"\||\n", _SPELLED) for word in row.split()}
_SPELLINGS = frozenset(_UNITS.values())
_JOINING = frozenset(["square", "sq", "squared", "cubic", "cu", "cubed", "per", "of", "a", "each"])
_NAMED = re.compile(r"named[a-z]+")  # what `name_units` makes of a word
_LETTER_UNITS = frozenset("msghlLNJWVACF")  # the others, as in 5\\text{k} and 5\\text{M}, may well multiply
_SHORT_UNITS = sorted(w for w in _UNITS if 2 <= len(w) <= 3 and w.isalpha() and w not in ("in", "min", "mol", "rad"))
_DECIMAL = r"\d+(?:\.\d+)?"


def changes(word: str) -> bool:
    """Whether a word says something else of the number before it than what is counted or measured."""
    return bool(_stems(word) & _ALL_CHANGING) or any(map(_CHANGING_ENDINGS.fullmatch, _stems(word)))


def _stems(word: str) -> set[str]:
    word = word.lower().strip("'")
    return {word, word.removesuffix("s"), re.sub(r"(?<=[sxhz])es$", "", word), word.replace("halves", "half")}


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


# --- units that answer or problem name --------------------------------------------------------------------------------

_AFTER_NUMBER = re.compile(r"[\d})%][^a-zA-Z]*(?:\\[a-zA-Z]+[^a-zA-Z]*)*[a-zA-Z]{3,}")
_WORD = re.compile(r"(?<![a-zA-Z\\])(?<!\\begin\{)(?<!\\end\{)[a-zA-Z]{3,}(?![a-zA-Z{(])")


def name_units(answer: str, prediction: str, prompt: str = "") -> tuple[str, str]:
    """Both texts, in which words of no list that the answer or the prompt names are spelled as units.

    A prompt names the nouns that stand in it in the plural, and with one of those, or with a unit, its other words:
    "8 red marbles" for "She has 5 marbles, some of them red".
    """
    if not _AFTER_NUMBER.search(prediction) and not _AFTER_NUMBER.search(answer):
        return answer, prediction
    words = [word for text in (answer, prediction) for word in _words_of(text)]
    unlisted = {word for word in words if not changes(word) and not _is_listed(word) and word not in FUNCTIONS}
    asked, plural = _named_by(prompt)
    named = {word for word in unlisted if _singular(word) in {*map(_singular, _words_of(answer)), *plural}}
    if named or any(map(_is_listed, words)):
        named |= {word for word in unlisted if word in asked}
    if not named:
        return answer, prediction
    stems = sorted(map(_singular, named))
    spelled = {word: "named" + string.ascii_lowercase[stems.index(_singular(word)) % 26] for word in named}
    return _spell_named(answer, spelled), _spell_named(prediction, spelled)


def _spell_named(text: str, spelled: dict[str, str]) -> str:
    if not _AFTER_NUMBER.search(text):
        return text
    return _WORD.sub(lambda match: spelled.get(match.group().lower(), match.group()), text)


def _words_of(text: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(text)}


def _is_listed(word: str) -> bool:
    return _singular(word) in _SPELLINGS or word in _JOINING


@lru_cache(64)
def _named_by(prompt: str) -> tuple[set[str], set[str]]:
    """The words of a prompt, and those that stand there in the plural, in the singular."""
    words = {word for word in _words_of(prompt[-20_000:]) if not changes(word)}
    return words, {_singular(word) for word in words if word.endswith("s") and not word.endswith("ss")}


# --- a number's unit --------------------------------------------------------------------------------------------------

_MONEY = re.compile(r"^([+-]?)\s*(\\\$|€|£|¥)\s*(?=[\d.(\\+-])")
_UNIT_TAIL = re.compile(
    r"(?P<value>.*?[\w)}\]!%])(?P<gap>\s*)(?P<unit>"
    r"(?:(?:(?:/|\\cdot|\^\{\\circ\})\s*)?\\text\{[^{}]*\}\s*(?:\^\{\s*-?\d\s*\}\s*)?)+"  # \text{cm}^{2}
    r"|\^\{\\circ\}\s*[CF]?"
    r"|(?<=[\s\d})])(?:[a-zA-Z]{3,}|SHORT)(?:\.|\^\{[23]\})?(?:\s*/\s*[a-zA-Z]+|\s+(?:per\s+)?[a-zA-Z]{2,}){0,3}"
    r")".replace("SHORT", "|".join(map(re.escape, _SHORT_UNITS)))
)
_ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")  # what follows is its argument's unit


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
    unit = _unit(match.group("unit"))
    return (match.group("value").strip(), *unit) if unit else (text, "", 1)


_UNIT_TOKEN = re.compile(r"[a-zA-Z]+(?:['-][a-zA-Z]+)*|\^\{\s*-?\d\s*\}|.", re.ASCII)


@lru_cache(2048)
def _unit(text: str) -> tuple[str, int] | None:
    """The unit that words name, and a factor (dozen, million); None where they say something else than a unit."""
    text = text.replace("^{\\circ}", " degree ").replace("\\cdot", " ")
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    words = [word for word in _UNIT_TOKEN.findall(text.replace(".", "")) if not word.isspace()]
    factor = 1
    while words and (times := MULTIPLIERS.get(words[0].lower().removesuffix("s"))):
        factor *= times
        del words[0]
    if (
        len(words) > 6
        or not all(map(_may_measure, words))
        or not (any(map(_measures, words)) or factor > 1 > len(words))
    ):
        return None
    return _spell(words), factor


def _measures(word: str) -> bool:
    """Whether a word is a unit, and no mere part of one."""
    if len(word) == 1:
        return word in _LETTER_UNITS or word in "$€¢°"
    return all(_singular(part) in _SPELLINGS or _NAMED.fullmatch(part) for part in word.split("-"))


def _may_measure(word: str) -> bool:
    return _measures(word) or word.lower() in _JOINING or word == "/" or (word[0] == "^" and len(word) > 1)


def _spell(words: list[str]) -> str:
    out: list[str] = []
    power = ""
    for word in words:
        if word.lower() in ("square", "sq", "squared"):
            power = "^2"
        elif word.lower() in ("cubic", "cu", "cubed"):
            power = "^3"
        elif word[0] == "^":
            power = word.strip("^{} ")
            out[-1:] = [f"/{out[-1]}^{power[1:]}" if power[0] == "-" else f"{out[-1]}^{power}"] if out else []
            power = ""
        elif word.lower() == "per":
            out.append("/")
        elif word.lower() not in ("of", "a", "each"):
            out.append((_singular(word) + power).removeprefix("^2").removeprefix("^3"))
            power = ""
    spelled = " ".join(part for part in out if part)
    return re.sub(r"\s*([/^])\s*", r"\1", spelled).replace("^1", "")


def _singular(word: str) -> str:
    """A unit in its one spelling; another word without the s of its plural."""
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
