"""One way of writing each thing: the many notations of an answer brought to plain LaTeX.

Each rewriting rule stands for a habit of people, models or encoders. Nothing here knows algebra.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

from stages.core.grading.verifier.latex import (
    FUNCTIONS,
    MAX_DEPTH,
    MAX_LENGTH,
    MAX_WRITTEN,
    TOKEN,
    Refused,
    closing,
    depth_of,
)
from stages.core.grading.verifier.quantities import NUMBER_WORDS

_GREEK = """
    alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi
    psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega
"""
_SPELLINGS = r"""
- −–—‐‑﹣ | \times × | \cdot ·⋅∙• | \div ÷ | \pi π | \infty ∞ | \le ≤⩽ | \ge ≥⩾ | \ne ≠ | \approx ≈ | \cup ∪ | \cap ∩
\in ∈ | \emptyset ∅ | \mathbb{R} ℝ | \mathbb{Z} ℤ | \mathbb{N} ℕ | \mathbb{Q} ℚ | \mathbb{C} ℂ | \pm ± | \mp ∓ | \sqrt √
\sqrt[3] ∛ | ^\circ ° | \ldots … | \langle ⟨ | \rangle ⟩ | \lfloor ⌊ | \rfloor ⌋ | \lceil ⌈ | \rceil ⌉ | \angle ∠
, ，、 | . 。 | ; ； | : ∶ | ' ′’ | " “”
"""


def _rows(table: str) -> list[list[str]]:
    """The rows of a table, | between them: what is written, and what for."""
    return [row.split() for line in table.strip().splitlines() for row in line.split(" | ")]


def _apart(command: str) -> str:
    """A command with the space that keeps it from a letter behind it."""
    return command + " " if command[-1].isalpha() and command not in (r"\frac", r"\binom") else command


_SYMBOLS = {character: _apart(command) for command, characters in _rows(_SPELLINGS) for character in characters}
_SYMBOLS |= {
    letter: f"\\{name} " for letter, name in zip("αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΠΣΦΨΩ", _GREEK.split(), strict=True)
}
_SYMBOL_TABLE = str.maketrans(_SYMBOLS)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_RAISED_AND_LOWERED = frozenset("⁰¹²³⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉")
_INVISIBLE = frozenset("\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u200f")  # no space, but no sign either
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

# Commands of honest answers that core.verifier.grammar does not read: they make words of a text, or are read before.
# One that is in neither list is refused: some build huge objects (\\operatorname{zeros}), some hide text (\\phantom).
_VERBAL = """
    ldots vdots ddots equiv bmod pmod pod mod mid nmid forall exists odot oplus otimes triangle parallel perp sim cong
    to rightarrow leftarrow Rightarrow Leftarrow implies iff Leftrightarrow Longleftrightarrow land lor neg subset
    subseteq supset supseteq not notin ni sup inf deg dim ker star ast underbrace overbrace bigcup bigcap mathcal
    mathfrak top bot square cap setminus le ge ne in approx cup pm mp widetilde widehat tilde imath jmath wedge
    vee propto hline angle begin end circ coth det emptyset langle rangle mathbb partial prime text vert
"""
VERBAL = frozenset(_VERBAL.split())

_OTHERS = r"""
\frac dfrac tfrac cfrac nicefrac sfrac | \binom dbinom tbinom | \le leq leqq leqslant | \ge geq geqq geqslant | \ne neq
\ldots dots cdots dotsc dotsb | < lt | > gt | \{ lbrace | \} rbrace | : colon | ^\circ degree
\emptyset varnothing
"""
_OTHER_NAMES = {name: _apart(command) for command, *names in _rows(_OTHERS) for name in names}
_OTHER_NAMES["vert"] = "|"

_TEXT_UNIT = r"\\text\{[^{}]*\}(?:\^\{?\d\}?)?"
# Applied in this order; each brings many spellings to one.
_RULES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"\x0c(?=rac)", r"\\f"),  # a backslash lost to a string escape: form feed, tab and backspace are no answer's
    (r"\t(?=ext\{|imes|frac|heta)", r"\\t"),
    (r"[\x00-\x20\x7f\u00a0]+", " "),
    (r"^\s*~", r"\\sim "),  # about, or not
    (r"(?<!\\)\\\\(?=circ|[dt]?frac|sqrt|text|pi|boxed|cdot|times|left|right)", r"\\"),
    (r"\\\\\s*\[\s*-?[\d.]+\s*[a-z]{2}\s*\]", r"\\\\ "),  # a row's distance to the next
    (r"\\[([\])]", " "),  # \( \) \[ \]
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?", ""),
    (
        r"(?<![\d.,}])[1-9]\d{0,2}(?:(\\[,;:! ]|\{,\}|~|\{ \})\d{3}(?!\d))(?:\1\d{3}(?!\d))*",
        lambda m: m.group().replace(m.group(1), ""),  # thousands
    ),
    (r"(?<=\d)\{,\}(?=\d)", "."),
    (r"(?<!\\)\\!", ""),
    (
        r"(?<!\\)\\[,;:> ]|\\(?:quad|qquad|thinspace|enspace|hfill|displaystyle|textstyle|limits|nolimits)"
        r"(?![a-zA-Z])|\\[hv]space\*?\{[^{}]*\}|~",
        " ",
    ),
    (r"(\\(?:begin|end)\{[a-zA-Z]*matrix)\*\}(?:\[[lcr]\])?", r"\1}"),
    (r"\\([a-zA-Z]+)", lambda m: _OTHER_NAMES.get(m.group(1), m.group())),
    (r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"\\textcolor\s*\{[^{}]*\}|\\color\s*\{[^{}]*\}", ""),
    (
        r"\\(?:underline|boxed|fbox|mathop|ensuremath|mathbf|mathit|mathnormal|boldsymbol|bm|bf|it|rm|bold)(?![a-zA-Z])",
        "",
    ),
    (r"\\(?:mathrm|text(?:bf|it|rm|tt|sf|normal|up|md)?|mbox|hbox|mathsf|mathtt|emph)\s*\{", r"\\text{"),
    (r"\\(?:text|operatorname\*?)\s*\{\s*(%s)\s*\}" % "|".join(FUNCTIONS), r"\\\1 "),  # noqa: UP031
    (
        r"(?i)^(?:\\text\{\s*)?(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+)?answer(?:\s+is\s*:?|\s*:)\s*(?:\}|(?=\s))",
        "",
    ),
    (r"\\text\{([^{}^]*)\^\{?(-?\d)\}?\s*\}", r"\\text{\1}^{\2}"),  # m/s^2
    (rf"\\frac\{{({_TEXT_UNIT})\}}\{{({_TEXT_UNIT})\}}", r"\1/\2"),
    (r"\\text\{([a-zA-Z]+)\}/\\text\{([a-zA-Z]+)\}", r"\\text{\1/\2}"),
    (
        r"\(?\s*\\(?:pmod|bmod|mod)(?![a-zA-Z])\s*\{?\s*(\d+)\s*\}?\s*\)?|\(\s*(?:\\text\{\s*)?mod\s*\}?\s*(\d+)\s*\}?\s*\)",
        lambda m: rf"\pmod{{{m.group(1) or m.group(2)}}}",
    ),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"\\not\s*=|!=", r"\\ne "),
    (r"\.\.\.+", r"\\ldots "),
    (r"\\bigcup(?![a-zA-Z]|\s*_)", r"\\cup "),
    (r"\\(?:R|Z|Q|N|C)(?![a-zA-Z])", lambda m: "\\mathbb{%s}" % m.group()[1]),  # noqa: UP031
    (r"\\mathbb\s*([A-Z])", r"\\mathbb{\1}"),
    (r"(?<![a-zA-Z\\])(?:np|numpy|math|sympy|sp)\.(?=[a-z])", ""),
    (
        r"(?<![a-zA-Z\\])(%s)(?=[^a-zA-Z]|[a-zA-Z](?![a-zA-Z])|$)" % "|".join(FUNCTIONS),  # noqa: UP031
        r"\\\1 ",
    ),
    (r"(?<![a-zA-Z\\])(?:infinity|infty|inf|oo)(?![a-zA-Z])", r"\\infty "),
    (r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi "),
    (r"(?<=[\w)\]}])\s*\*\*\s*(?=[\w({+-])", "^"),
    (r"(?i:\\text\{\s*(?:percent|per cent|pct)\s*\})|\\%|(?<=[\d\s}])(?i:percent|per cent|pct)(?![a-zA-Z])", "%"),
    (r"(?<=\d)\s*[eE]([+-]?\d{1,3})(?![\d.a-zA-Z])", r"\\cdot 10^{\1}"),
    (r"(?<=\d)\.(?![\d\\]|\(\d+\))", ""),
    (r"(?<![\d.])\.(?=\d)", "0."),
]
_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in _RULES]
_LEADING = re.compile(r"[\s:=*.,;]*")
_TRAILING = " .,;:*\\"
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_JOINER = re.compile(
    r"(?<!^)(?:\s*\\(?:lor|vee)(?![a-zA-Z])|,?\s*\\text\{\s*,?\s*(?:and|or)\s*,?\s*\}\s*,?|(?<!\{),?\s+(?:and|or)\s+|,\s*(?:and|or)(?![a-zA-Z]))(?=[^}])"
)
_LISTED = re.compile(r"\s*,\s*(?:(?:and|or)\s+)?|\s+(?:and|or)\s+")
_UNIT_BEFORE = re.compile(r"(?:[\d})\]/]|\\circ)\s*$")


@lru_cache(2048)
def canonical(text: str) -> str:
    """The text of an answer in one spelling; words stand in \\text{...}, choices between values become commas."""
    text = _unicode(text)
    if len(text) > MAX_LENGTH:
        raise Refused(f"longer than {MAX_LENGTH} characters")
    if depth_of(text) > MAX_DEPTH:
        raise Refused(f"brackets deeper than {MAX_DEPTH}")
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _JOINER.sub(", ", _dollars(text.strip()))
    if match := _TEXT.fullmatch(strip_outer(text)):
        text = ", ".join(f"\\text{{{word}}}" for word in _LISTED.split(match.group(1)))
    text = _TEXT.sub(_unwrap, text)
    text = _complete_arguments(_powers_and_roots(text))
    text = strip_outer(re.sub(r" +", " ", text))
    if len(text) > MAX_WRITTEN:
        raise Refused(f"longer than {MAX_WRITTEN} characters in plain notation")
    return text


def strip_outer(text: str) -> str:
    """Without the punctuation at both ends, and the braces around everything, that carry no meaning."""
    while True:
        leading = _LEADING.match(text).group()  # type: ignore[union-attr]
        if text[len(leading) : len(leading) + 1].isdigit():
            leading = leading.rstrip(".,;")  # in ",5" it is no idle one
        stripped = text[len(leading) :].rstrip(_TRAILING)
        if stripped[:1] == "{" and closing(stripped, 0) == len(stripped) - 1:
            stripped = stripped[1:-1].strip()
        if stripped == text:
            return text
        text = stripped


def _unicode(text: str) -> str:
    """ASCII where a character has a plain meaning there. Raises Refused for digits and marks that have none."""
    if text.isascii():
        return text
    if any(map(_is_doubtful, text)):
        raise Refused("a character that may be read as a digit, or is not to be seen")
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: "^{" + m.group().translate(_RAISED) + "}", text)
    text = re.sub("[₀-₉]+", lambda m: "_{" + m.group().translate(_LOWERED) + "}", text)
    text = re.sub(
        "[¼-¾⅐-⅞]",
        lambda m: " \\frac{{{}}}{{{}}}".format(*tuple(unicodedata.normalize("NFKC", m.group()).split("⁄"))),
        text,
    )
    text = unicodedata.normalize("NFKC", text.translate(_SYMBOL_TABLE)).replace("⁄", "/").translate(_SYMBOL_TABLE)
    return "".join(" " if c in _INVISIBLE else c for c in text)


@lru_cache(2048)
def _is_doubtful(character: str) -> bool:
    """Digits of other scripts, circled and Roman ones, surrogates, and what can't be seen but is no idle space."""
    category = unicodedata.category(character)
    if category == "Nd":
        return not unicodedata.normalize("NFKC", character).isascii()
    if category in ("No", "Nl"):
        return character not in _RAISED_AND_LOWERED and not re.fullmatch("[¼-¾⅐-⅞]", character)
    return category in ("Cf", "Cs", "Co", "Cn", "Cc") and character not in _INVISIBLE and not character.isspace()


def _dollars(text: str) -> str:
    """Without the $ signs that only mark mathematics; a lone one before a number is money, and becomes \\$."""
    if len(re.findall(r"(?<!\\)\$", text)) % 2:
        text = re.sub(r"(?<!\\)\$(?=\s*[\d.])", r"\\$", text, count=1)
    return re.sub(r"(?<!\\)\$", " ", text).strip()


def _unwrap(match: re.Match[str]) -> str:
    """What \\text{...} holds, where that is mathematics; words, and a letter after a number (a unit), stay."""
    inside = match.group(1)
    letters = re.findall(r"[^\W\d_]+", inside)
    lone = len(letters) == 1 and len(letters[0]) == 1 and inside.strip() == letters[0]
    if not letters:
        return inside
    if (spelled := inside.strip().lower()) in NUMBER_WORDS:
        return f" {NUMBER_WORDS[spelled]} "
    if lone and (letters[0] in "ied" or not _UNIT_BEFORE.search(match.string, 0, match.start())):
        return letters[0]
    return "\\text{" + inside.strip() + "}"


def _powers_and_roots(text: str) -> str:
    """x^(a+b) and sqrt(a+b) with braces: plain-text habits that LaTeX reads otherwise."""
    out: list[str] = []
    position = 0
    for match in re.finditer(r"(?:\^|\\sqrt)\s*\(", text):
        end = closing(text, match.end() - 1)
        if match.start() < position or end is None:
            continue
        command = match.group()[:-1].strip()
        out += [text[position : match.start()], command, "{", _powers_and_roots(text[match.end() : end]), "}"]
        position = end + 1
    return "".join([*out, text[position:]])


_ARGUMENTS = {"\\frac": 2, "\\binom": 2, "\\sqrt": 1, "^": 1, "_": 1}


def _complete_arguments(text: str) -> str:
    """\\frac12, \\frac1{2}, \\sqrt2, x^\\pi, 2^10: every argument in braces."""
    text = re.sub(r"([\^_])\s*(-?\d+)(?![\d}])", r"\1{\2}", text)
    out: list[str] = []
    open_groups: list[int] = []
    wanted = position = 0
    while match := TOKEN.match(text, position):
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
