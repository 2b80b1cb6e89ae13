"""A verifier worker that misbehaves on request: run in place of stages.core.verifier.algebra by test_verifier."""

import os

from stages.core import bounds
from stages.core.records import Verdict
from stages.core.verifier import algebra

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
