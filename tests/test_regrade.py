"""regrade: stored rollouts graded once more, with an engine that answers by rule behind them."""

import orjson
import pytest

from stages import regrade
from stages.core import jsonl, records
from stages.core.errors import InputError
from stages.core.records import Rollout
from stages.regrade import Options
from tests.scripted import problem


def read(out):
    return list(records.read(out / "rollouts.jsonl", Rollout))


def load(path):
    return orjson.loads(path.read_bytes())


def test_a_selection_by_no_metric_is_refused_when_grading_again(run, engines, tiny_policy, problems, tmp_path):
    run([tiny_policy], problems, tmp_path / "out")
    with pytest.raises(InputError, match="--select pass@2 is none of the metrics: avg@4, pass@1, pass@4"):
        regrade.run(Options(rollouts=tmp_path / "out", out=tmp_path / "again", select="pass@2"))
    assert not (tmp_path / "again").exists()


def test_grading_again_without_a_change_gives_the_same_files(run, engines, tiny_policy, problems, tmp_path, capsys):
    run([tiny_policy], problems, tmp_path / "out")
    regrade.run(Options(rollouts=tmp_path / "out", out=tmp_path / "again"))
    assert "no verdict changed" in capsys.readouterr().out
    for name in ("rollouts.jsonl", "results.jsonl", "metrics.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert len(engines) == 1


def test_grading_again_shows_which_verdicts_and_metrics_changed(run, engines, tiny_policy, problems, tmp_path, capsys):
    run([tiny_policy], problems, tmp_path / "out")
    honest = read(tmp_path / "out")
    wrong = [r for r in honest if r["verdict"] == "wrong"][:3]
    old = [r | {"verdict": "correct", "reward": 1.0} if r in wrong else r for r in honest]
    jsonl.write(tmp_path / "out/rollouts.jsonl", old)
    capsys.readouterr()
    regrade.run(Options(rollouts=tmp_path / "out", out=tmp_path / "again"))
    assert read(tmp_path / "again") == honest and read(tmp_path / "out") == old
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [str(tiny_policy), "correct", "->", "wrong", "3"] in shown
    averages = [100 * sum(r["reward"] for r in rollouts) / len(honest) for rollouts in (old, honest)]
    [moved] = [line for line in shown if line[:2] == [str(tiny_policy), "avg@4"]]
    assert [float(moved[2]), float(moved[5])] == pytest.approx(averages, abs=0.06)


def test_bare_answers_count_only_where_they_are_asked_for(run, engines, tiny_policy, problems, tmp_path):
    run([tiny_policy], problems, tmp_path / "out")
    regrade.run(Options(rollouts=tmp_path / "out", out=tmp_path / "bare", bare=True))
    strict, bare = (load(tmp_path / name / "metrics.json")["policies"][str(tiny_policy)] for name in ("out", "bare"))
    assert strict["no_answer"]["value"] > 0.1 > bare["no_answer"]["value"]
    assert bare["avg@4"]["value"] > strict["avg@4"]["value"]
    assert [load(tmp_path / name / "manifest.json")["parameters"]["bare"] for name in ("out", "bare")] == [False, True]


def test_sets_are_graded_again_side_by_side_and_a_file_alone(run, engines, tiny_policy, problems, tmp_path):
    jsonl.write(tmp_path / "more.jsonl", (problem(number) for number in range(3, 7)))
    run([tiny_policy], [problems, tmp_path / "more.jsonl"], tmp_path / "out", select="pass@4")
    regrade.run(Options(rollouts=tmp_path / "out", out=tmp_path / "again", select="pass@4"))
    overviews = [load(tmp_path / name / "metrics.json") for name in ("out", "again")]
    assert overviews[0] == overviews[1] and list(overviews[1]["sets"]) == ["sums", "more"], "the first set selects"
    regrade.run(Options(rollouts=tmp_path / "out/more/rollouts.jsonl", out=tmp_path / "one"))
    for again, first in (("again/sums", "sums"), ("again/more", "more"), ("one", "more")):
        assert read(tmp_path / again) == read(tmp_path / "out" / first)
    with pytest.raises(InputError, match=r"holds no rollouts\.jsonl"):
        regrade.run(Options(rollouts=tiny_policy, out=tmp_path / "two"))


def test_of_several_answers_any_is_right_when_drawn_and_when_graded_again(run, tiny_policy, tmp_path):
    both = [problem(n) | {"answer": "x", "other_answers": [problem(n)["answer"]]} for n in range(12)]
    jsonl.write(tmp_path / "both.jsonl", both)
    jsonl.write(tmp_path / "one.jsonl", [problem(n) | {"other_answers": None} for n in range(12)])
    for name in ("both", "one"):
        run([tiny_policy], tmp_path / f"{name}.jsonl", tmp_path / name)
    regrade.run(Options(rollouts=tmp_path / "both", out=tmp_path / "again"))
    drawn, again, one = (read(tmp_path / name) for name in ("both", "again", "one"))
    assert [r["reward"] for r in drawn] == [r["reward"] for r in again] == [r["reward"] for r in one]
    assert {0.0, 1.0} == {r["reward"] for r in one}
    jsonl.write(tmp_path / "wrong.jsonl", [problem(0) | {"other_answers": "8"}])
    with pytest.raises(InputError, match=r"wrong\.jsonl:1: field 'other_answers' of Problem must be a list of texts"):
        run([tiny_policy], tmp_path / "wrong.jsonl", tmp_path / "wrong")


def test_what_is_not_worked_out_counts_only_where_that_is_accepted(tmp_path):
    whole = {"sample": 0, "step": 0, "policy": "p", "prompt": "What is 3+4?", "answer": "7", "num_tokens": 9}
    texts = {"p0": "\\boxed{7}", "p1": "\\boxed{3+4}"}
    rows = [whole | {"problem_id": name, "completion": text} for name, text in texts.items()]
    jsonl.write(
        tmp_path / "drawn.jsonl", (row | {"reward": 1.0, "verdict": "correct", "finish_reason": "stop"} for row in rows)
    )
    for accepts, verdicts in ((False, ["correct", "unevaluated"]), (True, ["correct", "correct"])):
        out = tmp_path / str(accepts)
        regrade.run(Options(rollouts=tmp_path / "drawn.jsonl", out=out, accept_unevaluated=accepts))
        assert [row["verdict"] for row in read(out)] == verdicts
        assert [row["reward"] for row in read(out)] == [1.0 if verdict == "correct" else 0.0 for verdict in verdicts]
