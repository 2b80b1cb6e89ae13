"""Finding an answer in a completion, and comparing it: a table of pairs, and what the table cannot show."""

import random
import re
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from benchmarks import expressions
from benchmarks import fuzz_verifier as fuzz
from stages.core.grading.verifier import Verifier, grammar, quantities
from stages.core.grading.verifier.comparison import decide
from stages.core.grading.verifier.extraction import extract
from stages.core.grading.verifier.latex import Refused
from tests.answer_pairs import DOUBTFUL, EVALUATED, PAIRS, UNEVALUATED

BARE, BOX = True, "\\boxed{%s}"


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    """What equals the answer is correct, worked out or not."""
    with Verifier(workers=1, accept_unevaluated=True) as shared:
        yield shared


@pytest.mark.parametrize("kind", PAIRS)
def test_a_prediction_is_rewarded_exactly_if_it_equals_the_answer(kind: str, verifier: Verifier) -> None:
    rows = PAIRS[kind]
    scores = verifier.verify([(f"So it must be \\boxed{{{text}}}.", answer) for answer, text, _ in rows])
    wrong = [(row, score.verdict) for row, score in zip(rows, scores, strict=True) if (score.reward == 1.0) != row[2]]
    assert wrong == []


def test_every_answer_of_the_table_equals_itself(verifier: Verifier) -> None:
    golds = sorted({answer for rows in PAIRS.values() for answer, _, _ in rows})
    readable = verifier.parseable(golds)
    assert [gold for gold, ok in zip(golds, readable, strict=True) if not ok] == []


@pytest.mark.parametrize("answer", DOUBTFUL)
def test_what_says_something_else_or_is_in_doubt_is_never_rewarded(answer: str, verifier: Verifier) -> None:
    scores = verifier.verify([(BOX % text, answer) for text in DOUBTFUL[answer]])
    assert [text for text, score in zip(DOUBTFUL[answer], scores, strict=True) if score.reward] == []


@pytest.mark.parametrize(("table", "verdict"), [(UNEVALUATED, "unevaluated"), (EVALUATED, "correct")])
def test_what_is_left_to_do_is_not_rewarded_unless_that_is_accepted(
    table: dict[str, list[str]], verdict: str, verifier: Verifier
) -> None:
    rows = [(BOX % text, answer) for answer, texts in table.items() for text in texts]
    with Verifier(workers=1) as strict:
        scores = strict.verify(rows)
    assert [row for row, score in zip(rows, scores, strict=True) if score.verdict != verdict] == []
    assert {score.reward for score in scores} == {1.0 if verdict == "correct" else 0.0}
    assert {score.verdict for score in verifier.verify(rows)} == {"correct"}


def test_a_multiple_of_a_matrix_is_an_answer_and_a_sum_within_one_is_not() -> None:
    answer = r"\begin{pmatrix}2&0\\0&2\end{pmatrix}"
    multiple = r"\boxed{2\begin{pmatrix}1&0\\0&1\end{pmatrix}}"
    left = (r"\boxed{\begin{pmatrix}1+1&0\\0&2\end{pmatrix}}", r"\boxed{(1+1)\begin{pmatrix}1&0\\0&1\end{pmatrix}}")
    with Verifier(workers=1) as strict:
        scores = strict.verify([(completion, answer) for completion in (multiple, *left)])
    assert [score.verdict for score in scores] == ["correct", "unevaluated", "unevaluated"]


def test_an_echo_of_an_arithmetic_problem_pays_nothing() -> None:
    made = [(answer, text) for answer, text, is_equal in expressions.pairs(9, 300) if is_equal]
    sums = [(answer, text) for answer, text in made if re.search(r"[+−]|\\cdot|\\times|\\div|\d\(", text)]
    assert len(sums) > 50
    with Verifier(workers=1) as strict:
        verdicts = [score.verdict for score in strict.verify([(BOX % text, answer) for answer, text in sums])]
    assert set(verdicts) == {"unevaluated"}


@pytest.mark.parametrize("seed", range(3))
def test_expressions_of_all_operators_have_their_exact_value(seed: int, verifier: Verifier) -> None:
    rows = list(expressions.pairs(seed, 400))
    scores = verifier.verify([(BOX % text, answer) for answer, text, _ in rows])
    assert [row for row, score in zip(rows, scores, strict=True) if (score.reward == 1.0) != row[2]] == []


UNIT_PROMPT = "Ann has 5 red marbles in wide bins and repeating patterns. How many marbles are there?"


@pytest.mark.parametrize(
    ("text", "is_unit"),
    [
        ("8 red marbles", True),
        ("8\\text{ red marbles}", True),
        ("8 patterns", True),
        ("8 marble", True),
        ("8 bins", True),
        ("8 cm", True),
        ("8 blue marbles", False),
        ("8 repeating", False),
        ("8 wide", False),
        ("8 choose", False),
        ("8 gizmos", False),
        ("8 red", False),
    ],
)
def test_words_behind_a_number_are_a_unit_if_the_list_or_the_problem_has_them(text: str, is_unit: bool) -> None:
    with Verifier(workers=1) as verifier:
        [score] = verifier.submit([(BOX % text, "8")], [UNIT_PROMPT]).result()
    assert (score.reward == 1.0) == is_unit


FORMS = re.findall(r"^\| `(.+?)` \| (yes|no) \| (yes|no) \| .+ \|$", Path("docs/rewards.md").read_text(), re.M)


@pytest.mark.parametrize(("form", "counts", "counts_bare"), FORMS)
def test_forms_of_a_final_answer_count_as_the_documentation_says(form: str, counts: str, counts_bare: str) -> None:
    for bare, expected in ((False, counts), (True, counts_bare)):
        with Verifier(workers=1, bare=bare) as verifier:
            [score] = verifier.verify([(form.replace("⏎", "\n"), "73")])
        assert score.reward == (expected == "yes"), (bare, score)


def test_the_documentation_tells_of_some_forms() -> None:
    assert len(FORMS) > 25


def test_a_thought_that_began_in_the_prompt_and_never_ends_holds_no_answer() -> None:
    thinking = "What is 70+3?<|assistant|><think>\n"
    for completion, extracted in [("So \\boxed{73}", None), ("So \\boxed{7}</think>\\boxed{73}", "73")]:
        assert extract(completion, prompt=thinking) == extracted
    assert extract("So \\boxed{73}", prompt=thinking + "</think>") == "73"


@pytest.mark.parametrize(
    ("completion", "extracted"),
    [
        ("So \\boxed{3}.", "3"),
        ("First \\boxed{3}, no: \\boxed{4}.", "4"),
        ("\\boxed{\\frac{1}{2}} and sets like {a}", "\\frac{1}{2}"),
        ("\\boxed{4}, or rather \\boxed{5", None),
        ("\\boxed{4}. Then \\box", None),
        ("\\boxed{4, that is\n\nSo \\boxed{5}", "5"),
        ("\\boxed{4, that is \\boxed{5}", None),
        ("\\boxed 2", "2"),
        ("so $\\boxed2$.", "2"),
        ("$\\boxed\\pi$", "\\pi"),
        ("\\boxed 12", None),
        ("In a \\boxed form: \\boxed{3}", "3"),
        ("**\\boxed{3}**", "3"),
        ("- \\boxed{3}", "3"),
        ("\\boxed{3} - a prime.", "3"),
        ("\\boxed{3}. No other works.", "3"),
        ("\\boxed{0.5} or, equivalently, a half", "0.5"),
        ("\\boxed{3} or 4.", "3, 4"),
        ("\\boxed{3}\\text{ or }4", "3, 4"),
        ("Boxed: \\boxed{3}; not sure", "3"),
        ("\\boxed{3}, not sure", None),
        ("\\boxed{3} (?)", None),
        ("\\boxed{3}, but that is wrong", None),
        ("not \\boxed{3}", None),
        ("x\\ne\\boxed{3}", None),
        ("<think>\\boxed{5}</think> or <think>\\boxed{6}", None),
        ("\\boxed {4}", "4"),
        ("\\boxed\n{4}", "4"),
        ("\\fbox{4}", "4"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{x = \\boxed{4}}", "x = \\boxed{4}"),
        ("\\boxed{-\\boxed{3}}", "-\\boxed{3}"),
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
def test_the_answer_is_the_last_closed_box_or_else_the_last_answer_line(completion: str, extracted: str | None) -> None:
    assert extract(completion) == extracted


@pytest.mark.parametrize(
    ("completion", "extracted"),
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
def test_a_bare_expression_ends_the_last_line(completion: str, extracted: str | None) -> None:
    assert extract(completion, bare=True) == extracted


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
        extracted = extract(completion, bare)
        assert extracted is None or decide("2", extracted) in ("wrong", "rejected")


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
        ("\\sqrt{\\frac{4}{9}}", Fraction(2, 3)),
        ("\\sqrt[3]{-8}", Fraction(-2)),
        ("8^{-\\frac{2}{3}}", Fraction(1, 4)),
        ("\\sqrt{2}", None),
        ("2^{3}!", Fraction(40320)),
        ("-3^{2}", Fraction(-9)),
        ("1/2/3", Fraction(1, 6)),
        ("1 2", None),
        ("", None),
        ("٣", None),
    ],
)
def test_expressions_have_exact_values(text: str, value: Fraction | None) -> None:
    assert fuzz.exact(text) == value


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
        extracted = extract(shape % (unit * (100_000 // len(unit))))
        assert extracted is None or decide("2", extracted) in ("wrong", "rejected", "no_answer")
        assert extracted is None or decide(extracted, "2") in ("wrong", "rejected", "no_answer")


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
        ("2\\sqrt{3}-\\frac{x_{1}}{y}", "tree"),
        ("\\sum_{n=1}^{\\infty}\\frac{1}{n^{2}}", "tree"),
        ("|x-|y||", "tree"),
        ("\\gcd(12,18)", "tree"),
        ("3 4", "words"),
        ("3{4}", "words"),
        ("x'", "words"),
        ("5_{2}", "words"),
        ("x^{T}", "words"),
        ("x:y", "words"),
        ("x\\to 3", "words"),
        ("\\gcd(12x,18)", "words"),
        ("2\\frac{1}{2}\\pi", "tree"),
        ("2\\frac{3}{2}", "words"),
        ("2(8)", "tree"),
        ("1/2x", "words"),
        ("\\ln 2/3", "words"),
        ("\\cos 2\\pi/7", "tree"),
        ("2^{3}^{2}", "words"),
        ("x_{\\text{max}}", "tree"),
        ("5..6", "words"),
        ("5+", "refused"),
        ("\\frac{1}", "refused"),
        ("\\sqrt{5", "refused"),
        ("5+*3", "refused"),
        ("^{2}", "refused"),
        ("3!!", "words"),
        ("|5", "refused"),
        ("(5", "refused"),
        ("", "refused"),
        ("{" * 500, "words"),
        ("\\sqrt{" * 500 + "}" * 500, "words"),
    ],
)
def test_only_texts_of_one_meaning_are_expressions(text: str, kind: str) -> None:
    try:
        read = "words" if grammar.parse(text) is None else "tree"
    except Refused:
        read = "refused"
    assert read == kind


def test_long_integers_are_compared_digit_by_digit() -> None:
    digits = "7" * 900
    assert decide(digits, digits) == "correct"
    assert decide(digits, digits[:-1] + "8") == "wrong"
    assert sys.get_int_max_str_digits() >= 1000
