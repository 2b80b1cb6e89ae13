"""Finding an answer in a completion, and comparing it: a table of pairs, and what the table cannot show."""

import random
import sys
from collections.abc import Iterator
from fractions import Fraction

import pytest

from benchmarks import fuzz_verifier as fuzz
from stages.core.grading.verifier import Verifier, grammar, quantities
from stages.core.grading.verifier.comparison import decide
from stages.core.grading.verifier.extraction import extract
from tests.answer_pairs import DOUBTFUL, PAIRS

BARE, BOX = True, "\\boxed{%s}"


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(workers=1) as shared:
        yield shared


@pytest.mark.parametrize("kind", PAIRS)
def test_a_prediction_is_rewarded_exactly_if_it_is_the_answer(kind: str, verifier: Verifier) -> None:
    rows = PAIRS[kind]
    scores = verifier.verify([(f"So it must be \\boxed{{{text}}}.", answer) for answer, text, _ in rows])
    wrong = [(row, score.verdict) for row, score in zip(rows, scores, strict=True) if (score.reward == 1.0) != row[2]]
    assert wrong == []


def test_every_answer_of_the_table_equals_itself(verifier: Verifier) -> None:
    golds = sorted({answer for rows in PAIRS.values() for answer, _, _ in rows})
    found = verifier.parseable(golds)
    assert [gold for gold, ok in zip(golds, found, strict=True) if not ok] == []


@pytest.mark.parametrize("answer", DOUBTFUL)
def test_what_says_something_else_or_is_in_doubt_is_never_rewarded(answer: str, verifier: Verifier) -> None:
    scores = verifier.verify([(BOX % text, answer) for text in DOUBTFUL[answer]])
    assert [text for text, score in zip(DOUBTFUL[answer], scores, strict=True) if score.reward] == []


@pytest.mark.parametrize(
    ("completion", "found"),
    [
        ("So \\boxed{3}.", "3"),
        ("First \\boxed{3}, no: \\boxed{4}.", "4"),
        ("\\boxed{\\frac{1}{2}} and sets like {a}", "\\frac{1}{2}"),
        ("\\boxed{4}, or rather \\boxed{5", "4"),
        ("\\boxed {4}", "4"),
        ("\\boxed\n{4}", "4"),
        ("\\fbox{4}", "4"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{x = \\boxed{4}}", "4"),
        ("$\\boxed{1}$ and $\\boxed{2}$", "1, 2"),
        ("\\boxed{1}, \\boxed{2}, and \\boxed{3}", "1, 2, 3"),
        ("$\\boxed{1}$ or maybe $\\boxed{2}$", "1, 2"),
        ("\\boxed{1}\\quad\\text{or}\\quad\\boxed{2}", "1, 2"),
        ("\\boxed{1} / \\boxed{2}", "1, 2"),
        ("Case 1: \\boxed{1}. Case 2: \\boxed{2}.", "2"),
        ("\\boxed{1} \\boxed{2}", "2"),
        ("We add.\nAnswer: 42", "42"),
        ("We add.\n**Answer:** $42$\n", "$42$"),
        ("We add.\nFinal answer: 42", "42"),
        ("We add.\nAnswer:\n\n42", "42"),
        ("Answer: 41\nNo.\nAnswer: 42", "42"),
        ("Answer: 41, that is \\boxed{42}", "42"),
        ("<think>\\boxed{5}</think>\nAnswer: 2", "2"),
        ("<think>\\boxed{5}</think>\nI am sure.", "5"),
        ("The answer is 42", None),
        ("The answer to question 42 is not known", None),
        ("\\boxed{42", None),
        ("\\boxed{}", None),
        ("\\boxed{ }", None),
        ("42", None),
        ("", None),
    ],
)
def test_the_answer_is_the_last_closed_box_or_else_the_last_answer_line(completion: str, found: str | None) -> None:
    assert extract(completion) == found


@pytest.mark.parametrize(
    ("completion", "found"),
    [
        ("We get $x = 42$.", "x = 42"),
        ("6 \\cdot 7 = 42", "42"),
        ("#### 42", "42"),
        ("The answer is 42.", "42"),
        ("42", "42"),
        ("Then 41.\nThe answer is \\boxed{42}", "42"),
        ("I cannot answer question 42", None),
    ],
)
def test_a_bare_expression_ends_the_last_line(completion: str, found: str | None) -> None:
    assert extract(completion, bare=True) == found


@pytest.mark.parametrize(
    "completion",
    [
        "\\boxed{" * 200_000,
        "\\boxed{" * 100_000 + "}" * 99_999,
        "\\boxed{1}, " * 100_000,
        "\\boxed{" + "x" * 1_000_000 + "}",
        "\\boxed{" + "{" * 300_000 + "}" * 300_000 + "}",
        "Answer: " * 100_000,
        "answer\n" * 100_000,
        "{" * 1_000_000,
        "$ " * 500_000,
        "\\" * 1_000_000,
        "- " * 500_000 + "answer:",
    ],
)
def test_a_million_characters_of_anything_are_read_once(completion: str) -> None:
    """Each takes less than half a second; quadratic work would take hours."""
    for bare in (False, True):
        found = extract(completion, bare)
        assert found is None or decide("2", found) in ("wrong", "rejected")


@pytest.mark.parametrize(
    "prediction",
    [
        "1" * 1001,
        "(" * 25 + "2" + ")" * 25,
        "\\phantom{2}",
        "\\input{/etc/passwd}",
        "\\operatorname{zeros}(9,9)",
        ",".join(map(str, range(100))),
        "\\pm" * 4 + "2",
    ],
)
def test_what_no_honest_answer_needs_is_rejected_by_its_text(prediction: str) -> None:
    assert decide("2", prediction) == "rejected"


@pytest.mark.parametrize(
    "prediction",
    [
        "9^{9^{9^{9}}}",
        "10^{10^{10}}",
        "1E999999999",
        "2^{100000000}-3^{63000000}",
        "9!!!!!!!!",
        "1000000!",
        "\\binom{1000000}{500000}",
        "\\Gamma(1000000000)",
        "\\gcd(10^{10000000},3)",
        "(x+y+z)^{1000000}",
        "y=x^{1000000}",
    ],
)
def test_numbers_too_long_to_write_out_are_rejected_before_any_algebra(prediction: str, verifier: Verifier) -> None:
    assert verifier.verify([(BOX % prediction, "2")])[0].verdict == "rejected"


@pytest.mark.parametrize(
    "prediction",
    [
        "\x00" * 50,
        "\ud800",
        "2\x003",
        "2\u200b2",
        "٢",
        "²",
        "½" * 100,
        "2\u0301" * 100,
        "=" * 100,
        "\\" * 101,
        "\\frac" * 50,
        "^" * 300,
        "_" * 300,
        "\\sqrt" * 100,
        "\\text{" * 10 + "}" * 10,
        "\\begin{pmatrix}" * 5 + "\\end{pmatrix}" * 5,
        "\\begin{pmatrix} 1 & 2 \\\\ 3",
        "__import__('os').system('true')",
        "(lambda: 2)()",
        "None",
        "1/0",
        "\\infty-\\infty",
        "0^0",
    ],
)
def test_odd_text_is_an_ordinary_wrong_answer(prediction: str, verifier: Verifier) -> None:
    assert verifier.verify([(BOX % prediction, "2")])[0].verdict in ("wrong", "rejected", "no_answer")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", Fraction(12)),
        ("-0.5", Fraction(-1, 2)),
        ("3\\cdot10^{-2}", Fraction(3, 100)),
        ("10^{3}", Fraction(1000)),
        ("\\frac{3}{4}", Fraction(3, 4)),
        ("-2\\frac{1}{2}", Fraction(-5, 2)),
        ("7 1/3", Fraction(22, 3)),
        ("1/3", Fraction(1, 3)),
        ("0.1\\overline{6}", Fraction(1, 6)),
        ("2^{10}", Fraction(1024)),
        ("1/0", None),
        ("10^{9999}", None),
        ("x", None),
        ("1 2", None),
        ("", None),
        ("٣", None),
    ],
)
def test_literals_have_exact_values(text: str, value: Fraction | None) -> None:
    assert quantities.number(text) == value


@pytest.mark.parametrize(
    ("text", "value", "unit", "factor"),
    [
        ("5 \\text{cm}^{2}", "5", "cm^2", 1),
        ("5 \\text{square inches}", "5", "in^2", 1),
        ("\\$5", "5", "dollar", 1),
        ("2\\text{dozen}", "2", "", 12),
        ("3 \\text{million dollars}", "3", "dollar", 10**6),
        ("30^{\\circ}", "30", "degree", 1),
        ("5 \\text{miles per hour}", "5", "mi/h", 1),
        ("5\\text{is wrong}", "5\\text{is wrong}", "", 1),
        ("5m", "5m", "", 1),
    ],
)
def test_units_are_cut_off_and_spelled_one_way(text: str, value: str, unit: str, factor: int) -> None:
    assert quantities.split_unit(text) == (value, unit, factor)


@pytest.mark.parametrize("seed", range(4))
def test_no_text_raises_or_meets_code_that_did_not_foresee_it(seed: int) -> None:
    """Mutated answers, repetitions, other scripts, surrogates, deep nesting, numbers of 10^5 digits."""
    draw = random.Random(seed)
    with fuzz.Unforeseen() as unforeseen:
        for _ in range(400):
            fuzz.read_here(fuzz.hostile(draw, fuzz.ANSWERS), draw.choice(fuzz.ANSWERS))
    assert unforeseen.messages == []


@pytest.mark.parametrize(
    "unit", ["1,", "(A) ", "½", "\\text{a} ", "\\frac{1}{", "\\{1\\}", " million", "\\$", "x=", "\\1,000"]
)
def test_a_hundred_thousand_characters_in_a_box_are_rejected_unread(unit: str) -> None:
    for shape in fuzz.SHAPES:
        found = extract(shape % (unit * (100_000 // len(unit))))
        assert found is None or decide("2", found) in ("wrong", "rejected", "no_answer")
        assert found is None or decide(found, "2") in ("wrong", "rejected", "no_answer")


@pytest.mark.parametrize(
    ("answer", "prediction"),
    [
        ("2", "1," + ",".join(["234"] * 30_000)),
        ("2", "9" * 100_000),
        ("2", "9" * 1000),
        ("2", "\\1,000"),
        ("2", "2" + " million" * 100),
        ("2", "\\$" * 400 + "5"),
        ("2", "(" + ":".join(["9" * 300] * 3) + ")"),
        ("2", "1" * 900 + "/" + "7" * 90),
        ("2", "10_{99999999}"),
        ("2", "1:0"),
        ("9" * 5000, "2"),
        ("x" + "\ud800", "x\udfff"),
        ("2", "½" * 900),
        ("2", "3 \\text{is a p" + "o" * 80 + "wer of 2}"),
        ("2", "\\bar{\\" + "a" * 80 + "1}=2"),
        ("2", "(~\\text{a}" + "~\\text{a}" * 80),
        ("2", "2" + " \\text{a}" * 80 + "@"),
    ],
)
def test_what_once_raised_or_could_has_a_verdict(answer: str, prediction: str) -> None:
    with fuzz.Unforeseen() as unforeseen:
        assert decide(answer, prediction) in ("wrong", "rejected")
    assert unforeseen.messages == []


@pytest.mark.slow
def test_every_mutation_that_changes_an_answer_costs_the_reward(verifier: Verifier) -> None:
    made = fuzz.mutants(random.Random(11), fuzz.ANSWERS)
    batch = [next(made) for _ in range(1500)]
    scores = verifier.verify([(BOX % mutant, answer) for _, answer, mutant in batch])
    rewarded = {
        (m.name, answer, mutant): score.reward for (m, answer, mutant), score in zip(batch, scores, strict=True)
    }
    changing = {mutation.name for mutation in fuzz.MUTATIONS if not mutation.keeps}
    assert [key for key, reward in rewarded.items() if reward and key[0] in changing] == []
    assert [key for key, reward in rewarded.items() if not reward and key[0] not in changing] == []
    assert {name for name, _, _ in rewarded} == {mutation.name for mutation in fuzz.MUTATIONS}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("2\\sqrt{3}-\\frac{x_{1}}{y}", "EXPRESSION"),
        ("\\sum_{n=1}^{\\infty}\\frac{1}{n^{2}}", "EXPRESSION"),
        ("|x-|y||", "EXPRESSION"),
        ("\\gcd(12,18)", "EXPRESSION"),
        ("3 4", "ODD"),
        ("3{4}", "ODD"),
        ("x'", "ODD"),
        ("5_{2}", "ODD"),
        ("x^{T}", "ODD"),
        ("x:y", "ODD"),
        ("x\\to 3", "ODD"),
        ("\\gcd(12x,18)", "ODD"),
        ("2\\frac{1}{2}\\pi", "ODD"),
        ("5..6", "ODD"),
        ("5+", "BROKEN"),
        ("\\frac{1}", "BROKEN"),
        ("\\sqrt{5", "BROKEN"),
        ("5+*3", "BROKEN"),
        ("^{2}", "BROKEN"),
        ("3!!", "ODD"),
        ("|5", "BROKEN"),
        ("(5", "BROKEN"),
        ("", "BROKEN"),
        ("{" * 500, "BROKEN"),
        ("\\sqrt{" * 500 + "}" * 500, "ODD"),
    ],
)
def test_only_texts_of_one_meaning_are_expressions(text: str, kind: str) -> None:
    assert grammar.judge(text).name == kind


def test_long_integers_are_compared_digit_by_digit() -> None:
    digits = "7" * 900
    assert decide(digits, digits) == "correct"
    assert decide(digits, digits[:-1] + "8") == "wrong"
    assert sys.get_int_max_str_digits() >= 1000
