"""A verifier worker that misbehaves on request, in place of the one of grading.verifier.algebra."""

import os

from stages.core.grading import bounds
from stages.core.grading.verifier import algebra
from stages.core.records import Verdict

honest = algebra.compare


def compare(answer: str, prediction: str) -> Verdict:
    """As the real one, but for three predictions."""
    if prediction == "h+x":
        7**10**10  # one operation of C code: no Python signal handler runs before it ends
    if prediction == "c+x":
        os.abort()
    if prediction == "s+x":
        bytearray(2 * bounds.MAX_MEMORY)
    return honest(answer, prediction)


algebra.compare = compare

if __name__ == "__main__":
    algebra.main()
