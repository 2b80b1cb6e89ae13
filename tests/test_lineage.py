"""The lineage of the base: what an earlier setting has left behind is in no table, and what would need it is named."""

import json
import os
import shutil
from pathlib import Path

import pytest

from stages import analyze, regrade, report, sample
from stages import filter as filtering
from stages.core import jsonl, outputs, provenance
from stages.core.errors import InputError
from stages.core.study import lineage, runs
from tests.made_up import HOW, Runs
from tests.scripted import ScriptedEngines

pytestmark = pytest.mark.slow  # each writes reports, with their figures


@pytest.fixture(scope="module")
def whole(tiny_policy, tmp_path_factory):
    """Two iterations and the baseline, once."""
    path = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        Runs(tiny_policy).all()
    return path


@pytest.fixture
def graph(whole, tiny_policy, tmp_path, monkeypatch):
    """A copy of them to change, in the working directory."""
    shutil.copytree(whole / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return Runs(tiny_policy)


def table(capsys, **options):
    """Method -> the policy that stands for it in the table, and the lines on what was left out."""
    capsys.readouterr()
    report.run(report.Options(**{"ks": [2], "tsv": True} | options))
    told = capsys.readouterr()
    rows = [line.split("\t")[1:3] for line in told.out.splitlines()[1:]]
    lines = [line.removeprefix("rloop: left out: ") for line in told.err.splitlines() if "left out: " in line]
    return {method: policy for method, policy in rows if not method.endswith(", chosen")}, lines


WHOLE = {
    "Base": "runs/0/policy",
    "RL": "runs/vanilla/rl/checkpoints/step_000004",
    "RLoop": "runs/2/policy",
    "RLoop, last RL endpoint": "runs/2/rl/checkpoints/step_000002",
}
FIRST = WHOLE | {"RLoop": "runs/1/policy", "RLoop, last RL endpoint": "runs/1/rl/checkpoints/step_000002"}
OTHER = "than the one that is there now"


def test_of_a_graph_that_is_up_to_date_nothing_is_left_out(graph, capsys):
    assert table(capsys) == (WHOLE, [])


def test_an_iteration_that_was_taken_out_is_in_no_table_figure_or_sum(graph, capsys):
    gone = "iteration 2: not among the iterations that count (1)"
    only = {"ks": [2], "iterations": "--1.start runs/0/policy"}
    assert table(capsys, **only) == (FIRST, [gone])
    analyze.run(analyze.Options(evals=[Path("runs/eval")], out=Path("runs/analysis"), iterations="1"))
    assert json.loads(Path("runs/analysis/learning_RLoop.json").read_text())["labels"] == ["0", "2", "2+rft"]
    report.run(report.Options(**only))
    assert f"Left out: {gone}." in Path("runs/results.md").read_text()
    for name in ("curves.tsv", "results.tsv", "figures/training_pass_rate.tsv"):
        assert "runs/2" not in Path("runs", name).read_text()
    assert "RLoop 1: RL" in (page := Path("runs/report.html").read_text()) and "RLoop 2: RL" not in page


def test_the_way_on_from_an_iteration_that_was_made_anew_is_left_out(graph, capsys):
    graph.rft("1", "runs/0/policy")
    graph.evaluate("1", "runs/1/rl/checkpoints", "runs/1/policy")
    chosen, lines = table(capsys)
    assert chosen == FIRST
    assert lines == [
        f"runs/2/rl: made from another runs/1/policy {OTHER}",
        f"runs/2/policy: made from another runs/1/policy {OTHER}",
    ]


def test_of_a_new_base_what_was_made_from_the_old_one_is_left_out(graph, capsys):
    graph.checkpoint("runs/0/policy")
    graph.evaluate("0", "runs/0/policy")
    graph.rl("1", "runs/0/policy")
    graph.evaluate("1", "runs/1/rl/checkpoints")
    chosen, lines = table(capsys)
    assert chosen == {"Base": FIRST["Base"], "RLoop, last RL endpoint": FIRST["RLoop, last RL endpoint"]}
    other = f"made from another runs/0/policy {OTHER}"
    assert lines == [
        f"runs/1/policy: {other}",
        "runs/2/rl: made from runs/1/policy, which is left out",
        "runs/2/policy: made from runs/1/policy, which is left out",
        f"runs/vanilla/rl: {other}",
    ]


def test_a_baseline_from_another_base_or_from_other_problems_is_left_out(graph, capsys):
    graph.checkpoint("other/policy")
    graph.rl("vanilla", "other/policy", 4)
    graph.evaluate("vanilla", "runs/vanilla/rl/checkpoints")
    chosen, lines = table(capsys)
    assert "RL" not in chosen and chosen["RLoop"] == WHOLE["RLoop"]
    assert lines == [f"runs/vanilla/rl: made from another runs/0/policy {OTHER}"]
    graph.rl("vanilla", "runs/0/policy", 4)
    with Path("runs/0/train.jsonl").open("a") as file:
        file.write('{"id": "more", "problem": "1+1=?", "answer": "2", "source": "train"}\n')
    assert f"runs/vanilla/rl: made from another runs/0/train.jsonl {OTHER}" in table(capsys)[1]


def test_the_evaluation_of_a_checkpoint_that_was_trained_anew_is_left_out(graph, capsys):
    graph.rl("vanilla", "runs/0/policy", 4)
    chosen, lines = table(capsys)
    assert "RL" not in chosen
    assert lines == [f"runs/eval/vanilla: evaluated another {WHOLE['RL']} {OTHER}"]
    graph.evaluate("again", "runs/vanilla/rl/checkpoints")
    assert table(capsys) == (WHOLE, lines), "the stale one does not hide the new one"


def test_a_checkpoint_beyond_the_end_of_its_run_is_left_out(graph, capsys):
    graph.rl("vanilla", "runs/0/policy", 3)
    assert table(capsys)[1] == [f"{WHOLE['RL']}: its run has 3 steps now"]


def test_evaluations_on_another_version_of_the_problems_are_left_out(graph, capsys):
    rows = [{"id": "valid/1", "problem": "1+2=?", "answer": "4", "source": "valid"}]
    jsonl.write(Path("mine/valid.jsonl"), rows)
    graph.evaluate("vanilla", "runs/vanilla/rl/checkpoints", problems="mine/valid.jsonl")
    chosen, lines = table(capsys)
    assert "RL" not in chosen
    assert lines == ["runs/eval/vanilla: has other problems of valid than those of now"]
    Path("runs/0/valid.jsonl").unlink()
    assert table(capsys) == (chosen, lines), "where the problems are gone, those that the base was evaluated on count"


def test_a_policy_from_examples_or_rollouts_of_before_is_left_out(graph, capsys):
    graph.rollouts("2", 1)
    made_from = "runs/2/policy: made from runs/2/examples.jsonl, which is left out"
    lines = [f"runs/2/examples.jsonl: made from another runs/2/rl/rollouts {OTHER}", made_from]
    chosen, told = table(capsys)
    assert told == lines and chosen == WHOLE | {"RLoop": "runs/1/policy"}
    graph.examples("2")
    assert table(capsys)[1] == [f"runs/2/policy: made from another runs/2/examples.jsonl {OTHER}"]


def test_examples_from_rollouts_that_sample_drew_from_a_policy_of_before_are_left_out(graph, capsys):
    drawn, examples = Path("runs/2/drawn.jsonl"), Path("runs/2/examples.jsonl")
    train = Path("runs/0/train.jsonl")
    sample.draw(
        sample.Options(policy=[WHOLE["RL"]], problems=train, out=drawn, num_samples=64, **HOW), ScriptedEngines()
    )
    examples.unlink()
    filtering.run(filtering.Options(rollouts=[str(drawn)], out=str(examples), max_pass_rate=1.0))
    graph.rft("2", "runs/1/policy")
    graph.evaluate("2", "runs/2/rl/checkpoints", "runs/2/policy")
    assert table(capsys) == (WHOLE, [])
    graph.rl("vanilla", "runs/0/policy", 4)
    graph.evaluate("vanilla", "runs/vanilla/rl/checkpoints")
    chosen, lines = table(capsys)
    assert chosen == WHOLE | {"RLoop": "runs/1/policy"}
    assert lines == [
        f"runs/2/drawn.jsonl: made from another {WHOLE['RL']} {OTHER}",
        "runs/2/examples.jsonl: made from runs/2/drawn.jsonl, which is left out",
        "runs/2/policy: made from runs/2/examples.jsonl, which is left out",
    ]


def test_a_run_that_is_still_going_on_is_known_by_what_it_began_with(graph, capsys):
    inputs = {"runs/1/policy": provenance.digest("runs/1/rl/checkpoints/step_000002"), "runs/0/train.jsonl": ""}
    outputs.write_json(Path("runs/2/rl/state/run.json"), {"parameters": {}, "inputs": inputs})
    Path("runs/2/rl/manifest.json").unlink()
    assert f"runs/2/rl: made from another runs/1/policy {OTHER}" in table(capsys)[1]


def test_checkpoints_that_were_removed_after_their_evaluation_stay_in_the_results(graph, capsys):
    for path in ("runs/vanilla/rl/checkpoints", "runs/1/rl/checkpoints", "runs/2/policy", "runs/0/policy"):
        shutil.rmtree(path)
    assert table(capsys) == (WHOLE, [])


def test_what_is_gone_falls_with_what_it_was_made_from(graph, capsys):
    shutil.rmtree("runs/2/policy")
    graph.rft("1", "runs/0/policy")
    graph.evaluate("1", "runs/1/rl/checkpoints", "runs/1/policy")
    chosen, lines = table(capsys)
    assert chosen == FIRST and "runs/2/policy: made from runs/2/rl, which is left out" in lines
    for key in ("2", "vanilla"):
        shutil.rmtree(f"runs/{key}")
    chosen, lines = table(capsys)
    assert "RL" not in chosen and lines == ["runs/2: not there any more", "runs/vanilla: not there any more"]


def test_large_checkpoints_are_read_again_only_where_names_sizes_or_times_have_changed(graph, capsys):
    file = Path(WHOLE["RL"], "made.txt")
    before = file.stat()
    file.write_text("x" * before.st_size)
    assert "RL" not in table(capsys)[0]
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert table(capsys) == (WHOLE, [])


def test_by_hand_the_base_is_what_the_first_iteration_started_from_whatever_its_path(graph, capsys):
    Path("toy").mkdir()
    Path("runs/0/policy").rename("toy/policy")
    shutil.rmtree("runs/eval/0")
    graph.evaluate("0", "toy/policy")
    assert table(capsys) == (WHOLE | {"Base": "toy/policy"}, [])
    analyze.run(analyze.Options(evals=[Path("runs/eval")], out=Path("analysis")))
    assert json.loads(Path("analysis/learning_RL.json").read_text())["policies"][0] == "toy/policy"


def test_an_analysis_of_evaluations_of_before_is_not_shown(graph, capsys):
    analyze.run(analyze.Options(evals=[Path("runs/eval")], out=Path("runs/analysis")))
    report.run(report.Options(ks=[2]))
    assert Path("runs/figures/learning_RL.svg").exists()
    results = Path("runs/eval/vanilla/results.jsonl")
    results.write_text("".join(reversed(results.read_text().splitlines(keepends=True))))
    capsys.readouterr()
    report.run(report.Options(ks=[2]))
    stale = f"runs/analysis: analyzed another runs/eval/vanilla/results.jsonl {OTHER}: analyze again"
    assert stale in capsys.readouterr().err and not Path("runs/figures/learning_RL.svg").exists()


def test_evaluations_without_their_runs_are_taken_as_they_are(graph, tmp_path, monkeypatch, capsys):
    (tmp_path / "away").mkdir()
    Path("runs/eval").rename("away/eval")
    monkeypatch.chdir(tmp_path / "away")
    for options in ({}, {"runs": [Path("nowhere")]}):
        assert table(capsys, evals=[Path("eval")], **options)[0] == WHOLE
    report.run(report.Options(ks=[2], evals=[Path("eval")]))
    assert Path("report.html").exists()


def test_where_nothing_is_left_it_is_said(graph):
    for key in ("1", "2", "vanilla"):
        shutil.rmtree(f"runs/eval/{key}")
    graph.checkpoint("runs/0/policy")
    with pytest.raises(InputError, match="nothing of the evals descends from what is there now: evaluate again"):
        analyze.run(analyze.Options(evals=[Path("runs/eval")], out=Path("analysis")))


def test_unequal_numbers_of_steps_are_named(graph, capsys):
    graph.rl("vanilla", "runs/0/policy", 3)
    report.run(report.Options(ks=[2]))
    unequal = "RL has 3 steps and RLoop 4: to compare them give RL --steps 4"
    assert unequal in capsys.readouterr().err and unequal in Path("runs/results.md").read_text()


def test_evaluations_with_unlike_settings_are_named(graph, capsys):
    file = Path("runs/eval/vanilla/manifest.json")
    file.write_text(file.read_text().replace('"max_tokens": 32', '"max_tokens": 40'))
    table(capsys)
    report.run(report.Options(ks=[2]))
    unlike = (
        "evaluations of valid differ in max_tokens: 32 (runs/eval/0, runs/eval/1, runs/eval/2), 40 (runs/eval/vanilla)"
    )
    assert unlike in capsys.readouterr().err and unlike in Path("runs/results.md").read_text()
    analyze.run(analyze.Options(evals=[Path("runs/eval")], out=Path("analysis")))
    assert unlike in capsys.readouterr().err


def test_grading_again_keeps_what_the_evaluation_was_of(graph):

    regrade.run(regrade.Options(rollouts=Path("runs/eval/1"), out=Path("runs/eval/1b")))
    shutil.rmtree("runs/eval/1")
    graph.rft("1", "runs/0/policy")
    descent = lineage.Lineage(Path("runs"), runs.find_evals(["runs/eval"]))
    assert not descent.keeps(Path("runs/eval/1b"), "runs/1/policy")
    assert descent.keeps(Path("runs/eval/1b"), FIRST["RLoop, last RL endpoint"])


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("all", None),
        ("", set()),
        ("1 2 10", {1, 2, 10}),
        ("--1.start runs/0/policy --2.start 'a b' --2.seed 3", {1, 2}),
    ],
)
def test_iterations_are_named_by_numbers_or_as_a_map_written_out(text, numbers):
    assert lineage.chosen(text) == numbers
    with pytest.raises(InputError, match="name the numbers of iterations"):
        lineage.chosen("1 two")


def outcome(directory):
    """Every file below but those that tell the time."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_what_lies_in_the_working_directory_changes_no_byte(graph, tmp_path, monkeypatch):
    shutil.copytree("runs", tmp_path / "misleading/runs")
    shutil.copytree("runs/eval", tmp_path / "elsewhere/eval")
    for key in ("1", "2"):
        log = tmp_path / f"misleading/runs/{key}/rl/log.tsv"
        log.write_text(log.read_text() + "3\t0.5\n4\t0.5\n5\t0.5\n")
        (log.parent / "manifest.json").unlink()
    (tmp_path / "empty").mkdir()
    outcomes = []
    for here in ("empty", "misleading"):
        monkeypatch.chdir(tmp_path / here)
        for name in ("runs/eval", "elsewhere/eval"):
            out, evals = tmp_path / f"of_{here}" / name.split("/")[0], [tmp_path / name]
            analyze.run(analyze.Options(evals=evals, out=out / "analysis"))
            named = {"runs": [tmp_path / "runs"]} if name == "runs/eval" else {"evals": evals}
            report.run(report.Options(ks=[2], out=out / "page.html", **named))
        outcomes.append(outcome(tmp_path / f"of_{here}"))
        shutil.rmtree(tmp_path / f"of_{here}")
    assert outcomes[0] == outcomes[1] and len(outcomes[0]) > 40
    assert b"4+start" in outcomes[0]["elsewhere/analysis/learning_RLoop.json"]
