"""Rewards of one's own in real worker processes: sums, what goes wrong in a function, what is refused; the examples."""

import runpy
from pathlib import Path

import pytest

from stages import prepare
from stages.core import records
from stages.core.drawing.rollouts import Prompt
from stages.core.errors import InputError
from stages.core.grading import rewards
from stages.core.grading.rewards import OwnGrader, RewardOptions
from stages.core.grading.workers import needed

EXAMPLES = Path(__file__).parents[1] / "examples/rewards"
PROBLEM = {"id": "p1", "problem": "3+4=?", "answer": "7", "source": "sums", "target": 5}
MINE = """
import os, sys, time

def short(completions, **_):
    print("noise", flush=True)
    os.write(1, b"noise")
    return [len(text) <= 9 for text in completions]

def target(prompts, completion_ids, target, **_):
    assert prompts == ["3+4="] * len(target)
    return [None if len(ids) == 1 else len(ids) / goal for ids, goal in zip(completion_ids, target)]

def unruly(completions, **_):
    order = completions[0]
    if order == "raise":
        raise ValueError("no\\nway")
    if order == "exit":
        sys.exit(3)
    if order == "die":
        os._exit(3)
    if order == "hang":
        while True:
            pass
    if order == "sleep":
        time.sleep(60)
    if order == "swell":
        bytearray(2**29)
    return {"few": [1.0], "nan": [1.0, float("nan")], "text": ["1", "2"], "nothing": None}.get(order, [1.0, 0.0])

def always(completions, **_):
    raise KeyError("always")

def on_empty(completions, **_):
    return [1 / len(text) for text in completions]

def bare(completions):
    return [0.0] * len(completions)

def hungry(completions, prize, **_):
    return [0.0] * len(completions)

async def later(completions, **_):
    return [0.0] * len(completions)

number = 7
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    path = tmp_path_factory.mktemp("mine") / "mine.py"
    path.write_text(MINE)
    return path


def read(path, *functions, weights=()):
    names = [f"{path}:{name}" if name != rewards.MATH_VERIFY else name for name in functions]
    return rewards.read(RewardOptions(reward=names, reward_weight=list(weights)))


def ask(grader, *completions):
    return grader.grade(PROBLEM, "3+4=", completions, [[1] * number for number, _ in enumerate(completions, 1)])


def test_the_weighted_sum_leaves_out_what_does_not_apply_and_counts_as_correct_from_1_on(mine):
    one = read(mine, "math-verify", "short", "target", weights=[0.9, 0.1, 2.0])
    with one.grader() as grader:
        scores = ask(grader, "\\boxed{7}", "It is \\boxed{7}.", "It is 7.").result()
    assert [score.reward for score in scores] == pytest.approx([1.0, 0.9 + 2 * 2 / 5, 0.1 + 2 * 3 / 5], abs=1e-15)
    assert scores[0].reward >= 1.0, "0.9 + 0.1 is 1"
    assert [score.verdict for score in scores] == ["correct", "correct", "correct"]
    assert scores[0].parts == {"math-verify": 1.0, "mine.py:short": 1.0, "mine.py:target": None}
    assert scores[2].parts == {"math-verify": 0.0, "mine.py:short": 1.0, "mine.py:target": 0.6}


def test_what_is_not_correct_keeps_the_verdict_of_math_verify(mine):
    with read(mine, "math-verify", "short", weights=[1.0, 0.5]).grader() as grader:
        scores = ask(grader, "\\boxed{8}", "It is 7.", "\\boxed{7}").result()
    assert [score.verdict for score in scores] == ["wrong", "no_answer", "correct"]
    assert [score.reward for score in scores] == [0.5, 0.5, 1.5]


def test_what_is_not_worked_out_is_rewarded_only_where_that_is_accepted(mine):
    for weights in ([], [1.0]):
        names = ["math-verify", f"{mine}:short"][: 2 - bool(weights)]
        for accepts, verdict in ((False, "unevaluated"), (True, "correct")):
            options = RewardOptions(reward=names, reward_weight=weights, accept_unevaluated=accepts)
            with rewards.read(options).grader() as grader:
                [score] = ask(grader, "So it is \\boxed{3+4}").result()
            assert score.verdict == verdict


FAULTS = {
    "raise": ("error", "it raised ValueError: no way (line 16)"),
    "exit": ("error", "it raised SystemExit: 3 (line 18)"),
    "die": ("error", "its process ended with exit code 3"),
    "hang": ("timeout", "it took more than 0.2 s of CPU time (line 2"),
    "sleep": ("timeout", "it gave no reply in 0.3 s"),
    "swell": ("error", "it ran out of memory (line 27)"),
    "few": ("error", "it returned 1 values for 2 completions"),
    "nan": ("error", "it returned nan as a reward"),
    "text": ("error", "it returned str '1' as a reward"),
    "nothing": ("error", "it returned None, not a list of 2 numbers"),
}


@pytest.mark.slow
def test_whatever_a_function_does_costs_its_group_alone_and_is_told_once_with_counts(mine, monkeypatch, capsys):
    monkeypatch.setattr(rewards, "WORKER", "tests.hasty_worker")
    with OwnGrader(read(mine, "unruly"), workers=2) as grader:
        orders = [order for order in FAULTS if order != "sleep"] + ["fine", "raise"]
        groups = [ask(grader, order, "") for order in orders]
        monkeypatch.setattr(rewards, "SLACK_S", 0.3 - 8)  # of wall time there is 0.3 s for a group of two
        groups.append(ask(grader, "sleep", ""))
        by_order = {order: group.result() for order, group in zip([*orders, "sleep"], groups, strict=True)}
        assert [score.reward for score in by_order.pop("fine")] == [1.0, 0.0]
    for order, scores in by_order.items():
        verdict, fault = FAULTS[order]
        assert [(score.verdict, score.reward, score.applies) for score in scores] == [(verdict, 0.0, False)] * 2
        assert fault in scores[0].fault
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == len(FAULTS) + 1
    assert "the rewards failed on 11 of 12 groups: 2 x mine.py:unruly: it raised ValueError: no way" in printed[-1]


def test_a_file_that_changes_while_a_run_goes_on_rewards_nothing(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def one(completions, **_):\n    return [1.0] * len(completions)\n")
    one = read(path, "one")
    path.write_text("def one(completions, **_):\n    return [2.0] * len(completions)\n")
    with OwnGrader(one) as grader:
        assert "the file has changed since the run began" in ask(grader, "a").result()[0].fault
        with pytest.raises(InputError, match=r"failed on all 1 groups: --reward mine\.py:one: the file has changed"):
            grader.refuse_failed()
    changed = read(path, "one")
    assert len({changed.digest, one.digest, read(path, "one", weights=[2.0]).digest}) == 3
    assert changed.resolved["reward"] == ["mine.py:one"]


def test_closing_waits_for_no_reward(mine):
    with OwnGrader(read(mine, "unruly"), workers=1) as grader:
        groups = [ask(grader, "hang", ""), ask(grader, "fine", "")]
    for group in groups:
        with pytest.raises(RuntimeError, match="closed"):
            group.result()


def tokenizer(texts, add_special_tokens):
    return {"input_ids": [list(text.encode()) for text in texts]}


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        ("missing", "there is no function missing in it, only short, target, unruly, always,"),
        ("number", "there is no function number in it"),
        ("later", "later is a coroutine"),
        (
            "bare",
            "got an unexpected keyword argument 'prompts': it is called with prompts, completions, completion_ids, ",
        ),
        ("hungry", "missing a required argument: 'prize': it is called with"),
        ("always", "it raised KeyError: 'always' (line 31)"),
    ],
)
def test_a_function_that_can_not_be_called_is_refused_before_anything_starts(mine, function, fault):
    prompts = [Prompt(problem, "3+4=", [3]) for problem in (PROBLEM | {"prize": 1}, PROBLEM)]
    with pytest.raises(InputError) as refused:
        rewards.check(read(mine, function), prompts, tokenizer)
    assert str(refused.value).startswith(f"--reward {mine}:{function}: {fault}")


def test_a_file_that_is_no_python_is_refused_before_anything_starts(tmp_path):
    for text, fault in (("def f(: pass", "it raised SyntaxError"), ("import sys; sys.exit()", "it raised SystemExit")):
        (tmp_path / "mine.py").write_text(text)
        with pytest.raises(InputError, match=f"--reward {tmp_path}/mine.py:f: {fault}"):
            rewards.check(read(tmp_path / "mine.py", "f"), [Prompt(PROBLEM, "3+4=", [3])], tokenizer)


def test_what_fails_on_some_completions_is_told_and_goes_on(mine, capsys):
    prompts = [Prompt(PROBLEM, "3+4=", [3])]
    rewards.check(read(mine, "math-verify", "on_empty", "target"), prompts, tokenizer)
    assert capsys.readouterr().err.count("mine.py:on_empty: it raised ZeroDivisionError") == 1


@pytest.mark.parametrize(
    ("given", "weights", "fault"),
    [
        (["mine.txt:short"], [], "--reward mine.txt:short: expected math-verify, or FILE.py:function"),
        (["mine.py"], [], "--reward mine.py: expected math-verify, or FILE.py:function"),
        (["mine.py:a b"], [], "expected math-verify, or FILE.py:function"),
        (["gone.py:short"], [], "--reward gone.py:short: there is no file gone.py"),
        (["math-verify", "math-verify"], [], "--reward math-verify is given 2 times"),
        (["math-verify"], [1.0, 2.0], "--reward-weight is given 2 times, for 1 --reward"),
        (["math-verify"], [float("nan")], "--reward-weight nan: must be a finite number"),
    ],
)
def test_rewards_that_are_not_there_or_do_not_match_their_weights_are_refused(given, weights, fault):
    with pytest.raises(InputError, match=fault):
        rewards.read(RewardOptions(reward=given, reward_weight=weights))


def test_math_verify_alone_is_what_it_is_without_the_option():
    named = rewards.read(RewardOptions(reward=["math-verify"], reward_weight=[1.0]))
    assert named.resolved == rewards.read(RewardOptions()).resolved
    assert not named.are_own
    assert read("", "math-verify", weights=[2.0]).are_own


def example(name):
    return runpy.run_path(str(EXAMPLES / name))["reward"]


def test_the_example_of_a_format_wants_one_box_after_the_thought():
    texts = ["<think>3 + 4</think> It is \\boxed{7}.", "\\boxed{7}", "<think>3</think> \\boxed{7} or \\boxed{8}"]
    assert example("format.py")(completions=texts, answer=["7"] * 3) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 times 8: \\boxed{8 * 3}", 1.0),
        ("\\boxed{2 * 3 \\times (8 \\div 2) = 24}", 0.0),
        ("\\boxed{8 / (3 - 8 / 3)}", 0.0),
        ("\\boxed{(8 - 2) * 3}", 0.1),
        ("\\boxed{3 \\times 8 = 24}", 1.0),
        ("\\boxed{24}", 0.0),
        ("\\boxed{8 ** 3 ** 2}", 0.0),
        ("\\boxed{__import__('os').abort()}", 0.0),
        ("\\boxed{8 / 0}", 0.0),
        ("\\boxed{" + "(" * 99 + "8" + ")" * 99 + "}", 0.1),
        ("\\boxed{" + "-" * 150 + "8}", 0.0),
        ("24", 0.0),
    ],
)
def test_the_example_of_countdown_counts_without_running_what_was_written(text, expected):
    assert example("countdown.py")(completions=[text], numbers=[[2, 3, 8]], target=[24]) == [expected]


def test_the_example_of_a_csv_file_matches_its_answers_and_the_others(tmp_path):
    out = tmp_path / "capitals.jsonl"
    columns = {"problem_column": "question", "answer_column": "capital", "keep_column": ["also"]}
    prepare.run(prepare.Options(source=str(EXAMPLES / "capitals.csv"), out=str(out), **columns))
    problems = {problem["problem"].split()[-1]: problem for problem in records.read_problems(out)}
    assert len(problems) == 5
    for country, text, expected in (
        ("Colombia?", "It lies high.\n\n Bogota. \n", 1.0),
        ("Colombia?", "santa fe de bogotá", 1.0),
        ("Netherlands?", "Amsterdam", 1.0),
        ("Netherlands?", "", 0.0),
        ("Japan?", "Kyoto", 0.0),
    ):
        columns = {name: [value] for name, value in problems[country].items()}
        assert example("csv_match.py")(prompts=[""], completions=[text], completion_ids=[[]], **columns) == [expected]


def test_a_reward_sees_what_it_needs_of_the_environment_and_no_secret():
    given = {"PATH": "/bin", "LC_ALL": "C", "HF_TOKEN": "secret", "OPENAI_API_KEY": "secret", "RLOOP_JUDGE": "url"}
    assert needed(given) == {"PATH": "/bin", "LC_ALL": "C", "RLOOP_JUDGE": "url"}
