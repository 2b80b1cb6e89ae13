"""The prompts that policies will see, and whether they fit: rendered, counted and held against the context."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from rloop_cli.check.calls import Call, base_of, is_there, policies_of
from stages.core import records, tabular
from stages.core.drawing import templates
from stages.core.drawing.rollouts import make_prompts, no_room
from stages.core.errors import InputError
from stages.core.policy import checkpoints

SHOWN_CHARS = 300


class Rendering(NamedTuple):
    """A file of problems, put by a template to what descends from `base`."""

    base: Path
    template: str
    max_tokens: int
    file: str


@dataclass
class Seen:
    """What was found when the prompts were rendered: faults, notes, and the sizes that other parts need."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    first: str = ""  # the first problem's prompt
    sizes: dict[str, int] = field(default_factory=dict)  # problems, by file
    longest: dict[str, int] = field(default_factory=dict)  # tokens of prompt and completion, by call
    lines: list[str] = field(default_factory=list)  # of the summary


def seen(calls: Sequence[Call]) -> Seen:
    """Render and count the prompts of every call that draws, as far as policies and problems are there."""
    whole, done, broken = Seen(), dict[Rendering, int](), dict[str, str]()
    reader, contexts = cache(_reader), dict[str, int]()
    for call in calls:
        named = policies_of(call, calls) if call.stage in ("rl", "sample", "eval") else []
        if not named or (base := base_of(calls, named[0]).path) is None:
            continue
        try:
            tokenizer, context = reader(base)
        except InputError as error:
            broken.setdefault(str(error), call.origin("--policy", base))
            continue
        for file in (file for file in _files(call) if is_there(calls, file)):
            rendering = Rendering(base, call.options.template, call.options.max_tokens, file)
            if rendering not in done:
                done[rendering] = _longest(whole, rendering, call, tokenizer, context)
            if done[rendering]:
                whole.longest[call.name] = max(whole.longest.get(call.name, 0), done[rendering])
                contexts[call.name] = context
    whole.faults += [f"{origin}: {error}" for error, origin in broken.items()]
    whole.lines += _longest_of_each(calls, whole.longest, contexts)
    return whole


def _reader(base: Path) -> tuple[Any, int]:
    """The tokenizer of a policy, and its context in tokens; InputError if the checkpoint is broken."""
    checkpoints.resolve(str(base))
    return checkpoints.load_tokenizer(base), checkpoints.context_length(base)


def _files(call: Call) -> list[str]:
    return [path for flag in ("--problems", "--valid") for path in call.paths.get(flag, [])]


def _longest(whole: Seen, rendering: Rendering, call: Call, tokenizer: Any, context: int) -> int:
    """Tokens of the longest prompt of one file and its completion; 0, and a fault in `whole`, if there is none."""
    try:
        template = templates.load(rendering.template, tokenizer)
        problems = records.read_problems(Path(rendering.file))
        whole.sizes[rendering.file] = len(problems)
        prompts, left_out = make_prompts(problems, template, tokenizer, rendering.max_tokens, context, rendering.file)
    except InputError as error:
        flag = _flag(error)
        whole.faults.append(f"{call.origin(flag, None if flag else rendering.file)}: {error}")
        return 0
    whole.first = whole.first or prompts[0].text
    if left_out:
        said = f"{rendering.file}: {no_room(left_out, rendering.max_tokens, context)}"
        if call.stage == "eval":
            whole.faults.append(f"{call.origin('--max-tokens')}: {said}: lower it, or remove them")
        else:
            whole.notes.append(f"{said}: {call.stage} leaves them out")
    return max(len(prompt.token_ids) for prompt in prompts) + rendering.max_tokens


def _longest_of_each(calls: Sequence[Call], longest: Mapping[str, int], contexts: Mapping[str, int]) -> Iterator[str]:
    """A line for each stage: the longest of all its calls."""
    for stage in dict.fromkeys(call.stage for call in calls):
        ours = [call for call in calls if call.stage == stage and longest.get(call.name)]
        for call in sorted(ours, key=lambda call: longest[call.name])[-1:]:
            most = call.options.max_tokens
            prompt, context = longest[call.name] - most, contexts[call.name]
            yield f"{stage}: a prompt of {prompt:,} and max_tokens {most:,}, context {context:,}"


def _flag(error: InputError) -> str:
    """The option that an error is of, if it begins with one."""
    word = str(error).split()[0]
    return word if word.startswith("--") else "--template" if word == "template" else ""


def shortened(text: str) -> str:
    """A prompt on one line, with its middle left out if it is long."""
    line = json.dumps(text, ensure_ascii=False)
    return line if len(line) <= SHOWN_CHARS else f"{line[: SHOWN_CHARS // 2]} ... {line[-SHOWN_CHARS // 2 :]}"


def waiting(calls: Sequence[Call]) -> Iterator[str]:
    """A line for everything that has to be made before it can be checked."""
    needed = [call for call in calls if call.stage in ("rl", "rft", "sample", "eval")]
    bases = (base_of(calls, policy) for call in needed for policy in policies_of(call, calls)[:1])
    for waits in dict.fromkeys(base.waits_for for base in bases if base.path is None):
        yield f"context, prompts and memory of the policy: {waits}"
    files = dict.fromkeys(file for call in needed for file in _files(call) if not is_there(calls, file))
    if files:
        yield f"problems that are not made yet: {tabular.some(list(files))}"
