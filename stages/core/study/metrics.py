"""The metrics of a policy, from the counts in its Results: one table, each figure with an interval, paired differences.

METRICS says of each metric which fields of a Result it needs, how it is computed and what it is measured in; eval,
`--select`, analyze and report ask it, so a new metric is one entry. Shares are fractions 0..1. Intervals are 95 %
percentile bootstraps over problems: they say how far a figure would move with other problems of the same kind, not with
other samples or other seeds of training. A bootstrap of problems that all have the smallest or the largest value that
there can be is a point; its interval is that of Clopper and Pearson for none, or all, of so many problems. A difference
is real if its interval excludes zero.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypedDict

from stages.core.errors import InputError
from stages.core.records import Result
from stages.core.study.votes import maj_at_k

if TYPE_CHECKING:  # numpy is imported where it is used: the command line reads this module before it knows the stage
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]

KS = (8, 16, 32)
NUM_RESAMPLES = 2000
COVERAGE = 0.95
SHARE = "share"


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
    if k < 1:
        raise InputError(f"pass@{k} means nothing: name a k of 1 or more")
    if n.size and k > n.min():
        raise InputError(f"pass@{k} needs at least {k} samples a problem, found {n.min():.0f}: draw more or lower k")
    if (c < 0).any() or (c > n).any():
        raise InputError("a result counts more correct samples than samples (or fewer than none): was it edited?")
    all_wrong = np.ones(np.broadcast_shapes(n.shape, c.shape))
    for i in range(k):  # 0 once fewer than k are wrong: k samples must hold a right one
        all_wrong *= np.maximum(n - c - i, 0) / (n - i)
    return 1 - all_wrong


Values = Callable[[Mapping[str, Any], int], "ArrayLike"]


@dataclass(frozen=True)
class Metric:
    """A figure for each problem, from the fields of its Result that it `needs`.

    `values` takes these as columns [problems] and k; a metric without a k is computed once. `weight` names the column
    by which problems count in the mean, if they don't count alike.
    """

    name: str
    needs: tuple[str, ...]
    values: Values
    has_k: bool = False
    unit: str = SHARE
    is_accuracy: bool = False
    weight: str = ""

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The smallest and the largest value that there can be, if there are such."""
        return (0.0, 1.0) if self.unit == SHARE else None


def _per_sample(field: str, samples: str = "num_samples") -> Values:
    return lambda of, k: of[field] / of[samples]


def _pass(of: Mapping[str, Any], k: int) -> "Array":
    return pass_at_k(of["num_samples"], of["num_correct"], k)


def _maj(of: Mapping[str, Any], k: int) -> list[float]:
    counts = zip(of["num_samples"], of["num_correct"], of["wrong_votes"], strict=True)
    return [maj_at_k(int(n), int(c), tuple(votes), k) for n, c, votes in counts]


SAMPLES = ("num_samples", "num_correct")
METRICS = (
    Metric("avg", SAMPLES, _per_sample("num_correct"), is_accuracy=True),
    Metric("pass", SAMPLES, _pass, has_k=True, is_accuracy=True),
    Metric("maj", (*SAMPLES, "wrong_votes"), _maj, has_k=True, is_accuracy=True),
    Metric("greedy", ("num_greedy_correct",), lambda of, k: of["num_greedy_correct"], is_accuracy=True),
    Metric("truncated", ("num_truncated", "num_samples"), _per_sample("num_truncated")),
    Metric("no_answer", ("num_no_answer", "num_samples"), _per_sample("num_no_answer")),
    Metric("mean_tokens", ("num_tokens", "num_samples"), _per_sample("num_tokens"), unit="tokens"),
    Metric("kl", ("kl_nats", "num_kl_samples"), _per_sample("kl_nats", "num_kl_samples"), unit="nats a completion"),
    Metric(
        "kl_per_token",
        ("kl_nats", "num_kl_tokens"),
        _per_sample("kl_nats", "num_kl_tokens"),
        unit="nats a token",
        weight="num_kl_tokens",
    ),
)
ALWAYS = frozenset(("num_samples", "num_correct", "num_truncated"))  # what every Result has


def usual_ks(num_samples: int) -> list[int]:
    """The k of pass@k where none is named: those of KS that `num_samples` allows, or that number itself."""
    return [k for k in KS if k <= num_samples] or [num_samples]


def named(name: str) -> Metric:
    """The metric behind a figure's name: pass of pass@8."""
    return next(metric for metric in METRICS if metric.name == name.partition("@")[0])


def accuracies(names: Iterable[str]) -> list[str]:
    """Those of `names` that say how often a policy is right; others may be no metrics at all."""
    right = {metric.name for metric in METRICS if metric.is_accuracy}
    return [name for name in names if name.partition("@")[0] in right]


def in_order(names: Iterable[str]) -> list[str]:
    """Names of figures in the order of METRICS, those of one metric by k."""
    order = [metric.name for metric in METRICS]
    return sorted(names, key=lambda name: (order.index(name.partition("@")[0]), int(name.partition("@")[2] or 0)))


def available(fields: Iterable[str], ks: Sequence[int], num_samples: int) -> Iterator[tuple[str, Metric, int]]:
    """(name, metric, k) of every figure that Results with these fields have: avg@n for n `num_samples`, pass@k, ..."""
    known = frozenset(fields)
    for metric in METRICS:
        if known.issuperset(metric.needs):
            for k in ks if metric.has_k else [num_samples]:
                yield f"{metric.name}@{k}" if metric.has_k or metric.name == "avg" else metric.name, metric, k


def per_problem(
    results: Sequence[Result], ks: Sequence[int] = KS, num_samples: int | None = None
) -> dict[str, "Array"]:
    """The value of each figure on each problem, in the order of `results`, for those in which all problems count alike.

    n of avg@n is `num_samples`, or else the smallest number of samples of any problem.
    """
    return {name: values for name, values, weights in _measured(results, ks, num_samples) if weights is None}


def _measured(
    results: Sequence[Result], ks: Sequence[int], num_samples: int | None
) -> Iterator[tuple[str, "Array", "Array | None"]]:
    """(name, values [problems], weights) of every figure that all of the results count for."""
    import numpy as np

    check_results(results)
    rows: Sequence[Mapping[str, Any]] = results
    shared = frozenset.intersection(*(frozenset(row) for row in rows))
    needed = shared & {field for metric in METRICS for field in metric.needs}
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in needed}
    columns |= {name: np.array(column) for name, column in columns.items() if not isinstance(column[0], list)}
    for name, metric, k in available(shared, ks, num_samples or int(columns["num_samples"].min())):
        weights = columns[metric.weight] if metric.weight else None
        yield name, np.asarray(metric.values(columns, k), dtype=np.float64), weights


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
    for name, values, weights in _measured(results, ks, None):
        if weights is None:
            summary[name] = interval(values, seed, named(name).bounds)
        else:
            summary[name] = share_interval(values * weights, weights, seed)
    return summary


def compare(
    first: Sequence[Result], second: Sequence[Result], ks: Sequence[int] = KS, seed: int = 0
) -> dict[str, Difference]:
    """Second policy minus first, problem by problem: each metric's mean difference with its interval.

    Pairing removes what the problems' difficulty adds to both, so that much smaller differences can be told from
    chance than by two intervals side by side. Raises InputError if their problems differ.
    """
    return {
        name: judged(interval(values, seed, difference_bounds(name)))
        for name, values in gains(first, second, ks).items()
    }


def gains(first: Sequence[Result], second: Sequence[Result], ks: Sequence[int] = KS) -> dict[str, "Array"]:
    """Each metric of the second policy minus the first's [problems]; InputError if their problems differ."""
    order = {result["problem_id"]: index for index, result in enumerate(first)}
    if order.keys() != {result["problem_id"] for result in second}:
        names = [results[0]["policy"] if results else "(none)" for results in (first, second)]
        raise InputError(f"{names[0]} and {names[1]} were evaluated on different problems: compare them on the same")
    num_samples = min((result["num_samples"] for result in (*first, *second)), default=0)
    before = per_problem(first, ks, num_samples)
    after = per_problem(sorted(second, key=lambda result: order[result["problem_id"]]), ks, num_samples)
    return {name: after[name] - before[name] for name in before if name in after}


def judged(bounds: Interval) -> Difference:
    """A difference's interval, and as `real` whether it excludes zero."""
    return {**bounds, "real": bounds["low"] > 0 or bounds["high"] < 0}


def difference_bounds(name: str) -> tuple[float, float] | None:
    """The smallest and the largest difference that there can be in the figure `name`, if there are such."""
    bounds = named(name).bounds
    return (bounds[0] - bounds[1], bounds[1] - bounds[0]) if bounds else None


def interval(values: "ArrayLike", seed: int = 0, bounds: tuple[float, float] | None = None) -> Interval:
    """Mean of `values` [problems], which lie within `bounds`, with its 95 % bootstrap interval; a seed gives one."""
    import numpy as np

    return average_interval([np.asarray(values, dtype=np.float64)], seed, bounds)


def average_interval(sets: Sequence["Array"], seed: int = 0, bounds: tuple[float, float] | None = None) -> Interval:
    """The plain average of several sets' means (each an array [problems]), every set resampled on its own."""
    import numpy as np

    means = sum(_resamples(len(values), seed + i) @ values / len(values) for i, values in enumerate(sets)) / len(sets)
    tail = (1 - COVERAGE) / 2
    low, high = map(float, np.quantile(means, (tail, 1 - tail)))
    value = sum(float(values.mean()) for values in sets) / len(sets)
    for bound in bounds or ():
        if all((values == bound).all() for values in sets):
            away = bound + (sum(bounds or ()) - 2 * bound) * at_bound(len(sets) * min(map(len, sets)))
            low, high = min(bound, away), max(bound, away)
    return {"value": value, "low": low, "high": high}


def at_bound(num_problems: int) -> float:
    """Clopper and Pearson's upper bound of a share of which none of `num_problems` were seen; mirrored, for all."""
    return 1 - ((1 - COVERAGE) / 2) ** (1 / num_problems)


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
    low, high = map(float, np.quantile(parts[wholes > 0] / wholes[wholes > 0], (tail, 1 - tail)))
    value = float(part.sum() / whole.sum())
    if whole.dtype == bool and value in (0, 1):
        low, high = (0, at_bound(whole.sum())) if value == 0 else (1 - at_bound(whole.sum()), 1)
    return {"value": value, "low": low, "high": high}


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
