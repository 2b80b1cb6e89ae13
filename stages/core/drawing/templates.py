r"""From a problem's text to the exact prompt that the engine sees: one template object for rl, sample and eval.

A template file is the text of a prompt, in which {problem} stands once for the problem. Texts that end a completion
may stand before it, as YAML between two lines of dashes:

    ---
    stop: ["\nProblem:"]
    ---
    Problem: What is 3 + 4?
    Solution: 3 + 4 = \boxed{7}

    Problem: {problem}
    Solution:

Every rollout stores the rendered prompt, and every manifest the template's digest, so the
exact prompt can always be read back. Problems are inserted as they are: braces, `%` and the placeholder need no escape.

A rendered prompt may begin with the tokenizer's begin token, as chat templates do: `policy.encode` adds no second one.
"""

import difflib
import hashlib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from stages.core.drawing.rendering import render_in_child
from stages.core.errors import InputError, in_one_line
from stages.core.records import Message

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'
R1_ZERO_BEFORE = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The Assistant "
    "first thinks about the reasoning process in the mind and then provides the User with the answer. The reasoning "
    "process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: You must put your answer "
    "inside <answer> </answer> tags, i.e., <answer> answer here </answer>. And your final answer will be extracted "
    "automatically by the \\boxed{} tag.\nThis is the problem:\n"
)
PLACEHOLDER = "{problem}"
FENCE = "---"  # the line before and after what a file says beside its text
BYTE_ORDER_MARK = "\ufeff"

TemplateName = Annotated[
    str,
    "prompt template: boxed, qwen-math, r1-zero, dapo, chat (the policy's own; chat-thinking and chat-no-thinking "
    "where it has the choice), none, or a file: the text of a prompt, in which {problem} "
    'stands once for the problem; before it, between two lines of ---, stop: ["\\nProblem:"] names texts that end a '
    "completion. A problem with a prompt of its own takes only the stop texts from the template",
]


class FrontMatter(msgspec.Struct, forbid_unknown_fields=True):
    """What a template file says between its fences."""

    stop: list[Annotated[str, msgspec.Meta(min_length=1)]]


@dataclass(frozen=True)
class Template:
    """How a problem is put to a policy.

    `stop` holds texts that end a completion beside the tokenizer's own end tokens, and stay at its end: what was
    sampled is what is trained on. `end_tokens` sorts them for an engine. `digest` names the template by what it does,
    whatever its `name`. A `program` is a policy's own chat template, which may fail or never end; `settings` are what
    it is told beside the messages.
    """

    name: str
    render: Callable[[str], str]
    stop: tuple[str, ...]
    digest: str
    program: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def render_all(self, problems: Sequence[str]) -> list[str]:
        """Every problem's prompt; InputError if a program fails, or takes more than its share of time or memory."""
        if not self.program:
            return list(map(self.render, problems))
        return list(render_in_child(self.render, [("template chat", problem) for problem in problems]))

    def end_tokens(self, tokenizer: Any) -> tuple[list[int], list[str]]:
        """Split `stop` for an engine: (ids of those that are special tokens of `tokenizer`, the others as texts).

        A special token is skipped when completions are decoded, so as a text it would never be seen. Any other text
        may come about in many ways, even if it is one token, too.
        """
        known = tokenizer.get_vocab()
        special = {
            text: known[text]
            for text in self.stop
            if text in known and not tokenizer.decode([known[text]], skip_special_tokens=True)
        }
        return list(special.values()), [text for text in self.stop if text not in special]


def load(name_or_path: str, tokenizer: Any = None) -> Template:
    """The template of this name, or of this file: a text with {problem} in it once, after its stop texts if it has any.

    boxed      Qwen2.5's chat markup: system line, problem, "... put your final answer within \\boxed{}"
    qwen-math  Qwen2.5-Math's: the instruction is the system line, the problem is the user's turn
    r1-zero    R1-Zero's conversation, answer in \\boxed{} inside <answer> (Open-Reasoner-Zero's wording)
    dapo       the plain wrapper of DAPO-Math-17k, answer on a last line "Answer: ..."
    chat       `tokenizer`'s own chat template, the user's turn being the problem and boxed's instruction; of one that
               can be told (Qwen3's), chat-thinking and chat-no-thinking say whether the policy is to think first
    none       the problem's text and nothing else

    Raises InputError for an unknown name, a file without {problem} or with a front matter that is none, or `chat`
    without a chat template.
    """
    if name_or_path in _TEXTS:
        return _pasted(name_or_path, *_TEXTS[name_or_path])
    if name_or_path in CHATS:
        return _chat(name_or_path, tokenizer)
    return _pasted(name_or_path, *_from_file(Path(name_or_path)))


def user_turn(problem: str) -> str:
    """What the user says of a problem in a chat: the problem, and how to answer."""
    return f"{problem}\n{INSTRUCTION}"


def render_chats(
    tokenizer: Any, chats: Mapping[str, Sequence[Message]], file: str, settings: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """The prompt of each of a file's chats, by problem id: what the policy's chat template makes of the messages.

    `settings` are those of the Template, if one takes part. A last message of the assistant is left open for the policy
    to go on with. InputError if there is no chat template, or for what `Template.render_all` raises it.
    """

    def render(messages: Sequence[Message]) -> str:
        is_open = messages[-1]["role"] == "assistant"
        how = {"add_generation_prompt": not is_open, "continue_final_message": is_open, **(settings or {})}
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **how))

    if not chats:
        return {}
    inputs = [(f"{file}: messages of problem {problem_id}", messages) for problem_id, messages in chats.items()]
    _chat_source(tokenizer, inputs[0][0], "write its prompt as a text, or give the policy one")
    prompts = render_in_child(render, inputs)
    return dict(zip(chats, prompts, strict=True))


def _qwen(system: str, after_problem: str) -> tuple[str, str, tuple[str, ...]]:
    before = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
    return before, f"{after_problem}<|im_end|>\n<|im_start|>assistant\n", ("<|im_end|>",)


_TEXTS: dict[str, tuple[str, str, tuple[str, ...]]] = {  # before the problem, after it, stop
    "boxed": _qwen("You are a helpful assistant.", f"\n{INSTRUCTION}"),
    "qwen-math": _qwen(INSTRUCTION, ""),
    "r1-zero": (R1_ZERO_BEFORE, "\nAssistant: <think>", ("</answer>",)),
    "dapo": (DAPO_BEFORE, DAPO_AFTER, ()),
    "none": ("", "", ()),
}
CHATS: dict[str, dict[str, Any]] = {
    "chat": {},
    "chat-thinking": {"enable_thinking": True},
    "chat-no-thinking": {"enable_thinking": False},
}
NAMES = (*_TEXTS, *CHATS)
_CHOICES = ", ".join(NAMES)


def _pasted(name: str, before: str, after: str, stop: tuple[str, ...]) -> Template:
    def render(problem: str) -> str:
        return before + problem + after

    return Template(name, render, stop, _digest(before, after, *stop))


def _chat(name: str, tokenizer: Any) -> Template:
    source, settings = _chat_source(tokenizer, f"template {name}", f"choose another of {_CHOICES}"), CHATS[name]
    for setting in settings:
        if setting not in source:
            raise InputError(f"template {name}: the policy's chat template knows no {setting}: take chat")

    def render(problem: str) -> str:
        turn = {"role": "user", "content": user_turn(problem)}
        return str(tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True, **settings))

    digest = _digest(source, INSTRUCTION, *(f"{key}={value}" for key, value in settings.items()))
    return Template(name, render, (), digest, program=True, settings=settings)


def _chat_source(tokenizer: Any, origin: str, remedy: str) -> str:
    """The text of a policy's chat template; InputError, which begins with `origin`, if there is none."""
    if tokenizer is None or not tokenizer.chat_template:
        raise InputError(f"{origin}: the policy's tokenizer has no chat template; {remedy}")
    try:
        source = tokenizer.get_chat_template()
    except ValueError as error:
        raise InputError(f"{origin}: {in_one_line(error)}") from None
    if not isinstance(source, str):
        raise InputError(f"{origin}: the policy's chat template is no text but {type(source).__name__}")
    return source


def _from_file(path: Path) -> tuple[str, str, tuple[str, ...]]:
    """The text before {problem}, the text after it, and the stop texts."""
    if not path.is_file():
        near = difflib.get_close_matches(str(path).lower(), NAMES, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"template {path}: neither one of {_CHOICES} nor a file{meant}")
    try:
        text = path.read_text(encoding="utf-8").removesuffix("\n")  # the end of line that editors add
    except UnicodeDecodeError as error:
        raise InputError(f"template {path}: not a UTF-8 text ({error.reason} at byte {error.start})") from None
    stop, text = _stops_and_text(path, text)
    if text.count(PLACEHOLDER) != 1:
        raise InputError(f"template {path}: {PLACEHOLDER} must stand in it once, found {text.count(PLACEHOLDER)} times")
    before, after = text.split(PLACEHOLDER)
    return before, after, stop


def _stops_and_text(path: Path, text: str) -> tuple[tuple[str, ...], str]:
    """The stop texts that a file's front matter names, and the rest; a file whose first line is no fence has none."""
    first, *lines = text.split("\n")
    if first.removeprefix(BYTE_ORDER_MARK).rstrip() != FENCE:
        return (), text
    if first.startswith(BYTE_ORDER_MARK):
        raise InputError(f"template {path}: begins with a byte order mark: save the file as plain UTF-8")
    end = next((number for number, line in enumerate(lines) if line.rstrip() == FENCE), None)
    if end is None:
        raise InputError(f"template {path}: a second line {FENCE} must end its front matter; {_EXPECTED}")
    try:
        stop = msgspec.yaml.decode("\n".join(lines[:end]), type=FrontMatter).stop
    except ValueError as error:  # msgspec's errors are ValueErrors; so is what PyYAML says of a wrong date
        fault = textwrap.shorten(str(error), 240, placeholder=" ...")
        raise InputError(f"template {path}: front matter: {fault}; {_EXPECTED}") from None
    if any("\\n" in text for text in stop):
        raise InputError(f"template {path}: a stop text holds a backslash and an n, no line break; {_EXPECTED}")
    return tuple(stop), "\n".join(lines[end + 1 :])


_EXPECTED = 'expected such as stop: ["\\nProblem:"], in double quotes, or stop: []'


def _digest(*parts: str) -> str:
    """SHA-256 over the parts, each with its length, so that no two templates share one."""
    return hashlib.sha256(b"".join(f"{len(part)}:{part}".encode(errors="surrogatepass") for part in parts)).hexdigest()
