from types import SimpleNamespace

import pytest

from stages.core import policies, templates
from stages.core.errors import InputError

HOSTILE = "If {x} = {problem} and 100% of $\\frac{1}{2}$ is {0}, what is \\boxed{}? $Answer\n{{}}"


def chat_tokenizer(template: str = "[USER] {} [BOT]") -> SimpleNamespace:
    def apply(messages, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        return "<s>[USER] " + messages[0]["content"] + " [BOT]"

    return SimpleNamespace(chat_template=template, apply_chat_template=apply, get_chat_template=lambda: template)


@pytest.mark.parametrize("name", [name for name in templates.NAMES if name != "none"])
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
    tokenizer = policies.load_tokenizer(policy)
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
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than 1 s over"),
        ("{{ 7 ** (10 ** 8) }}", "takes more than 1 s over one problem"),
    ],
)
def test_a_chat_template_that_fails_or_does_not_end_is_one_line(tiny_policy, monkeypatch, text, fault):
    monkeypatch.setattr(templates, "MAX_RENDER_S", 1)
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


@pytest.mark.parametrize("text", ["no place for it", "{problem} and {problem}"])
def test_a_file_without_exactly_one_place_for_the_problem_is_refused(tmp_path, text):
    path = tmp_path / "mine.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=r"mine.txt: \{problem\} must stand in it once"):
        templates.load(str(path))


def test_an_unknown_name_is_refused_with_the_names_there_are():
    with pytest.raises(InputError, match="neither one of boxed, qwen-math, r1-zero, dapo, none, chat nor a file"):
        templates.load("boxes")


def test_the_digest_follows_what_a_template_does_not_what_it_is_called(tmp_path):
    same, other = tmp_path / "same.txt", tmp_path / "other.txt"
    same.write_text(templates.DAPO_BEFORE + "{problem}" + templates.DAPO_AFTER)
    other.write_text(templates.DAPO_BEFORE + "{problem}" + templates.DAPO_AFTER + " Now.")
    digests = {name: templates.load(name, chat_tokenizer()).digest for name in templates.NAMES}
    assert len(set(digests.values())) == len(templates.NAMES)
    assert templates.load(str(same)).digest == digests["dapo"]
    assert templates.load(str(other)).digest != digests["dapo"]


def test_stops_that_are_tokens_are_told_from_stops_that_are_text():
    tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0, "<|im_end|>": 7})
    assert templates.load("boxed").end_tokens(tokenizer) == ([7], [])
    assert templates.load("r1-zero").end_tokens(tokenizer) == ([], ["</answer>"])


class Beginning:
    """A tokenizer of one token a text, with a begin token that it adds when asked to."""

    bos_token = "<s>"

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [0] * add_special_tokens + [1]}


def test_a_text_that_begins_with_the_begin_token_gets_no_second_one():
    assert policies.encode(Beginning(), ["<s>one", "one"]) == [[1], [0, 1]]
