"""Every stage where its output cannot be: on a full disk, beside another that writes it, at a link, where none may be.

The output is then absent, nothing else has changed, and one line names it. (rl: see test_saving and test_rundir.)
"""

import os
import re
import shutil
from pathlib import Path

import pytest

from stages import analyze, merge, prepare, regrade, report, rft, sample, toy
from stages import eval as evaluation
from stages import filter as filtering
from stages.core import jsonl, outputs
from stages.core.errors import InputError
from tests.made_up import HOW, Runs
from tests.scripted import ScriptedEngine, ScriptedEngines
from tests.test_saving import files_of_at_most

TOY = {"pretrain_steps": 2, "pretrain_batch": 2, "num_train": 20, "num_test": 20}
SIZES = {  # bytes at which each stage meets a full disk somewhere else, the last one right before its end
    "prepare": (0, 500, 3_000, 9_000), "filter": (0, 500, 3_000, 9_000), "merge": (0, 3_000, 100_000),
    "sample": (0, 500, 9_000), "toy": (0, 1_000, 20_000), "rft": (0, 3_000, 100_000), "eval": (0, 500, 3_000),
    "regrade": (0, 500, 1_000), "analyze": (0, 1_000, 9_000), "report": (0, 1_000, 30_000),
}  # fmt: skip
SLOW = ("rft", "analyze", "report")


def cases(values):
    """`values`, of which the first part is a stage; those of slow stages are marked."""
    return [pytest.param(*case, marks=pytest.mark.slow if case[0] in SLOW else ()) for case in values]


@pytest.fixture(scope="module")
def given(tmp_path_factory, tiny_policy, other_policy):
    """A directory with what every stage reads."""
    directory = tmp_path_factory.mktemp("given")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        Runs(tiny_policy).all(1)
    for name, policy in {"policy": tiny_policy, "other": other_policy}.items():
        shutil.copytree(policy, directory / name)
    many = ({"id": f"q{i}", "problem": f"{i} + " + "1 + " * 50, "answer": f"{i}", "source": "sums"} for i in range(60))
    jsonl.write(directory / "many.jsonl", many)
    sums = [{"id": f"p{i}", "problem": f"{i}+2=?", "answer": str(i + 2), "source": "sums"} for i in range(1, 20)]
    jsonl.write(directory / "sums.jsonl", sums)
    rollout = {"step": 1, "policy": "p", "num_tokens": 3, "finish_reason": "stop", "prompt": "1+2=" * 200}
    rollouts = [
        rollout | {"problem_id": f"p{i}", "sample": n, "completion": f"{i}.{n}", "answer": "3", "reward": float(n == 0),
                   "verdict": "correct" if n == 0 else "wrong"}
        for i in range(1, 20) for n in range(20)
    ]  # fmt: skip
    jsonl.write(directory / "rollouts.jsonl", rollouts)
    example = {"prompt": "1+2=", "completion": "\\boxed{3}", "pass_rate": 0.1}
    jsonl.write(directory / "examples.jsonl", ({"problem_id": f"p{i}", **example} for i in range(8)))
    return directory


@pytest.fixture
def directory(given, tmp_path, monkeypatch):
    """A working directory with what every stage reads, and nothing else."""
    for path in given.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(stage, out):
    """Make `out`, in the working directory, by a stage."""
    drawn = {"num_samples": 4, **HOW}
    shared = {"policy": ["policy"], **drawn}
    calls = {
        "prepare": lambda: prepare.run(prepare.Options(source="many.jsonl", out=str(out))),
        "filter": lambda: filtering.run(filtering.Options(rollouts=["rollouts.jsonl"], out=str(out))),
        "merge": lambda: merge.run(merge.Options(policy=["policy", "other"], weight=[0.5, 0.5], out=out)),
        "sample": lambda: sample.draw(
            sample.Options(**shared, problems=Path("sums.jsonl"), out=out), lambda _, policy: ScriptedEngine(policy)
        ),
        "toy": lambda: toy.run(toy.Options(out=out, **TOY)),
        "rft": lambda: rft.run(
            rft.Options(policy="policy", examples=Path("examples.jsonl"), out=out, batch_size=4, warn_below=0)
        ),
        "eval": lambda: evaluation.draw(
            evaluation.Options(**shared, problems=[Path("sums.jsonl")], out=out, k=[2]), ScriptedEngines()
        ),
        "regrade": lambda: regrade.run(regrade.Options(rollouts=Path("runs/eval/0"), out=out)),
        "analyze": lambda: analyze.run(analyze.Options(evals=[Path("runs/eval")], out=out)),
        "report": lambda: report.run(report.Options(runs=[Path("runs")], out=out)),
    }
    calls[stage]()


def everything(directory):
    """Each path with its content, without what is only read and what an interrupted evaluation keeps."""
    kept = {".out.partial"}
    paths = sorted(path for path in directory.rglob("*") if kept.isdisjoint(path.relative_to(directory).parts))
    return {path: path.read_bytes() if path.is_file() else os.path.lexists(path) for path in paths}


def said(error):
    """The line that the door makes of an error; an OSError has its file's name."""
    return f"{getattr(error.value, 'filename', None) or error.value}"


@pytest.mark.parametrize(("stage", "size"), cases((stage, size) for stage, sizes in SIZES.items() for size in sizes))
def test_on_a_full_disk_the_output_is_whole_or_absent_and_a_line_names_the_file(directory, stage, size):
    before = everything(directory)
    with files_of_at_most(size), pytest.raises((OSError, ValueError)) as error:
        call(stage, Path("out"))
    assert re.search("out|figures", said(error)) and "\n" not in said(error), said(error)
    assert everything(directory) == before, "something is left"


@pytest.mark.parametrize("stage", cases((stage,) for stage in SIZES))
def test_two_at_once_links_and_places_that_take_no_files_are_refused_in_a_line(directory, stage, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "thesis.tex").write_text("precious")
    (directory / "lost").symlink_to("nowhere")
    (directory / "full").symlink_to(elsewhere)
    (directory / "round").symlink_to("round")
    (directory / "file").write_text("precious")
    before = everything(directory)
    faults = {
        "out": "is being written by another process",
        "lost": "link to something that is not there",
        "full": "already holds something|is a directory",
        "round": "cannot be written|link to something",
        "file/out": "cannot be written",
        "/proc/out": "cannot be written",
        "/dev/null": "already holds something|is not a plain file",
    }
    with outputs.locked("out"):
        for out, fault in faults.items():
            with pytest.raises(InputError, match=fault) as error:
                call(stage, Path(out))
            assert Path(out).name in str(error.value) and "\n" not in str(error.value), error.value
    assert everything(directory) == before, "something was changed"
    call(stage, Path("out"))
    assert Path("out").exists()
