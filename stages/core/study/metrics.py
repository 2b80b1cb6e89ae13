"""avg@k and pass@k from counts, each with a bootstrap interval, and the paired difference of two policies.

Everything starts from Results (how many samples, how many correct, for each problem), so that every figure can be
recomputed from results.jsonl. All figures are fractions 0..1. Intervals are 95 % percentile bootstraps over problems:
they say how far a figure would move with other problems of the same kind, not with other samples or other seeds of
training. A difference is called real if its interval excludes zero.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypedDict

from stages.core.errors import InputError
from stages.core.records import Result

if TYPE_CHECKING:  # numpy is imported where it is used: the command line reads this module before it knows the stage
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]

KS = (8, 16, 32)
NUM_RESAMPLES = 2000
COVERAGE = 0.95


class Interval(TypedDict):
    """A figure with the interval that holds it: {"value": 0.25, "low": 0.19, "high": 0.31}."""

    value: float
    low: float
    high: float


class Difference(Interval):
    """Second policy minus first on the same problems; `real` says that the interval excludes zero."""

    real: bool


def pass_at_k(num_samples: "ArrayLike", num_correct: "ArrayLike", k: int) -> "Array":
    """Probability that at least one of k samples is correct: 1 - C(n-c, k) / C(n, k), for each problem.

    Unbiased for every n >= k (Chen et al. 2021, "Evaluating Large Language Models Trained on Code"). The quotient of
    binomials is the product of (n-c-i) / (n-i) over i < k, whose factors lie in 0..1, so nothing overflows or cancels.
    Raises InputError for k < 1, k > n, or counts with c > n or c < 0.
    """
    import numpy as np

    n, c = np.asarray(num_samples, dtype=np.float64), np.asarray(num_correct, dtype=np.float64)
    _check_counts(n, c, k)
    all_wrong = np.ones(np.broadcast_shapes(n.shape, c.shape))
    for i in range(k):
        all_wrong *= np.maximum(n - c - i, 0) / (
            n - i
        )  # 0 once fewer than k are wrong: k samples must hold a right one
    return 1 - all_wrong


def _check_counts(n: "Array", c: "Array", k: int) -> None:
    if k < 1:
        raise InputError(f"pass@{k} means nothing: name a k of 1 or more")
    if n.size and k > n.min():
        raise InputError(f"pass@{k} needs at least {k} samples a problem, found {n.min():.0f}: draw more or lower k")
    if (c < 0).any() or (c > n).any():
        raise InputError("a result counts more correct samples than samples (or fewer than none): was it edited?")


def avg_at_k(num_samples: "ArrayLike", num_correct: "ArrayLike") -> "Array":
    """Share of correct samples for each problem; its expectation is the same for every k, so all samples are used."""
    import numpy as np

    return np.asarray(num_correct, dtype=np.float64) / np.asarray(num_samples, dtype=np.float64)


def per_problem(
    results: Sequence[Result], ks: Sequence[int] = KS, num_samples: int | None = None
) -> dict[str, "Array"]:
    """Each metric's value on each problem, in the order of `results`: avg@n, pass@k, truncated.

    n is `num_samples`, or else the smallest number of samples of any problem. If every result also counts
    `num_no_answer` or `num_tokens` (a sum over samples), `no_answer` (share) and `mean_tokens` (tokens a completion)
    are there too; if each counts `kl_nats`, `kl`: KL to a base in nats a completion.
    """
    import numpy as np

    check_results(results)
    n = np.array([result["num_samples"] for result in results])
    c = np.array([result["num_correct"] for result in results])
    values = {f"avg@{num_samples or n.min()}": avg_at_k(n, c)} | {f"pass@{k}": pass_at_k(n, c, k) for k in ks}
    for field, name in (("num_truncated", "truncated"), ("num_no_answer", "no_answer"), ("num_tokens", "mean_tokens")):
        if all(field in result for result in results):
            values[name] = np.array([result[field] for result in results]) / n  # type: ignore[literal-required]
    if all("kl_nats" in result for result in results):
        values["kl"] = np.array([r["kl_nats"] / r["num_kl_samples"] for r in results])  # type: ignore[typeddict-item]
    return values


def check_results(results: Sequence[Result]) -> None:
    """Raise InputError for impossible counts of one policy, or for two results of one problem."""
    if not results:
        raise InputError("no results to summarise: is results.jsonl empty?")
    policies = {result["policy"] for result in results}
    if len(policies) > 1:
        raise InputError(f"expected the results of one policy, found {len(policies)}: {', '.join(sorted(policies))}")
    if len({result["problem_id"] for result in results}) < len(results):
        raise InputError(f"policy {policies.pop()} has two results for one problem: was it evaluated twice?")
    if any(result["num_samples"] < 1 for result in results):
        raise InputError(f"policy {policies.pop()} has a result without samples: evaluate it again")
    for result in results:
        if not 0 <= result["num_correct"] <= result["num_samples"]:
            raise InputError(
                f"policy {result['policy']} has {result['num_correct']} correct of {result['num_samples']} samples of "
                f"{result['problem_id']}: was results.jsonl edited? evaluate it again"
            )


def summarise(results: Sequence[Result], ks: Sequence[int] = KS, seed: int = 0) -> dict[str, Any]:
    """One policy on one set: {"num_problems", "num_samples", "avg@32": Interval, "pass@8": Interval, ...}."""
    summary: dict[str, Any] = {
        "num_problems": len(results),
        "num_samples": min((result["num_samples"] for result in results), default=0),
    }
    return summary | {name: interval(values, seed) for name, values in per_problem(results, ks).items()}


def compare(
    first: Sequence[Result], second: Sequence[Result], ks: Sequence[int] = KS, seed: int = 0
) -> dict[str, Difference]:
    """Second policy minus first, problem by problem: each metric's mean difference with its interval.

    Pairing removes what the problems' difficulty adds to both, so that much smaller differences can be told from
    chance than by two intervals side by side. Raises InputError if their problems differ.
    """
    return {name: judged(interval(values, seed)) for name, values in gains(first, second, ks).items()}


def gains(first: Sequence[Result], second: Sequence[Result], ks: Sequence[int] = KS) -> dict[str, "Array"]:
    """Each metric of the second policy minus the first's [problems]; InputError if their problems differ."""
    order = {result["problem_id"]: position for position, result in enumerate(first)}
    if order.keys() != {result["problem_id"] for result in second}:
        names = [results[0]["policy"] if results else "(none)" for results in (first, second)]
        raise InputError(f"{names[0]} and {names[1]} were evaluated on different problems: compare them on the same")
    num_samples = min((result["num_samples"] for result in (*first, *second)), default=0)
    before = per_problem(first, ks, num_samples)
    after = per_problem(sorted(second, key=lambda result: order[result["problem_id"]]), ks, num_samples)
    return {name: after[name] - before[name] for name in before if name in after}


def difference(first: "ArrayLike", second: "ArrayLike", seed: int = 0) -> Difference:
    """Mean of second - first over problems (arrays [problems], same order), with its interval."""
    import numpy as np

    return judged(interval(np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64), seed))


def judged(bounds: Interval) -> Difference:
    """A difference's interval, and as `real` whether it excludes zero."""
    return {**bounds, "real": bounds["low"] > 0 or bounds["high"] < 0}


def interval(values: "ArrayLike", seed: int = 0) -> Interval:
    """Mean of `values` [problems] with its 95 % percentile bootstrap interval; a seed gives one interval."""
    import numpy as np

    return average_interval([np.asarray(values, dtype=np.float64)], seed)


def average_interval(sets: Sequence["Array"], seed: int = 0) -> Interval:
    """The plain average of several sets' means (each an array [problems]), every set resampled on its own."""
    import numpy as np

    means = sum(_resamples(len(values), seed + i) @ values / len(values) for i, values in enumerate(sets)) / len(sets)
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    value = sum(float(values.mean()) for values in sets) / len(sets)
    return {"value": value, "low": float(low), "high": float(high)}


def share_interval(part: "Array", whole: "Array", seed: int = 0) -> Interval:
    """Share of the problems `whole` that are in `part` (both bool [problems]), with its interval; NaN of no problem.

    Or the quotient of two sums over problems, such as nats and tokens. Both are resampled together, since their sizes
    depend on the problems; resamples without any of `whole` don't count.
    """
    import numpy as np

    picks = _resamples(len(whole), seed)
    parts, wholes = picks @ part, picks @ whole
    if not whole.any():
        return {"value": np.nan, "low": np.nan, "high": np.nan}
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(parts[wholes > 0] / wholes[wholes > 0], (tail, 1 - tail))
    return {"value": float(part.sum() / whole.sum()), "low": float(low), "high": float(high)}


@lru_cache(maxsize=8)
def _resamples(num_problems: int, seed: int) -> "Array":
    """How often each problem is picked in each resample, [resamples, problems]; shared by all metrics of a set."""
    import numpy as np

    picks = np.random.default_rng(seed).integers(num_problems, size=(NUM_RESAMPLES, num_problems))
    rows = np.arange(NUM_RESAMPLES)[:, None] * num_problems
    counts = np.bincount((picks + rows).ravel(), minlength=NUM_RESAMPLES * num_problems)
    return counts.reshape(NUM_RESAMPLES, num_problems).astype(np.float64)


def by_policy(results: Sequence[Result]) -> Mapping[str, list[Result]]:
    """Results grouped by policy, in the order of first appearance."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result["policy"], []).append(result)
    return groups
