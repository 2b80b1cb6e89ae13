"""How alike the completions of two checkpoints are: Jaccard similarity of bigrams (the paper's Appendix A).

    J(s, t) = |G(s) & G(t)| / |G(s) | G(t)|          G(s): the set of bigrams of completion s
    Sim(i, j) = mean over problems of the mean of J over all N x N pairs of a completion of i and one of j

As in the formula, the diagonal is the mean over all N x N pairs of one checkpoint's completions, each with itself
included. The paper does not say what its bigrams consist of. Here they are pairs of lexical tokens, which are runs of
word characters or single other marks ("x+12" is x, +, 12), so no tokenizer is needed and text without spaces works.
Two completions without any bigram count as alike (1), one with and one without as unlike (0).

With M the 0/1 matrix [completions, bigrams] of a problem, the sparse product M @ M.T holds all intersections, and
|G(s)| + |G(t)| less the intersection is the union. Equal completions share one row with a weight, which saves most of
the work if a policy repeats itself.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.core.study.metrics import Array

_TOKEN = re.compile(r"\w+|[^\w\s]")
COMMON = 16  # bigrams that occur in one of this many completions or more are multiplied densely, the rest sparsely


def similarity_matrix(completions: Sequence[Mapping[str, Sequence[str]]]) -> tuple["Array", "Array"]:
    """Mean similarity [checkpoints, checkpoints] of `completions`: for each checkpoint, problem id -> its completions.

    All checkpoints must hold the same problems, with one completion or more for each. The second array [checkpoints]
    is the similarity within each checkpoint without the pairs of a completion and itself, over the problems with two
    completions or more; NaN if there is none.
    """
    import numpy as np

    problems = sorted(completions[0])
    total, distinct = np.zeros((len(completions), len(completions))), np.zeros(len(completions))
    num_paired = np.zeros(len(completions))
    for problem in problems:
        here = [checkpoint[problem] for checkpoint in completions]
        alike, num_samples = problem_similarity(here), np.array([len(texts) for texts in here])
        total += alike
        paired = num_samples > 1
        distinct[paired] += without_self(np.diag(alike)[paired], num_samples[paired])
        num_paired += paired
    within = np.divide(distinct, num_paired, out=np.full(len(completions), np.nan), where=num_paired > 0)
    return total / len(problems), within


def problem_similarity(completions: Sequence[Sequence[str]]) -> "Array":
    """Similarity [checkpoints, checkpoints] on one problem, from each checkpoint's completions of it."""
    import numpy as np

    texts: dict[str, int] = {}
    members = [[texts.setdefault(text, len(texts)) for text in of_checkpoint] for of_checkpoint in completions]
    weights = np.zeros((len(completions), len(texts)))
    for checkpoint, indices in enumerate(members):
        np.add.at(weights[checkpoint], indices, 1 / len(indices))
    return weights @ jaccard(bigrams(texts)) @ weights.T


def bigrams(texts: Iterable[str]) -> list["Array"]:
    """For each text the set of its pairs of neighbouring lexical tokens, as sorted codes that mean the same in all."""
    import numpy as np

    codes: defaultdict[str, int] = defaultdict()
    codes.default_factory = codes.__len__  # a token's code counts the distinct tokens before it
    tokens = [np.array([codes[token] for token in _TOKEN.findall(text)], dtype=np.int64) for text in texts]
    return [np.unique(of_text[:-1] * len(codes) + of_text[1:]) for of_text in tokens]


def jaccard(sets: Sequence["Array"]) -> "Array":
    """Jaccard index [sets, sets] of every pair of `sets` of codes; 1 for two empty ones."""
    import numpy as np

    sizes = np.array([len(codes) for codes in sets], dtype=np.float64)
    shared = _intersections(sets)
    union = sizes[:, None] + sizes[None, :] - shared
    return np.divide(shared, union, out=np.ones_like(union), where=union > 0)


def _intersections(sets: Sequence["Array"]) -> "Array":
    """Number of shared codes [sets, sets]: a dense product for the common codes, a sparse one for the rare."""
    import numpy as np
    from scipy.sparse import csc_array

    codes, columns = np.unique(np.concatenate(sets), return_inverse=True)
    rows = np.repeat(np.arange(len(sets)), [len(of_set) for of_set in sets])
    matrix = csc_array((np.ones(len(columns), np.float32), (rows, columns)), shape=(len(sets), len(codes)))
    common = np.bincount(columns, minlength=len(codes)) * COMMON >= len(sets)
    dense, rare = matrix[:, common].toarray(), matrix[:, ~common].tocsr()
    return (dense @ dense.T + (rare @ rare.T).toarray()).astype(np.float64)  # float32 counts exactly up to 2**24


def without_self(within: "Array", num_samples: "Array") -> "Array":
    """Similarity of distinct samples of one problem, from the diagonal, which counts each with itself (J = 1) too.

    (N^2 within - N) / (N^2 - N), for N of 2 or more.
    """
    return (num_samples * within - 1) / (num_samples - 1)
