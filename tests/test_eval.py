"""eval with an engine that answers by rule: what it writes, resumes, refuses and grades again; then the real one."""

import json
import random
import shutil
from collections import Counter
from itertools import combinations
from pathlib import Path

import orjson
import pytest

from stages import regrade
from stages.core import jsonl, records
from stages.core.errors import InputError
from stages.core.grading import ballots, verifier
from stages.core.grading.verifier import Verifier
from stages.core.records import Result, Rollout
from stages.core.study import metrics, scoring
from stages.core.study.votes import maj_at_k
from stages.eval.partial import Groups, Writer
from tests.scripted import problem

NUM_PROBLEMS = 12


def read(out, kind=Rollout):
    return list(records.read(out / f"{kind.__name__.lower()}s.jsonl", kind))


def load(path):
    return orjson.loads(path.read_bytes())


def samples(rollouts):
    """Completions by policy, problem and sample."""
    return {(r["policy"], r["problem_id"], r["sample"]): r["completion"] for r in rollouts}


def test_results_and_metrics_follow_from_the_rollouts(run, engines, tiny_policy, other_policy, problems, tmp_path):
    run([tiny_policy, other_policy], problems, tmp_path / "out")
    rollouts, results = read(tmp_path / "out"), read(tmp_path / "out", Result)
    assert len(rollouts) == 2 * NUM_PROBLEMS * 4 and len(results) == 2 * NUM_PROBLEMS
    for result in results:
        own = [r for r in rollouts if (r["policy"], r["problem_id"]) == (result["policy"], result["problem_id"])]
        assert result["num_correct"] == sum(r["reward"] for r in own)
        assert result["num_truncated"] == sum(r["finish_reason"] == "length" for r in own)
        assert result["num_no_answer"] == sum(r["verdict"] == "no_answer" for r in own)
        assert result["num_tokens"] == sum(r["num_tokens"] for r in own)
    written = load(tmp_path / "out/metrics.json")
    mine = [result for result in results if result["policy"] == str(other_policy)]
    summary = written["policies"][str(other_policy)]
    assert summary["avg@4"]["value"] == sum(result["num_correct"] for result in mine) / (4 * NUM_PROBLEMS)
    assert summary["pass@4"]["value"] == sum(result["num_correct"] > 0 for result in mine) / NUM_PROBLEMS
    assert summary["verdicts"]["no_answer"] == sum(result["num_no_answer"] for result in mine) > 0
    theirs = [result for result in results if result["policy"] == str(tiny_policy)]
    difference = written["differences"][f"{other_policy} - {tiny_policy}"]
    assert difference == metrics.compare(theirs, mine, (1, 4))
    assert difference["avg@4"]["value"] == pytest.approx(
        summary["avg@4"]["value"] - written["policies"][str(tiny_policy)]["avg@4"]["value"]
    )
    assert len(engines) == 1 and engines[0].num_loads == 2


def test_the_samples_of_a_problem_do_not_depend_on_its_place_or_company(
    run, engines, tiny_policy, other_policy, problems, tmp_path
):
    run([tiny_policy, other_policy], problems, tmp_path / "all")
    few = tmp_path / "few.jsonl"
    jsonl.write(few, (problem(number) for number in reversed(range(3, NUM_PROBLEMS))))
    run([other_policy], few, tmp_path / "few")
    everything, some = samples(read(tmp_path / "all")), samples(read(tmp_path / "few"))
    assert len(some) == 4 * (NUM_PROBLEMS - 3)
    assert some == {key: everything[key] for key in some}


def test_another_seed_draws_other_samples(run, engines, tiny_policy, problems, tmp_path):
    run([tiny_policy], problems, tmp_path / "zero")
    run([tiny_policy], problems, tmp_path / "one", seed=1)
    assert samples(read(tmp_path / "zero")) != samples(read(tmp_path / "one"))


def test_an_interrupted_call_goes_on_where_it_stopped(run, engines, tiny_policy, other_policy, problems, tmp_path):
    both = [tiny_policy, other_policy]
    run(both, problems, tmp_path / "whole")
    engines.dies_after = NUM_PROBLEMS + 5
    with pytest.raises(KeyboardInterrupt, match="what was drawn is kept: the same command draws the rest"):
        run(both, problems, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(both, problems, tmp_path / "out")
    assert len(engines[-1].prompted) == NUM_PROBLEMS - 5
    assert engines[-1].num_loads == 1  # the finished policy's weights are not even read
    for name in ("rollouts.jsonl", "results.jsonl", "metrics.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sums.jsonl", "whole"]


def write(path, *problem_ids, sample=0, engine=0):
    with Writer(path, "sums", engine) as writer:
        for problem_id in problem_ids:
            writer.add([{"problem_id": problem_id, "sample": sample}])
    return path / f"sums-{engine}.jsonl"


def kept(path):
    """The sample on disk by problem."""
    with Groups(path, "sums") as groups:
        return {problem_id: groups.get(problem_id)[0]["sample"] for problem_id in sorted(groups.problem_ids)}


@pytest.mark.parametrize(
    "broken", [b"", b"\0\0\0\n", b"17\n", b"[]\n", b'[5,[{"problem_id":"b","sample":0}]]\n', b'[5,[{"pro\n']
)
def test_what_a_crash_or_a_hand_has_broken_is_drawn_again(tmp_path, broken):
    path = write(tmp_path, "a")
    path.write_bytes(path.read_bytes() + broken + b'[{"problem_id":"c","sample":7}]\n'[: 40 if broken else 20])
    assert kept(tmp_path) == {"a": 0}
    write(tmp_path, "c", sample=1)
    assert kept(tmp_path) == {"a": 0, "c": 1}


def test_a_line_that_a_crash_cut_is_drawn_again(tmp_path):
    path = write(tmp_path, "a", "b")
    path.write_bytes(path.read_bytes()[:-5])
    assert kept(tmp_path) == {"a": 0}
    write(tmp_path, "b", "c", sample=1)
    assert kept(tmp_path) == {"a": 0, "b": 1, "c": 1}


def test_the_groups_of_all_engines_count_whatever_their_number_was(tmp_path):
    write(tmp_path, "a", engine=0)
    path = write(tmp_path, "b", "c", engine=1)
    path.write_bytes(path.read_bytes()[:-5])
    write(tmp_path, "c", engine=0, sample=1)  # one engine goes on; the other's broken line stays where it is
    assert kept(tmp_path) == {"a": 0, "b": 0, "c": 1}


@pytest.fixture
def interrupted(run, engines, tiny_policy, problems, tmp_path):
    engines.dies_after = 5
    with pytest.raises(KeyboardInterrupt):
        run([tiny_policy], problems, tmp_path / "out")
    return engines


def test_an_interrupted_call_is_not_mixed_with_another(run, interrupted, tiny_policy, problems, tmp_path):
    with pytest.raises(
        InputError, match=r"max_tokens was 32, is now 16. Repeat it as it was begun, or remove .*\.partial"
    ):
        run([tiny_policy], problems, tmp_path / "out", max_tokens=16)
    with pytest.raises(InputError, match="num_samples was 4, is now 5"):
        run([tiny_policy], problems, tmp_path / "out", num_samples=5)


def test_more_policies_can_be_named_when_a_call_is_repeated(
    run, interrupted, tiny_policy, other_policy, problems, tmp_path
):
    run([other_policy, tiny_policy], problems, tmp_path / "out")
    assert len(interrupted[-1].prompted) == 2 * NUM_PROBLEMS - 5


def test_problems_that_changed_are_drawn_anew(run, interrupted, tiny_policy, problems, tmp_path):
    jsonl.write(problems, (problem(number) | {"answer": "0"} for number in range(NUM_PROBLEMS)))
    run([tiny_policy], problems, tmp_path / "out")
    assert len(interrupted[-1].prompted) == NUM_PROBLEMS
    assert {rollout["reward"] for rollout in read(tmp_path / "out")} == {0.0}


def test_a_finished_call_is_not_repeated_and_another_is_refused(run, engines, tiny_policy, problems, tmp_path, capsys):
    run([tiny_policy], problems, tmp_path / "out")
    before = (tmp_path / "out/manifest.json").read_bytes()
    run([tiny_policy], problems, tmp_path / "out", memory_fraction=0.5)
    assert "out is done: the same options and inputs made it" in capsys.readouterr().err
    assert len(engines) == 1 and (tmp_path / "out/manifest.json").read_bytes() == before
    with pytest.raises(InputError, match=r"out is another output: k was \[.*\], is now \[1, 2\]: name another --out"):
        run([tiny_policy], problems, tmp_path / "out", k=[1, 2])
    with pytest.raises(InputError, match=f"out evaluates other policies \\({tiny_policy}\\): name another --out"):
        run([f"{tiny_policy}/../{tiny_policy.name}"], problems, tmp_path / "out")
    assert len(engines) == 1


def test_what_another_verifier_graded_is_not_taken_for_done(run, engines, tiny_policy, problems, tmp_path, monkeypatch):
    run([tiny_policy], problems, tmp_path / "out")
    monkeypatch.setitem(verifier.VERSION, "grader", "0.5")
    with pytest.raises(InputError, match=r"by another verifier \(grader was .*, is now 0\.5\): .* rloop regrade "):
        run([tiny_policy], problems, tmp_path / "out")
    assert len(engines) == 1


@pytest.mark.slow
def test_one_s_own_rewards_score_an_evaluation_and_are_part_of_what_it_is(
    run, engines, tiny_policy, problems, tmp_path
):
    file = tmp_path / "mine.py"
    file.write_text(
        "def boxed(completions, id, **_):\n    return [text.startswith('\\\\boxed') for text in completions]\n"
    )
    own = {"reward": [f"{file}:boxed"]}
    run([tiny_policy], problems, tmp_path / "out", **own)
    rollouts = read(tmp_path / "out")
    assert {r["reward"] for r in rollouts} == {0.0, 1.0}
    assert all(r["reward"] == r["completion"].startswith("\\boxed") == r["rewards"]["mine.py:boxed"] for r in rollouts)
    average = load(tmp_path / "out/metrics.json")["policies"][str(tiny_policy)]["avg@4"]["value"]
    assert average == sum(r["verdict"] == "correct" for r in rollouts) / len(rollouts)
    run([tiny_policy], problems, tmp_path / "out", **own)
    assert len(engines) == 1
    assert load(tmp_path / "out/manifest.json")["parameters"]["reward"] == ["mine.py:boxed"]
    with pytest.raises(InputError, match="its rewards are not math-verify's"):
        regrade.run(regrade.Options(rollouts=tmp_path / "out", out=tmp_path / "again"))
    with pytest.raises(InputError, match="--maj counts answers that math-verify"):
        run([tiny_policy], problems, tmp_path / "again", **own, maj=True)
    file.write_text("def boxed(completions, **_):\n    return [1 / len(text) for text in completions if text != '7']\n")
    with pytest.raises(InputError, match="reward_digest was"):
        run([tiny_policy], problems, tmp_path / "out", **own)
    file.write_text(
        "def boxed(completions, **_):\n    return [1.0] * len(completions) if len(completions) == 2 else 7\n"
    )
    for _ in range(2):  # what failed is not kept for a second call to find
        with pytest.raises(InputError, match=r"failed on all 12 groups: .* it returned int 7, not a list of 4 numbers"):
            run([tiny_policy], problems, tmp_path / "again", **own)
    assert not (tmp_path / "again").exists()


def test_two_names_of_one_checkpoint_are_evaluated_once(run, engines, tiny_policy, problems, tmp_path):
    shutil.copytree(tiny_policy, tmp_path / "again")
    run([tiny_policy, tmp_path / "again"], problems, tmp_path / "out")
    assert len(engines[-1].prompted) == NUM_PROBLEMS
    results = metrics.by_policy(read(tmp_path / "out", Result))
    assert [list(results), len(results[str(tmp_path / "again")])] == [
        [str(tiny_policy), str(tmp_path / "again")], NUM_PROBLEMS
    ]  # fmt: skip


def test_several_sets_share_one_engine_and_lie_side_by_side(
    run, engines, tiny_policy, other_policy, problems, tmp_path
):
    jsonl.write(tmp_path / "more.jsonl", (problem(number) for number in range(3, 7)))
    run([tiny_policy, other_policy], [problems, tmp_path / "more.jsonl"], tmp_path / "out", select="avg@4")
    assert [engine.num_loads for engine in engines] == [2]
    assert [len(read(tmp_path / "out" / name)) for name in ("sums", "more")] == [2 * 4 * NUM_PROBLEMS, 2 * 4 * 4]
    overview = load(tmp_path / "out/metrics.json")
    for name in ("sums", "more"):
        policies = load(tmp_path / "out" / name / "metrics.json")["policies"]
        assert load(tmp_path / "out" / name / "manifest.json")["set"] == name
        assert overview["sets"][name][str(other_policy)]["pass@4"] == policies[str(other_policy)]["pass@4"]["value"]
    assert overview["selected"] == load(tmp_path / "out/sums/metrics.json")["selected"]


def test_the_best_policy_by_a_metric_is_named(run, engines, tiny_policy, other_policy, problems, tmp_path, capsys):
    run([tiny_policy, other_policy], problems, tmp_path / "out", select="avg@4")
    written = load(tmp_path / "out/metrics.json")
    averages = {name: summary["avg@4"]["value"] for name, summary in written["policies"].items()}
    assert averages[str(other_policy)] > averages[str(tiny_policy)]
    assert written["selected"] == {
        "policy": str(other_policy), "metric": "avg@4", "value": averages[str(other_policy)]
    }  # fmt: skip
    assert f"best on sums by avg@4: {other_policy}" in capsys.readouterr().out


@pytest.fixture
def validated(run, engines, tiny_policy, other_policy, problems, tmp_path, monkeypatch):
    """An eval of a run's three checkpoints, the second of which is the best, and of a policy fine-tuned after it."""
    monkeypatch.chdir(tmp_path)
    for path, policy in {
        CHECKPOINTS[0]: tiny_policy, CHECKPOINTS[1]: other_policy, CHECKPOINTS[2]: tiny_policy, TUNED: tiny_policy
    }.items():  # fmt: skip
        shutil.copytree(policy, path)
    run([str(Path(TUNED)), "1/rl/checkpoints"], problems, Path("valid"), select="avg@4")
    assert load(Path("valid/metrics.json"))["selected"]["policy"] == CHECKPOINTS[1]
    return Path("valid")


CHECKPOINTS = [f"1/rl/checkpoints/step_{step:06d}" for step in (2, 10, 12)]
TUNED = "1/policy"


def evaluated(out):
    """The policies that an eval output has results of, in order."""
    return list(metrics.by_policy(read(Path(out), Result)))


def test_what_an_evaluation_selected_is_evaluated_with_ends_of_runs_and_what_is_no_checkpoint(run, validated, problems):
    run([], problems, Path("test"), selected=[validated])
    assert evaluated("test") == [TUNED, *CHECKPOINTS[1:]]
    run([], problems, Path("all"), selected=[validated], all_checkpoints=True)
    assert evaluated("all") == [TUNED, *CHECKPOINTS]


def test_a_policy_that_is_named_and_selected_or_selected_twice_is_evaluated_once(run, validated, problems):
    shutil.copytree(validated, "again")
    run([CHECKPOINTS[0], CHECKPOINTS[2]], problems, Path("test"), selected=[validated, Path("again")])
    assert evaluated("test") == [CHECKPOINTS[0], CHECKPOINTS[2], TUNED, CHECKPOINTS[1]]
    run(["1/rl/checkpoints/"], problems, Path("named"), selected=[validated])
    assert evaluated("named") == [*CHECKPOINTS, TUNED]


def test_policies_are_taken_from_no_eval_that_selected_nothing(run, validated, problems):
    run([TUNED], problems, Path("unselected"))
    with pytest.raises(InputError, match="--selected unselected: it selected no policy; evaluate with --select"):
        run([], problems, Path("test"), selected=[Path("unselected")])
    with pytest.raises(InputError, match="--selected 1/policy: no manifest"):
        run([], problems, Path("test"), selected=[Path(TUNED)])
    shutil.rmtree(TUNED)
    with pytest.raises(InputError, match="policy 1/policy: no such directory"):
        run([], problems, Path("test"), selected=[validated])


def test_policies_that_were_made_anew_since_they_were_selected_are_refused(run, validated, problems, other_policy):
    shutil.rmtree(CHECKPOINTS[2])
    shutil.copytree(other_policy, CHECKPOINTS[2])
    with pytest.raises(InputError, match="--selected valid: 1/rl/checkpoints/step_000012 has changed since"):
        run([], problems, Path("test"), selected=[validated])
    assert not Path("test").exists()
    run([TUNED, "1/rl/checkpoints"], problems, Path("anew"), select="avg@4")
    run([], problems, Path("test"), selected=[Path("anew")])
    assert evaluated("test") == [TUNED, CHECKPOINTS[1], CHECKPOINTS[2]]


def test_of_equals_by_the_metric_the_best_by_average_is_named_as_the_report_does_then_the_first():
    def summary(coverage, average):
        return {"avg@4": {"value": average}, "pass@4": {"value": coverage}}

    summaries = {"a": summary(0.9, 0.1), "b": summary(0.9, 0.3), "c": summary(0.9, 0.3), "d": summary(0.8, 0.9)}
    assert scoring.selected(summaries, "pass@4") == {"policy": "b", "metric": "pass@4", "value": 0.9}
    assert scoring.selected(summaries, "avg@4")["policy"] == "d"


def majority_is_right(voters, k):
    """The share of all choices of k `voters` in which most are correct, of classes that are level each its part."""
    chances = []
    for chosen in combinations(voters, k):
        counts = Counter(vote for vote in chosen if vote != "silent")
        winners = [vote for vote in counts if counts[vote] == max(counts.values())]
        chances.append(("correct" in winners) / len(winners) if winners else 0)
    return sum(chances) / len(chances)


@pytest.mark.parametrize("seed", range(40))
def test_maj_at_k_is_the_share_of_all_choices_of_k_samples_in_which_most_are_correct(seed):
    luck = random.Random(seed)
    voters = luck.choices(["correct", "silent", "a", "b", "c", "d"], weights=[3, 1, 3, 2, 1, 1], k=luck.randint(1, 9))
    counts = Counter(voters)
    wrong = tuple(counts[vote] for vote in "abcd" if counts[vote])
    for k in range(1, len(voters) + 1):
        expected = majority_is_right(voters, k)
        assert maj_at_k(len(voters), counts["correct"], wrong, k) == pytest.approx(expected, abs=1e-12)


def test_more_votes_than_samples_are_refused():
    with pytest.raises(InputError, match="more votes than samples"):
        maj_at_k(4, 2, (2, 1), 2)


@pytest.mark.slow
def test_equivalent_answers_are_one_class_and_what_cannot_be_read_is_none():
    halves = {"1/2": 1, "0.5": 2, r"\frac12": 3}
    sums = {"x+1": 2, "1+x": 1, r"2x": 1}
    words = {"east": 1, r"\text{East}": 1}
    unreadable = {r"\frac{": 9, "x^^2": 9, r"\sqrt{}": 9}
    with Verifier() as verifier:
        sizes = ballots.class_sizes([Counter(halves | sums | words | unreadable), Counter(), Counter(sums)], verifier)
    assert sizes == [[6, 3, 2, 1], [], [3, 1]]


def test_answers_are_of_one_class_whichever_of_them_the_verifier_takes_for_the_answer():
    letter, labelled = "B", "(B) 5"
    with Verifier() as verifier:
        assert verifier.compare([(letter, labelled), (labelled, letter)]) == ["correct", "wrong"]
        for order in ([letter, labelled, "C"], [labelled, "C", letter]):
            assert ballots.class_sizes([Counter(order)], verifier) == [[2, 1]]


def test_majorities_follow_from_the_rollouts(run, engines, tiny_policy, other_policy, problems, tmp_path, capsys):
    both = [tiny_policy, other_policy]
    run(both, problems, tmp_path / "out", num_samples=6, k=[1, 4], maj=True, select="maj@4")
    rollouts, written = read(tmp_path / "out"), load(tmp_path / "out/metrics.json")
    for policy in map(str, both):
        own = [r for r in rollouts if r["policy"] == policy]
        chances = []
        for number in range(NUM_PROBLEMS):  # this engine has one wrong answer for each problem
            names = {"correct": "correct", "wrong": "wrong", "no_answer": "silent"}
            voters = [names[r["verdict"]] for r in own if r["problem_id"] == f"p{number}"]
            chances.append(majority_is_right(voters, 4))
        assert written["policies"][policy]["maj@4"]["value"] == pytest.approx(sum(chances) / NUM_PROBLEMS)
        low, value, high = (written["policies"][policy]["maj@4"][key] for key in ("low", "value", "high"))
        assert low < value < high
    values = [written["policies"][str(policy)]["maj@4"]["value"] for policy in both]
    assert written["differences"][f"{other_policy} - {tiny_policy}"]["maj@4"]["value"] == pytest.approx(
        values[1] - values[0]
    )
    assert written["selected"]["value"] == max(values) and "maj@4" in capsys.readouterr().out
    assert any(result["wrong_votes"] for result in read(tmp_path / "out", Result))


def test_majorities_are_the_same_at_once_after_an_interruption_and_by_grading_again(
    run, engines, tiny_policy, problems, tmp_path
):
    run([tiny_policy], problems, tmp_path / "out", maj=True)
    engines.dies_after = 5
    with pytest.raises(KeyboardInterrupt):
        run([tiny_policy], problems, tmp_path / "later")
    run([tiny_policy], problems, tmp_path / "later", maj=True)  # what was drawn without counts
    assert len(engines[-1].prompted) == NUM_PROBLEMS - 5
    run([tiny_policy], problems, tmp_path / "without")
    assert "maj" not in (tmp_path / "without/metrics.json").read_text()
    regrade.run(regrade.Options(rollouts=tmp_path / "without", out=tmp_path / "again", maj=True))
    for name in ("rollouts.jsonl", "results.jsonl", "metrics.json"):
        for other in ("later", "again"):
            assert (tmp_path / other / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_greedy_completions_are_measured_beside_the_samples_and_change_none_of_their_figures(
    run, engines, tiny_policy, other_policy, problems, tmp_path, capsys
):
    both = [tiny_policy, other_policy]
    run(both, problems, tmp_path / "without")
    run(both, problems, tmp_path / "out", greedy=True, select="greedy")
    assert engines[-1].num_loads == 2 and "greedy" in capsys.readouterr().out
    assert read(tmp_path / "out") == read(tmp_path / "without")
    drawn = list(records.read(tmp_path / "out/greedy.jsonl", Rollout))
    assert [(r["policy"], r["problem_id"], r["sample"], r["greedy"]) for r in drawn] == [
        (str(policy), f"p{number}", 0, True) for policy in both for number in range(NUM_PROBLEMS)
    ]
    with_it, without = (load(tmp_path / name / "metrics.json") for name in ("out", "without"))
    for policy in map(str, both):
        rewards = [r["reward"] for r in drawn if r["policy"] == policy]
        assert with_it["policies"][policy].pop("greedy")["value"] == sum(rewards) / NUM_PROBLEMS
    assert "value" in with_it["differences"][f"{other_policy} - {tiny_policy}"].pop("greedy")
    assert with_it.pop("selected")["metric"] == "greedy" and with_it == without


def test_greedy_completions_do_not_depend_on_the_seed(run, engines, tiny_policy, problems, tmp_path):
    run([tiny_policy], problems, tmp_path / "zero", greedy=True)
    run([tiny_policy], problems, tmp_path / "one", greedy=True, seed=1)
    assert read(tmp_path / "zero") != read(tmp_path / "one")
    assert (tmp_path / "zero/greedy.jsonl").read_bytes() == (tmp_path / "one/greedy.jsonl").read_bytes()


@pytest.mark.parametrize("groups_before", [5, NUM_PROBLEMS + 5])
def test_greedy_completions_go_on_where_they_stopped_and_are_graded_again(
    run, engines, tiny_policy, problems, tmp_path, capsys, groups_before
):
    run([tiny_policy], problems, tmp_path / "out", greedy=True)
    engines.dies_after = groups_before
    with pytest.raises(KeyboardInterrupt):
        run([tiny_policy], problems, tmp_path / "later", greedy=True)
    run([tiny_policy], problems, tmp_path / "later", greedy=True)
    assert len(engines[-1].prompted) == 2 * NUM_PROBLEMS - groups_before
    regrade.run(regrade.Options(rollouts=tmp_path / "out", out=tmp_path / "again"))
    assert "no verdict changed" in capsys.readouterr().out
    for name in ("rollouts.jsonl", "greedy.jsonl", "results.jsonl", "metrics.json"):
        for other in ("later", "again"):
            assert (tmp_path / other / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    flipped = [r | {"verdict": "wrong", "reward": 0.0} for r in records.read(tmp_path / "out/greedy.jsonl", Rollout)]
    jsonl.write(tmp_path / "out/greedy.jsonl", flipped)
    regrade.run(regrade.Options(rollouts=tmp_path / "out", out=tmp_path / "mended"))
    assert (tmp_path / "mended/greedy.jsonl").read_bytes() == (tmp_path / "later/greedy.jsonl").read_bytes()
    [moved] = [line.split() for line in capsys.readouterr().out.splitlines() if "] " in line and " greedy " in line]
    assert float(moved[2]) == 0


def test_the_tables_show_a_difference_that_is_real(run, engines, tiny_policy, make_policy, problems, tmp_path, capsys):
    run([tiny_policy, make_policy(std=0.6)], problems, tmp_path / "out", num_samples=16)
    [row] = [line for line in capsys.readouterr().out.splitlines() if " - " in line]
    assert " *" in row
    assert load(tmp_path / "out/metrics.json")["differences"].popitem()[1]["avg@16"]["real"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": [1, 8]}, r"--k 8 needs 1 to 4 \(--num-samples\)"),
        ({"k": [0]}, "--k 0"),
        ({"num_samples": 0}, "--num-samples 0: must be at least 1"),
        ({"select": "pass@2"}, "none of the metrics: avg@4, pass@1, pass@4$"),
        ({"select": "maj@2", "maj": True}, "none of the metrics: avg@4, pass@1, pass@4, maj@1, maj@4"),
        ({"problems": []}, "--problems is missing"),
        ({"problems": [Path("-")]}, "--problems -: name a file"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_read(run, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run([tmp_path / "nowhere"], **{"problems": [tmp_path / "none.jsonl"], "out": tmp_path / "out", **options})


def test_an_evaluation_without_a_policy_is_refused(run, problems, tmp_path):
    with pytest.raises(InputError, match="--policy is missing"):
        run([], problems, tmp_path / "out")


def test_an_average_over_fewer_problems_is_refused(run, engines, tiny_policy, problems, tmp_path):
    with problems.open("a") as file:
        file.write(json.dumps(problem(1) | {"id": "long", "problem": "1+" * 60 + "1=?"}) + "\n")
    with pytest.raises(InputError, match=r"1 problems \(long\) leave no room"):
        run([tiny_policy], problems, tmp_path / "out")
    assert not engines


def test_several_temperatures_are_measured_apart_and_each_as_it_is_alone(
    run, engines, tiny_policy, other_policy, problems, tmp_path
):
    both = [tiny_policy, other_policy]
    run(both, problems, tmp_path / "one", temperature=[0.6])
    run(both, problems, tmp_path / "two", temperature=[1.0, 0.6], greedy=True, select="avg@4")
    assert sorted(path.name for path in (tmp_path / "two").iterdir() if path.is_dir()) == ["sums@0.6", "sums@1"]
    assert samples(read(tmp_path / "two/sums@0.6")) == samples(read(tmp_path / "one"))
    for path, temperature in (("two/sums@0.6", 0.6), ("two/sums@1", 1.0), ("one", 0.6)):
        manifest = load(tmp_path / path / "manifest.json")
        assert (manifest["temperature"], manifest["parameters"]["temperature"]) == (temperature, [temperature])
        assert load(tmp_path / path / "metrics.json")["temperature"] == temperature
        assert {result["temperature"] for result in read(tmp_path / path, Result)} == {temperature}
    overview = load(tmp_path / "two/metrics.json")
    assert overview["selected"] == load(tmp_path / "two/sums@0.6/metrics.json")["selected"], "the lowest one selects"
    run(both, problems, tmp_path / "two", temperature=[1.0, 0.6], greedy=True, select="avg@4")
    assert len(engines) == 2, "already done"


def test_a_temperature_that_is_added_keeps_what_was_drawn_at_another(run, engines, tiny_policy, problems, tmp_path):
    engines.dies_after = 5
    with pytest.raises(KeyboardInterrupt):
        run([tiny_policy], problems, tmp_path / "out")
    run([tiny_policy], problems, tmp_path / "out", temperature=[1.0, 0.6])
    assert len(engines[-1].prompted) == 2 * NUM_PROBLEMS - 5


def test_a_temperature_that_is_named_twice_is_refused(run, tiny_policy, problems, tmp_path):
    with pytest.raises(InputError, match="--temperature 1, 1: name each once"):
        run([tiny_policy], problems, tmp_path / "out", temperature=[1.0, 1.0])
