"""From examples to training steps: token ids with labels, the order of examples, the learning rate of each step.

Without torch: it takes a tokenizer and works on lists of integers.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.core.errors import InputError
from stages.core.policy import checkpoints
from stages.core.policy.checkpoints import IGNORED
from stages.core.records import Example


@dataclass(frozen=True)
class Row:
    """An example as the trainer sees it: `labels` are the token ids, but IGNORED on the prompt.

    Row(input_ids=[5, 6, 9, 1], labels=[-100, -100, 9, 1])
    """

    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_labels(self) -> int:
        """Tokens of the completion, its end token included: those that the loss counts."""
        return len(self.labels) - self.labels.count(IGNORED)


def tokenize(tokenizer: Any, example: Example) -> Row:
    """The prompt's token ids as the engine saw them, then the completion's, then the end token exactly once.

    The completion is cut out of the tokenised whole if that begins with the prompt's tokens, because a tokenizer
    that marks the begin of a text (SentencePiece) would put a space before a completion on its own. If prompt and
    completion share a token in the whole, the completion is tokenised on its own: the engine began there, too.
    """
    prompt_ids, whole_ids = checkpoints.encode(
        tokenizer, [example["prompt"], example["prompt"] + example["completion"]]
    )
    if whole_ids[: len(prompt_ids)] == prompt_ids:
        completion_ids = whole_ids[len(prompt_ids) :]
    else:
        completion_ids = tokenizer(example["completion"], add_special_tokens=False)["input_ids"]
    while completion_ids and completion_ids[-1] == tokenizer.eos_token_id:
        completion_ids = completion_ids[:-1]
    completion_ids = [*completion_ids, tokenizer.eos_token_id]
    return Row(prompt_ids + completion_ids, [IGNORED] * len(prompt_ids) + completion_ids)


def tokenize_fitting(tokenizer: Any, examples: Sequence[Example], max_tokens: int) -> tuple[list[Row], list[str]]:
    """The rows of at most `max_tokens` tokens, and the problem ids of the examples left out as too long.

    No example is cut: half a solution would teach to stop half-way. Raises InputError if no example fits.
    """
    rows, left_out = [], []
    for example in examples:
        row = tokenize(tokenizer, example)
        if len(row) <= max_tokens:
            rows.append(row)
        else:
            left_out.append(example["problem_id"])
    if not rows:
        raise InputError(
            f"none of {len(examples)} examples fits into {max_tokens} tokens, prompt included: raise --max-tokens, or "
            "where that is the policy's context, draw shorter completions in rl"
        )
    return rows, left_out


def order(lengths: Sequence[int], batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """The example numbers of each optimizer step: every epoch a fresh shuffle, cut into batches of `batch_size`.

    An epoch's last batch may be smaller. Within a step the longest come first: the order there does not change the
    gradient, and neighbours of about the same length need little padding.
    """
    steps = []
    for epoch in range(epochs):
        shuffled = list(range(len(lengths)))
        random.Random(f"{seed}/{epoch}").shuffle(shuffled)
        for start in range(0, len(shuffled), batch_size):
            steps.append(sorted(shuffled[start : start + batch_size], key=lambda number: -lengths[number]))
    return steps


def microbatch_size(share: int, longest: int, token_budget: int) -> int:
    """The most examples of length `longest` that fit `token_budget` and divide `share`, one process's part of a step.

    1 if not even one fits.
    """
    fitting = [size for size in range(1, share + 1) if share % size == 0 and size * longest <= token_budget]
    return max(fitting, default=1)


def lr_share(step: int, num_steps: int, warmup_share: float, last_share: float) -> float:
    """The share of the peak learning rate at `step` (from 0): linear up, the peak, linear down to `last_share`.

    Of w = round(warmup_share * num_steps) warm-up steps, step s runs at (s + 1) / (w + 1); step w at 1; the last at
    `last_share`. A single step runs at 1.
    """
    num_warmup = min(round(warmup_share * num_steps), num_steps - 1)
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    num_falling = num_steps - 1 - num_warmup
    return 1.0 - (1.0 - last_share) * (step - num_warmup) / num_falling if num_falling else 1.0
