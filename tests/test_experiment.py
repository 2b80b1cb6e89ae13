"""The experiments: a project for each seed and arm, and what they share."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rloop_cli.app import app
from stages.core.errors import InputError

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "experiments").glob("*/*.yaml"))
SMALL = """
params: params.yaml
common: {rl: {seed: $seed}}
seeds: [3, 4]
arms:
  loop: {}
  all: {filter: {rate: 1.0}}
  twice: {rl: {steps: 8}}
"""
GRAPH = """
stages:
  rl:
    cmd: mkdir -p runs/1/rl && echo rl ${rl} >> ../made && echo ${rl} > runs/1/rl/log
    params: [rl]
    outs: [runs/1/rl: {cache: false}]
  filter:
    cmd: echo filter ${filter} >> ../made && cat runs/1/rl/log > runs/1/examples
    deps: [runs/1/rl]
    params: [filter]
    outs: [runs/1/examples]
"""


def module(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


@pytest.fixture
def experiments(monkeypatch):
    return module("run", monkeypatch)


@pytest.fixture
def small(tmp_path):
    """An experiment of two seeds and three arms in a directory of its own."""
    (tmp_path / "params.yaml").write_text("rl: {steps: 4}\nfilter: {rate: 0.3}\n")
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path / "small.yaml"


def test_a_merge_patch_changes_adds_and_removes(experiments):
    before = {"a": {"b": 1, "c": 2}, "d": [1], "e": {"f": 1}}
    after = experiments.patched(before, {"a": {"b": 3, "c": None, "g": {"h": None, "i": 4}}, "d": [2], "e": 5})
    assert after == {"a": {"b": 3, "g": {"i": 4}}, "d": [2], "e": 5}
    assert before == {"a": {"b": 1, "c": 2}, "d": [1], "e": {"f": 1}}


def test_a_seed_and_an_arm_are_the_params_with_their_patches(experiments, small):
    loop, everything, twice = experiments.projects(small, "4", [])
    assert [project.path.name for project in (loop, everything, twice)] == ["4-loop", "4-all", "4-twice"]
    assert loop.params == {"rl": {"steps": 4, "seed": 4}, "filter": {"rate": 0.3}}
    assert everything.params == loop.params | {"filter": {"rate": 1.0}}
    assert twice.params == loop.params | {"rl": {"steps": 8, "seed": 4}}
    assert {project.first for project in (loop, everything, twice)} == {loop.path}
    (alone,) = experiments.projects(small, "4", ["all"])
    assert alone.first == alone.path, "there is nothing yet to share with"
    twice.path.mkdir(parents=True)
    assert {project.first for project in experiments.projects(small, "4", ["loop", "all"])} == {twice.path}
    loop.path.mkdir()
    assert experiments.projects(small, "4", ["all"])[0].first == loop.path


@pytest.mark.parametrize(("text", "message"), [
    (SMALL.replace("all:", "some:"), "has no arm all: it has loop, some, twice"),
    (SMALL.replace("$seed", "$sed"), "is no experiment"),
    ("a list", "is no experiment"),
    ("params: [", "is no experiment"),
])  # fmt: skip
def test_what_is_wrong_with_an_experiment_is_said_in_one_line(experiments, small, text, message):
    small.write_text(text)
    with pytest.raises(InputError, match=message) as raised:
        experiments.projects(small, "3", ["all"])
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_an_arm_takes_over_what_its_params_do_not_change(experiments, small, monkeypatch):
    root = small.parent / "root"
    shutil.copytree(ROOT / ".dvc", root / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache"))
    (root / "dvc.yaml").write_text(GRAPH)
    monkeypatch.setattr(experiments, "ROOT", root)
    assert experiments.run(small, [], [], [], 2) == 0
    runs = small.parent / "runs/small"
    assert sorted(path.name for path in runs.iterdir()) == sorted(
        ["made", *(f"{seed}-{arm}" for seed in (3, 4) for arm in ("loop", "all", "twice"))]
    )
    made = (runs / "made").read_text().splitlines()
    assert sorted(line for line in made if line.endswith(" 3")) == ["rl --steps 4 --seed 3", "rl --steps 8 --seed 3"]
    assert (
        sorted(line for line in made if line.startswith("filter"))
        == ["filter --rate 0.3"] * 4 + ["filter --rate 1.0"] * 2
    )
    assert (runs / "4-twice/runs/1/examples").read_text() == "--steps 8 --seed 4\n"
    assert experiments.run(small, [], ["all"], [], 1) == 0
    assert (runs / "made").read_text().splitlines() == made, "started again it makes nothing anew"


def test_a_start_script_makes_runs_0_whole_or_not_at_all(experiments, small):
    small.write_text("start: start.sh $seed 7\n" + SMALL)
    script = small.with_name("start.sh")
    script.write_text("echo $1 $2 >$3/numbers\nfalse\n")
    with pytest.raises(InputError, match="failed, see above"):
        experiments.make_start(small, "3")
    assert not list((small.parent / "runs").rglob("numbers"))
    script.write_text("echo $1 $2 >$3/numbers\n")
    experiments.make_start(small, "3")
    (project, *_) = experiments.projects(small, "3", [])
    project.make()
    assert (project.path / "runs/0/numbers").read_text() == "3 7\n"


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_arm_passes_the_check_but_for_what_its_start_makes(experiments, tmp_path, monkeypatch, file):
    (tmp_path / "experiments").mkdir()
    for name in ("experiments", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("runs"), dirs_exist_ok=True)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    projects = experiments.projects(tmp_path / file.relative_to(ROOT), "1", [])
    assert projects
    for project in projects:
        project.make()
        monkeypatch.chdir(project.path)
        faults = CliRunner().invoke(app, ["check"]).stderr.splitlines()
        assert not [fault for fault in faults if "runs/0/" not in fault]
