"""Drawing groups of rollouts: problems to prompts, prompts to completions, completions to rewards.

The verifier works on finished groups while the engine still generates the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.core import policy as policies
from stages.core.engine import Completion, Engine, Sampling
from stages.core.errors import InputError
from stages.core.prompts import Template
from stages.core.records import Problem, Rollout
from stages.core.verifier import Batch, Score, Verifier


@dataclass(frozen=True)
class Prompt:
    """A problem made ready for the engine: its exact text and its token ids."""

    problem: Problem
    text: str
    token_ids: list[int]


@dataclass
class Group:
    """The completions drawn for one prompt, with their scores, in the order of the samples."""

    prompt: Prompt
    completions: list[Completion]
    _batch: Batch = field(repr=False)

    @property
    def scores(self) -> list[Score]:
        """The verifier's scores; waits for them where they are not there yet."""
        return self._batch.result()

    @property
    def rewards(self) -> list[float]:
        """The verifier's 0.0 or 1.0 for each completion."""
        return [score.reward for score in self.scores]

    def rollouts(self, policy: str, step: int = 0, first_sample: int = 0) -> list[Rollout]:
        """The group as records, `sample` counting up from `first_sample`."""
        return [
            {
                "problem_id": self.prompt.problem["id"],
                "sample": first_sample + number,
                "step": step,
                "policy": policy,
                "prompt": self.prompt.text,
                "completion": completion.text,
                "answer": self.prompt.problem["answer"],
                "reward": score.reward,
                "verdict": score.verdict,
                "num_tokens": len(completion.token_ids),
                "finish_reason": "stop" if completion.finish_reason == "stop" else "length",
            }
            for number, (completion, score) in enumerate(zip(self.completions, self.scores, strict=True))
        ]


def make_prompts(
    problems: Sequence[Problem], template: Template, tokenizer: Any, max_tokens: int, context: int
) -> tuple[list[Prompt], list[str]]:
    """Render and tokenise; return the prompts that leave room for `max_tokens`, and the ids of those left out.

    Raises InputError where `max_tokens` alone fills the `context` (in tokens), or no prompt is left.
    """
    if max_tokens >= context:
        raise InputError(f"--max-tokens {max_tokens} does not fit the policy's context of {context} tokens: lower it")
    texts = [template.render(problem["problem"]) for problem in problems]
    encoded = policies.encode(tokenizer, texts)
    prompts, left_out = [], []
    for problem, text, token_ids in zip(problems, texts, encoded, strict=True):
        if len(token_ids) + max_tokens <= context:
            prompts.append(Prompt(problem, text, token_ids))
        else:
            left_out.append(problem["id"])
    if not prompts:
        shortest = min(len(token_ids) for token_ids in encoded)
        raise InputError(
            f"no problem fits: the shortest prompt has {shortest} tokens, and with --max-tokens {max_tokens} "
            f"that is beyond the policy's context of {context}: lower --max-tokens"
        )
    return prompts, left_out


def draw(
    engine: Engine,
    verifier: Verifier,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    on_group: Callable[[int], None] | None = None,
) -> list[Group]:
    """Sample a group for each prompt and hand it to the verifier as soon as it is done.

    `on_group` is called with the number of tokens of each finished group, for progress bars. The scores may still be
    under way when this returns; the first look at `Group.scores` waits for them.
    """
    groups: list[Group | None] = [None] * len(prompts)

    def finished(index: int, completions: list[Completion]) -> None:
        answer = prompts[index].problem["answer"]
        batch = verifier.submit([(completion.text, answer) for completion in completions])
        groups[index] = Group(prompts[index], completions, batch)
        if on_group is not None:
            on_group(sum(len(completion.token_ids) for completion in completions))

    engine.generate([prompt.token_ids for prompt in prompts], sampling, finished)
    return [group for group in groups if group is not None]
