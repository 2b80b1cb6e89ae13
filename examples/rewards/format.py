"""A format reward: a completion should think, and then give one answer, in a box, and nothing after it.

rloop rl ... --reward math-verify --reward examples/rewards/format.py:reward --reward-weight 1 --reward-weight 0.2
"""

import re
from typing import Any

FORM = re.compile(r"\s*<think>.+</think>[^<]*\\boxed\{[^{}]+\}[.$\s]*", re.DOTALL)


def reward(completions: list[str], **columns: Any) -> list[float]:
    """1 for a completion in the form, 0 for any other."""
    return [float(completion.count("\\boxed") == 1 and bool(FORM.fullmatch(completion))) for completion in completions]
