"""The DVC graph: it parses into the stages it should, and a shrunken one runs whole in a clone."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
FILES = ("stages", "rloop_cli", "dvc.yaml", ".gitignore", ".dvcignore", ".dvc/config", ".dvc/plots", ".dvc/.gitignore")
STAGES = (
    "toy@0 rl@1 filter@1 rft@1 rl@2 filter@2 rft@2 rl@3 filter@3 rft@3 vanilla eval_base eval@1 eval@2 eval@3 "
    "eval_vanilla test@1 test@2 test@3 test_vanilla analyze report"
)


def dvc(directory, *arguments):
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(directory)}
    done = subprocess.run(
        [BIN / "dvc", *arguments], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def copy_of_project(directory, params):
    """The project as a git repository of its own, with other parameters."""
    for name in FILES:
        source, target = ROOT / name, directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    (directory / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "as it is"]):
        git(directory, *arguments)


def git(directory, *arguments):
    subprocess.run(
        ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", *arguments], cwd=directory, check=True
    )


@pytest.mark.parametrize("around", ["nothing", "another repository that ignores it"])
def test_an_unpacked_archive_needs_no_repository_of_its_own(tmp_path, around):
    project = tmp_path / "outer/rloop"
    (project / ".dvc").mkdir(parents=True)
    for name in ("Makefile", ".dvc/config"):
        shutil.copy(ROOT / name, project / name)
    (project / "dvc.yaml").write_text("stages: {a: {cmd: echo hi > x, outs: [x]}}\n")
    if around != "nothing":
        git(tmp_path / "outer", "init", "-q")
    if "ignores" in around:
        (tmp_path / "outer/.gitignore").write_text("rloop\n")
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "GIT_CEILING_DIRECTORIES": str(tmp_path)}
    subprocess.run(["make", "-o", ".venv/installed", ".dvc/scm"], cwd=project, env=environment, check=True)
    dvc(project, "repro", "-q")
    assert (project / "x").read_text() == "hi\n"


def planned(directory):
    """Stage -> command, as `make plan` shows them."""
    shown = dvc(directory, "repro", "--dry", "--force-downstream")
    return dict(re.findall(r"^Running stage '(.+)':\n> (.+)$", shown, flags=re.MULTILINE))


def shrunken():
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["toy"]["0"] = {"seed": 0, "pretrain_steps": 200, "num_train": 40, "num_test": 6}
    params["iterations"] = params["tuned"] = {"1": {"start": "runs/0/policy"}}
    params["rl"] |= {"steps": 2, "problems_per_step": 4, "group_size": 8, "checkpoint_every": 1}
    params["vanilla"]["steps"] = 2
    params["filter"]["max_pass_rate"] = 0.9
    params["eval"] |= {"num_samples": 8, "k": [4, 8]}
    params["valid"]["select"] = "avg@8"
    params["tests"]["problems"] = ["runs/0/prec.jsonl", "runs/0/long.jsonl"]
    params["report"]["ks"] = [4, 8]
    return params


def test_the_graph_parses_into_the_expected_stages(tmp_path):
    copy_of_project(tmp_path, yaml.safe_load((ROOT / "params.yaml").read_text()))
    names = [line.split()[0] for line in dvc(tmp_path, "stage", "list", "--all").splitlines()]
    assert sorted(names) == sorted(STAGES.split())


@pytest.mark.slow
def test_one_more_iteration_is_one_more_line_and_five_more_stages(tmp_path):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["iterations"]["4"] = {"start": "runs/3/policy"}
    copy_of_project(tmp_path, params)
    names = {line.split()[0] for line in dvc(tmp_path, "stage", "list", "--all").splitlines()}
    assert names - set(STAGES.split()) == {"rl@4", "filter@4", "rft@4", "eval@4", "test@4"}


@pytest.mark.slow
def test_what_would_be_done_is_shown_from_the_start_with_the_iterations_that_count(tmp_path):
    from stages.core.study import lineage

    params = shrunken()
    params["iterations"]["2"] = {"start": "runs/1/policy"}
    copy_of_project(tmp_path, params)
    shown = planned(tmp_path)
    names = (
        "toy@0 rl@1 filter@1 rft@1 rl@2 filter@2 rft@2 vanilla eval_base eval@1 eval@2 eval_vanilla test@1 test@2 "
        "test_vanilla analyze report"
    )
    assert shown.keys() == set(names.split())
    for name in ("analyze", "report"):
        words = shlex.split(shown[name])
        assert lineage.chosen(words[words.index("--iterations") + 1]) == {1, 2}


@pytest.mark.slow
def test_an_iteration_may_end_with_merge_in_the_place_of_filter_and_rft(tmp_path):
    params = shrunken()
    params["tuned"], params["merged"] = {}, params["iterations"]
    copy_of_project(tmp_path, params)
    shown = planned(tmp_path)
    assert {"rl@1", "merge@1", "eval@1"} < shown.keys()
    assert not {"filter@1", "rft@1"} & shown.keys()
    wanted = "--policy runs/0/policy --policy runs/1/rl/checkpoints --out runs/1/policy --weight 0.5 --weight 0.5"
    assert shown["merge@1"] == f"rloop merge {wanted}"


@pytest.mark.slow
def test_a_shrunken_loop_runs_whole_and_then_only_what_is_new(tmp_path):
    params = shrunken()
    copy_of_project(tmp_path, params)
    dvc(tmp_path, "repro")
    table = (tmp_path / "runs/results.md").read_text()
    assert all(method in table for method in ("Base", "RL", "RLoop"))
    every_checkpoint_is_validated_and_what_counts_is_tested(tmp_path / "runs")
    for name in ("report.html", "results.tsv", "curves.tsv", "figures", "analysis", "1/policy/model.safetensors"):
        assert (tmp_path / "runs" / name).exists(), name
    assert "up to date" in dvc(tmp_path, "repro")
    processes = "accelerate launch --config_file configs/accelerate/gpu8-fsdp2.yaml -m rloop_cli"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params | {"launch": processes}, sort_keys=False))
    assert "up to date" in dvc(tmp_path, "repro"), "another launcher makes nothing anew"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    lock = tmp_path / "dvc.lock"  # as of a dvc that was killed when rft had just ended
    made = yaml.safe_load(lock.read_text())
    del made["stages"]["rft@1"]
    lock.write_text(yaml.safe_dump(made, sort_keys=False))
    manifest = (tmp_path / "runs/1/policy/manifest.json").read_bytes()
    dvc(tmp_path, "repro")
    assert (tmp_path / "runs/1/policy/manifest.json").read_bytes() == manifest, "it was made once"
    shown = dvc(tmp_path, "metrics", "show")
    assert max(map(len, shown.splitlines())) <= 100, "it fits a terminal"
    assert [line.split()[0].rpartition("/")[2] for line in shown.splitlines()[1:]] == [
        "Base.json", "RL.json", "RL_chosen.json", "RLoop.json", "RLoop_chosen.json", "RLoop_last_RL_endpoint.json",
    ]  # fmt: skip
    dvc(tmp_path, "plots", "show", "--out", "plots")
    page = (tmp_path / "plots/index.html").read_text()
    assert all(title in page for title in ("Metrics over steps", "Gradient norm", "forgetting_RLoop.png"))
    assert "DVC_METRIC" not in page, "a template was not filled in"

    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "a run")
    results = tmp_path / "runs/metrics/RLoop.json"
    written = json.loads(results.read_text())
    written["avg@8"] += 7.5
    results.unlink()
    results.write_text(json.dumps(written))
    (line,) = (line.split() for line in dvc(tmp_path, "metrics", "diff").splitlines() if "RLoop.json" in line)
    assert line[1] == "avg@8" and float(line[-1]) == 7.5, line

    params["filter"]["max_pass_rate"] = 0.8
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    assert "filter.max_pass_rate" in dvc(tmp_path, "params", "diff")
    stale = dvc(tmp_path, "status")
    assert "filter@1" in stale
    assert "rl@1" not in stale
    assert "vanilla" not in stale

    left_behind_by_a_second_iteration(tmp_path / "runs")
    params["filter"]["max_pass_rate"] = 0.9
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    assert "Stage 'rft@1' didn't change" in dvc(tmp_path, "repro")
    now = (tmp_path / "runs/results.md").read_text()
    assert now == table + "\nLeft out: iteration 2: not among the iterations that count (1).\n"

    params["iterations"]["2"] = {"start": "runs/1/policy"}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    assert planned(tmp_path).keys() == {"rl@2", "filter@2", "rft@2", "eval@2", "test@2", "analyze", "report"}


def every_checkpoint_is_validated_and_what_counts_is_tested(runs):
    """Two steps, a checkpoint each: the second is the end of its run, the first is tested if it was selected."""
    checkpoints = [f"rl/checkpoints/step_00000{step}" for step in (1, 2)]
    for key, others in (("1", ["runs/1/policy"]), ("vanilla", [])):
        validated = json.loads((runs / f"eval/{key}/valid/metrics.json").read_text())
        named = [*(f"runs/{key}/{checkpoint}" for checkpoint in checkpoints), *others]
        assert list(validated["policies"]) == named
        for name in ("prec", "long"):
            tested = json.loads((runs / f"eval/{key}/test/{name}/metrics.json").read_text())
            assert list(tested["policies"]) == [p for p in named if p in (validated["selected"]["policy"], *named[1:])]
            assert "selected" not in tested, "nothing is selected on a test set"
    rows = (runs / "results.tsv").read_text().splitlines()
    sets = [row.split("\t")[:2] for row in rows if row.split("\t")[1] in ("Base", "RL", "RLoop")]
    assert sets == [
        [name, method]
        for name in ("valid", "long", "prec", "Average", "Average without valid")
        for method in ("Base", "RL", "RLoop")
    ]


def left_behind_by_a_second_iteration(runs):
    """What is on disk of an iteration whose line was taken out of params.yaml."""
    for name in ("", "eval"):
        shutil.copytree(runs / name / "1", runs / name / "2")
    for file in (runs / "eval/2").rglob("*.json*"):
        file.write_text(file.read_text().replace("runs/1/", "runs/2/"))
