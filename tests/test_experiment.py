"""The experiment on the toy: its plan names nothing that an earlier part has not made, and its means are means."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from stages.core import jsonl, records
from stages.toy import make_sets, problems


@pytest.fixture
def experiment(monkeypatch):
    """The two modules of experiments/toy."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "experiments/toy")
    import results
    import run

    yield run, results
    for name in ("run", "results"):
        del sys.modules[name]


def arguments(part, name):
    flag = f"--{name}"
    words = part.make if isinstance(part.make, list) else []
    return [after for word, after in pairwise(words) if word == flag]


def test_every_part_reads_only_what_was_made_before_it(experiment):
    run, _ = experiment
    for name in run.ARMS:
        made = []
        before = [] if name == "loop" else list(run.parts("loop", 3))
        for part in [*run.parts("vanilla", 3), *before, *run.parts(name, 3)]:
            assert part.out not in made, f"{part.out} is made twice"
            for flag in ("policy", "problems", "rollouts", "examples", "evals"):
                for path in arguments(part, flag):
                    assert any(f"{path}/".startswith(f"{out}/") for out in [*made, "eval"]), f"{part.out} needs {path}"
            made.append(part.out)


def test_every_method_of_the_tables_is_evaluated(experiment):
    run, results = experiment
    asked = {
        (part.out.removeprefix("eval/"), policy)
        for name in run.ARMS
        for part in run.parts(name, 1)
        if part.out.startswith("eval/")
        for policy in arguments(part, "policy")
    }
    wanted = {(place, policy) for place, policy, _ in results.METHODS.values() if policy}
    assert wanted <= asked


@pytest.mark.parametrize("seed", range(1, 6))
def test_the_training_problems_are_split_as_they_are_meant_to_be(experiment, tmp_path, seed):
    run, _ = experiment
    (tmp_path / "0").mkdir()
    jsonl.write(tmp_path / "0/train.jsonl", problems("train", make_sets(seed, 756, 10, 0.2)["train"]))
    run.split_sets(tmp_path)
    names = ("train", "select", "mixed")
    found = {name: list(records.read_problems(tmp_path / f"sets/{name}.jsonl")) for name in names}
    assert [len(found[name]) for name in found] == [320, 100, 320]
    ids = {name: {problem["id"] for problem in found[name]} for name in found}
    assert not ids["train"] & ids["select"]
    assert len(ids["mixed"]) == 320
    assert sum(map(run.is_hard, found["mixed"])) == 128


def test_a_problem_is_hard_where_a_running_total_misses_the_answer(experiment):
    run, _ = experiment
    assert not run.is_hard({"problem": "2*3+4=?", "answer": "10"})
    assert run.is_hard({"problem": "2+3*4=?", "answer": "14"})


def test_a_mean_over_seeds_has_the_student_interval(experiment):
    _, results = experiment
    found = results.mean([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.value == 3.0
    assert found.half == pytest.approx(2.776445 * 2.5**0.5 / 5**0.5, rel=1e-6)  # t of 4 degrees of freedom
    assert results.cell(results.mean([2.0, 2.0])) == "2.0"
    assert results.cell(results.mean([3.0, 3.1, 3.2]), signed=True).startswith("**+3.1")
    assert results.cell(results.mean([-1.0, 0.0, 1.0]), signed=True) == "+0.0 ± 2.5"


def test_differences_are_taken_within_a_seed(experiment, monkeypatch, tmp_path):
    run, results = experiment
    for seed, correct in (("1", {"0/policy": 8, results.METHODS["RL"][1]: 16}), ("2", {"0/policy": 16})):
        for name in run.SETS:
            rows = [
                {"problem_id": "a", "policy": policy, "num_samples": 32, "num_correct": count, "num_truncated": 0}
                for policy, count in correct.items()
            ]
            path = tmp_path / seed / "eval/loop" / name / "results.jsonl"
            path.parent.mkdir(parents=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(results, "RUNS", tmp_path)
    values = results.measured()
    assert values["Base", "all", "avg@32"] == {"1": 25.0, "2": 50.0}
    assert results.differences(values, "RL", "Base", "outside", "avg@32") == [25.0]
    assert results.differences(values, "RL", "Base", "all", "avg@32", relative=True) == [100.0]


def test_a_cost_counts_every_run_and_fine_tuning_behind_a_policy_once(experiment, tmp_path):
    _, results = experiment

    def write(place, **record):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(json.dumps(record))

    for run, start in (("1/rl", None), ("2/rl", "1/policy")):
        write(f"{run}/manifest.json", stage="rl", **({"policy": start} if start else {}))
        lines = [f"{step}\t{100 * step}\t{10 * step}\n" for step in range(1, results.STEPS + 2)]
        (tmp_path / run / "log.tsv").write_text("step\tnum_rollouts\tupdate_tokens\n" + "".join(lines))
    write("1/policy/manifest.json", stage="rft", policy="0/policy", examples="1/examples.jsonl")
    write("1/policy/metrics.json", num_tokens=7)
    write("1/examples.manifest.json", rollouts=["1/rl"])
    end = f"2/rl/checkpoints/{results.step_name(2)}"
    write("2/policy/manifest.json", stage="merge", paths={"policy 0": "1/policy", "policy 1": end})

    first = sum(range(1, results.STEPS + 1))
    assert results.cost(tmp_path, "0/policy") == (0, 0, 0)
    assert results.cost(tmp_path, "1/policy") == (100 * first, 10 * first, 7)
    assert results.cost(tmp_path, end) == (100 * (first + 1 + 2), 10 * (first + 1 + 2), 7)
    assert results.cost(tmp_path, "2/policy") == results.cost(tmp_path, end)


def test_temporal_sampling_takes_turns_from_the_latest_checkpoint(experiment):
    _, results = experiment

    def counts(correct):
        return [{"num_samples": 32, "num_correct": correct}]

    names = [f"vanilla/rl/checkpoints/{results.step_name(step)}" for step in results.SPREAD]
    found = results.spread(dict(zip(names, map(counts, (0, 0, 32)), strict=True)))
    assert found["avg@32"][0] == pytest.approx(11 / 32)
    assert found["pass@8"][0] == 1.0
    assert results.spread({}) == {}
