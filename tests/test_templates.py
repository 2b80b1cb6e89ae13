from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.core.drawing import rendering, templates
from stages.core.errors import InputError
from stages.core.policy import checkpoints

HOSTILE = "If {x} = {problem} and 100% of $\\frac{1}{2}$ is {0}, what is \\boxed{}? $Answer\n{{}}"


def chat_tokenizer(template: str = "[USER] {} [BOT]") -> SimpleNamespace:
    def apply(messages, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        return "<s>[USER] " + messages[0]["content"] + " [BOT]"

    return SimpleNamespace(chat_template=template, apply_chat_template=apply, get_chat_template=lambda: template)


@pytest.mark.parametrize("name", ["boxed", "qwen-math", "r1-zero", "dapo", "chat"])
def test_a_problem_with_braces_and_placeholders_stands_in_the_prompt_unchanged_and_once(name):
    template = templates.load(name, chat_tokenizer())
    assert template.render(HOSTILE).count(HOSTILE) == 1
    assert template.render(HOSTILE).replace(HOSTILE, "1 + 1") == template.render("1 + 1")


def test_boxed_is_qwens_markup_to_the_letter():
    assert templates.load("boxed").render("1 + 1?") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n1 + 1?\n"
        "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_qwen_math_puts_the_instruction_into_the_system_line():
    assert templates.load("qwen-math").render("1 + 1?") == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_dapo_is_its_wrapper_to_the_letter():
    assert templates.load("dapo").render("1 + 1?") == (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\n1 + 1?\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    )


def test_r1_zero_opens_the_thinking_and_stops_at_the_end_of_the_answer():
    template = templates.load("r1-zero")
    assert template.render("1 + 1?").endswith("This is the problem:\n1 + 1?\nAssistant: <think>")
    assert template.stop == ("</answer>",)


def test_none_is_the_problem_itself():
    assert templates.load("none").render(HOSTILE) == HOSTILE


def test_chat_uses_the_tokenizers_own_template():
    template = templates.load("chat", chat_tokenizer())
    assert template.render("1 + 1?") == f"<s>[USER] 1 + 1?\n{templates.INSTRUCTION} [BOT]"


@pytest.mark.parametrize("tokenizer", [None, chat_tokenizer(template="")])
def test_chat_without_a_chat_template_is_refused(tokenizer):
    with pytest.raises(InputError, match="no chat template; choose another of boxed"):
        templates.load("chat", tokenizer)


def chat_template(policy, text):
    tokenizer = checkpoints.load_tokenizer(policy)
    tokenizer.chat_template = text
    return templates.load("chat", tokenizer)


def test_every_problem_gets_its_own_prompt_from_a_chat_template(tiny_policy):
    template = chat_template(tiny_policy, "<{{ messages[0].content | trim }}>")
    problems = [HOSTILE, "", "x" * 100_000, " é\n"]
    assert template.render_all(problems) == [f"<{problem}\n{templates.INSTRUCTION}>".replace("< é", "<é") if problem
                                             else f"<{templates.INSTRUCTION}>" for problem in problems]  # fmt: skip
    assert template.render_all(["1"]) == [template.render("1")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{% for %}", "fails: TemplateSyntaxError"),
        ("{{ raise_exception('one user turn only') }}", "fails: TemplateError: one user turn only"),
        ("{{ messages[7].content }}", "fails: UndefinedError"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails: SecurityError"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "fails: RecursionError"),
        ("{{ 'a' * 10 ** 11 }}", "fails: MemoryError"),
        ("{{ 'a' * (2 * 10 ** 7) }}", "fails: ValueError: it makes a prompt of 20000000 characters"),
        ("\ud800", "fails: UnicodeEncodeError"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes too long over"),
        ("{{ 7 ** (10 ** 8) }}", "takes too long over one problem"),
    ],
)
def test_a_chat_template_that_fails_or_does_not_end_is_one_line(tiny_policy, monkeypatch, text, fault):
    monkeypatch.setattr(rendering, "MAX_RENDER_S", 1)
    with pytest.raises(InputError, match=f"template chat: the policy's chat template {fault}") as caught:
        chat_template(tiny_policy, text).render_all(["1 + 1?"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", [["a"], {"other": "a"}, 5])
def test_a_chat_template_that_is_no_text_is_one_line(tiny_policy, template):
    with pytest.raises(InputError, match=r"template chat: "):
        chat_template(tiny_policy, template)


def test_a_file_is_a_template_less_the_end_of_line_that_editors_add(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("Q: {problem}\nGive {it} in \\boxed{}.\nA:\n")
    assert templates.load(str(path)).render(HOSTILE) == f"Q: {HOSTILE}\nGive {{it}} in \\boxed{{}}.\nA:"


@pytest.mark.parametrize("head", ['stop: ["\\nQ:", </s>]', "stop:\n- |2-\n\n  Q:\n- </s>"])
def test_a_file_names_its_stop_texts_between_two_fences(tmp_path, head):
    path = tmp_path / "mine.txt"
    path.write_text(f"---\n{head}\n---\n\nQ: {{problem}}\nA:\n")
    template = templates.load(str(path))
    assert template.stop == ("\nQ:", "</s>")
    assert template.render(HOSTILE) == f"\nQ: {HOSTILE}\nA:"


@pytest.mark.parametrize(
    ("head", "fault"),
    [
        ('stop: [""]', "Expected `str` of length >= 1"),
        ("stop: [a, 5]", r"Expected `str`, got `int` - at `\$.stop\[1\]`"),
        ("stop: a", "Expected `array`, got `str`"),
        ("stop: [a]\nname: mine", "unknown field `name`"),
        ("", "Expected `object`, got `null`"),
        ("stop: [a", "while parsing a flow sequence"),
        ("stop: [2026-13-01]", "month must be in 1..12"),
        ("stop: ['\\nQ:']", "a stop text holds a backslash and an n, no line break"),
    ],
)
def test_a_front_matter_that_is_none_is_refused_in_one_line(tmp_path, head, fault):
    path = tmp_path / "mine.txt"
    path.write_text(f"---\n{head}\n---\n{{problem}}")
    with pytest.raises(InputError, match=rf'mine.txt: .*{fault}.*; expected such as stop: \["\\nProblem:"\]') as caught:
        templates.load(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("---\nstop: [a]\n{problem}", "a second line --- must end its front matter"),
        ("\ufeff---\nstop: [a]\n---\n{problem}", "begins with a byte order mark"),
        ("---\nstop: ['{problem}']\n---\nnone here", "must stand in it once, found 0 times"),
    ],
)
def test_a_front_matter_without_an_end_or_a_text_is_refused(tmp_path, text, fault):
    path = tmp_path / "mine.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=fault):
        templates.load(str(path))


def test_stop_texts_are_part_of_the_digest_and_a_file_without_any_keeps_the_digest_it_had(tmp_path):
    path, digests = tmp_path / "mine.txt", []
    for head in ("", "---\nstop: []\n---\n", "---\nstop: [a]\n---\n", "---\nstop: [b]\n---\n"):
        path.write_text(head + "Q {problem} A\n")
        digests.append(templates.load(str(path)).digest)
    assert (
        digests[0] == digests[1] == "6cd22fb5b80139841114d9aced22446c85653fc0917347b73be4d437bf5ba5c3"
    )  # of before there were stops
    assert len(set(digests)) == 3


def test_the_four_shots_of_the_example_end_in_a_box_and_its_stop_text_begins_the_next_problem():
    template = templates.load(str(Path(__file__).parents[1] / "examples/templates/four-shot.txt"))
    [stop] = template.stop
    *shots, last = ("\n" + template.render(HOSTILE)).split(stop)[1:]
    assert [shot.strip().endswith("}.") and shot.count("\\boxed{") == 1 for shot in shots] == [True] * 4
    assert last == f" {HOSTILE}\nSolution:"


@pytest.mark.parametrize("text", ["no place for it", "{problem} and {problem}"])
def test_a_file_without_exactly_one_place_for_the_problem_is_refused(tmp_path, text):
    path = tmp_path / "mine.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=r"mine.txt: \{problem\} must stand in it once"):
        templates.load(str(path))


def test_an_unknown_name_is_refused_with_the_names_there_are():
    with pytest.raises(
        InputError,
        match=r"neither one of boxed, .*, chat, chat-thinking, chat-no-thinking nor a file \(did you mean boxed\?\)$",
    ):
        templates.load("Boxed")


def test_the_digest_follows_what_a_template_does_not_what_it_is_called(tmp_path):
    same, other = tmp_path / "same.txt", tmp_path / "other.txt"
    same.write_text(templates.DAPO_BEFORE + "{problem}" + templates.DAPO_AFTER)
    other.write_text(templates.DAPO_BEFORE + "{problem}" + templates.DAPO_AFTER + " Now.")
    digests = {name: templates.load(name, chat_tokenizer(THINKING)).digest for name in templates.NAMES}
    assert len(set(digests.values())) == len(templates.NAMES)
    assert templates.load(str(same)).digest == digests["dapo"]
    assert templates.load(str(other)).digest != digests["dapo"]


def test_stops_that_are_special_tokens_are_told_from_stops_that_are_text(tiny_policy):
    tokenizer = checkpoints.load_tokenizer(tiny_policy)
    template = templates.Template("mine", str, ("<eos>", "}", "</answer>"), "digest")
    assert template.end_tokens(tokenizer) == ([tokenizer.eos_token_id], ["}", "</answer>"])


CHAT = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ASK = {"role": "user", "content": HOSTILE}


def test_messages_are_rendered_by_the_policys_chat_template(tiny_policy):
    tokenizer = checkpoints.load_tokenizer(tiny_policy)
    tokenizer.chat_template = CHAT
    chats = {
        "a": [{"role": "system", "content": "Be brief."}, ASK],
        "b": [ASK],
        "c": [ASK, {"role": "assistant", "content": "Let me see:"}],
    }
    assert templates.render_chats(tokenizer, chats, "sums.jsonl", {}) == {
        "a": f"[system]Be brief.[end][user]{HOSTILE}[end][assistant]",
        "b": f"[user]{HOSTILE}[end][assistant]",
        "c": f"[user]{HOSTILE}[end][assistant]Let me see:",
    }


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (None, "the policy's tokenizer has no chat template; write its prompt as a text"),
        ("{{ raise_exception('no system turn') }}", "the policy's chat template fails: TemplateError: no system turn"),
    ],
)
def test_messages_that_can_not_be_rendered_are_named_by_file_and_problem(tiny_policy, text, fault):
    tokenizer = checkpoints.load_tokenizer(tiny_policy)
    tokenizer.chat_template = text
    with pytest.raises(InputError) as caught:
        templates.render_chats(tokenizer, {"p1": [ASK]}, "sums.jsonl", {})
    assert str(caught.value).startswith(f"sums.jsonl: messages of problem p1: {fault}")


THINKING = (  # as Qwen3's: thoughts are left out by an empty one
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
)


def test_a_policy_that_can_think_is_told_whether_to_in_problems_and_in_messages(tiny_policy):
    tokenizer = checkpoints.load_tokenizer(tiny_policy)
    tokenizer.chat_template = THINKING
    chats = {"p1": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]}
    digests = set()
    for name, end in (("chat", ""), ("chat-thinking", ""), ("chat-no-thinking", "<think></think>")):
        template = templates.load(name, tokenizer)
        digests.add(template.digest)
        assert template.render_all(["1 + 1?"]) == [f"<user>1 + 1?\n{templates.INSTRUCTION}<assistant>{end}"]
        prompts = templates.render_chats(tokenizer, chats, "sums.jsonl", template.settings)
        assert prompts == {"p1": f"<system>Be brief.<user>1 + 1?<assistant>{end}"}
    assert len(digests) == 3
    tokenizer.chat_template = CHAT
    with pytest.raises(InputError, match="template chat-thinking: the policy's chat template knows no enable_thinking"):
        templates.load("chat-thinking", tokenizer)


class Beginning:
    """A tokenizer of one token a text, with a begin token that it adds when asked to."""

    bos_token = "<s>"

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [0] * add_special_tokens + [1]}


def test_a_text_that_begins_with_the_begin_token_gets_no_second_one():
    assert checkpoints.encode(Beginning(), ["<s>one", "one"]) == [[1], [0, 1]]
