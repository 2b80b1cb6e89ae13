"""Learning, forgetting and similarity, worked out by hand on three checkpoints and two problems."""

import csv
import json
from itertools import combinations, pairwise, product
from math import comb, prod
from pathlib import Path

import numpy as np
import pytest

from stages import analyze
from stages.analyze import dynamics, means, similarity, temporal
from stages.core import jsonl
from stages.core.errors import InputError
from stages.core.study import figures, runs
from stages.core.study.runs import RL, RLOOP

BASE = "runs/0/policy"


def rollout(policy: str, problem: str, sample: int, completion: str, reward: float) -> dict:
    return {
        "problem_id": problem,
        "sample": sample,
        "step": 0,
        "policy": policy,
        "prompt": problem,
        "completion": completion,
        "answer": "1",
        "reward": reward,
        "verdict": "correct" if reward else "wrong",
        "num_tokens": 3,
        "finish_reason": "stop",
    }


def evaluate(directory: Path, samples: dict[str, dict[str, list[tuple[str, int]]]]) -> None:
    """Write an eval's output from policy -> problem -> [(completion, reward), ...]."""
    rollouts, results = [], []
    for policy, problems in samples.items():
        for problem, drawn in problems.items():
            rollouts += [rollout(policy, problem, i, text, float(reward)) for i, (text, reward) in enumerate(drawn)]
            counts = {"num_samples": len(drawn), "num_correct": sum(reward for _, reward in drawn), "num_truncated": 0}
            results.append({"problem_id": problem, "policy": policy} | counts)
    jsonl.write(directory / "rollouts.jsonl", rollouts)
    jsonl.write(directory / "results.jsonl", results)


def by_hand(tmp_path: Path) -> Path:
    evaluate(
        tmp_path / "runs/eval/valid",
        {
            BASE: {"p": [("a b c", 1), ("a b d", 0)], "q": [("x y", 0), ("x y", 0)]},
            "runs/vanilla/rl/checkpoints/step_000005": {
                "p": [("a b c", 0), ("c b a", 0)],
                "q": [("x y", 1), ("z y", 1)],
            },
            "runs/vanilla/rl/checkpoints/step_000010": {"p": [("a b d", 1), ("e", 0)], "q": [("x y z", 0), ("", 1)]},
        },
    )
    return tmp_path / "runs/eval/valid"


def values(path: Path) -> list:
    return json.loads(path.read_text())["values"]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("analysis")
    analyze.run(analyze.Options(evals=[by_hand(directory)], out=directory / "out"))
    return directory / "out"


def test_matrices_equal_those_worked_out_by_hand(out):
    # solved (p, q): base yes no, step 5 no yes, step 10 yes yes
    assert values(out / "learning_RL.json") == [[0, 0.5, 0.5], [0.5, 0, 0.5], [0, 0, 0]]
    assert values(out / "forgetting_RL.json") == [[0, 0.5, 0], [0.5, 0, 0], [0.5, 0.5, 0]]
    # p: base {ab, bc} {ab, bd}, step 5 {ab, bc} {cb, ba}, step 10 {ab, bd} {}
    # q: base {xy} {xy}, step 5 {xy} {zy}, step 10 {xy, yz} {}
    third = 1 / 3
    p = np.array(
        [
            [(1 + third + third + 1) / 4, (1 + third) / 4, (third + 1) / 4],
            [(1 + third) / 4, 2 / 4, third / 4],
            [(third + 1) / 4, third / 4, 2 / 4],
        ]
    )
    q = np.array([[1, 2 / 4, 2 * 0.5 / 4], [2 / 4, 2 / 4, 0.5 / 4], [2 * 0.5 / 4, 0.5 / 4, 2 / 4]])
    assert np.array(values(out / "similarity_RL.json")) == pytest.approx((p + q) / 2, abs=1e-15)


def test_the_means_say_what_chance_alone_forgets(out):
    measured = json.loads((out / "metrics.json").read_text())["RL"]
    assert measured["mean_forgetting"] == pytest.approx((0.5 + 0 + 0) / 3)
    # halves of two samples; correct of 2 for (p, q): base (1, 0), step 5 (0, 2), step 10 (1, 1)
    assert measured["floor_of_forgetting"] == pytest.approx((0.25 + 0 + 0.5) / 3)
    assert measured["mean_forgetting_of_halves"] == pytest.approx((0.25 + 0.125 + 0.25) / 3)
    assert measured["mean_similarity_within"] == pytest.approx((5 / 6 + 0.5 + 0.5) / 3)


def test_each_matrix_is_there_as_json_tsv_and_figures_with_labels(out):
    assert json.loads((out / "learning_RL.json").read_text())["labels"] == ["0", "5", "10"]
    rows = list(csv.reader((out / "forgetting_RL.tsv").open(), delimiter="\t"))
    assert rows[:2] == [["step", "0", "5", "10"], ["0", "0", "0.5", "0"]]
    assert (out / "similarity_RL.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "similarity_RL.svg").read_text()
    steps = list(csv.DictReader((out / "similarity_by_step.tsv").open(), delimiter="\t"))
    assert [float(row["within"]) for row in steps] == pytest.approx([5 / 6, 0.5, 0.5], abs=1e-5)
    assert [float(row["within_distinct"]) for row in steps] == pytest.approx([2 / 3, 0, 0], abs=1e-5)


def test_what_is_kept_of_the_bases_problems_and_what_is_new_equal_those_worked_out_by_hand(out):
    # solved (p, q): base yes no, step 5 no yes, step 10 yes yes
    kept = json.loads((out / "retention.json").read_text())
    assert [(row["x"], row["y"]) for row in kept["rows"]] == [(0, 1), (5, 0), (10, 1)]
    new = json.loads((out / "turnover.json").read_text())
    assert [(row["x"], row["y"]) for row in new["rows"]] == [(0, 0), (5, 1), (10, 0.5)]
    assert (new["rows"][2]["low"], new["rows"][2]["high"]) == (0, 1), "two problems say little"
    assert new["rows"][1]["policy"] == "runs/vanilla/rl/checkpoints/step_000005"
    assert "<svg" in (out / "turnover.svg").read_text()
    assert next(csv.DictReader((out / "retention.tsv").open(), delimiter="\t"))["RL steps"] == "0"


def test_intervals_of_a_share_move_with_both_of_its_parts():
    is_solved = np.random.default_rng(1).random((2, 200)) < [[0.5], [0.6]]
    (_, share), rng = dynamics.retention(is_solved), np.random.default_rng(2)
    picks = [is_solved[:, rng.integers(200, size=200)] for _ in range(4000)]
    shares = [(first & later).sum() / first.sum() for first, later in picks]
    assert share["value"] == (is_solved[0] & is_solved[1]).sum() / is_solved[0].sum()
    assert [share["low"], share["high"]] == pytest.approx(np.quantile(shares, [0.025, 0.975]), abs=0.01)


def test_a_base_that_solves_nothing_has_no_retention():
    (first, second) = dynamics.retention(np.array([[False, False], [True, False]]))
    assert all(np.isnan(value) for value in (*first.values(), *second.values()))
    assert dynamics.turnover(np.array([[False, False], [True, False]]))[1]["value"] == 1


@pytest.mark.parametrize("correct", [(0, 1, 2), (4, 0, 0), (1, 1, 1), (0, 0, 0)])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7])
def test_samples_of_several_checkpoints_pass_as_often_as_all_choices_of_them_do(correct, k):
    samples = [[index < count for index in range(4)] for count in correct]
    quotas = [sum(turn % 3 == checkpoint for turn in range(k)) for checkpoint in range(3)]
    assert temporal.quotas(k, 3) == quotas
    choices = product(*(combinations(of_one, quota) for of_one, quota in zip(samples, quotas, strict=True)))
    passed = [any(map(any, choice)) for choice in choices]
    passes = temporal.pass_at_k(np.full((3, 1), 4), np.array(correct)[:, None], k)
    assert passes == pytest.approx([sum(passed) / len(passed)], abs=1e-12)


def test_temporal_sampling_is_right_on_average_whatever_an_evaluation_draws():
    rates, num_samples, k = (0.3, 0.05), 4, 5
    expected = 1 - (1 - rates[0]) ** 3 * (1 - rates[1]) ** 2
    total = 0.0
    for counts in product(range(num_samples + 1), repeat=2):
        weight = prod(
            comb(num_samples, c) * p**c * (1 - p) ** (num_samples - c) for c, p in zip(counts, rates, strict=True)
        )
        total += weight * temporal.pass_at_k(np.full((2, 1), num_samples), np.array(counts)[:, None], k)[0]
    assert total == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow
def test_the_latest_policies_take_turns_as_far_as_their_samples_go(tmp_path):
    analyze.run(analyze.Options(evals=[by_hand(tmp_path)], out=tmp_path / "out", ks=[2, 3, 8]))
    # correct of 2 for (p, q): step 10 (1, 1), step 5 (0, 2), base (1, 0)
    two = json.loads((tmp_path / "out/temporal_pass_2.json").read_text())["rows"]
    assert [(row["x"], row["y"]) for row in two] == [(1, 1), (2, (1 / 2 + 1) / 2)]
    three = json.loads((tmp_path / "out/temporal_pass_3.json").read_text())["rows"]
    assert [row["x"] for row in three] == [2, 3], "one policy has no three samples"
    assert three[1]["y"] == pytest.approx((3 / 4 + 1) / 2)
    assert three[1]["policy"].split(" | ")[::2] == ["runs/vanilla/rl/checkpoints/step_000010", BASE]
    assert not (tmp_path / "out/temporal_pass_8.json").exists()


def test_more_correct_samples_can_be_asked_for():
    results = [[{"problem_id": "p", "num_correct": 1}, {"problem_id": "q", "num_correct": 2}]]
    assert dynamics.solved(results, min_correct=2).tolist() == [[False, True]]


@pytest.mark.slow
def test_differential_forgetting_aligns_rloop_and_rl_by_global_step(tmp_path):
    right, wrong = [("t u", 1)], [("t u", 0)]
    solved = {
        BASE: (1, 0),
        "runs/1/rl/checkpoints/step_000002": (1, 1),
        "runs/1/policy": (0, 0),
        "runs/2/rl/checkpoints/step_000002": (1, 0),
        "runs/vanilla/rl/checkpoints/step_000002": (1, 1),
        "runs/vanilla/rl/checkpoints/step_000004": (0, 0),
    }
    samples = {
        policy: {problem: right if yes else wrong for problem, yes in zip("pq", of_policy, strict=True)}
        for policy, of_policy in solved.items()
    }
    evaluate(tmp_path / "valid", samples)
    analyze.run(analyze.Options(evals=[tmp_path / "valid"], out=tmp_path / "out"))
    matrix = json.loads((tmp_path / "out/differential_forgetting.json").read_text())
    assert matrix["labels"] == ["0", "2", "4"]
    assert matrix["values"] == [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]
    labels = json.loads((tmp_path / "out/learning_RLoop.json").read_text())["labels"]
    assert labels == ["0", "2", "2+start", "4"]


def test_sparse_similarity_agrees_with_the_plain_loop_over_sets():
    rng = np.random.default_rng(3)
    texts = [[" ".join(rng.choice(list("abcdefgh"), rng.integers(0, 30))) for _ in range(5 + i)] for i in range(4)]
    sets = [[set(pairwise(text.split())) for text in of_checkpoint] for of_checkpoint in texts]
    plain = [
        [np.mean([len(s & t) / len(s | t) if s | t else 1.0 for s in first for t in second]) for second in sets]
        for first in sets
    ]
    assert similarity.problem_similarity(texts) == pytest.approx(np.array(plain), abs=1e-12)


def test_bigrams_are_of_words_numbers_and_marks_whatever_the_blanks():
    first, second, third = similarity.bigrams(["2*6=12", "2 * 6  = 12", "2*6=1 2"])
    assert first.tolist() == second.tolist() != third.tolist()


@pytest.mark.parametrize(("n", "c", "least"), [(4, 1, 1), (5, 2, 1), (6, 3, 2), (4, 0, 1), (4, 4, 1), (3, 3, 2)])
def test_what_halves_of_the_samples_forget_is_the_mean_over_all_choices_of_them(n, c, least):
    right, half = set(range(c)), n // 2
    solved = {part: len(right & set(part)) >= least for part in combinations(range(n), half)}
    apart = [solved[a] and not solved[b] for a, b in product(solved, solved) if not set(a) & set(b)]
    results = [[{"problem_id": "p", "num_samples": n, "num_correct": c}] for _ in range(2)]
    forgotten = dynamics.forgetting_of_halves(results, least)
    share = np.mean(list(solved.values()))
    between, chance = share * (1 - share), np.mean(apart)
    assert forgotten == pytest.approx(np.array([[chance, between], [between, chance]]))


def test_the_floor_of_forgetting_is_right_on_average_whatever_an_evaluation_draws():
    rate, half = 0.05, 4
    solved = 1 - (1 - rate) ** half
    total = sum(comb(8, c) * rate**c * (1 - rate) ** (8 - c) * dynamics._of_halves(8, c, 1)[1] for c in range(9))
    assert total == pytest.approx(solved * (1 - solved), abs=1e-12)


def test_pairs_within_an_iteration_are_those_without_a_reset_between_them():
    names = [BASE, *(f"runs/{i}/{part}" for i in (1, 2) for part in ("rl/checkpoints/step_000002", "policy"))]
    alone = [BASE, *(f"runs/vanilla/rl/checkpoints/step_00000{step}" for step in (1, 2, 3, 4))]
    paths = {RLOOP: runs.path_of(runs.positions(names), RLOOP), RL: runs.path_of(runs.positions(alone), RL)}
    assert [each.label for each in paths[RLOOP]] == ["0", "2", "2+start", "4", "4+start"]
    pairs = {
        run: set(zip(*map(list, np.nonzero(means.is_within(path, [2, 4]))), strict=True)) for run, path in paths.items()
    }
    assert pairs == {RLOOP: {(0, 1), (2, 3)}, RL: {(0, 1), (0, 2), (1, 2), (2, 3), (2, 4), (3, 4)}}
    values = np.arange(25.0).reshape(5, 5).tolist()
    matrices = [{"name": "forgetting", "run": run, "values": values} for run in (RL, RLOOP)]
    measured = means.measure(matrices, [], paths)
    assert measured[RLOOP]["mean_forgetting_within_iterations"] == (1 + 13) / 2
    assert measured[RLOOP]["mean_forgetting_across_iterations"] == (2 + 3 + 4 + 7 + 8 + 9 + 14 + 19) / 8
    assert measured[RLOOP]["mean_forgetting_at_common_steps"] == (1 + 3 + 8) / 3, "steps 0, 2 and 4"
    assert measured[RL]["mean_forgetting_at_common_steps"] == (2 + 4 + 14) / 3
    assert measured[RL]["mean_forgetting"] == measured[RLOOP]["mean_forgetting"]


def test_what_is_learned_forward_is_forgotten_backward():
    is_solved = np.random.default_rng(0).random((5, 40)) < 0.5
    assert (dynamics.learning(is_solved) == dynamics.forgetting(is_solved).T).all()
    gain = is_solved.mean(1)[None, :] - is_solved.mean(1)[:, None]
    assert dynamics.learning(is_solved) - dynamics.forgetting(is_solved) == pytest.approx(gain)


def test_evals_of_several_sets_or_of_one_checkpoint_are_refused(tmp_path):
    by_hand(tmp_path)
    evaluate(tmp_path / "runs/eval/other", {BASE: {"r": [("a", 1)]}})
    with pytest.raises(InputError, match="several problem sets"):
        analyze.run(analyze.Options(evals=[tmp_path / "runs/eval"], out=tmp_path / "out"))
    with pytest.raises(InputError, match="no two checkpoints"):
        analyze.run(analyze.Options(evals=[tmp_path / "runs/eval/other"], out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_directory_without_results_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no results\.jsonl"):
        analyze.run(analyze.Options(evals=[tmp_path], out=tmp_path / "out"))


def test_similarity_within_leaves_each_completion_itself_out_problem_by_problem():
    completions = [{"p": ["a b", "a b", "c d", "c d", "c d"], "q": ["a b c", "a b"], "r": ["alone"]}]
    _, within = similarity.similarity_matrix(completions)
    assert within == pytest.approx([(8 / 20 + 0.5) / 2])  # p: 2 + 6 of 20 ordered pairs are alike
    assert np.isnan(similarity.similarity_matrix([{"r": ["alone"]}])[1]).all()


def test_the_set_of_an_eval_of_one_set_is_known_by_its_manifest(tmp_path):
    for name, policy in (("0", BASE), ("vanilla", "runs/vanilla/rl/checkpoints/step_000002")):
        evaluate(tmp_path / "eval" / name, {policy: {"p": [("a b", 1)]}})
        (tmp_path / "eval" / name / "manifest.json").write_text('{"set": "valid"}')
    analyze.run(analyze.Options(evals=[tmp_path / "eval"], set_="valid", out=tmp_path / "out"))
    assert json.loads((tmp_path / "out/learning_RL.json").read_text())["set"] == "valid"


@pytest.mark.parametrize(("asked", "taken"), [("valid", "valid@0.6"), ("valid@1", "valid@1")])
def test_of_a_set_at_several_temperatures_the_lowest_is_analyzed_unless_one_is_named(tmp_path, capsys, asked, taken):
    for at in ("1", "0.6", "1.2"):
        policies = (BASE, "runs/vanilla/rl/checkpoints/step_000002")
        evaluate(tmp_path / f"eval/valid@{at}", {policy: {"p": [("a b", 1)]} for policy in policies})
        file = tmp_path / f"eval/valid@{at}/results.jsonl"
        rows = [row | {"temperature": float(at)} for _, row in jsonl.read(file)]
        file.unlink()
        jsonl.write(file, rows)
    analyze.run(analyze.Options(evals=[tmp_path / "eval"], set_=asked, out=tmp_path / "out"))
    matrix, curve, similar = (
        json.loads((tmp_path / f"out/{name}.json").read_text())
        for name in ("learning_RL", "retention", "similarity_by_step")
    )
    assert matrix["set"] == taken
    captions = [figure.caption for figure in figures.of_analysis([matrix, curve, similar])]
    drawn = f"; samples drawn at temperature {taken.partition('@')[2]}"
    assert len(captions) == 3 and all(drawn in caption for caption in captions)
    assert ("valid@0.6 is analyzed, of valid that at the lowest temperature" in capsys.readouterr().err) == (
        asked == "valid"
    )


@pytest.fixture
def two(tmp_path) -> Path:
    steps = ("runs/0/policy", "runs/vanilla/rl/checkpoints/step_000002", "runs/other/rl/checkpoints/step_000002")
    solved = {policy: {"p": [("a b", turn % 2), ("c d", 0)]} for turn, policy in enumerate(steps)}
    evaluate(tmp_path / "valid", solved)
    return tmp_path


@pytest.mark.slow
def test_any_two_runs_can_be_compared(two):
    analyze.run(analyze.Options(evals=[two / "valid"], out=two / "out", compare=["other", "RL"]))
    matrix = json.loads((two / "out/differential_forgetting.json").read_text())
    assert matrix["values"] == [[0, 0], [-1, 0]]  # read backwards, RL forgets what it has learnt
    assert matrix["definition"].startswith("forgetting of other minus forgetting of RL;")
    assert "other - RL" in json.loads((two / "out/metrics.json").read_text())
    for wrong in (["RL"], ["RL", "RL"], ["RL", "RLoop"]):
        with pytest.raises(InputError, match="name two different runs of RL, other"):
            analyze.run(analyze.Options(evals=[two / "valid"], out=two / "again", compare=wrong))


def test_rollouts_that_are_not_those_of_the_results_are_refused(two):
    file = two / "valid/rollouts.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for wrong, fault in ((lines[1:], "has 1 rollouts of p and 2 samples"), ([*lines, lines[0]], "stands there twice")):
        file.write_text("".join(wrong))
        with pytest.raises(InputError, match=fault):
            analyze.run(analyze.Options(evals=[two / "valid"], out=two / "out"))


def test_results_that_cannot_be_are_refused_with_their_file(two):
    file = two / "valid/results.jsonl"
    good = file.read_text()
    for wrong in (good.replace('"num_correct":1', '"num_correct":7'), good + good.splitlines(keepends=True)[0]):
        file.write_text(wrong)
        with pytest.raises(InputError, match=r"valid/results\.jsonl: policy runs/"):
            analyze.run(analyze.Options(evals=[two / "valid"], out=two / "out"))


def test_of_a_policy_evaluated_twice_the_first_counts_with_its_own_rollouts(two, capsys):
    evaluate(two / "more/valid", {BASE: {"p": [("a b", 1), ("x y", 1)]}})
    (two / "more/valid/rollouts.jsonl").unlink()
    analyze.run(analyze.Options(evals=[two / "more", two / "valid"], out=two / "out"))
    said = capsys.readouterr().err
    assert f"{BASE} was evaluated on valid twice: {two}/more/valid counts" in said
    assert f"no similarity of RL: {two}/more/valid holds no rollouts.jsonl" in said
    assert values(two / "out/forgetting_RL.json")[0][1] == 0, "the eval named first solves p"


def test_an_eval_that_is_not_finished_is_none(tmp_path):
    evaluate(tmp_path / "eval/.valid.partial", {BASE: {"p": [("a b", 1)]}})
    with pytest.raises(InputError, match=r"no results\.jsonl"):
        analyze.run(analyze.Options(evals=[tmp_path / "eval"], out=tmp_path / "out"))


def test_evals_below_the_root_are_found_past_what_is_the_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    for path in ("proc/1", "work/proc", "work/.x.partial"):
        evaluate(tmp_path / path, {BASE: {"p": [("a b", 1)]}})
    (tmp_path / "work/round").symlink_to(tmp_path)
    assert runs.find_evals([tmp_path]) == [tmp_path / "work/proc"]


def test_a_directory_too_large_to_hold_evals_only_is_refused(two, monkeypatch):
    monkeypatch.setattr(runs, "MAX_DIRECTORIES", 1)
    with pytest.raises(InputError, match="more than 1 directories below it: name the --out of an eval"):
        analyze.run(analyze.Options(evals=[two], out=two / "out"))
