"""The cheap half of the verifier: finding the answer in a completion, and what its text alone decides."""

import re
import signal

from stages.core.records import Verdict

MAX_RAW = 1000
DEADLINE_SIGNALS = (signal.SIGXCPU, signal.SIGPROF)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ANSWER = re.compile(r"^[ \t*#>]*answer[ \t*]*:[ \t*]*(.*)$", re.IGNORECASE | re.MULTILINE)


def extract(completion: str, bare: bool = False) -> str | None:
    """The text of the last closed box, else of the last "Answer:" line, else None."""
    for found in reversed(list(_BOX.finditer(completion))):
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", completion[found.end() :]):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                return completion[found.end() : found.end() + brace.start()].strip() or None
    lines = _ANSWER.findall(completion)
    return lines[-1].strip(" $*") or None if lines else None


def decide(answer: str, prediction: str) -> Verdict | None:
    """The verdict where the text alone gives one, else None."""
    if len(prediction) > MAX_RAW:
        return "rejected"
    left, right = answer.replace(",", ""), prediction.strip("$ .").replace(",", "")
    if re.fullmatch(r"[+-]?\d+", left, re.ASCII) and re.fullmatch(r"[+-]?\d+", right, re.ASCII):
        return "correct" if int(left) == int(right) else "wrong"
    return None
