"""Policies and the problems for them: read and checked as one request, before an engine starts.

    request = read_request(["loop/0/policy"], {"valid": Path("valid.jsonl")}, options, ranks, num_samples=32)
    engine = request.start_engine(request.path)
    engine.generate([prompt.token_ids for prompt in request.sets["valid"]], request.seeded(request.sets["valid"]), ...)

rl draws from one policy for its problems and its validation set, sample and eval from several, `rloop check` from none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from stages.core import records
from stages.core.drawing import templates
from stages.core.drawing.engine import EngineOptions, Sampling, VllmEngine
from stages.core.drawing.rollouts import OWN_PROMPTS, Prompt, make_prompts, no_room, seeded, template_digest
from stages.core.drawing.templates import Template, TemplateName
from stages.core.errors import InputError
from stages.core.grading import rewards
from stages.core.grading.rewards import RewardOptions, Rewards
from stages.core.options import at_least
from stages.core.outputs import read_json
from stages.core.policy import checkpoints
from stages.core.progress import warn
from stages.core.ranks import ALONE, Ranks


@dataclass(frozen=True, kw_only=True)
class RequestOptions(EngineOptions, RewardOptions):
    """The options of every stage that draws."""

    max_tokens: Annotated[int, "most tokens in a completion", at_least(1)] = 2048
    template: TemplateName = "boxed"
    seed: Annotated[int, "seed of sampling"] = 0


@dataclass(frozen=True)
class Request:
    """A checked request: policies by name, files of problems by set, and the prompts of each in the file's order.

    `left_out` are the ids of the problems of each set whose prompt leaves no room for max_tokens in the `context` (in
    tokens). `tokenizer` is the first policy's; the others encode the prompts alike.
    """

    policies: dict[str, Path]
    files: dict[str, Path]
    sets: dict[str, list[Prompt]]
    left_out: dict[str, list[str]]
    tokenizer: Any
    template: Template
    context: int
    sampling: Sampling
    options: RequestOptions
    ranks: Ranks
    rewards: Rewards

    @property
    def path(self) -> Path:
        """Where the first policy lies."""
        return next(iter(self.policies.values()))

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts of all sets."""
        return [prompt for prompts in self.sets.values() for prompt in prompts]

    @property
    def resolved(self) -> dict[str, Any]:
        """What identities say of template and rewards, beyond the values of their options."""
        return {"template_digest": self.template.digest, **self.rewards.resolved}

    @property
    def seen(self) -> dict[str, str]:
        """What must be the same on all ranks besides the inputs, by name."""
        return {f"template {self.template.name}": self.template.digest, "reward": self.rewards.digest}

    @property
    def about(self) -> dict[str, Any]:
        """What manifests say of the policies: their names, and where those lie that are not named by their paths."""
        elsewhere = {name: str(path) for name, path in self.policies.items() if str(path) != name}  # as from the hub
        return {"policies": list(self.policies), "paths": elsewhere}

    def longest(self, *sets: str) -> int:
        """Tokens of the longest prompt of these sets, of all if none is named, and of the longest completion."""
        prompts = [prompt for name in sets or self.sets for prompt in self.sets[name]]
        return max((len(prompt.token_ids) for prompt in prompts), default=0) + self.options.max_tokens

    def too_long(self, *sets: str) -> str:
        """A sentence on the problems of these sets, or of all, that are left out; "" if there are none."""
        ids = [problem_id for name in sets or self.left_out for problem_id in self.left_out[name]]
        return no_room(ids, self.options.max_tokens, self.context) if ids else ""

    def seeded(self, prompts: Sequence[Prompt]) -> Sampling:
        """How to sample `prompts`."""
        return seeded(self.sampling, self.options.seed, prompts)

    def start_engine(self, policy: Path, sleeps: bool = False, quantization: str | None = None) -> VllmEngine:
        """An engine with room for the longest prompt and completion; all ranks start theirs together."""
        if self.ranks.is_first:
            warn(f"starting the engine with {policy}")
        with self.ranks.raise_once():
            engine = VllmEngine(
                policy,
                self.options,
                max_model_len=self.longest(),
                sleeps=sleeps,
                distributed=not self.ranks.is_alone,
                quantization=quantization,
            )
        if self.ranks.is_first:
            warn(engine.capacity)
        return engine

    def warn_of_templates(self) -> None:
        """Warn of each policy whose manifest, or that of the rl run it is a checkpoint of, names another template.

        Checkpoints of others say nothing of theirs, and pass.
        """
        digest = template_digest(self.prompts, self.template)
        if digest == OWN_PROMPTS:
            return
        for name, path in self.policies.items():
            directories = (path, *path.absolute().parents[:2])
            manifests = (read_json(directory / "manifest.json") for directory in directories)
            manifest = next((manifest for manifest in manifests if "template_digest" in manifest), {})
            if manifest.get("template_digest", digest) != digest:
                trained = f"template {manifest.get('parameters', {}).get('template', 'another one')}"
                if manifest["template_digest"] == OWN_PROMPTS:
                    trained = "prompts of its problems' own"
                warn(f"policy {name} was trained with {trained}, and is now prompted with {self.template.name}")


def read_request(
    policies: Sequence[str],
    files: Mapping[str, Path],
    options: RequestOptions,
    ranks: Ranks = ALONE,
    *,
    num_samples: int,
    temperature: float = 1.0,
    limit: int = 0,
    log_probs: bool = False,
) -> Request:
    """Read and check all that is needed to ask `policies` the problems in `files` (by set); InputError for a fault.

    A policy is a checkpoint, a directory of checkpoints or a hub id. Of each file the first `limit` problems count,
    all if it is 0. Of many ranks the first looks into the weights.
    """
    ranks.refuse_uneven()
    summands = rewards.read(options)
    problems = {name: records.read_problems(file)[: limit or None] for name, file in files.items()}
    paths = resolve(policies)
    tokenizers = {name: checkpoints.load_tokenizer(path) for name, path in paths.items()}
    first = next(iter(paths))
    tokenizer, context = tokenizers[first], checkpoints.context_length(paths[first])
    template = templates.load(options.template, tokenizer)
    made = {
        name: make_prompts(own, template, tokenizer, options.max_tokens, context, files[name])
        for name, own in problems.items()
    }
    prompts = [prompt for own, _ in made.values() for prompt in own]
    _check_alike(paths, tokenizers, template, prompts)
    for path in paths.values() if ranks.is_first else ():
        checkpoints.check_shapes(path)
    checkpoints.check_divisible(paths[first], ranks.tensor_parallel)
    rewards.check(summands, prompts, tokenizer, ranks.is_first)
    stop_ids, stop = template.end_tokens(tokenizer)
    return Request(
        paths,
        dict(files),
        {name: own for name, (own, _) in made.items()},
        {name: left_out for name, (_, left_out) in made.items()},
        tokenizer,
        template,
        context,
        Sampling(num_samples, options.max_tokens, temperature, tuple(stop), tuple(stop_ids), log_probs=log_probs),
        options,
        ranks,
        summands,
    )


def by_stem(files: Sequence[Path]) -> dict[str, Path]:
    """Files of problems by set, which is called by its file's name without the suffix; InputError for two of one."""
    sets: dict[str, Path] = {}
    for file in files:
        if file.stem in sets:
            raise InputError(f"--problems {file}: there is already a set called {file.stem}: rename one of the files")
        sets[file.stem] = file
    return sets


def resolve(policies: Sequence[str]) -> dict[str, Path]:
    """Where policies lie, by their names in records: as typed, without a slash at the end."""
    if not policies:
        raise InputError("--policy is missing: name at least one checkpoint directory")
    paths: dict[str, Path] = {}
    for name in (name for typed in policies for name in checkpoints.within(typed)):
        if name in paths:
            raise InputError(f"policy {name} is named twice")
        paths[name] = checkpoints.resolve(name)
    return paths


def _check_alike(
    paths: dict[str, Path], tokenizers: dict[str, Any], template: Template, prompts: Sequence[Prompt]
) -> None:
    """Raise InputError if a policy cannot take the first one's place in the engine."""
    first, *others = paths
    texts, token_ids = [prompt.text for prompt in prompts], [prompt.token_ids for prompt in prompts]
    has_chats = any(isinstance(prompt.problem.get("prompt"), list) for prompt in prompts)
    for name in others:
        if (fault := checkpoints.difference(paths[first], paths[name])) is not None:
            pass
        elif checkpoints.encode(tokenizers[name], texts) != token_ids:
            fault = "their tokenizers differ"
        elif templates.load(template.name, tokenizers[name]).digest != template.digest:
            fault = "their chat templates differ"
        elif has_chats and tokenizers[name].chat_template != tokenizers[first].chat_template:
            fault = "their chat templates differ, and problems have messages"
        if fault:
            raise InputError(f"policies {first} and {name} cannot share one engine: {fault}; use two calls")
