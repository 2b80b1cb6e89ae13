"""The verifier as its callers see it: scores in order, workers that come, fail and go."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.core.grading.scores import Score
from stages.core.grading.verifier import Verifier, comparison
from stages.core.grading.verifier import verdicts as module

ROOT = Path(__file__).parents[1]
HARD = ("So it is \\boxed{\\sqrt{7+4\\sqrt{3}}}.", "2+\\sqrt{3}")
HARD_WRONG = ("So it is \\boxed{\\sqrt{7+4\\sqrt{5}}}.", "2+\\sqrt{3}")
LONG = ("So it is \\boxed{\\sum_{n=1}^{\\infty}\\sin n}.", "2")


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(workers=1) as shared:
        yield shared


def test_integers_words_and_fractions_start_no_worker() -> None:
    with Verifier() as verifier:
        pairs = [("\\boxed{7}", "7"), ("\\boxed{\\frac{2}{4}}", "0.5"), ("Answer: east", "East"), ("none", "7")]
        verdicts = [score.verdict for score in verifier.verify(pairs)]
        assert verdicts == ["correct", "correct", "correct", "no_answer"]
        assert verifier.worker_pids == []


@pytest.mark.slow
def test_scores_come_in_the_order_of_the_pairs(verifier: Verifier) -> None:
    pairs = [HARD, ("\\boxed{3}", "3"), HARD_WRONG, ("nothing", "3"), HARD, ("\\boxed{4}", "3")]
    assert [score.reward for score in verifier.verify(pairs)] == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]


def test_a_score_tells_verdict_reward_and_prediction(verifier: Verifier) -> None:
    assert verifier.verify([("It is \\boxed{ x+1 }", "1+x")]) == [Score("correct", 1.0, "x+1")]
    assert verifier.verify([("It is 3", "3")]) == [Score("no_answer", 0.0, None)]


def test_batches_may_be_collected_in_any_order(verifier: Verifier) -> None:
    first = verifier.submit([(f"\\boxed{{x+{n}\\sqrt{{2}}}}", "x+\\sqrt{2}") for n in range(3)])
    second = verifier.submit([HARD])
    assert [score.reward for score in second.result()] == [1.0]
    assert [score.reward for score in first.result()] == [0.0, 1.0, 0.0]


@pytest.mark.slow
def test_number_of_workers_and_order_of_pairs_change_no_verdict(verifier: Verifier) -> None:
    pairs = [(f"\\boxed{{{n}\\pi+\\sqrt{{{m}}}}}", "2\\pi+\\sqrt{12}") for n in (1, 2) for m in (3, 12)]
    pairs += [("\\boxed{2\\sqrt{3}+2\\pi}", "2\\pi+\\sqrt{12}"), HARD, HARD_WRONG]
    one = verifier.verify(pairs)
    with Verifier(workers=2) as other:
        assert other.verify(pairs[::-1])[::-1] == one


def test_closing_waits_for_no_score() -> None:
    with Verifier(workers=3) as verifier:
        batch = verifier.submit([(f"\\boxed{{x+{n}\\sqrt{{2}}}}", f"x+\\sqrt{{{n}}}") for n in range(9)])
    with pytest.raises(RuntimeError, match="closed"):
        batch.result()


def test_counts_hold_every_verdict_handed_out() -> None:
    with Verifier() as verifier:
        verifier.verify([("\\boxed{1}", "1"), ("\\boxed{1}", "2"), ("1", "1"), ("\\boxed{" + "1" * 5000 + "}", "1")])
        assert verifier.counts == {"correct": 1, "wrong": 1, "no_answer": 1, "rejected": 1}


def test_answers_that_nothing_can_equal_are_found_and_never_rewarded(verifier: Verifier) -> None:
    golds = ["7", "\\frac{\\sqrt{2}}{2}", "\\frac{1}{", "x+*+", "\\foo{}", "", "east", "y=x^2", "(1,2]", "\\sqrt{}"]
    readable = verifier.parseable(golds)
    assert readable == [True, True, False, False, False, False, True, True, True, False]
    scores = verifier.verify([(f"\\boxed{{{gold}}}", gold) for gold in golds])
    assert [score.reward == 1.0 for score in scores] == readable


def test_a_bare_expression_counts_only_on_demand() -> None:
    text = "We add them and get $x = 42$."
    with Verifier() as strict, Verifier(bare=True) as lenient:
        assert strict.verify([(text, "42")])[0].verdict == "no_answer"
        assert lenient.verify([(text, "42"), ("I have no answer to question 42", "42")])[0].verdict == "correct"


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_closing_ends_its_heir() -> None:
    with Verifier(workers=1) as verifier:
        verifier.verify([HARD])
        [pid] = verifier.worker_pids
        batch = verifier.submit([(f"\\boxed{{\\sin({n}x)\\sqrt{{{n}+y}}}}", "\\sin(3x)\\sqrt{3+y}") for n in range(12)])
        os.kill(pid, signal.SIGKILL)
        assert [score.verdict for score in batch.result()] == ["correct" if n == 3 else "wrong" for n in range(12)]
        [other] = verifier.worker_pids
        assert other != pid
    assert _gone(other)
    with pytest.raises(RuntimeError, match="closed"):
        verifier.verify([("\\boxed{1}", "1")])


@pytest.mark.slow
def test_hanging_swelling_and_crashing_cost_one_verdict_each_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORKER", "tests.unruly_worker")
    predictions = ["1+x", "h+x", "x+2", "c+x", "s+x", "2+x"]
    with Verifier(workers=1) as verifier:
        verdicts = [score.verdict for score in verifier.verify([(f"\\boxed{{{text}}}", "x+2") for text in predictions])]
    assert verdicts == ["wrong", "timeout", "correct", "error", "error", "correct"]


@pytest.mark.parametrize(
    ("cores", "ranks", "workers"),
    [(16, None, 8), (4, None, 3), (1, None, 1), (16, "4", 3), (64, "2", 8), (8, "8", 1), (2, "4", 1), (96, "8", 8)],
)
def test_the_ranks_of_a_node_share_its_cores(
    cores: int, ranks: str | None, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    with Verifier() as verifier:
        assert verifier.workers == workers
    with Verifier(workers=5) as verifier:
        assert verifier.workers == 5


def test_what_the_caller_cannot_read_is_left_to_the_worker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, verifier: Verifier
) -> None:
    def fail(*_: object) -> bool:
        raise KeyError(1)

    monkeypatch.setattr(comparison, "verdict", fail)
    verdicts = [score.verdict for score in verifier.verify([("\\boxed{7.25}", "7.25"), ("\\boxed{7.5}", "7.25")])]
    assert verdicts == ["correct", "wrong"]
    assert "could not be read" in caplog.text


def test_the_memo_is_bounded_by_bytes_and_holds_no_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MEMO_BYTES", 100_000)
    with Verifier(workers=1) as verifier:
        for start in range(0, 4000, 100):
            verifier.verify([(f"\\boxed{{{n}}}", "7") for n in range(start, start + 100)])
            assert sum(sys.getsizeof(text) for _, text in verifier._memo) < 100_000
        verifier.verify([("\\boxed{" + "1" * 70_000 + str(n) + "}", "7") for n in range(20)])
        assert max(len(text) for _, text in verifier._memo) < 1000
        assert verifier.verify([("\\boxed{7}", "7")])[0].verdict == "correct"


@pytest.mark.parametrize(
    ("limit", "cause"),
    [("RLIMIT_AS, (48 << 20,) * 2", "."), ("RLIMIT_NOFILE, (6, 6)", "open files")],
)
def test_a_worker_that_cannot_start_is_one_line_with_the_remedy(limit: str, cause: str) -> None:
    code = f"""
import resource
from stages.core.errors import InputError
from stages.core.grading.verifier import Verifier
import tempfile, subprocess, encodings.idna
resource.setrlimit(resource.{limit})
with Verifier(workers=1) as verifier:
    try:
        verifier.verify([{HARD!r}])
    except InputError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    [line] = done.stdout.splitlines()
    assert re.match(
        f"a worker of the verifier could not start: .*(?:{cause}).*; free memory, or raise the limits", line
    )
    assert done.stderr == ""


def test_recursion_without_end_is_an_error() -> None:
    code = """
from stages.core.grading.bounds import Bounds
from stages.core.grading.verifier.algebra import _failed
def deeper(): return deeper()
print(Bounds()(deeper, _failed))
"""
    assert _python(code).split() == ["error"]


def test_neither_side_imports_torch_and_the_caller_no_sympy() -> None:
    code = "import sys, stages.core.grading.{0}; print(*({1!r} & set(sys.modules)))"
    assert _python(code.format("verifier", {"torch", "sympy", "numpy", "math_verify", "transformers"})).split() == []
    assert _python(code.format("verifier.algebra", {"torch", "transformers", "vllm"})).split() == []


@pytest.mark.slow
def test_workers_die_with_a_parent_that_is_killed_and_need_no_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "caller.py"  # no `if __name__ == "__main__"`: starting a worker must not run it again
    script.write_text(
        "import time\nfrom stages.core.grading.verifier import Verifier\nverifier = Verifier(workers=1)\n"
        f"verifier.verify([{HARD!r}])\nprint(*verifier.worker_pids, flush=True)\n"
        f"verifier.submit([{LONG!r}])\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    [pid] = map(int, parent.stdout.readline().split())
    parent.kill()
    parent.communicate()
    assert _gone(pid)


def test_versions_of_everything_that_decides_a_verdict_are_told() -> None:
    assert set(module.VERSION) == {"grader", "math-verify", "latex2sympy2_extended", "sympy", "antlr4-python3-runtime"}


def _gone(pid: int) -> bool:
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout


def test_of_several_answers_the_best_verdict_counts():
    pairs = [("\\boxed{3}", ["2", "3"]), ("\\boxed{1+2}", ["2", "3"]), ("\\boxed{4}", ["2", "3"]), ("4", ["2", "3"]),
             ("\\boxed{2, 3}", ["2", "3"]), ("\\boxed{x+x}", ["y", "2x"])]  # fmt: skip
    with Verifier() as verifier:
        assert [score.verdict for score in verifier.verify(pairs)] == [
            "correct", "unevaluated", "wrong", "no_answer", "wrong", "correct"]  # fmt: skip
