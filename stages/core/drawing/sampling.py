"""Sample several policies on the same problems with one engine: check everything first, then draw groups of rollouts.

`plan` reads and checks everything without an engine: policies that cannot share one, prompts that do not fit, a
template that a policy was not trained with. `rollouts` then samples them all, `draw_scored` one policy. Of several
ranks each has an engine, or some in a row have one, and each engine draws its share of a policy's prompts.

The samples of a problem come from a generator seeded by (seed, problem id, sample), never from a stream that several
problems share. So they depend neither on the order nor on the choice of the problems, nor on the other policies of
the call. What the engine cannot promise: logits are rounded as the batch they were computed in has it, so
other sequences in the batch may change a sample, about once in many thousands of tokens in bfloat16 and rarely in
float32.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, TypeVar

from stages.core import records
from stages.core.drawing import templates
from stages.core.drawing.engine import Engine, EngineOptions, Sampling, VllmEngine
from stages.core.drawing.rollouts import OWN_PROMPTS, Group, Prompt, asked_by, draw_each, make_prompts, seeded
from stages.core.drawing.templates import Template, TemplateName
from stages.core.errors import InputError
from stages.core.grading import rewards
from stages.core.grading.rewards import RewardOptions, Rewards
from stages.core.grading.scores import Grader
from stages.core.options import at_least
from stages.core.outputs import read_json
from stages.core.policy import checkpoints
from stages.core.progress import StepProgress, warn
from stages.core.ranks import ALONE, Ranks
from stages.core.records import Problem, Rollout

MAX_WAITING = 32  # groups whose scores may be under way before the engine waits for the verifier
MAX_COMPLETIONS = 8192  # in one call of the engine, which holds them all: about 1 GB if each has 2,048 tokens
GATHERED_GROUPS = 32  # of each rank in one message, which NCCL takes through the memory of all GPUs

T = TypeVar("T")
StartEngine = Callable[[Path], Engine]


@dataclass(frozen=True, kw_only=True)
class Options(EngineOptions, RewardOptions):
    """The options that sample and eval share."""

    max_tokens: Annotated[int, "most tokens in a completion", at_least(1)] = 2048
    temperature: Annotated[float, "sampling temperature", at_least(0)] = 1.0
    template: TemplateName = "boxed"
    seed: Annotated[int, "seed of sampling"] = 0
    limit: Annotated[int, "ask only the first problems, so many; 0 asks all", at_least(0)] = 0
    bare: Annotated[bool, "a completion without box and 'Answer:' line counts by its bare final expression"] = False


@dataclass(frozen=True)
class Plan:
    """A checked request, ready to be drawn: policies by name, prompts by set in the order of its file.

    `left_out` are the ids of the problems whose prompt leaves no room for max_tokens in the `context` (in tokens).
    """

    policies: dict[str, Path]
    sets: dict[str, list[Prompt]]
    left_out: list[str]
    template: Template
    context: int
    sampling: Sampling
    options: Options
    ranks: Ranks
    rewards: Rewards

    @property
    def num_groups(self) -> int:
        """Number of groups, one for each policy and problem."""
        return len(self.policies) * sum(map(len, self.sets.values()))

    @property
    def resolved(self) -> dict[str, Any]:
        """What identities say of template and rewards, beyond the values of their options."""
        return {"template_digest": self.template.digest, **self.rewards.resolved}

    @property
    def about(self) -> dict[str, Any]:
        """What manifests say of the policies: their names, and where those lie that are not named by their paths."""
        elsewhere = {name: str(path) for name, path in self.policies.items() if str(path) != name}  # as from the hub
        return {"policies": list(self.policies), "paths": elsewhere}

    def grader(self, has_scored: bool = False) -> Grader:
        """What scores the completions, a context manager; `has_scored` if an interrupted call has kept some."""
        return self.rewards.grader(self.options.bare, has_scored)

    def start_engine(self, policy: Path) -> Engine:
        """The engine, with room for the longest prompt and completion."""
        longest = max(len(prompt.token_ids) for prompts in self.sets.values() for prompt in prompts)
        engine = VllmEngine(
            policy,
            max_model_len=longest + self.options.max_tokens,
            dtype=self.options.dtype,
            memory_fraction=self.options.memory_fraction,
            distributed=not self.ranks.is_alone,
            tensor_parallel=self.ranks.tensor_parallel,
            max_sequences=self.options.max_sequences,
            is_compiled=self.options.compile,
        )
        if self.ranks.is_first:
            warn(engine.capacity)
        return engine

    def parts(self, asked: Sequence[T], num_engines: int = 1) -> Iterator[Sequence[T]]:
        """What is asked, in parts that `num_engines` can hold, each in one call."""
        size = num_engines * max(1, MAX_COMPLETIONS // self.sampling.num_samples)
        for start in range(0, len(asked), size):
            yield asked[start : start + size]

    def seeded(self, prompts: Sequence[Prompt]) -> Sampling:
        """How to sample `prompts`."""
        return seeded(self.sampling, self.options.seed, prompts)


def rollouts(plan: Plan, start_engine: StartEngine, grader: Grader) -> Iterator[Rollout]:
    """Sample every policy on every problem; rollouts by policy, problem and sample, in the order of the plan.

    All ranks must iterate; each gets all rollouts.
    """
    engines = Engines(start_engine, plan.ranks)
    prompts = [prompt for prompts in plan.sets.values() for prompt in prompts]
    with Meter(plan.num_groups, plan.ranks) as meter:
        for name, path in plan.policies.items():
            engine = engines.holding(path)
            meter.start(name, len(prompts))
            for part in plan.parts(prompts, plan.ranks.num_engines):
                share = plan.ranks.share(part)
                groups: dict[int, Group] = {}
                with plan.ranks.raise_once():
                    draw_scored(engine, grader, share, plan.seeded(share), meter, groups.__setitem__)
                mine = [groups[number].rollouts(name) for number in sorted(groups)]
                for group in _in_order(plan.ranks, mine, len(part)):
                    yield from group


def _in_order(ranks: Ranks, mine: Sequence[list[Rollout]], num_groups: int) -> Iterator[list[Rollout]]:
    """The groups of all ranks, `num_groups` together, in the order in which they were shared out."""
    for start in range(0, -(-num_groups // ranks.num_engines), GATHERED_GROUPS):
        shares = ranks.gather(mine[start : start + GATHERED_GROUPS])[:: ranks.tensor_parallel]
        for row in zip_longest(*shares):
            yield from (group for group in row if group is not None)


def draw_scored(
    engine: Engine,
    grader: Grader,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    meter: "Meter",
    keep: Callable[[int, Group], None],
) -> None:
    """Draw a group for each prompt; `keep` gets each with its prompt's number as soon as it is scored.

    Of the ranks that share an engine only the first scores and keeps. Groups on which rewards of the user's own failed
    are kept once another has succeeded; if none has so far, that is an InputError.
    """
    waiting: deque[tuple[int, Group]] = deque()
    failed: list[tuple[int, Group]] = []

    def hand_over(max_waiting: int) -> None:
        while waiting and (len(waiting) > max_waiting or waiting[0][1].is_scored):
            number, group = waiting.popleft()
            meter.scored(group.num_correct, len(group.scores))
            failed.append((number, group))
            if not group.scores[0].fault:
                keep_all()

    def keep_all() -> None:
        for number, group in failed:
            keep(number, group)
        failed.clear()

    def drawn(number: int, group: Group) -> None:
        meter.drawn(group.num_tokens)
        waiting.append((number, group))
        hand_over(MAX_WAITING)

    draw_each(engine, grader, prompts, sampling, drawn)
    hand_over(0)
    grader.refuse_failed()
    keep_all()


class Engines:
    """An engine for one policy after another: their weights are swapped, once the engine has shown that it can.

    An engine starts on all ranks at the same time, so each must ask for the same policies in the same order.
    """

    def __init__(self, start: StartEngine, ranks: Ranks) -> None:
        self._start = start
        self._ranks = ranks
        self._engine: Engine | None = None
        self._policy = Path()
        self._can_swap: bool | None = None  # not known before the second policy

    def holding(self, policy: Path) -> Engine:
        """The engine with the weights of `policy`; started anew if these cannot be swapped in."""
        if self._engine is not None and self._takes(policy):
            self._engine.load(checkpoints.disk_weights(policy))
        else:
            if self._engine is not None:
                self._engine.close()
            with self._ranks.raise_once():
                self._engine = self._start(policy)
        self._policy = policy
        return self._engine

    def close(self) -> None:
        """Free the engine's memory, if one was started."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _takes(self, policy: Path) -> bool:
        if checkpoints.is_tied(policy) != checkpoints.is_tied(self._policy):
            return False
        if self._can_swap is None and self._engine is not None:
            faults = self._ranks.gather(self._engine.swap_fault(lambda: checkpoints.disk_weights(self._policy)))
            fault = next(filter(None, faults), None)
            self._can_swap = fault is None
            if fault and self._ranks.is_first:
                warn(f"the engine is started anew for each policy, for it cannot swap weights of this kind: {fault}")
        return bool(self._can_swap)


def plan(
    names: Sequence[str], problem_files: Sequence[Path], num_samples: int, options: Options, ranks: Ranks = ALONE
) -> Plan:
    """Read and check everything that sample or eval needs; InputError for the first fault."""
    if options.temperature == 0 and num_samples > 1:
        raise InputError(f"--temperature 0 gives the same sample {num_samples} times: add --num-samples 1")
    ranks.refuse_uneven()
    rewarded = rewards.read(options)
    problems = _read_sets(problem_files, options.limit)
    paths = _resolve(names)
    tokenizers = {name: checkpoints.load_tokenizer(path) for name, path in paths.items()}
    first = next(iter(paths))
    tokenizer, context = tokenizers[first], checkpoints.context_length(paths[first])
    template = templates.load(options.template, tokenizer)
    sets: dict[str, list[Prompt]] = {}
    left_out: list[str] = []
    for file, (name, own) in zip(problem_files, problems.items(), strict=True):
        sets[name], too_long = make_prompts(own, template, tokenizer, options.max_tokens, context, file)
        left_out += too_long
    prompts = [prompt for prompts in sets.values() for prompt in prompts]
    _check_alike(paths, tokenizers, template, prompts)
    for path in paths.values():
        checkpoints.check_shapes(path)
    checkpoints.check_divisible(paths[first], ranks.tensor_parallel)
    rewards.check(rewarded, prompts, tokenizer, ranks.is_first)
    stop_token_ids, stop = template.end_tokens(tokenizer)
    sampling = Sampling(
        num_samples,
        options.max_tokens,
        options.temperature,
        stop=tuple(stop),
        stop_token_ids=tuple(stop_token_ids),
        log_probs=False,
    )
    return Plan(paths, sets, left_out, template, context, sampling, options, ranks, rewarded)


def _read_sets(files: Sequence[Path], limit: int) -> dict[str, list[Problem]]:
    """Problems by set; a set is called by its file's name, without the suffix."""
    sets: dict[str, list[Problem]] = {}
    for file in files:
        if file.stem in sets:
            raise InputError(f"--problems {file}: there is already a set called {file.stem}: rename one of the files")
        sets[file.stem] = records.read_problems(file)[: limit or None]
    return sets


def _resolve(given: Sequence[str]) -> dict[str, Path]:
    """Policies by their names in records: as typed, without a slash at the end."""
    if not given:
        raise InputError("--policy is missing: name at least one checkpoint directory")
    paths: dict[str, Path] = {}
    for name in (name for text in given for name in checkpoints.within(text)):
        if name in paths:
            raise InputError(f"policy {name} is named twice")
        paths[name] = checkpoints.resolve(name)
    return paths


def _check_alike(
    paths: dict[str, Path], tokenizers: dict[str, Any], template: Template, prompts: Sequence[Prompt]
) -> None:
    """Raise InputError if a policy cannot take the first one's place in the engine."""
    first = next(iter(paths))
    texts, token_ids = [prompt.text for prompt in prompts], [prompt.token_ids for prompt in prompts]
    has_chats = any(isinstance(prompt.problem.get("prompt"), list) for prompt in prompts)
    for name, path in paths.items():
        if (fault := checkpoints.difference(paths[first], path)) is not None:
            pass
        elif checkpoints.encode(tokenizers[name], texts) != token_ids:
            fault = "their tokenizers differ"
        elif templates.load(template.name, tokenizers[name]).digest != template.digest:
            fault = "their chat templates differ"
        elif has_chats and tokenizers[name].chat_template != tokenizers[first].chat_template:
            fault = "their chat templates differ, and problems have messages"
        if fault:
            raise InputError(f"policies {first} and {name} cannot share one engine: {fault}; use two calls")


def warn_of_templates(plan: Plan) -> None:
    """Warn of each policy whose manifest, or that of the rl run it is a checkpoint of, names another template.

    Nothing is known of problems that all have prompts of their own: their file says how they are asked.
    """
    asked = asked_by([prompt for prompts in plan.sets.values() for prompt in prompts], plan.template)
    if asked == OWN_PROMPTS:
        return
    for name, path in plan.policies.items():
        manifests = (read_json(place / "manifest.json") for place in (path, *path.absolute().parents[:2]))
        manifest = next((manifest for manifest in manifests if "template_digest" in manifest), {})
        if manifest.get("template_digest", asked) != asked:
            trained = f"template {manifest.get('parameters', {}).get('template', 'another one')}"
            if manifest["template_digest"] == OWN_PROMPTS:
                trained = "prompts of its problems' own"
            warn(f"policy {name} was trained with {trained}, and is asked with {plan.template.name}")


class Meter:
    """Shows groups as they come, with the policy at work, its average so far and tokens a second.

    Of several engines only this rank's is seen, and counted as if the others were as far.
    """

    def __init__(self, num_groups: int, ranks: Ranks) -> None:
        self._progress = StepProgress("groups", num_groups, quiet=not ranks.is_first)
        self._num_engines = ranks.num_engines
        self._num_groups = self._end = 0
        self.start("", 0)

    def __enter__(self) -> "Meter":
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)

    def start(self, policy: str, num_missing: int, num_done: int = 0) -> None:
        """Restart the counts for `policy`, which lacks `num_missing` groups, while `num_done` are there already."""
        self._policy = policy
        self._num_groups = self._end + num_done
        self._end = self._num_groups + num_missing
        self._num_tokens = self._num_scored = 0
        self._num_correct = 0
        self._start = time.monotonic()

    def drawn(self, num_tokens: int) -> None:
        """Count a drawn group, with its completions' tokens."""
        self._num_groups = min(self._num_groups + self._num_engines, self._end)
        self._num_tokens += num_tokens
        self._progress.step(self._num_groups, self._note())

    def scored(self, num_correct: int, num_completions: int) -> None:
        """Count a group for the average so far."""
        self._num_scored += num_completions
        self._num_correct += num_correct

    def _note(self) -> str:
        speed = self._num_engines * self._num_tokens / max(1e-9, time.monotonic() - self._start)
        about = "about " if self._num_engines > 1 else ""
        average = f"avg {100 * self._num_correct / self._num_scored:.1f} %, " if self._num_scored else ""
        return f"{average}{about}{speed:,.0f} tokens/s, {self._policy}"
