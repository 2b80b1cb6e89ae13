"""Draw groups of rollouts: problems to prompts, prompts to completions, completions to rewards.

The verifier works on finished groups while the engine still generates the others.
"""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from stages.core.drawing import templates
from stages.core.drawing.engine import Completion, Engine, Sampling, ShouldStop, seed_of
from stages.core.drawing.templates import Template
from stages.core.drawing.tokens import pack_ids, pack_log_probs
from stages.core.errors import InputError
from stages.core.grading.scores import Grader, Pending, Score
from stages.core.policy import checkpoints
from stages.core.records import Problem, Rollout
from stages.core.tabular import some

OWN_PROMPTS = "the problems' own prompts"  # in the place of a template's digest


@dataclass(frozen=True)
class Prompt:
    """A problem made ready for the engine: its exact text and its token ids."""

    problem: Problem
    text: str
    token_ids: list[int]


def seeded(sampling: Sampling, seed: int, prompts: Sequence[Prompt]) -> Sampling:
    """How to sample `prompts` so that a problem's samples depend only on `seed` and its id, in eval as elsewhere."""
    return replace(sampling, seeds=[seed_of(seed, prompt.problem["id"]) for prompt in prompts])


class Packed(Sequence[Completion]):
    """Completions that another process reads at its first look, tokens and log-probs as arrays."""

    def __init__(self, completions: Sequence[Completion]):
        import numpy as np

        ids: Any = partial(np.asarray, dtype=np.int32)
        log_probs: Any = partial(np.asarray, dtype=np.float32)  # which is how engines compute them
        arrays = [each._replace(token_ids=ids(each.token_ids), log_probs=log_probs(each.log_probs))
                  for each in completions]  # fmt: skip
        self._bytes, self._length = pickle.dumps(arrays, protocol=5), len(arrays)

    @cached_property
    def _read(self) -> list[Completion]:
        bytes_, self._bytes = self._bytes, b""
        read: list[Completion] = pickle.loads(bytes_)
        return read

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        return self._read[index]


@dataclass
class Group:
    """The completions drawn for one prompt, with their scores, in the order of the samples."""

    prompt: Prompt
    completions: Sequence[Completion]
    batch: Pending = field(repr=False)

    @property
    def scores(self) -> list[Score]:
        """The scores; waits for them if they are not there yet."""
        return self.batch.result()

    def settled(self) -> "Group":
        """The same group with its scores waited for, free to travel to another process."""
        self.batch.result()
        return self

    def packed(self) -> "Group":
        """`settled`, its completions as bytes until someone looks at them: of many ranks few need all of them."""
        return Group(self.prompt, Packed(self.completions), self.settled().batch)

    @property
    def is_scored(self) -> bool:
        """Whether the scores are there, so that reading them does not wait."""
        return self.batch.is_done

    @property
    def num_tokens(self) -> int:
        """Tokens of all completions, end tokens included."""
        return sum(len(completion.token_ids) for completion in self.completions)

    @property
    def rewards(self) -> list[float]:
        """The reward of each completion: math-verify's 0.0 or 1.0, or the sum of the user's own."""
        return [score.reward for score in self.scores]

    @property
    def num_correct(self) -> int:
        return sum(score.verdict == "correct" for score in self.scores)

    def rollouts(self, policy: str, step: int = 0, first_sample: int = 0) -> list[Rollout]:
        """The group as records, `sample` counting up from `first_sample`."""
        pairs = enumerate(zip(self.completions, self.scores, strict=True), first_sample)
        return [self._rollout(completion, score, policy, step, sample) for sample, (completion, score) in pairs]

    def _rollout(self, completion: Completion, score: Score, policy: str, step: int, sample: int) -> Rollout:
        rollout: Rollout = {
            "problem_id": self.prompt.problem["id"],
            "sample": sample,
            "step": step,
            "policy": policy,
            "prompt": self.prompt.text,
            "completion": completion.text,
            "answer": self.prompt.problem["answer"],
            "reward": score.reward,
            "verdict": score.verdict,
            "num_tokens": len(completion.token_ids),
            "finish_reason": "stop" if completion.finish_reason == "stop" else "length",
            "token_ids": pack_ids(completion.token_ids),
        }
        if others := self.prompt.problem.get("other_answers"):
            rollout["other_answers"] = others
        if len(completion.log_probs):
            rollout["log_probs"] = pack_log_probs(completion.log_probs)
        if score.parts is not None:
            rollout["rewards"] = score.parts
        return rollout


def make_prompts(
    problems: Sequence[Problem],
    template: Template,
    tokenizer: Any,
    max_tokens: int,
    context: int,
    file: str | Path = "problems",
) -> tuple[list[Prompt], list[str]]:
    """Render and tokenise; return the prompts that leave room for `max_tokens`, and the ids of those left out.

    Raises InputError if `max_tokens` alone fills the `context` (in tokens), and one that names the `file` if a prompt
    is empty or can't be rendered, or if none is left.
    """
    if max_tokens >= context:
        raise InputError(f"--max-tokens {max_tokens} does not fit the policy's context of {context} tokens: lower it")
    texts = _texts(problems, template, tokenizer, str(file))
    encoded = checkpoints.encode(tokenizer, texts)
    prompts, left_out = [], []
    for problem, text, token_ids in zip(problems, texts, encoded, strict=True):
        if not token_ids:
            remedy = "write its prompt as a text" if problem.get("prompt") else "name another --template"
            raise InputError(f"{file}: problem {problem['id']} gives an empty prompt: remove it, or {remedy}")
        if len(token_ids) + max_tokens <= context:
            prompts.append(Prompt(problem, text, token_ids))
        else:
            left_out.append(problem["id"])
    if not prompts:
        shortest = min(len(token_ids) for token_ids in encoded)
        raise InputError(
            f"{file}: no problem fits: the shortest prompt has {shortest} tokens, and with --max-tokens {max_tokens} "
            f"that is beyond the policy's context of {context}: lower --max-tokens"
        )
    return prompts, left_out


def template_digest(prompts: Sequence[Prompt], template: Template) -> str:
    """The digest of `template`, or OWN_PROMPTS if every problem has a prompt of its own."""
    is_needed = any(prompt.problem.get("prompt") is None for prompt in prompts)
    return template.digest if is_needed else OWN_PROMPTS


def _texts(problems: Sequence[Problem], template: Template, tokenizer: Any, file: str) -> list[str]:
    """Each problem's prompt: its own, or else what the template makes of it."""
    own = {problem["id"]: prompt for problem in problems if (prompt := problem.get("prompt")) is not None}
    others = [problem for problem in problems if problem["id"] not in own]
    rendered = template.render_all([problem["problem"] for problem in others])
    texts = dict(zip((problem["id"] for problem in others), rendered, strict=True))
    texts |= {name: prompt for name, prompt in own.items() if isinstance(prompt, str)}
    chats = {name: prompt for name, prompt in own.items() if not isinstance(prompt, str)}
    texts |= templates.render_chats(tokenizer, chats, file, template.settings)
    return [texts[problem["id"]] for problem in problems]


def no_room(left_out: Sequence[str], max_tokens: int, context: int) -> str:
    """What to say of the problems that `make_prompts` left out."""
    return (
        f"{len(left_out)} problems ({some(left_out)}) leave no room for --max-tokens {max_tokens} in the policy's "
        f"context of {context} tokens"
    )


def draw(
    engine: Engine,
    grader: Grader,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    should_stop: ShouldStop = lambda: False,
) -> list[Group]:
    """Sample a group for each prompt and hand it to the grader as soon as it is done.

    The scores may still be under way when this returns; the first look at `Group.scores` waits for them. Raises Stopped
    once `should_stop`. Of the ranks that share an engine the first gets the groups, the others none.
    """
    groups: dict[int, Group] = {}
    draw_each(engine, grader, prompts, sampling, groups.__setitem__, should_stop)
    return [groups[index] for index in sorted(groups)]


def draw_each(
    engine: Engine,
    grader: Grader,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    on_group: Callable[[int, Group], None],
    should_stop: ShouldStop = lambda: False,
) -> None:
    """As `draw`, but keeps no groups: each is passed to `on_group` with its prompt's index, to save memory.

    The engine still holds the completions of the whole call.
    """

    def finished(index: int, completions: list[Completion]) -> None:
        prompt, texts = prompts[index], [completion.text for completion in completions]
        batch = grader.grade(prompt.problem, prompt.text, texts, [completion.token_ids for completion in completions])
        on_group(index, Group(prompt, completions, batch))

    engine.generate([prompt.token_ids for prompt in prompts], sampling, finished, should_stop)
