"""The expensive half of the verifier: comparison with math-verify, in worker processes of its own."""

import ctypes
import json
import os
import resource
import signal
import sys
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

from stages.core import answers
from stages.core.records import Verdict

DEADLINE_S = 1.0
BACKSTOP_S = 3
MAX_MEMORY = 2**30


class _Deadline(BaseException):
    pass


def _on_deadline(*_: Any) -> None:
    raise _Deadline


def compare(answer: str, prediction: str) -> Verdict:
    """The verdict on a prediction that the text alone did not decide."""
    from math_verify import verify

    return "correct" if verify(parse(answer), parse(prediction), timeout_seconds=None) else "wrong"


@lru_cache(4096)
def parse(text: str) -> Any:
    """The sympy object of an answer."""
    from math_verify import LatexExtractionConfig
    from math_verify import parse as math_parse

    config = LatexExtractionConfig(boxed_match_priority=0)
    return math_parse(f"\\boxed{{{text}}}", [config], fallback_mode="no_fallback", parsing_timeout=None)


def bounded(answer: str, prediction: str) -> Verdict:
    """`compare` under the bounds of CPU time and memory."""
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + BACKSTOP_S, hard))
    signal.signal(signal.SIGPROF, _on_deadline)
    signal.setitimer(signal.ITIMER_PROF, DEADLINE_S)
    try:
        try:
            return compare(answer, prediction)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, signal.SIG_IGN)
    except _Deadline:
        return "timeout"
    except Exception:
        return "error"


def main() -> None:
    """Serve one parent over the pipe whose descriptor is the first argument; the second is the parent's id."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[2]):
        return
    pipe = Connection(int(sys.argv[1]))
    parse("1")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            answer, predictions = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        for prediction in predictions:
            pipe.send_bytes(bounded(answer, prediction).encode())


if __name__ == "__main__":
    main()
