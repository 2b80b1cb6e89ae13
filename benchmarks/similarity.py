"""Bigram similarity of checkpoints: sparse products against the plain loop over sets, on the same completions.

    python benchmarks/similarity.py                    32 samples x 30 problems x 15 checkpoints, 400 tokens each
    python benchmarks/similarity.py --plain-s 60       a first look: the plain loop on as many problems as fit in

The completions are drawn from a Zipf-distributed vocabulary which drifts from checkpoint to checkpoint, so that the
sets overlap, less than those of real solutions do (0.2 to 0.3): equal completions, which the sparse side counts once,
do not occur. With --plain-s the plain loop's time is scaled up, and agreement is checked on the problems that it did.
"""

import argparse
import time
from itertools import pairwise

import numpy as np

from stages.analyze import similarity

Completions = list[list[str]]


def make_problem(rng: np.random.Generator, checkpoints: int, samples: int, tokens: int) -> Completions:
    """Completions [checkpoints][samples] of one problem: a common stock of phrases, walked differently each time."""
    vocabulary = np.array([f"w{i}" for i in range(400)])
    popularity = 1 / np.arange(1, 401) ** 1.1
    drift = [popularity * np.exp(rng.normal(0, 0.5, 400) * np.sqrt(i / checkpoints)) for i in range(checkpoints)]
    return [[" ".join(vocabulary[rng.choice(400, size=tokens, p=p / p.sum())]) for _ in range(samples)] for p in drift]


def plain(problem: Completions) -> np.ndarray:
    """Appendix A as it is written: every pair of completions of every pair of checkpoints, one set operation each."""
    sets = [[set(pairwise(text.split())) for text in texts] for texts in problem]
    total = np.zeros((len(sets), len(sets)))
    for i, first in enumerate(sets):
        for j, second in enumerate(sets[: i + 1]):
            scores = [len(s & t) / len(s | t) if s | t else 1.0 for s in first for t in second]
            total[i, j] = total[j, i] = sum(scores) / len(scores)
    return total


def main() -> None:
    """Time both on the same data and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("problems", 30), ("checkpoints", 15), ("samples", 32), ("tokens", 400), ("plain-s", 3600)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    problems = [
        make_problem(rng, options.checkpoints, options.samples, options.tokens) for _ in range(options.problems)
    ]

    similarity.problem_similarity(problems[0][:1])  # imports
    start = time.perf_counter()
    fast = [similarity.problem_similarity(problem) for problem in problems]
    fast_s = time.perf_counter() - start

    worst, done, start = 0.0, 0, time.perf_counter()
    while done < len(problems) and (done == 0 or time.perf_counter() - start < options.plain_s):
        worst = max(worst, float(np.abs(plain(problems[done]) - fast[done]).max()))
        done += 1
    plain_s = (time.perf_counter() - start) * len(problems) / done

    pairs = options.problems * (options.checkpoints * options.samples) ** 2 / 2
    mean = np.mean(fast, axis=0)
    print(f"{pairs / 1e6:.1f} million pairs; similarity {np.diag(mean).mean():.3f} within, {mean.mean():.3f} overall")
    print(f"sparse products   {fast_s:8.2f} s")
    print(f"loop over sets    {plain_s:8.2f} s   (measured on {done} of {len(problems)} problems)")
    print(f"{plain_s / fast_s:.0f} times as fast; largest difference {worst:.1e}")
    assert worst < 1e-12


if __name__ == "__main__":
    main()
