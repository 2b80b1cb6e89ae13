"""Whether a prediction is the answer, as far as text decides; a `Leaf` (grading.verifier.algebra) says the rest.

Forms are compared part by part; only where two values are not both rational numbers does a leaf have to say. Beside
what grammar and quantities mend, math-verify alone takes any number out of a text that it can't read and the last side
of any equation (1=2 is 2; here only behind a name, and every other number must agree), compares six decimals (6.63e-34
is 1.05e-34; here fractions, and a decimal of six or more digits stands for the value that it rounds), ignores bases,
and splits words into letters (east is seat).

Where convention decides: 50% equals 0.5 and, for want of a percent sign on the other side, 50; (1,2) equals "1, 2" in
this order; an answer with a unit equals the same number without one, but not one with another unit.
"""

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Literal

from stages.core.grading.verifier import extraction, forms, grammar, notation, pending, quantities
from stages.core.grading.verifier.forms import (
    Approximation,
    Congruence,
    Form,
    Ordered,
    Relation,
    Rows,
    Several,
    Value,
    Words,
    is_name,
    plain,
    read,
    read_canonical,
)
from stages.core.grading.verifier.grammar import Tree
from stages.core.grading.verifier.latex import MAX_LENGTH, Refused, letters
from stages.core.records import Verdict

Leaf = Callable[[Literal["value", "equation", "inequality", "decimal"], Tree, Tree], bool]


class NeedsAlgebra(Exception):
    """The text alone does not decide."""


_log = logging.getLogger(__name__)
_INTEGER = re.compile(r"[+-]?(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)", re.ASCII)


def decide(answer: str, prediction: str) -> Verdict | None:
    """The verdict where the text alone gives one, else None.

    Never raises, and takes a bounded time: no text over MAX_LENGTH is looked at, so that no number has more digits
    than int() takes, no regular expression more than some thousand characters, and no reading more than MAX_DEPTH
    levels. What reading does not foresee is left, as all that text does not decide, to a worker under its own bounds.
    """
    if len(prediction) > MAX_LENGTH or len(answer) > MAX_LENGTH:
        return "rejected"
    try:
        if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(prediction):  # the same as below, ten times as fast
            return "correct" if int(answer.replace(",", "")) == int(prediction.replace(",", "")) else "wrong"
        return verdict(answer, prediction, _ask)
    except NeedsAlgebra:
        return None
    except Exception:  # a fault of ours, which the worker meets again and calls `error`
        _log.exception("an answer could not be read here: %r as %r", prediction[:200], answer[:200])
        return None


def _ask(*_: object) -> bool:
    raise NeedsAlgebra


def verdict(answer: str, prediction: str, leaf: Leaf) -> Verdict:
    """Whether a prediction is the answer, and if so, whether nothing is left to do for it."""
    try:
        return _verdict(answer, prediction, leaf)
    except Refused:
        return "rejected"


def _verdict(answer: str, prediction: str, leaf: Leaf) -> Verdict:
    if "boxed" in answer:
        inside = extraction.extract(answer) or answer
        answer, prediction = inside, inside if prediction == answer else prediction
    if (letter := _choice(answer)) and (chosen := _choice(prediction, labelled=True)) is not None:
        return "correct" if chosen == letter else "wrong"
    gold, pred = _outermost(read(answer)), _outermost(read(prediction))
    gold = gold if gold == pred else _as_answer(gold)
    if not _equal(gold, pred, leaf):
        return "wrong"
    return "unevaluated" if pending.is_unevaluated(gold, pred) else "correct"


def _outermost(form: Form) -> Form:
    """A set of one number as the number, where the set is all there is."""
    alone = isinstance(form, Several) and form.braces and len(form.items) == 1
    return form.items[0] if alone and isinstance(form.items[0], Value | Words | Relation) else form  # type: ignore[union-attr]


def _as_answer(form: Form) -> Form:
    """An answer that says "x is about 3.14", as x = 3.14: what is exact, nobody knows."""
    if isinstance(form, Relation) and set(form.signs) <= {"=", r"\approx"} and is_name(form.members[0]):
        return form._replace(signs=("=",) * len(form.signs))
    return form


_CAPITAL = re.compile("[A-Z]")
_CHOICE = re.compile(r"\(?\s*([A-Z])\s*\)?\s*[.:]?")
_LABELLED = re.compile(
    r"(?:(?:option|choice|answer)\s*:?\s*)?(?:\(\s*([A-Z])\s*\)|([A-Z])\s*[.:)](?=\s|$)|([A-Z])$)(?P<rest>.*)",
    re.I | re.S,
)
# What behind a label leaves in doubt whether it is chosen: a further label, a word of doubt, a comma.
_UNDECIDED = re.compile(
    r"^\s*(?:[,;/&|+?!'_^=<>]|(?<!\s)-|-(?![\d\\])|\\(?:approx|ne|sim|to|mid|pm|cup|cap)(?![a-zA-Z])|\(?[A-Z]\)?\s*$)|\(\s*[A-Z]\s*\)|(?<![a-zA-Z])[A-Z]\s*(?:[:)]|\.\s)|,\s*[A-Z]\s*$|[?]"
    r"|(?<![a-zA-Z])(?:(?i:or|not|no|nor|is|isn't|are|was|wrong|incorrect|false|but|if|unless|maybe|perhaps|possibly"
    r"|neither|either|both|instead|rather|except|option|choice|answer|xor|vs|versus|can't|cannot|fails?|failed|invalid"
    r"|eliminated|excluded|ruled|crossed|rejected|discarded|unlikely|doubtful)|and\s+[A-Z])(?![a-zA-Z])"
    r"|^\s*\\times\s*$|[✗✘✕✖❌❎☒]|[\[<]\s*[A-Z]\s*[\]>]|\s[A-E]\s*$|(?<![a-zA-Z])(?i:wait|hmm|oops|actually)(?![a-zA-Z])"
)
_OF_CHOICES = re.compile(  # texts that choices have, with such words in them
    r"\s*(?:(?:it\s+)?can(?:not|'t) be (?:determined|found|known|solved)"
    r"|(?:there is )?(?:no|not) (?:enough|sufficient) \w+|none of [a-z ]+|no (?:real )?\w+)[\s.]*",
    re.I,
)


@lru_cache(2048)
def _choice(text: str, labelled: bool = False) -> str | None:
    """The letter of a multiple choice: B, (B), \\text{(B)}; labelled: also "(B) 5", "B. 5", "Option B"."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1 ", notation.canonical(text)).strip()
    match = (_LABELLED if labelled else _CHOICE).fullmatch(text)
    letter = next(filter(None, match.groups()), None) if match else None
    rest = match.group("rest") if match and labelled else ""
    if _UNDECIDED.search(rest) and not _OF_CHOICES.fullmatch(rest):
        return None
    return letter


def _equal(gold: Form, pred: Form, leaf: Leaf) -> bool:
    if isinstance(pred, Approximation):
        return _approximates(pred, leaf) and _equal(gold, pred.exact, leaf)
    if isinstance(gold, Approximation):
        return _equal(gold.exact, pred, leaf)
    if isinstance(gold, Congruence) and isinstance(pred, Congruence):
        same_kind = (gold.name, gold.modulus) == (pred.name, pred.modulus)
        return same_kind and (gold.residue - pred.residue) % gold.modulus == 0
    if isinstance(gold, Congruence) or isinstance(pred, Congruence):
        return False
    if isinstance(gold, Words) or isinstance(pred, Words):
        return _words(gold) == _words(pred) != ""
    if isinstance(gold, Value) and isinstance(pred, Value):
        return _equal_values(gold, pred, leaf)
    if isinstance(gold, Several) or isinstance(pred, Several):
        is_set = [isinstance(side, Several) and side.braces for side in (gold, pred)]
        one_is_none = any(is_set) and not all(isinstance(side, Several) for side in (gold, pred))
        return not one_is_none and _equal_several(gold, pred, leaf)
    if isinstance(gold, Relation) or isinstance(pred, Relation):
        return _equal_relations(gold, pred, leaf)
    if isinstance(gold, Ordered) and isinstance(pred, Ordered):
        marks = (gold.opening, gold.closing) == (pred.opening, pred.closing)
        return marks and _all(gold.items, pred.items, leaf)
    if isinstance(gold, Rows) and isinstance(pred, Rows):
        same = len(gold.rows) == len(pred.rows)
        return same and _all([c for row in gold.rows for c in row], [c for row in pred.rows for c in row], leaf)
    return False


def _words(item: Form) -> str:
    if isinstance(item, Words):
        return item.plain
    return plain(item.text) if isinstance(item, Value) and not re.search(r"\d", item.text) else ""


def _approximates(item: Approximation, leaf: Leaf) -> bool:
    """Whether the decimal is the exact value rounded; otherwise one cannot tell which of the two is meant."""
    exact = item.exact
    if isinstance(exact, Relation) and set(exact.signs) == {"="}:
        exact = read_canonical(exact.members[-1])
    decimal = item.decimal
    if not isinstance(exact, Value) or not isinstance(decimal, Value):
        return False
    if decimal.unit and decimal.unit != exact.unit:
        return False
    if exact.number is not None:
        return exact.number == decimal.number or quantities.is_rounding_of(decimal.text, exact.number, 1)
    return leaf("decimal", exact.tree, decimal.tree)


def _all(golds: Iterable[Form], preds: Iterable[Form], leaf: Leaf) -> bool:
    """Whether all are equal in order; one that is unequal by its text spares the algebra of the others."""
    golds, preds = list(golds), list(preds)
    if len(golds) != len(preds):
        return False
    needs_algebra = False
    for gold, pred in zip(golds, preds, strict=True):
        try:
            if not _equal(gold, pred, leaf):
                return False
        except NeedsAlgebra:
            needs_algebra = True
    if needs_algebra:
        raise NeedsAlgebra
    return True


def _equal_values(gold: Value, pred: Value, leaf: Leaf) -> bool:
    if gold.unit != pred.unit and ((gold.unit and pred.unit) or _CAPITAL.fullmatch(gold.text)):
        return False  # B eliminated: what stands behind a choice is no unit
    if gold.is_percent != pred.is_percent:  # 50% is 0.5, and 50 where the other side leaves the percent sign out
        whole = gold._replace(is_percent=False), pred._replace(is_percent=False)
        return _equal_values(*whole, leaf) or _equal_values(_hundredth(gold), _hundredth(pred), leaf)
    if gold.number is not None and pred.number is not None:
        return gold.number == pred.number or _is_rounded(gold, pred) or _is_rounded(pred, gold)
    return gold.tree == pred.tree or leaf("value", gold.tree, pred.tree)


def _hundredth(value: Value) -> Value:
    if not value.is_percent:
        return value
    return forms.of_tree(Tree("/", (value.tree, grammar.number("100"))))._replace(unit=value.unit)


def _is_rounded(exact: Value, decimal: Value) -> bool:
    assert exact.number is not None
    return not quantities.is_terminating(exact.number) and quantities.is_rounding_of(decimal.text, exact.number)


def _equal_several(gold: Form, pred: Form, leaf: Leaf) -> bool:
    golds, preds = _items(gold), _items(pred)
    if isinstance(gold, Ordered) or isinstance(pred, Ordered):
        return _equal_tuple_and_list(gold, pred, leaf)
    if isinstance(gold, Value) and isinstance(pred, Several) and not pred.braces:  # 3/4 or 0.75
        return bool(preds) and _all([gold] * len(preds), preds, leaf) and _all(preds[:1] * len(preds), preds, leaf)
    if len(golds) != len(preds):
        return False
    variables = [{name.partition("_")[0] for name in _names(items)} for items in (golds, preds)]  # x_1, x_2: one
    if variables[0] != variables[1] and max(map(len, variables)) > 1:
        braces = any(isinstance(side, Several) and side.braces for side in (gold, pred))
        return not braces and _all(_in_order(golds), _in_order(preds), leaf)
    left = list(preds)
    needs_algebra = False
    for item in golds:
        for index, other in enumerate(left):
            try:
                if _equal(item, other, leaf):
                    del left[index]
                    break
            except NeedsAlgebra:
                needs_algebra = True
        else:
            if not needs_algebra:
                return False
    if left:
        raise NeedsAlgebra
    return True


def _items(item: Form) -> tuple[Form, ...]:
    return item.items if isinstance(item, Several) else (item,)


def _equal_tuple_and_list(gold: Form, pred: Form, leaf: Leaf) -> bool:
    """(3,5) and "x=3, y=5" or "3, 5": the order counts; names go by the alphabet."""
    tuple_, other = (gold, pred) if isinstance(gold, Ordered) else (pred, gold)
    assert isinstance(tuple_, Ordered)
    assert isinstance(other, Several)
    if other.braces or (tuple_.opening, tuple_.closing) != ("(", ")"):
        return False
    names = _names(other.items)
    if names and len(names) < len(other.items):
        return False
    items = _in_order(other.items)
    return _all(tuple_.items, items, leaf) if isinstance(gold, Ordered) else _all(items, tuple_.items, leaf)


def _names(items: Iterable[Form]) -> set[str]:
    """The names to which items give values: x and y of x=2, y=7."""
    named = [item.members[0] for item in items if isinstance(item, Relation) and item.signs == ("=",)]
    return {_name(name) for name in named if is_name(name)}


def _in_order(items: Sequence[Form]) -> list[Form]:
    """The values of named items by the alphabet of their names; other items as they are."""
    named = [item for item in items if isinstance(item, Relation) and item.signs == ("=",) and is_name(item.members[0])]
    if len(named) < len(items):
        return list(items)
    if all(_LETTER.fullmatch(item.members[0]) for item in named):
        named.sort(key=lambda item: item.members[0])
    return [read_canonical(item.members[1]) for item in named]


_LETTER = re.compile(r"[a-zA-Z](?:_\{\w+\})?")


def _equal_relations(gold: Form, pred: Form, leaf: Leaf) -> bool:
    if isinstance(gold, Relation) and isinstance(pred, Relation):
        return _equal_two_relations(gold, pred, leaf)
    if isinstance(gold, Relation):
        side = _side(gold, leaf)
        return side is not None and _equal(side, pred, leaf)
    assert isinstance(pred, Relation)
    if isinstance(gold, Value) and _CAPITAL.fullmatch(gold.text) and _VARIABLE.fullmatch(pred.members[0]):
        return False  # C = B chooses neither
    if (side := _side(pred, leaf)) is not None:
        return _equal(gold, side, leaf)
    if set(pred.signs) == {"="} and isinstance(gold, Value):  # 2+3=5: every member has to be the answer
        return _all([gold] * len(pred.members), map(read_canonical, pred.members), leaf)
    return False


def _equal_two_relations(gold: Relation, pred: Relation, leaf: Leaf) -> bool:
    if gold == pred and all(map(_is_whole, gold.members)):
        return True
    if set(gold.signs) == set(pred.signs) == {"="}:
        return _equal_chains(gold, pred, leaf) if len(gold.members) > 2 else _equal_equations(gold, pred, leaf)
    left, right = _interval(gold), _interval(pred)
    if left and right:
        return left[0] == right[0] and _equal(left[1], right[1], leaf)
    if len(gold.members) == len(pred.members) == 2:
        one, two = _difference(gold), _difference(pred)
        same_sign = pred.signs[0] in (gold.signs[0], _FLIPPED.get(gold.signs[0]))
        kind: Literal["inequality", "equation"] = "inequality" if gold.signs[0] in _FLIPPED else "equation"
        return same_sign and one is not None and two is not None and leaf(kind, one, two)
    same_signs = gold.signs == pred.signs
    return same_signs and _all(map(read_canonical, gold.members), map(read_canonical, pred.members), leaf)


def _is_whole(member: str) -> bool:
    try:
        grammar.parse(member)
    except Refused:
        return False
    return True


def _equal_equations(gold: Relation, pred: Relation, leaf: Leaf) -> bool:
    if is_name(gold.members[0]) and _name(gold.members[0]) == _name(pred.members[0]):
        left, right = _side(gold, leaf), _side(pred, leaf)
        return left is not None and right is not None and _equal(left, right, leaf)
    if len(pred.members) > 2:
        return False
    one, two = _difference(gold), _difference(pred)
    if one is None or two is None:  # words on one side
        return _all(map(read_canonical, gold.members), map(read_canonical, pred.members), leaf)
    return leaf("equation", one, two)


def _equal_chains(gold: Relation, pred: Relation, leaf: Leaf) -> bool:
    """Whether a = b = c says the same: all members but those that are one value, in any order.

    Of a named number's chain (S = ab = 6) name and number will do.
    """
    golds, preds = (_distinct(map(read_canonical, relation.members), leaf) for relation in (gold, pred))
    is_number = not letters(gold.members[-1]) and not any(map(_LETTER.fullmatch, gold.members[1:-1]))
    if is_number and len(preds) < len(golds):
        golds = [golds[0], golds[-1]]
    return _equal_several(Several(tuple(golds), True), Several(tuple(preds), True), leaf)


def _distinct(items: Iterable[Form], leaf: Leaf) -> list[Form]:
    distinct: list[Form] = []
    for item in items:
        if not any(_equal(other, item, leaf) for other in distinct):
            distinct.append(item)
    return distinct


def _difference(relation: Relation) -> Tree | None:
    """What is zero, or positive, where a relation of two members holds; None where one of them is no expression."""
    sides = [forms.value(member) for member in relation.members[:: -1 if relation.signs[0] in ("<", r"\le") else 1]]
    if not isinstance(sides[0], Value) or not isinstance(sides[1], Value):
        return None
    return Tree("+", (sides[0].tree, grammar.negative(sides[1].tree)))


_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


_VARIABLE = re.compile(r"(?:[a-zA-Z]+|\\[a-zA-Z]+)(?:_\w+)?(?:\(\w+\))?", re.ASCII)  # of an interval: x, f(x), not |x|


def _side(relation: Relation, leaf: Leaf) -> Form | None:
    """What a relation says of its name: the value behind "x = ", or the interval of an inequality; else None.

    In a chain behind a name every member without letters of its own must equal the last: x = 1 = 2 says nothing.
    """
    if set(relation.signs) != {"="}:
        named = _interval(relation)
        return named[1] if named and _VARIABLE.fullmatch(named[0]) else None
    members = relation.members
    if len(members) == 2 and not is_name(members[0]) and is_name(members[1]):
        members = members[::-1]
    if not is_name(members[0]):
        return None
    last = read_canonical(members[-1])
    if not all(isinstance(forms.value(member), Value) for member in members[1:-1]):
        return None
    names, known = letters(members[0]), letters(members[-1])
    if any(names & letters(member) for member in members[1:-1]):  # y = 4x y = 3x: two relations, no chain
        return None
    compared = [member for member in members[1:-1] if letters(member) <= known]
    return last if all(_equal(last, read_canonical(member), leaf) for member in compared) else None


def _interval(relation: Relation) -> tuple[str, Form] | None:
    """(name, interval) of x < 3, 2 \\le x < 5."""
    members, signs = relation.members, relation.signs
    if not set(signs) <= set(_FLIPPED):
        return None
    if (len(members) == 2 and not is_name(members[0])) or (signs[0] in (">", r"\ge") and len(members) == 3):
        members, signs = members[::-1], tuple(_FLIPPED[sign] for sign in signs[::-1])
    if len(members) == 2 and is_name(members[0]):
        return _name(members[0]), _half_line(signs[0], read_canonical(members[1]))
    if len(members) == 3 and is_name(members[1]) and set(signs) <= {"<", r"\le"}:
        ends = read_canonical(members[0]), read_canonical(members[2])
        return _name(members[1]), Ordered("[" if signs[0] == r"\le" else "(", "]" if signs[1] == r"\le" else ")", ends)
    return None


def _half_line(sign: str, bound: Form) -> Form:
    below, above = (forms.value(r"-\infty"), bound), (bound, forms.value(r"\infty"))
    if sign in ("<", r"\le"):
        return Ordered("(", "]" if sign == r"\le" else ")", below)
    return Ordered("[" if sign == r"\ge" else "(", ")", above)


def _name(text: str) -> str:
    return re.sub(r"[\s{}]|\\text|\\left|\\right", "", text)
