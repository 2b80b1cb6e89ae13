"""The report of a small synthetic directory of runs: its numbers, its files, and its page clicked through."""

import csv
import html
import html.parser
import json
import re
import shutil
import subprocess
import urllib.request
import xml.etree.ElementTree
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stages import report
from stages.core import jsonl, outputs, tabular
from stages.core.errors import InputError
from stages.core.study import figures, runs
from stages.report import browser, curves, page, study, summaries
from stages.report import seeds as report_seeds

HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"> 1 + 1 = \\boxed{2}"
VANILLA = [f"vanilla/rl/checkpoints/step_{step:06d}" for step in (2, 4)]
RLOOP = ["1/rl/checkpoints/step_000002", "1/policy", "2/rl/checkpoints/step_000002", "2/policy"]
# policy -> set -> number of correct samples, of 4, on each of three problems
COUNTS = {
    "0/policy": {"valid": [1, 0, 2], "far": [1, 1, 0]},
    RLOOP[0]: {"valid": [2, 1, 2], "far": [1, 1, 1]},
    RLOOP[1]: {"valid": [1, 1, 2], "far": [2, 1, 1]},
    RLOOP[2]: {"valid": [3, 1, 3], "far": [2, 2, 1]},
    RLOOP[3]: {"valid": [3, 2, 3], "far": [3, 2, 2]},
    VANILLA[0]: {"valid": [3, 0, 4], "far": [1, 0, 0]},
    VANILLA[1]: {"valid": [4, 0, 4], "far": [0, 0, 0]},
}


CHOSEN = {"Base": "runs/0/policy", "RL": f"runs/{VANILLA[1]}", "RLoop": f"runs/{RLOOP[3]}"}


def write_eval(root: Path, problem_set: str, group: str, policies: list[str]) -> None:
    rollouts, results = [], []
    for policy in policies:
        for number, num_correct in enumerate(COUNTS[policy][problem_set]):
            problem = {"problem_id": f"{problem_set}/{number}", "policy": f"runs/{policy}"}
            results.append(problem | {"num_samples": 4, "num_correct": num_correct, "num_truncated": 0})
            for sample in range(4):
                right = sample < num_correct
                drawn = {"sample": sample, "step": 0, "prompt": f"What is {number} + 1?", "answer": str(number + 1)}
                drawn |= {"completion": HOSTILE if right else f"sample {sample} of {policy}", "reward": float(right)}
                drawn |= {"verdict": "correct" if right else "wrong", "num_tokens": 5, "finish_reason": "stop"}
                rollouts.append(problem | drawn)
    directory = root / "eval" / group / problem_set
    jsonl.write(directory / "rollouts.jsonl", rollouts)
    jsonl.write(directory / "results.jsonl", results)


def write_rl(run: Path, steps: int) -> None:
    run.mkdir(parents=True)
    names = ["step", "reward", "pass_rate", "entropy", "grad_norm", "num_rollouts", "rollout_tokens", "update_tokens"]
    names += ["rewards/mine.py:short", "entropy_drawn"]
    rows = [[step, step / 10, step / 20, 1 / step, 0.5, 8, 100, 80, 0.25, 2 / step] for step in range(1, steps + 1)]
    lines = [
        "\t".join(map(str, line)) for line in [[*names, "seconds", "mismatch"], *([*row, 1.5, ""] for row in rows)]
    ]
    (run / "log.tsv").write_text("\n".join(lines) + "\n")
    manifest = {"stage": "rl", "parameters": {"steps": steps, "lr": 0.1}, "versions": {"torch": "2.13"}}
    (run / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A directory of runs with everything in it, and its report."""
    root = tmp_path_factory.mktemp("report") / "runs"
    for problem_set in ("valid", "far"):
        write_eval(root, problem_set, "base", ["0/policy"])
        write_eval(root, problem_set, "loop", RLOOP)
        write_eval(root, problem_set, "vanilla", VANILLA)
    for iteration in ("1", "2"):
        write_rl(root / iteration / "rl", 2)
        (root / iteration / "policy").mkdir()
        (root / iteration / "policy" / "manifest.json").write_text('{"stage": "rft", "parameters": {"lr": 0.2}}')
        (root / iteration / "policy" / "metrics.json").write_text('{"num_tokens": 40, "seconds": 99}')
        (root / iteration / "policy" / "log.tsv").write_text("step\tseconds\n1\t0.2\n2\t0.3\n")
    write_rl(root / "vanilla" / "rl", 4)
    matrix = {"name": "forgetting", "run": "RL", "number": "2b", "definition": "forgotten", "labels": ["0", "2"]}
    matrix |= {"set": "valid", "policies": ["runs/0/policy", f"runs/{VANILLA[0]}"]}
    steps = [{"run": "RL", "step": step, "within": 0.5, "after_rft": 0} for step in (0, 2)]
    (root / "analysis").mkdir()
    (root / "analysis/forgetting_RL.json").write_text(json.dumps(matrix | {"values": [[0, 0.5], [0, 0]]}))
    rows = [
        {"series": "RL", "x": step, "y": 0.5, "low": 0.4, "high": None, "policy": "runs/0/policy"} for step in (0, 2)
    ]
    curve = {"name": "retention", "set": "valid", "definition": "kept", "x_label": "RL steps", "rows": rows}
    (root / "analysis/retention.json").write_text(json.dumps(curve))
    (root / "analysis/metrics.json").write_text('{"steps": {"mean_learning": 0.5}}')  # a run of this name
    (root / "analysis/similarity_by_step.json").write_text(json.dumps({"steps": steps}))
    make(root)
    return root


def make(root: Path, **options) -> None:
    report.run(report.Options(**{"ks": [2, 4, 8], "runs": [root]} | options))


def studied(root: Path) -> study.Study:
    return study.read(root, [], "valid", "all", needed=True)


def read_tsv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(), delimiter="\t"))


def passed(num_correct: int, k: int) -> float:
    subsets = list(combinations(range(4), k))
    return sum(min(subset) < num_correct for subset in subsets) / len(subsets)


def test_results_table_holds_each_method_on_each_set_and_their_average(made):
    rows = read_tsv(made / "results.tsv")
    methods = ["Base", "RL", "RL, chosen", "RLoop", "RLoop, last RL endpoint", "RLoop, chosen"]
    assert [(row["set"], row["method"]) for row in rows] == [
        (s, m) for s in ("valid", "far", "Average") for m in methods
    ]
    policies = dict(zip(methods, ["0/policy", VANILLA[1], VANILLA[1], RLOOP[3], RLOOP[2], RLOOP[3]], strict=True))
    for row in rows[:12]:
        counts = COUNTS[policies[row["method"]]][row["set"]]
        assert float(row["avg@4"]) == pytest.approx(100 * sum(counts) / 12, abs=0.005)
        assert float(row["pass@2"]) == pytest.approx(100 * sum(passed(c, 2) for c in counts) / 3, abs=0.005)
        assert float(row["avg@4_low"]) <= float(row["avg@4"]) <= float(row["avg@4_high"])
    assert float(rows[12]["pass@4"]) == pytest.approx(200 / 3, abs=0.005)
    for_dvc = json.loads((made / "results.json").read_bytes())
    assert all(for_dvc[row["method"]][row["set"]]["avg@4"] == float(row["avg@4"]) for row in rows)
    small = {path.stem: json.loads(path.read_bytes()) for path in (made / "metrics").iterdir()}
    averages = {re.sub(r"\W+", "_", method): for_dvc[method]["Average"] for method in methods}
    assert small == averages, "for dvc metrics show: the average over the sets, a file a method"


def test_results_markdown_is_the_papers_table_and_says_what_is_left_out(made):
    lines = (made / "results.md").read_text().splitlines()
    assert lines[:4] == [
        "| Set | Method | avg@4 | pass@2 | pass@4 |",
        "|---|---|---:|---:|---:|",
        "| valid (chosen on it) | Base | 25.00 | 44.44 | 66.67 |",
        "|  | RL | **66.67** | 66.67 | 66.67 |",
    ]
    assert "| RLoop | 4+rft | 4+rft | 66.67 | 66.67 | 0.00 |" in lines
    assert lines[-1] == "Left out: pass@8: some problems have 4 samples only."


def test_table_is_printed_and_nothing_written(made, tmp_path, capsys):
    make(made, table=True, out=tmp_path / "page.html")
    assert (made / "results.md").read_text().startswith(capsys.readouterr().out)
    make(
        made,
        tsv=True,
        evals=[made / f"eval/{group}/far" for group in ("base", "loop", "vanilla")],
        out=tmp_path / "page.html",
    )
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines(), delimiter="\t"))
    assert {row["set"] for row in rows} == {"far"} and len(rows) == 4, "without the validation set none is chosen"
    assert not any(tmp_path.iterdir())


def test_policies_on_no_known_way_stand_for_themselves_in_the_table(tmp_path, capsys):
    results = [
        {"problem_id": "a", "policy": name, "num_samples": 4, "num_correct": 1, "num_truncated": 0} for name in "xy"
    ]
    jsonl.write(tmp_path / "math/results.jsonl", results)
    make(tmp_path, evals=[tmp_path / "math"], table=True)
    assert re.findall(r"\| (\w*) \| ([xy]) \|", capsys.readouterr().out) == [("math", "x"), ("", "y")]


def test_curves_place_every_policy_on_its_way(made):
    rows = [row for row in read_tsv(made / "curves.tsv") if (row["set"], row["metric"]) == ("valid", "avg@4")]
    steps = [(row["method"], row["step"], row["after_rft"], float(row["value"])) for row in rows]
    on_rl = [("RL", "0", "0", 25), ("RL", "2", "0", 700 / 12), ("RL", "4", "0", 800 / 12)]
    on_rloop = [("0", "0", 3), ("2", "0", 5), ("2", "1", 4), ("4", "0", 7), ("4", "1", 8)]
    expected = on_rl + [("RLoop", step, after, 100 * count / 12) for step, after, count in on_rloop]
    assert [step[:3] for step in steps] == [step[:3] for step in expected]
    assert [step[3] for step in steps] == pytest.approx([step[3] for step in expected], abs=1e-3)


def test_the_divergence_from_the_base_is_a_curve_in_nats():
    names = ["runs/0/policy", *(f"runs/{policy}" for policy in (VANILLA[1], RLOOP[0], RLOOP[1]))]
    rows = [
        {"set": "valid", "policy": name, "metric": metric, "value": value, "low": value / 2, "high": 2 * value}
        for name, nats in zip(names, (0.0, 3.0, 1.0, 0.5), strict=True)
        for metric, value in (("kl", nats), ("avg@4", 0.25))
    ]
    tidy = curves.tidy(pd.DataFrame(rows), runs.positions(names), {"valid": "0.6"})
    assert tidy.groupby("metric")["value"].max().to_dict() == {"avg@4": 25, "kl": 3}, "the others are in percent"
    [figure] = curves.of_divergence(tidy, [])
    assert (figure.name, figure.title) == ("kl_valid", "KL to the base on valid")
    assert "; samples drawn at temperature 0.6" in figure.caption
    drawn = [(row["series"], row["RL steps"], row["nats a completion"]) for row in figure.data]
    assert drawn == [("RL", 0, 0), ("RL", 4, 3), ("RLoop", 0, 0), ("RLoop", 2, 1), ("RLoop", 2, 0.5)]


def test_global_steps_count_the_whole_iterations_even_if_their_ends_were_not_evaluated(tmp_path):
    write_rl(tmp_path / "runs/1/rl", 30)
    write_rl(tmp_path / "runs/2/rl", 20)
    policies = [f"runs/{name}" for name in ("1/rl/checkpoints/step_000010", "2/rl/checkpoints/step_000010", "3/policy")]
    positions = runs.positions(policies, tmp_path / "runs")
    assert [(position.step, position.label) for position in positions] == [(10, "10"), (40, "40"), (80, "80+start")]


def test_a_merged_policy_is_labelled_as_merged_and_ends_its_iteration_as_a_fine_tuned_one_does(tmp_path):
    for iteration, stage in enumerate(("merge", "rft"), 1):
        write_rl(tmp_path / f"runs/{iteration}/rl", 30)
        outputs.write_json(tmp_path / f"runs/{iteration}/policy/manifest.json", {"stage": stage})
    policies = ["runs/1/rl/checkpoints/step_000030", "runs/1/policy", "runs/2/policy"]
    positions = runs.positions(policies, tmp_path / "runs")
    assert [position.label for position in positions] == ["30", "30+merge", "60+rft"]
    assert [position.ends_iteration for position in positions] == [False, True, True]


def test_steps_are_those_of_the_runs_that_were_named_whatever_lies_in_the_working_directory(tmp_path, monkeypatch):
    write_rl(tmp_path / "here/1/rl", 5)
    write_rl(tmp_path / "elsewhere/runs/1/rl", 30)
    monkeypatch.chdir(tmp_path / "elsewhere")
    positions = runs.positions(["runs/1/policy", "runs/2/policy"], tmp_path / "here")
    assert [position.step for position in positions] == [5, 10]
    assert runs.root_of([tmp_path / "here/eval/1/valid"]) == tmp_path / "here"


def test_iterations_count_by_number_where_no_steps_are_known():
    positions = runs.positions([f"else/{iteration}/policy" for iteration in (10, 2, 1)])
    assert [position.policy for position in positions] == ["else/1/policy", "else/2/policy", "else/10/policy"]


def test_every_figure_lies_there_as_png_and_svg_with_its_data(made):
    names = {path.stem for path in (made / "figures").iterdir()} - {"written"}
    expected = {"steps_valid_avg4", "steps_far_pass4", "iterations_far", "overfitting", "training_grad_norm"}
    expected.add("training_rewards_mine.py_short")
    assert expected | {"forgetting_RL", "similarity_by_step", "retention"} <= names
    assert "training_mismatch" not in names, "a column without a number makes no figure"
    for name in names:
        xml.etree.ElementTree.parse(made / "figures" / f"{name}.svg")
        assert (made / "figures" / f"{name}.png").stat().st_size > 1000
        assert len(read_tsv(made / "figures" / f"{name}.tsv")) >= 2


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text of the embedded records."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.records = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][1].get("id") == "rollouts-data":
            self.records += data


def test_page_loads_nothing_and_holds_hostile_completions_as_data(made):
    parsed = Page((made / "report.html").read_text())
    links = [attrs.get(name) for _, attrs in parsed.tags for name in ("src", "href", "xlink:href") if attrs.get(name)]
    assert links and all(link.startswith(("#", "data:image/png;")) for link in links)
    assert not any(tag in ("img", "link", "iframe") for tag, _ in parsed.tags)
    texts = [
        r["completion"] for s in json.loads(parsed.records) for p in s["problems"] for of in p["rollouts"] for r in of
    ]
    assert HOSTILE in texts


def test_the_first_screen_says_who_leads_with_the_averages_and_their_way_over_steps(made):
    study = studied(made)
    summary = summaries.sum_up(study, [2, 4], 0)
    compared = summaries.differences(summary.scores, study.averages, summary.chosen)
    coverage, accuracy = summaries.headline(summary.rows, compared, ["pass@4", "avg@4"])
    assert coverage.endswith("RLoop, “RLoop, last RL endpoint” and “RLoop, chosen” lead with 100.0 % (54.1 to 100.0).")
    assert re.fullmatch(
        r"avg@4 on average over the sets\. RLoop against RL: chosen \+29\.2 points \(\+[\d.]+ to \+[\d.]+\); "
        r"last \+29\.2 points \(\+[\d.]+ to \+[\d.]+\)\. "
        r"RLoop and “RLoop, chosen” lead with 62\.5 % \([\d.]+ to [\d.]+\)\.",
        accuracy,
    )
    (chance,) = summaries.headline(summary.rows, compared.assign(real=False), ["avg@4"])
    assert chance.count("), which may be chance") == 2
    (equal,) = summaries.headline(summary.rows, compared.assign(value=0.0, low=0.0, high=0.0), ["avg@4"])
    assert "chosen the same on every problem; last the same on every problem" in equal
    lost = "Lost after the best checkpoint, in avg@4 on valid: RL 0.0 points (best at step 4 of 4), RLoop 0.0 points"
    first = (made / "report.html").read_text().partition("</header>")[0]
    assert html.unescape(first).count(accuracy) == 1 and lost in first and first.count("<figure>") == 3
    assert first.count('<tr><th scope="row">') == 6 + 5, "six methods and five differences"
    best = re.findall(r'class="best">([\d.]+)<', first)
    assert best == [f"{100 * value:.2f}" for value in (7.5 / 12, 1, 1, 7.5 / 12, 1)]


def test_ids_of_the_page_are_unique(made):
    ids = [attrs["id"] for _, attrs in Page((made / "report.html").read_text()).tags if "id" in attrs]
    assert len(ids) == len(set(ids))


@pytest.mark.slow
def test_a_second_report_replaces_the_first_with_the_same_bytes(made):
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    make(made)
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == before


def test_of_an_empty_directory_all_outputs_are_written_and_say_what_is_missing(tmp_path, capsys):
    write_rl(outputs.aside(tmp_path / "1/rl"), 2)
    make(tmp_path, out=Path(tmp_path / "out/page.html"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "page.html", "results.md", "results.tsv", "results.json", "curves.tsv", "figures", "metrics",
    }  # fmt: skip
    assert "no results.jsonl" in (tmp_path / "out/results.md").read_text()
    assert "no log.tsv" in (tmp_path / "out/page.html").read_text()
    said = capsys.readouterr().err
    assert said.count("left out") == 5
    assert re.search(r"left out: .*1/rl\.before-\S+ takes 0\.0 MiB: an earlier run that was moved aside", said)


def test_what_no_report_wrote_is_never_removed(made, tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/thesis.docx").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis\.docx"):
        make(made, out=tmp_path / "page.html")
    assert (tmp_path / "figures/thesis.docx").exists()
    shutil.move(tmp_path / "figures", tmp_path / "metrics")
    with pytest.raises(InputError, match=r"metrics holds thesis\.docx"):
        make(made, out=tmp_path / "page.html")


@pytest.mark.slow
def test_a_picture_or_a_table_of_someone_else_is_never_replaced(made, tmp_path):
    target = tmp_path / "page.html"
    for out in (target, tmp_path / "second.html", target):  # its own and the other's
        make(made, out=out)
    (tmp_path / "figures/mine.png").write_text("drawn by hand")
    with pytest.raises(InputError, match=r"mine\.png"):
        make(made, out=Path(target))
    other = tmp_path / "other"
    other.mkdir()
    (other / "results.md").write_text("my notes")
    with pytest.raises(InputError, match=r"results\.md is there, and no report wrote it"):
        make(made, out=Path(other / "page.html"))
    assert [path.name for path in other.iterdir()] == ["results.md"]


@pytest.mark.slow
def test_methods_evaluated_on_different_problems_are_named(made, tmp_path, capsys):
    shutil.copytree(made / "eval", tmp_path / "eval")
    file = tmp_path / "eval/vanilla/valid/results.jsonl"
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if "valid/0" not in line))
    make(tmp_path)
    assert "left out: RL and Base on valid: evaluated on different problems (2 and 3), so no difference" in (
        capsys.readouterr().err
    )


def without(made: Path, copy: Path, problem_set: str, policies: list[str]) -> Path:
    """The runs, as if these policies had not been evaluated on the set."""
    shutil.copytree(made, copy)
    for file in copy.glob(f"eval/*/{problem_set}/*.jsonl"):
        kept = [row for _, row in jsonl.read(file) if row["policy"].removeprefix("runs/") not in policies]
        file.unlink()
        jsonl.write(file, kept)
    return copy


@pytest.mark.slow
def test_curves_show_the_checkpoints_that_a_set_has_and_averages_those_that_have_all_sets(made, tmp_path):
    copy = without(made, tmp_path / "runs", "far", [VANILLA[0], RLOOP[0], RLOOP[1]])
    make(copy)
    labels = {
        name: [(row["method"], row["step"], row["after_rft"]) for row in read_tsv(copy / "curves.tsv")
               if (row["set"], row["metric"]) == (name, "avg@4")]
        for name in ("valid", "far")
    }  # fmt: skip
    ends = [("RL", "0", "0"), ("RL", "4", "0"), ("RLoop", "0", "0"), ("RLoop", "4", "0"), ("RLoop", "4", "1")]
    assert labels["far"] == ends and len(labels["valid"]) == 8
    average = read_tsv(copy / "figures/steps_Average_avg4.tsv")
    assert [(row["series"], row["RL steps"], row["after_rft"]) for row in average] == ends
    iterations = read_tsv(copy / "figures/iterations_far.tsv")
    assert {row["iteration"] for row in iterations} == {"0", "2"}, "not numbered by what is there"
    assert (copy / "results.tsv").read_text() == (made / "results.tsv").read_text()


def test_a_method_that_lacks_a_set_has_no_average_and_is_named(made, tmp_path, capsys):
    copy = without(made, tmp_path / "runs", "far", [VANILLA[1], RLOOP[2]])
    make(copy, table=True)
    table, said = capsys.readouterr()
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines()[2:]]
    methods = ["Base", "RL", "RL, chosen", "RLoop", "RLoop, last RL endpoint", "RLoop, chosen"]
    complete = ["Base", "RLoop", "RLoop, chosen"]
    assert [method for _, method in rows] == [*methods, *complete, *complete]
    for method in ("RL", "RLoop, last RL endpoint"):
        assert f"left out: {method} on far: not evaluated, so no difference and no average over the sets" in said
    study = studied(copy)
    scores, chosen = study.scores([2]), summaries.methods(study.positions, {})
    apart = summaries.differences(scores, study.averages, chosen)
    pairs = apart[apart["metric"] == "avg@4"].groupby("policy")["set"].agg(list).to_dict()
    assert pairs["RLoop − Base"] == ["valid", "far", "Average"] and pairs["RLoop − RL"] == ["valid"]
    headline = summaries.headline(
        summaries.results(summaries.summarise(scores, study.averages), chosen), apart, ["avg@4"]
    )
    assert headline == ["avg@4 on average over the sets. RLoop leads with 62.5 % (54.2 to 70.8)."]


@pytest.mark.slow
def test_a_validation_set_that_there_is_not_is_named_and_no_rollouts_are_no_fault(made, tmp_path, capsys):
    make(made, ks=[2], valid="nope", max_problems=0, out=tmp_path / "page.html")
    said = capsys.readouterr().err
    assert "no evaluation of nope (--valid), only of far, valid" in said and "rollouts" not in said


def test_analyses_of_two_sets_are_both_shown_and_names_with_any_mark_make_files(made, tmp_path):
    for name in ("a/b", "c $x$"):
        shutil.copytree(made / "analysis", tmp_path / "analysis" / name)
    for file in tmp_path.rglob("forgetting_RL.json"):
        file.write_text(file.read_text().replace('"RL"', '"org/$model_"'))
    make(tmp_path)
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert {"a_b_forgetting_org_model_", "c_x__forgetting_org_model_", "a_b_similarity_by_step"} <= names


def test_what_chance_forgets_stands_beside_what_is_forgotten_within_and_across_iterations(made, tmp_path):
    own = {"mean_learning": 0.1, "mean_forgetting": 0.2, "mean_similarity": 0.5, "mean_forgetting_of_halves": 0.3}
    own |= {"floor_of_forgetting": 0.25, "mean_similarity_within": 0.9}
    own |= {f"{name}_across_iterations": value / 2 for name, value in own.items() if name.startswith("mean_f")}
    copy = Path(shutil.copytree(made, tmp_path / "runs"))
    outputs.write_json(copy / "analysis/metrics.json", {"RL": own, "RL - RLoop": {"mean_differential_forgetting": 1}})
    outputs.write_json(copy / "analysis/manifest.json", {"parameters": {"set": "valid"}, "inputs": {}})
    columns = ["on valid", "learned", "alike", "forgotten", "forgotten, half of the samples", "of that by chance"]
    assert report._means(studied(copy)) == [
        dict(zip(columns, ["RL, all pairs", "10.0", "50.0", "20.0", "30.0", "25.0"], strict=True)),
        dict(zip(columns, ["RL, pairs across a reset", "", "", "10.0", "15.0", ""], strict=True)),
    ]
    outputs.write_json(copy / "analysis/manifest.json", {"inputs": {"runs/vanilla/rl": "another"}})
    assert report._means(studied(copy)) == [], "of other runs than those that are there"


def test_parameters_are_named_once_and_runs_only_where_they_differ(made):
    lines = {line["parameter"]: line["value"] for line in summaries.settings(studied(made).settings())["rl"]}
    assert lines == {"steps": "2 (1/rl, 2/rl), 4 (vanilla/rl)", "lr": "0.1", "version of torch": "2.13"}


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("step\tloss\n1\t0.5\n2\t\n", [{"step": 1, "loss": 0.5}, {"step": 2}]),
        ("step\tloss\n1\t0.5\n2\t0.12", [{"step": 1, "loss": 0.5}]),
        ("step\tloss\n1\t0.5\n\0\0\0", [{"step": 1, "loss": 0.5}]),
        ("", []),
    ],
)
def test_a_log_is_read_up_to_the_line_that_is_being_written(tmp_path, text, rows):
    (tmp_path / "log.tsv").write_text(text)
    assert tabular.read_tsv(tmp_path / "log.tsv") == rows


@pytest.mark.parametrize("line", [b'1\t"0.5', b"1", b"1\t2\t3", b"1\t\0", b"1\t\xff"])
def test_a_broken_line_of_a_log_is_named(tmp_path, line):
    (tmp_path / "log.tsv").write_bytes(b"step\tloss\n" + line + b"\n2\t0.5\n")
    with pytest.raises(InputError, match=r"log\.tsv(:2:| is no text)"):
        tabular.read_tsv(tmp_path / "log.tsv")


def test_a_directory_in_the_place_of_the_page_is_refused_before_anything_is_written(made, tmp_path):
    (tmp_path / "page").mkdir()
    with pytest.raises(InputError, match="page is a directory: name a file"):
        make(made, out=tmp_path / "page")
    assert [path.name for path in tmp_path.rglob("*")] == ["page"]


def test_a_missing_directory_of_runs_is_a_plain_error(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        make(tmp_path / "nowhere")


def test_ledger_adds_up_phases_and_weighs_rloop_against_rl(made):
    lines = {line["phase"]: line for line in summaries.costs(studied(made).logs()).to_dict("records")}
    assert lines["RLoop 1: RL"]["tokens drawn"] == 200 and lines["RLoop 1: RFT"]["tokens trained on"] == 40
    counts = {"steps": 4, "rollouts": 32, "tokens drawn": 400, "tokens trained on": 400, "seconds": 7.0}
    assert lines["RLoop, total"] == {"phase": "RLoop, total", "updates, s": 1.0} | counts
    assert lines["RLoop / RL"]["seconds"] == pytest.approx(7 / 6)
    short = studied(made).logs().assign(verify_s=0.001)
    assert pd.isna(summaries.costs(short).set_index("phase").loc["RLoop / RL", "grading, s"]), "a quotient of noise"
    assert lines["RLoop / RL"]["tokens drawn"] == 1 and lines["RLoop / RL"]["tokens trained on"] == 1.25
    assert lines["RFT's share of RLoop"]["tokens trained on"] == pytest.approx(80 / 400)


def test_differences_are_paired_by_problem_and_averaged_over_sets(made):
    chosen = {"RL": f"runs/{VANILLA[1]}", "RLoop": f"runs/{RLOOP[3]}"}
    whole = studied(made)
    differences = summaries.differences(whole.scores([2]), whole.averages, chosen, [("RL", "RLoop")])
    values = {row["set"]: row for row in differences[differences["metric"] == "avg@4"].to_dict("records")}
    assert values["far"]["value"] == pytest.approx(7 / 12) and values["far"]["real"]
    assert values["valid"]["value"] == pytest.approx(0) and not values["valid"]["real"]
    assert values["Average"]["value"] == pytest.approx(7 / 24)


def test_the_chosen_checkpoint_is_the_first_best_on_the_validation_set_and_never_the_base():
    values = {"runs/0/policy": 0.9, VANILLA[0]: 0.6, VANILLA[1]: 0.4, RLOOP[0]: 0.3, RLOOP[1]: 0.5, RLOOP[2]: 0.5}
    listed, by_policy = runs.positions(values), pd.Series(values)
    best = summaries.chosen_by(by_policy, listed)
    assert {method: position.policy for method, position in best.items()} == {"RL": VANILLA[0], "RLoop": RLOOP[1]}
    assert summaries.methods(listed, best)["RL, chosen"] == VANILLA[0]
    lost = {row["method"]: row["lost"] for row in summaries.peaks(by_policy, listed, best)}
    assert lost == {"RL": pytest.approx(20), "RLoop": 0}
    assert summaries.chosen_by(by_policy.drop(VANILLA[0]), listed).keys() == {"RLoop"}
    assert summaries.chosen_by(by_policy[:0], listed) == {}


def test_the_set_that_checkpoints_are_chosen_on_is_left_out_of_an_average_of_its_own(made, tmp_path):
    copy = tmp_path / "runs"
    shutil.copytree(made, copy)
    for group in ("base", "loop", "vanilla"):
        shutil.copytree(copy / "eval" / group / "far", copy / "eval" / group / "more")
    study = studied(copy)
    assert study.averages == {"Average": ["valid", "far", "more"], "Average without valid": ["far", "more"]}
    make(copy, tsv=False, out=tmp_path / "page.html")
    rows = {(row["set"], row["method"]): row for row in read_tsv(tmp_path / "results.tsv")}
    assert rows["Average without valid", "RLoop"]["avg@4"] == rows["far", "RLoop"]["avg@4"]
    first = (tmp_path / "page.html").read_text().partition("</header>")[0]
    assert re.findall(r'scope="rowgroup">([^<]+)', first) == [
        "Average without valid",
        "Average",
        "Average without valid",
    ]
    assert "avg@4 on average without valid. RLoop against RL: " in first


@pytest.fixture(scope="module")
def seeds(made, tmp_path_factory) -> list[Path]:
    """Three directories of runs: in the second RL, and in the third RLoop, gets one problem more or fewer."""
    directory = tmp_path_factory.mktemp("seeds")
    roots = [Path(shutil.copytree(made, directory / str(number) / "runs")) for number in range(3)]
    for root, policy, change in ((roots[1], VANILLA[1], 1), (roots[2], RLOOP[3], -1)):
        for file in (root / "eval").glob("*/far/results.jsonl"):
            rows = [row for _, row in jsonl.read(file)]
            for row in rows[-1:]:
                row["num_correct"] += change * (row["policy"] == f"runs/{policy}")
            file.unlink()
            jsonl.write(file, rows)
    return roots


def test_of_several_runs_means_and_differences_have_students_interval_over_them(seeds):
    read = report_seeds.read([studied(root) for root in seeds], [2, 4], 0)
    table = report_seeds.means(read.measured).set_index(["set", "method", "metric"])
    values = np.array([0, 100 / 12, 0])  # RL on far, avg@4
    half = 4.302653 * values.std(ddof=1) / 3**0.5
    row = table.loc["far", "RL", "avg@4"]
    assert [row["value"], row["low"], row["high"]] == pytest.approx(
        [values.mean(), *(values.mean() + half * np.array([-1, 1]))]
    )
    apart = report_seeds.means(report_seeds.differences(read.measured)).set_index(["set", "method", "metric"])
    gains = np.array([700 / 12, 600 / 12, 600 / 12])  # RLoop 7, 7 and 6 of 12 less RL 0, 1 and 0
    row, half = apart.loc["far", "RLoop − RL", "avg@4"], 4.302653 * gains.std(ddof=1) / 3**0.5
    assert [row["value"], row["high"] - row["value"]] == pytest.approx([gains.mean(), half])
    assert table.loc["Average", "RL", "avg@4"]["value"] == pytest.approx((800 / 12 + values.mean()) / 2)
    two = report_seeds.means(read.measured[read.measured["run"] != str(seeds[2])])
    assert two["low"].isna().all() and (two["num_runs"] == 2).all(), "two runs have no interval"


def test_what_a_method_cost_is_summed_up_to_its_policy(seeds):
    read = report_seeds.read([studied(root) for root in seeds], [2, 4], 0)
    lines = {
        line["method"]: line
        for line in report_seeds.frontier(report_seeds.means(read.measured), read.costs, ["avg@4", "pass@4"])
    }
    cost = {name: [line[key] for key in ("rollouts", "tokens", "hours")] for name, line in lines.items()}
    assert cost["Base"] == [0, 0, 0]
    assert cost["RL"] == [32, 4 * 180, "0.002"]
    assert cost["RLoop"] == [32, 4 * 180 + 80, "0.002"]
    assert cost["RLoop, last RL endpoint"][:2] == [32, 4 * 180 + 40], "not its last fine-tuning"
    hours = read.costs.groupby("method")["hours"].mean()
    assert hours["RLoop"] * 3600 == pytest.approx(7) and hours["RLoop, last RL endpoint"] * 3600 == pytest.approx(6.5)
    assert [name for name, line in lines.items() if line["frontier"]] == ["RLoop", "RLoop, chosen"]


@pytest.mark.parametrize(("select", "metric"), [("pass@2", "pass@2"), ("avg@32", "avg@4"), ("", "avg@4")])
def test_checkpoints_are_chosen_by_the_metric_that_the_evaluations_select_by(made, tmp_path, select, metric):
    shutil.copytree(made / "eval", tmp_path / "eval")
    for directory in tmp_path.glob("eval/*/valid"):
        outputs.write_json(directory / "manifest.json", {"set": "valid", "parameters": {"select": select}})
    summary = summaries.sum_up(studied(tmp_path), [2, 4], 0)
    assert summary.metric == metric
    assert summary.chosen["RL, chosen"] == f"runs/{VANILLA[1 if metric == 'avg@4' else 0]}", "pass@2 is 2/3 at both"
    assert f"best {metric} on valid" in summaries.markdown_of_peaks(summary, "valid")


def test_what_has_as_much_of_one_and_less_of_the_other_is_not_on_the_frontier():
    accuracy, coverage = pd.Series([10.0, 20.0, 20.0, 20.0, 15.0]), pd.Series([90.0, 80.0, 70.0, 80.0, 90.0])
    assert curves.leads(accuracy, coverage) == [False, True, False, True, True]


def test_over_runs_methods_are_compared_without_the_set_that_checkpoints_are_chosen_on():
    sets = ["select", "far", "Average", "Average without select"]
    rows = [
        (name, method, "avg@4", 10.0 * len(name), 9.0 * len(name), 11.0 * len(name), 3)
        for name in sets
        for method in ("RL", "RLoop")
    ]
    table = pd.DataFrame(rows, columns=["set", "method", "metric", "value", "low", "high", "num_runs"])
    assert set(summaries.compared(table)["set"]) == {"Average without select"}
    assert set(report_seeds.nested(table, "select")) == {"select (chosen on it)", *sets[1:]}
    assert "select" in report_seeds.nested(table, "select@0.6"), "of two temperatures the lowest selects"
    without = table[table["set"] != "Average without select"]
    assert set(summaries.compared(without)["set"]) == {"Average"}
    of_pair = table[table["method"] == "RL"]
    (sentence,) = report_seeds.headline(of_pair.assign(method="RLoop − RL"), ["avg@4"])
    assert sentence == "avg@4 on average without select. RLoop against RL: last +220.0 ± 22.0 points."
    (sentence,) = report_seeds.headline(
        of_pair.assign(method="RL − RL, chosen", low=float("nan"), high=float("nan")), ["avg@4"]
    )
    assert sentence == (
        "The last policy against the chosen one: RL +220.0 points (too few runs for an interval) of avg@4."
    )


def test_several_runs_have_a_page_tables_and_a_figure_of_the_frontier(seeds, tmp_path, capsys):
    report.run(report.Options(runs=seeds, ks=[2, 4], out=tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert "avg@4 on average over the sets. RLoop against RL: chosen +" in page and page.count("<figure>") == 3
    assert "<h1>RLoop: 3 runs</h1>" in page and "Average over the sets. Means over runs, in percent" in page
    text = (tmp_path / "results.md").read_text()
    assert re.search(r"\| far \| Base \| .*\n\|  \| RL \| 2\.8 ± 12\.0 \| ", text)
    assert (
        re.findall(r"^\| (\w[^|]*) \| (?:Base|RL − Base) ", text, re.M)
        == ["Average", "valid (chosen on it)", "far"] * 2
    )
    assert [row["RL steps"] for row in read_tsv(tmp_path / "figures/steps_valid_avg4.tsv")] == [*"024", *"02244"]
    assert {row["run"] for row in read_tsv(tmp_path / "results.tsv")} == set(map(str, seeds))
    assert {row["series"] for row in read_tsv(tmp_path / "figures/frontier.tsv")} >= {"Base", "RL", "RLoop"}
    report.run(report.Options(runs=seeds, ks=[2, 4], table=True))
    assert capsys.readouterr().out == (tmp_path / "results.md").read_text()


def test_several_runs_count_by_the_sets_that_all_have_and_are_told_where_they_differ(seeds, tmp_path, capsys):
    fewer, other, shorter = (Path(shutil.copytree(seeds[0], tmp_path / name)) for name in ("fewer", "other", "shorter"))
    for directory in fewer.glob("eval/*/far"):
        shutil.rmtree(directory)
    shutil.rmtree(shorter / "vanilla")
    write_rl(shorter / "vanilla/rl", 3)
    for file in shorter.glob("eval/*/valid/results.jsonl"):
        rows = [row for _, row in jsonl.read(file)]
        file.unlink()
        jsonl.write(file, [row for row in rows if row["problem_id"] != "valid/0"])
    for root, metric in ((fewer, "avg@4"), (shorter, "pass@2")):
        manifest = {"set": "valid", "parameters": {"select": metric}}
        outputs.write_json(root / "eval/loop/valid/manifest.json", manifest)
    report.run(report.Options(runs=[seeds[1], fewer, shorter], ks=[2, 8], table=True))
    printed, said = capsys.readouterr()
    assert "valid (chosen on it)" in printed and "far" not in printed.partition("Left out")[0]
    for line in (
        "Left out: far: evaluated in 2 of 3 runs.",
        f"evaluations of valid differ in number of problems: 3 ({seeds[1]}, {fewer}), 2 ({shorter})",
        f"evaluations of valid differ in select: avg@4 ({fewer}), pass@2 ({shorter})",
        f"runs differ in their steps: 4 of RL and 4 of RLoop ({seeds[1]}), 4 of RL and 4 of RLoop ({fewer}), 3 of RL",
    ):
        assert line in printed and line.removeprefix("Left out: ").rstrip(".") in said
    for directory in other.glob("eval/*/far"):
        shutil.rmtree(directory.with_name("valid"))
    with pytest.raises(
        InputError, match=r"no problem set was evaluated in all of them \(.*fewer: valid; .*other: far\)"
    ):
        report.run(report.Options(runs=[fewer, other], table=True))
    report.run(report.Options(runs=[fewer, shorter], valid="nope", ks=[2], table=True))
    printed, said = capsys.readouterr()
    assert "chosen on it" not in printed and f"{shorter}: left out: all by the validation set: no evaluation" in said
    report.run(report.Options(runs=seeds, ks=[64], out=tmp_path / "page.html"))
    said = capsys.readouterr().err
    assert f"{seeds[0]}: left out: pass@64: some problems have 4 samples only" in said
    assert "RLoop against RL: " in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runs": ["a", "b"]}, "--out: name the page"),
        ({"runs": ["a", "a"], "table": True}, "--runs a: named twice"),
        ({"runs": ["a", "b"], "table": True, "evals": ["c"]}, "--evals: leave it out"),
    ],
)
def test_what_does_not_go_with_several_runs_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        report.Options(**options)


def test_a_run_that_goes_on_is_shown_with_how_far_it_is(made, tmp_path, capsys, monkeypatch):
    copy = Path(shutil.copytree(made, tmp_path / "runs"))
    (copy / "2/rl/manifest.json").unlink()
    outputs.write_json(copy / "2/rl/state/run.json", {"parameters": {"steps": 4802}, "inputs": {}})
    rounds = iter([None, KeyboardInterrupt])

    def sleep(seconds: float) -> None:
        assert seconds == 60
        if ends := next(rounds):
            raise ends

    monkeypatch.setattr(report.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        make(copy, watch=60, max_problems=0)
    assert capsys.readouterr().err.count("under way: 2/rl: 2 of 4802 steps, 2 h left") == 2
    page = (copy / "report.html").read_text()
    assert "Under way: 2/rl: 2 of 4802 steps, 2 h left." in page
    assert '<meta http-equiv="refresh" content="60">' in page


def test_a_table_for_a_closed_output_is_refused_and_a_name_with_a_line_break_stays_in_its_line(
    tmp_path, capsys, monkeypatch
):
    row = {"problem_id": "a", "num_samples": 4, "num_correct": 2, "num_truncated": 0}
    jsonl.write(tmp_path / "runs/eval/valid/results.jsonl", [row | {"policy": "a\nb|c"}])
    options = report.Options(runs=[tmp_path / "runs"], ks=[2], table=True)
    report.run(options)
    assert "| valid | a\\nb\\|c | " in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout", None)
    with pytest.raises(InputError, match="standard output is closed"):
        report.run(options)


def test_sets_at_several_temperatures_are_averaged_and_chosen_on_apart(made, tmp_path, capsys):
    for group in ("base", "loop", "vanilla"):
        for name, at in ((name, at) for name in ("valid", "far") for at in ("0.6", "1")):
            rows = [
                row | {"temperature": float(at)} for _, row in jsonl.read(made / f"eval/{group}/{name}/results.jsonl")
            ]
            jsonl.write(tmp_path / f"runs/eval/{group}/{name}@{at}/results.jsonl", rows)
    study = studied(tmp_path / "runs")
    assert study.averages == {f"Average@{at}": [f"valid@{at}", f"far@{at}"] for at in ("0.6", "1")}
    assert study.valid == "valid@0.6"
    assert study.temperatures == {f"{name}@{at}": at for name in ("valid", "far", "Average") for at in ("0.6", "1")}
    make(tmp_path / "runs", table=True)
    printed = capsys.readouterr().out
    assert "| valid@0.6 (chosen on it) | Base | 25.00" in printed and printed.count("(chosen on it)") == 1
    assert "In percent; samples drawn at temperature 0.6, 1.\n" in printed
    for part in ("1", "2", "vanilla"):
        shutil.copytree(made / part, tmp_path / "runs" / part)
    make(tmp_path / "runs")
    assert {(row["set"], row["temperature"]) for row in read_tsv(tmp_path / "runs/results.tsv")} == {
        *study.temperatures.items()
    }
    page = (tmp_path / "runs/report.html").read_text()
    captions = [text for text in re.findall("<figcaption>([^<]+)", page) if "from log.tsv" not in text]
    assert len(captions) > 6 and all("; samples drawn at temperature " in text for text in captions)
    assert any(text.startswith("RL alone") and "on valid@0.6; samples" in text for text in captions)
    both = [tmp_path / "runs", Path(shutil.copytree(tmp_path / "runs", tmp_path / "again"))]
    report.run(report.Options(runs=both, ks=[2], table=True))
    printed = capsys.readouterr().out
    assert printed.count("valid@0.6 (chosen on it)") == 2 and printed.count("(chosen on it)") == 2
    assert "Samples drawn at temperature 0.6, 1." in printed


def test_whatever_eval_measured_is_shown_and_a_policy_that_lacks_it_has_a_dash(tmp_path, capsys):
    row = {"problem_id": "a", "num_samples": 4, "num_correct": 2, "num_truncated": 0}
    votes = {"wrong_votes": [1, 1], "num_greedy_correct": 1}
    jsonl.write(tmp_path / "runs/eval/valid/results.jsonl", [row | {"policy": "x"}, row | votes | {"policy": "y"}])
    outputs.write_json(tmp_path / "runs/eval/valid/manifest.json", {"set": "valid", "parameters": {"k": [2]}})
    report.run(report.Options(runs=[tmp_path / "runs"], table=True))
    printed, said = capsys.readouterr()
    assert printed.splitlines()[0] == "| Set | Method | avg@4 | pass@2 | maj@2 | greedy |"
    assert re.search(r"\| x \| \S+ \| \S+ \| - \| - \|\n", printed) and "left out" not in said


def test_browser_keeps_the_problems_that_differ_most_and_a_mix_of_samples(made):
    evaluations = runs.read_evals(runs.find_evals([made / "eval"]))
    positions = runs.positions(evaluations["valid"].results, made)
    built = {of_set["name"]: of_set for of_set in browser.build(evaluations, positions, CHOSEN, 2, 2)}
    assert [problem["id"] for problem in built["valid"]["problems"]] == ["valid/1", "valid/0"]
    assert built["valid"]["problems"][1]["rates"][0] == 0.25
    verdicts = [[r["correct"] for r in of_policy] for of_policy in built["valid"]["problems"][1]["rollouts"]]
    labels = [policy["label"] for policy in built["valid"]["policies"]]
    assert labels == ["Base", "RL 2", "RL 4", "RLoop 2", "RLoop 2+rft", "RLoop 4", "RLoop 4+rft"]
    assert dict(zip(labels, verdicts, strict=True))["RL 4"] == [True, True]
    assert dict(zip(labels, verdicts, strict=True))["Base"] == [True, False]


def test_problems_are_gained_or_lost_by_whether_any_sample_is_correct(made):
    evaluations = runs.read_evals(runs.find_evals([made / "eval"]))
    rows = {(row["set"], row["RLoop against"]): list(row.values())[2:] for row in browser.gains(evaluations, CHOSEN)}
    assert rows["valid", "RL"] == [1, 0, 2, 0], "problem 1: 2 of 4 against 0"
    assert rows["far", "RL"] == [3, 0, 0, 0] and rows["far", "Base"] == [1, 0, 2, 0]
    swapped = CHOSEN | {"RL": CHOSEN["RLoop"], "RLoop": CHOSEN["RL"]}
    assert [row["lost"] for row in browser.gains(evaluations, swapped) if row["set"] == "far"] == [3, 2]


def test_browser_stays_within_its_size(made, monkeypatch):
    monkeypatch.setattr(browser, "MAX_BYTES", 12_000)
    evaluations = runs.read_evals(runs.find_evals([made / "eval"]))
    positions = runs.positions(evaluations["valid"].results, made)
    built = browser.build(evaluations, positions, CHOSEN, 3, 4)
    assert built and len(page.embedded(built)) < 14_000


class Browser:
    """A headless Chromium over W3C WebDriver: just what clicking through a page takes."""

    def __init__(self, profile: Path):
        command = ["chromedriver", "--port=0", f"--log-path={profile / 'log'}"]
        self.driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        port = next(
            match[1] for line in self.driver.stdout or () if (match := re.search(r"successfully on port (\d+)", line))
        )
        self.base = f"http://127.0.0.1:{port}/session"
        flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
        arguments = [f"--{flag}" for flag in f"{flags} disable-component-update disable-sync".split()]
        options = {"args": [*arguments, f"--user-data-dir={profile / 'profile'}"], "binary": shutil.which("chromium")}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.call("", {"capabilities": {"alwaysMatch": wanted}})
        self.base += "/" + session["sessionId"]

    def call(self, path: str, body: dict | None = None, method: str = "POST"):
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def click(self, selector: str) -> None:
        element = self.call("/element", {"using": "css selector", "value": selector})
        self.call(f"/element/{next(iter(element.values()))}/click")

    def run(self, script: str):
        return self.call("/execute/sync", {"script": f"return {script}", "args": []})

    def texts(self, selector: str) -> list[str]:
        return self.run(f"[...document.querySelectorAll({selector!r})].map((found) => found.textContent)")

    def close(self) -> None:
        self.call("", method="DELETE")
        self.driver.terminate()
        self.driver.wait()


@pytest.fixture
def chromium(tmp_path):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no browser here: apt-get install chromium chromium-driver")
    started = Browser(tmp_path)
    yield started
    started.close()


@pytest.mark.slow
def test_page_can_be_clicked_through_in_a_browser(made, chromium):
    chromium.call("/url", {"url": (made / "report.html").as_uri()})
    columns = chromium.texts("#columns h3")
    assert columns[0] == "Base: 0 % correct" and "RL 4: 0 % correct" in columns and len(columns) == 7
    assert chromium.texts("#problem option") == ["valid/1", "valid/0", "valid/2"], "what was gained comes first"
    chromium.click("#set option:nth-child(2)")
    assert chromium.texts("#problem option") == ["far/0", "far/1", "far/2"]
    chromium.click('#kind option[value="gained Base"]')
    assert chromium.texts("#problem option") == ["far/2"]
    assert chromium.texts("#answer") == ["3"] and HOSTILE in chromium.texts("#columns pre")
    chromium.click("#verdicts option[value=wrong]")
    assert chromium.texts('[data-policy="6"] pre') == [f"sample {sample} of {RLOOP[3]}" for sample in (2, 3)]
    chromium.click('#rates circle[data-policy="5"]')
    assert chromium.run("document.getElementById('columns').scrollLeft") > 0
    chromium.click('#kind option[value="lost RL"]')
    assert chromium.texts("#chosen") == ["far: none of this kind"] and chromium.texts("#columns h3") == []
    chromium.click('#kind option[value=""]')
    assert chromium.texts("#chosen") == ["far: problem far/0"]
    chromium.click("details summary")
    assert chromium.run("document.querySelector('details').open")
    assert chromium.run("document.title").startswith("RLoop")
    for width in (360, 1280):
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        chromium.call("/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics})
        assert chromium.run("document.documentElement.scrollWidth") <= width
        assert chromium.run("[...document.querySelectorAll('details table')].every((t) => t.scrollWidth <= innerWidth)")
    printed = chromium.call("/print", {})
    assert len(printed) > 1000
    assert chromium.run("[...document.querySelectorAll('details')].every((fold) => fold.open)")
    assert [entry for entry in chromium.call("/se/log", {"type": "browser"}) if entry["level"] == "SEVERE"] == []


@pytest.mark.parametrize("part", ["parameters", "inputs", "versions"])
@pytest.mark.parametrize("output", ["1/rl", "1/policy", "vanilla/rl"])
def test_a_manifest_whose_parts_are_no_objects_is_named(made, tmp_path, part, output):
    copy = Path(shutil.copytree(made, tmp_path / "runs"))
    file = copy / output / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {part: [1]}))
    with pytest.raises(InputError, match=rf"{output}/manifest\.json: {part} must be an object, found \[1\]"):
        studied(copy).settings()


@pytest.mark.parametrize("step", ["1e30", "inf", "-2", "nan"])
def test_steps_that_no_run_reaches_are_named(tmp_path, step):
    (tmp_path / "log.tsv").write_text(f"step\tloss\n{step}\t0.5\n")
    with pytest.raises(InputError, match=r"log\.tsv: no run has .* steps"):
        runs.num_steps(tmp_path)
    (tmp_path / "manifest.json").write_text('{"parameters": {"steps": 4000000000000000000}}')
    with pytest.raises(InputError, match=r"manifest\.json: no run has 4e\+18 steps"):
        runs.num_steps(tmp_path)


def test_a_checkpoint_whose_number_no_run_reaches_stands_for_itself():
    policy = f"runs/vanilla/rl/checkpoints/step_1{'0' * 5000}"
    assert runs.positions([policy]) == [runs.Position(policy, policy, 0, policy)]


@pytest.mark.parametrize("log_scale", [False, True])
def test_figures_are_drawn_whatever_the_size_of_steps_and_values(log_scale):
    sizes = [1e30, 1e308, float("inf"), float("nan")]
    lines = {"x": [0, *sizes], "y": [0.1, *sizes], "low": [0.0, *sizes], "high": [0.2, *sizes]}
    table = pd.concat(pd.DataFrame({"series": name} | lines) for name in "ab")
    assert figures.lines("a", "t", "c", table, figures.Panel("y", log_scale=log_scale)).svg.startswith("<?xml")
