"""pass@k against the enumeration of subsets, intervals against the theory of the mean, and what is refused."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import binomtest

from stages.core.errors import InputError
from stages.core.study import metrics, scoring


def result(problem: str, num_correct: int, num_samples: int = 4, policy: str = "p", **extra: int) -> dict:
    counts = {"num_samples": num_samples, "num_correct": num_correct, "num_truncated": 0}
    return {"problem_id": problem, "policy": policy} | counts | extra


def pass_by_enumeration(n: int, c: int, k: int) -> float:
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    return sum(any(subset) for subset in subsets) / len(subsets)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 1), (5, 2), (6, 6), (8, 3), (9, 8)])
def test_pass_at_k_equals_the_share_of_subsets_that_hold_a_correct_sample(n, k):
    passes = metrics.pass_at_k([n] * (n + 1), range(n + 1), k)
    assert passes == pytest.approx([pass_by_enumeration(n, c, k) for c in range(n + 1)], abs=1e-14)


def test_pass_at_k_stays_exact_where_the_binomials_exceed_a_float():
    exact = 1 - math.comb(3997, 500) / math.comb(4000, 500)
    assert metrics.pass_at_k([4000], [3], 500)[0] == pytest.approx(exact, rel=1e-12)


def test_pass_at_k_takes_another_number_of_samples_for_each_problem():
    passes = metrics.pass_at_k([4, 8], [1, 3], 2)
    assert passes == pytest.approx([pass_by_enumeration(4, 1, 2), pass_by_enumeration(8, 3, 2)])


@pytest.mark.parametrize(
    ("n", "c", "k", "message"), [(4, 1, 5, "at least 5"), (4, 1, 0, "1 or more"), (4, 5, 2, "edited")]
)
def test_impossible_counts_are_refused(n, c, k, message):
    with pytest.raises(InputError, match=message):
        metrics.pass_at_k([n], [c], k)


def test_summary_of_a_policy_is_the_mean_over_problems():
    summary = metrics.summarise([result("a", 4), result("b", 1), result("c", 0)], ks=(1, 2))
    assert (summary["num_problems"], summary["num_samples"]) == (3, 4)
    assert summary["avg@4"]["value"] == pytest.approx(5 / 12)
    assert summary["pass@1"]["value"] == pytest.approx(5 / 12)
    assert summary["pass@2"]["value"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert summary["truncated"] == {"value": 0.0, "low": 0.0, "high": pytest.approx(1 - 0.025 ** (1 / 3))}


def test_further_counts_become_metrics_only_where_every_result_has_them():
    whole = [result("a", 4, num_tokens=40, num_no_answer=1), result("b", 1, num_tokens=20, num_no_answer=0)]
    assert metrics.summarise(whole, ks=(1,))["mean_tokens"]["value"] == pytest.approx(7.5)
    assert metrics.summarise(whole, ks=(1,))["no_answer"]["value"] == pytest.approx(0.125)
    assert "mean_tokens" not in metrics.summarise([*whole, result("c", 1)], ks=(1,))


def test_interval_agrees_with_the_normal_one_on_many_values_and_is_the_same_every_time():
    values = np.random.default_rng(7).normal(0.5, 0.2, size=800)
    half = 1.96 * values.std() / math.sqrt(800)
    interval = metrics.interval(values)
    assert interval["low"] == pytest.approx(values.mean() - half, abs=half / 10)
    assert interval["high"] == pytest.approx(values.mean() + half, abs=half / 10)
    metrics._resamples.cache_clear()
    assert metrics.interval(values) == interval


def test_intervals_hold_the_truth_in_about_95_of_100_draws():
    rng = np.random.default_rng(1)
    drawn = map(metrics.interval, rng.binomial(8, 0.3, (400, 60)) / 8)
    assert 0.91 < np.mean([one["low"] <= 0.3 <= one["high"] for one in drawn]) < 0.98


@pytest.mark.parametrize("num_problems", [1, 7, 40])
def test_of_none_or_all_the_interval_is_clopper_and_pearsons(num_problems):
    interval = binomtest(0, num_problems).proportion_ci(method="exact")
    none = metrics.interval(np.zeros(num_problems), bounds=(0, 1))
    assert none == {"value": 0, "low": 0, "high": pytest.approx(interval.high)}
    every = metrics.interval(np.ones(num_problems), bounds=(0, 1))
    assert every == {"value": 1, "low": pytest.approx(1 - interval.high), "high": 1}
    better = metrics.interval(np.ones(num_problems), bounds=(-1, 1))
    assert better == {"value": 1, "low": pytest.approx(1 - 2 * interval.high), "high": 1}
    assert metrics.interval(np.zeros(num_problems), bounds=(-1, 1)) == {"value": 0, "low": 0, "high": 0}
    whole = np.arange(2 * num_problems) < num_problems
    assert metrics.share_interval(np.zeros(len(whole), bool), whole)["high"] == pytest.approx(interval.high)
    assert metrics.share_interval(whole, whole)["low"] == pytest.approx(1 - interval.high)


def test_the_average_of_sets_without_a_success_is_that_of_as_many_problems():
    assert metrics.average_interval([np.zeros(20), np.zeros(20)], bounds=(0, 1))["high"] == pytest.approx(
        binomtest(0, 40).proportion_ci(method="exact").high
    )


def test_every_metric_is_measured_where_its_fields_are_there_and_named_in_the_order_of_the_table():
    counted = {"num_tokens": 40, "num_no_answer": 1, "wrong_votes": [2], "num_greedy_correct": 1}
    counted |= {"kl_nats": 3.0, "num_kl_samples": 2, "num_kl_tokens": 12}
    summary = metrics.summarise([result("a", 2, **counted), result("b", 2, **counted | {"kl_nats": 9.0})], ks=(1, 2))
    assert list(summary)[2:6] == ["avg@4", "pass@1", "pass@2", "maj@1"]
    assert {name.partition("@")[0] for name in summary} >= {metric.name for metric in metrics.METRICS}
    assert summary["maj@1"]["value"] == 0.5 and summary["greedy"]["value"] == 1
    assert summary["kl"]["value"] == 3.0 and summary["kl_per_token"]["value"] == 0.5
    assert metrics.accuracies(summary) == ["avg@4", "pass@1", "pass@2", "maj@1", "maj@2", "greedy"]
    assert metrics.in_order(["greedy", "pass@16", "pass@8", "avg@4"]) == ["avg@4", "pass@8", "pass@16", "greedy"]


def test_the_average_of_sets_is_surer_than_each_and_weighs_them_alike():
    sets = [np.random.default_rng(i).normal(i, 1, size=200 * i) for i in (1, 2)]
    average, alone = metrics.average_interval(sets), metrics.interval(sets[0])
    half = 1.96 * math.sqrt(sets[0].var() / 200 + sets[1].var() / 400) / 2
    assert average["value"] == pytest.approx((sets[0].mean() + sets[1].mean()) / 2)
    assert (average["high"] - average["low"]) / 2 == pytest.approx(half, rel=0.1)
    assert average["high"] - average["low"] < alone["high"] - alone["low"]


def test_a_paired_difference_is_real_where_two_intervals_overlap():
    first = [result(str(i), i % 9, 10) for i in range(90)]
    second = [result(str(i), i % 9 + (i % 3 > 0), 10, policy="q") for i in reversed(range(90))]
    difference = metrics.compare(first, second, ks=(1,))["avg@10"]
    alone = [metrics.summarise(results, ks=(1,))["avg@10"] for results in (first, second)]
    assert difference["value"] == pytest.approx(2 / 30) and difference["real"]
    assert alone[0]["high"] > alone[1]["low"]


def test_policies_with_other_numbers_of_samples_are_compared_on_the_smaller():
    differences = metrics.compare([result("a", 4, 8)], [result("a", 3, 4, policy="q")], ks=(2,))
    assert list(differences) == ["avg@4", "pass@2", "truncated"]
    assert differences["avg@4"]["value"] == pytest.approx(0.25)


def test_a_policy_does_not_differ_from_itself():
    results = [result(str(i), i % 4) for i in range(20)]
    differences = metrics.compare(results, results, ks=(1, 4)).values()
    assert differences and not any(each["real"] or each["value"] for each in differences)


def test_policies_on_different_problems_are_not_compared():
    with pytest.raises(InputError, match="different problems"):
        metrics.compare([result("a", 1)], [result("b", 1)], ks=(1,))


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], "no results"),
        ([result("a", 1), result("b", 1, policy="q")], "one policy"),
        ([result("a", 1), result("a", 1)], "two results"),
        ([result("a", 0, 0)], "without samples"),
        ([result("a", 5, 4)], "5 correct of 4 samples of a"),
        ([result("a", -1)], "-1 correct"),
    ],
)
def test_results_that_are_not_one_policys_on_distinct_problems_are_refused(results, message):
    with pytest.raises(InputError, match=message):
        metrics.summarise(results, ks=(1,))


def test_importing_metrics_loads_neither_numpy_nor_torch():
    code = "import sys, stages.core.study.metrics; sys.exit(bool({'numpy', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_of_many_policies_the_differences_from_the_first_and_the_best_are_shown_and_the_rest_counted():
    results = [
        result(f"{i}", (i + k) % 5, policy=name)
        for k, name in enumerate(("base", "a\nb", "c", "d", "e"))
        for i in range(4)
    ]
    measured = scoring.measure([row | {"verdicts": {}} for row in results], ks=(1,))
    shown = scoring.difference_table(measured).splitlines()
    assert [line.split("  ")[0] for line in shown[1:-2]] == [
        "a\\nb - base", "c - base", "d - base", "e - base", "c - a\\nb", "d - a\\nb", "e - a\\nb",
    ]  # fmt: skip
    assert shown[-1] == "3 more differences are in metrics.json"
