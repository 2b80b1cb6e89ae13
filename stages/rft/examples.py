"""From examples to training steps: token ids with labels, the order of examples, the learning rate of each step.

Without torch: it takes a tokenizer and works on lists of integers.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stages.core.drawing import templates
from stages.core.drawing.tokens import unpack_ids, unpack_log_probs
from stages.core.errors import InputError
from stages.core.policy import checkpoints
from stages.core.policy.checkpoints import IGNORED
from stages.core.records import Example, Message


class Unpacked(NamedTuple):
    """An example with its sampled tokens, None if it is known as a text alone, and their log-probs, if known."""

    example: Example
    token_ids: list[int] | None
    log_probs: list[float]

    @property
    def problem_id(self) -> str:
        return self.example["problem_id"]


def unpack(example: Example) -> Unpacked:
    """The example, unpacked. Raises InputError for packed tokens or log-probs that are none."""
    try:
        ids = unpack_ids(example["token_ids"]) if "token_ids" in example else None
        return Unpacked(example, ids, unpack_log_probs(example.get("log_probs", "")))
    except InputError as error:
        raise InputError(f"an example of problem {example['problem_id']}: {error}") from None


@dataclass(frozen=True)
class Tokenized:
    """An example as the trainer sees it: `labels` are the token ids, but IGNORED on the prompt.

    Tokenized(input_ids=[5, 6, 9, 1], labels=[-100, -100, 9, 1])
    """

    input_ids: list[int]
    labels: list[int]
    weight: float = 1.0  # negative for a failure
    log_probs: list[float] = field(default_factory=list)  # of the completion's tokens when they were drawn, if known

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_labels(self) -> int:
        """Tokens of the completion, its end token included: those that the loss counts."""
        return len(self.labels) - self.labels.count(IGNORED)


@dataclass(frozen=True)
class Ending:
    """By what a completion ends that is known as a text alone.

    `chat` after a prompt that ends as the policy's chat template opens the answer, with the text `opening`; else
    `plain`, the tokenizer's end token. `all` are the tokens that end a completion when it is drawn.
    """

    plain: int
    all: frozenset[int]
    chat: int | None = None
    opening: str = ""

    def after(self, prompt: str) -> int:
        """The end token of a completion of `prompt`."""
        return self.chat if self.chat is not None and prompt.endswith(self.opening) else self.plain


def ending(tokenizer: Any, end_token_ids: Sequence[int]) -> Ending:
    """How texts end under a policy: its end tokens, and the one of them that its chat template puts after an answer."""
    plain, ends = tokenizer.eos_token_id, frozenset(end_token_ids)
    if not getattr(tokenizer, "chat_template", None):
        return Ending(plain, ends)
    question, answer = Message(role="user", content="What is 3 + 4?"), Message(role="assistant", content="It is 7.")
    chats = {"open": [question], "closed": [question, answer, question]}
    rendered = templates.render_chats(tokenizer, chats, "the policy's chat template")
    closing = checkpoints.encode(tokenizer, [rendered["closed"].rpartition(answer["content"])[2]])[0]
    chat = next((token for token in closing if token in ends), None)
    return Ending(plain, ends, chat, rendered["open"].rpartition(question["content"])[2])


def tokenize(tokenizer: Any, unpacked: Unpacked, end: Ending) -> Tokenized:
    """The prompt's token ids as the engine saw them, then the completion's.

    Of a rollout these are the tokens that were sampled, with the one that ended it if it was not truncated. A text is
    tokenised and ends with its end token exactly once.
    """
    example, sampled, log_probs = unpacked
    [prompt_ids] = checkpoints.encode(tokenizer, [example["prompt"]])
    if sampled is not None:
        completion_ids = sampled
    else:
        completion_ids = _completion_ids(tokenizer, example, prompt_ids)
        last = completion_ids[-1] if completion_ids and completion_ids[-1] in end.all else end.after(example["prompt"])
        while completion_ids and completion_ids[-1] == last:
            completion_ids = completion_ids[:-1]
        completion_ids = [*completion_ids, last]
    labels = [IGNORED] * len(prompt_ids) + completion_ids
    return Tokenized(prompt_ids + completion_ids, labels, example.get("weight", 1.0), log_probs)


def _completion_ids(tokenizer: Any, example: Example, prompt_ids: list[int]) -> list[int]:
    """The tokens of a completion that is known as a text.

    It is cut out of the tokenised whole if that begins with the prompt's tokens, because a tokenizer that marks the
    begin of a text (SentencePiece) would put a space before a completion on its own. If prompt and completion share a
    token in the whole, the completion is tokenised on its own: the engine began there, too.
    """
    [whole_ids] = checkpoints.encode(tokenizer, [example["prompt"] + example["completion"]])
    if whole_ids[: len(prompt_ids)] == prompt_ids:
        return whole_ids[len(prompt_ids) :]
    return list(tokenizer(example["completion"], add_special_tokens=False)["input_ids"])


def tokenize_fitting(
    tokenizer: Any, examples: Sequence[Unpacked], max_tokens: int, end: Ending
) -> tuple[list[Tokenized], list[str]]:
    """The rows of at most `max_tokens` tokens, and the problem ids of the examples left out as too long.

    No example is cut: half a solution would teach to stop half-way. Raises InputError if no example fits.
    """
    rows, left_out = [], []
    for example in examples:
        row = tokenize(tokenizer, example, end)
        if len(row) <= max_tokens:
            rows.append(row)
        else:
            left_out.append(example.problem_id)
    if not rows:
        raise InputError(
            f"none of {len(examples)} examples fits into {max_tokens} tokens, prompt included: raise --max-tokens, or "
            "where that is the policy's context, draw shorter completions in rl"
        )
    return rows, left_out


def without_unknown(tokenizer: Any, examples: Sequence[Unpacked]) -> tuple[list[Unpacked], list[str]]:
    """The examples whose sampled tokens the tokenizer has, and the problem ids of the others.

    A padded vocabulary has ids that stand for no text, and at temperature 1 one is sampled now and then.
    """
    size = len(tokenizer)
    kept: list[Unpacked] = []
    unknown: list[str] = []
    for example in examples:
        if max(example.token_ids or [0]) < size:
            kept.append(example)
        else:
            unknown.append(example.problem_id)
    if not kept:
        raise InputError(f"each of {len(examples)} examples holds tokens that the policy's tokenizer lacks")
    return kept, unknown


def check_ids(tokenizer: Any, examples: Sequence[Unpacked], vocabulary: int) -> list[str]:
    """The problem ids of examples whose text is not that of their token_ids: edited texts, say.

    Raises InputError if they are no ids of a policy with `vocabulary` tokens, or most are another tokenizer's.
    """
    known = [(each, each.token_ids) for each in examples if each.token_ids is not None]
    differing = []
    for each, ids in known:
        if ids and max(ids) >= vocabulary:
            raise InputError(
                f"an example of problem {each.problem_id} holds token {max(ids)}, and the policy has "
                f"{vocabulary}: its token_ids are of another tokenizer; leave them out to train on the text"
            )
        if tokenizer.decode(ids, skip_special_tokens=True).strip() != each.example["completion"].strip():
            differing.append(each.problem_id)
    if 2 * len(differing) > len(known):
        raise InputError(
            f"{len(differing)} of {len(known)} examples hold token_ids that do not give their text: they are of "
            "another tokenizer than the policy's; leave them out to train on the text"
        )
    return differing


def check_log_probs(examples: Sequence[Unpacked]) -> None:
    """Raise InputError for the first example without a log-prob for each of its tokens."""
    for example in examples:
        if not example.token_ids or len(example.token_ids) != len(example.log_probs):
            raise InputError(
                f"--likelihood-weights: an example of problem {example.problem_id} has no log-prob for each of its "
                "tokens: take rollouts of rl, which keeps them"
            )


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
