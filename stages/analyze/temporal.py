"""Temporal sampling: pass@k with the k samples spread over checkpoints of a run (Li et al. 2025, arXiv 2505.20196).

The t latest checkpoints take turns, the latest first, so that checkpoint i gives k_i samples, k / t rounded up or down.
Of its n_i samples in the evaluation c_i are correct. k_i of these, drawn without replacement, are all wrong with
probability C(n_i - c_i, k_i) / C(n_i, k_i). Its expectation over evaluations is (1 - p_i)^k_i, the probability that k_i
new samples are all wrong, where p_i is the probability of a correct one. Samples of different checkpoints are
independent, so that the product over checkpoints is unbiased as well:

    pass@k|t = 1 - prod_i C(n_i - c_i, k_i) / C(n_i, k_i)

With t = 1 this is pass@k of the latest checkpoint. No checkpoint needs more than k / t samples, rounded up.
"""

from typing import TYPE_CHECKING

from stages.core.study import metrics

if TYPE_CHECKING:
    from stages.core.study.metrics import Array


def quotas(k: int, num_checkpoints: int) -> list[int]:
    """How many of k samples each checkpoint gives in turn: 8 over 3 are 3, 3, 2."""
    return [k // num_checkpoints + (turn < k % num_checkpoints) for turn in range(num_checkpoints)]


def pass_at_k(num_samples: "Array", num_correct: "Array", k: int) -> "Array":
    """pass@k|t for each problem; counts are [t, problems], the latest checkpoint first.

    Raises InputError if a checkpoint has fewer samples of a problem than its share of k.
    """
    import numpy as np

    all_wrong = np.ones(num_samples.shape[1])
    for n, c, quota in zip(num_samples, num_correct, quotas(k, len(num_samples)), strict=True):
        if quota:
            all_wrong *= 1 - metrics.pass_at_k(n, c, quota)
    return 1 - all_wrong
