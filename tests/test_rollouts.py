"""Problems to prompts to groups of rollouts, with an engine that answers by rule."""

import pytest

from stages.core import records
from stages.core.drawing import rollouts
from stages.core.drawing.engine import Completion, Sampling
from stages.core.drawing.rollouts import OWN_PROMPTS, Group, draw, draw_each, make_prompts, template_digest
from stages.core.drawing.templates import Template
from stages.core.errors import InputError
from stages.core.grading.scores import Pending, Score
from stages.core.grading.verifier import Verifier

ASK = Template("ask", lambda problem: f"Q {problem} A", (), "digest")


def test_a_packed_group_reads_its_completions_at_the_first_look_and_gives_the_same_records(monkeypatch):
    completions = [Completion("a", [5, 300], [-0.5, -2.25], "stop"), Completion("b", [7], [-1.0], "length")]
    scores = [Score("wrong", 0.0, "a"), Score("correct", 1.0, "b")]
    group = Group(prompts(1)[0], completions, Pending((), lambda: scores))
    with monkeypatch.context() as patch:
        patch.setattr(rollouts.pickle, "loads", None)
        packed = group.packed()
        assert len(packed.completions) == 2 and packed.rewards == [0.0, 1.0]
    assert packed.rollouts("policy") == group.rollouts("policy")


class WordTokenizer:
    """A tokenizer with one token a word."""

    bos_token = None

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [len(word) for word in text.split()]}


class BackwardsEngine:
    """Answers "7" and "8" in turn, the last prompt first."""

    def generate(self, prompts, sampling, on_group, should_stop=None):
        for index in reversed(range(len(prompts))):
            texts = [f"\\boxed{{{7 + i % 2}}}" for i in range(sampling.num_samples)]
            on_group(index, [Completion(text, [1] * (index + 1), [], "stop") for text in texts])


def problem(number, text="one two"):
    return {"id": f"p{number}", "problem": text, "answer": str(7 + number % 2), "source": "s"}


def prompts(count):
    return make_prompts([problem(i) for i in range(count)], ASK, WordTokenizer(), 4, 100)[0]


def test_a_prompt_is_the_rendered_problem_and_its_tokens():
    [prompt] = prompts(1)
    assert (prompt.text, prompt.token_ids, prompt.problem) == ("Q one two A", [1, 3, 3, 1], problem(0))


def test_a_problem_that_leaves_no_room_for_the_completion_is_left_out_by_name():
    problems = [problem(0), problem(1, "one two three"), problem(2)]
    kept, left_out = make_prompts(problems, ASK, WordTokenizer(), 6, context=10)
    assert ([prompt.problem["id"] for prompt in kept], left_out) == (["p0", "p2"], ["p1"])


@pytest.mark.parametrize(("max_tokens", "message"), [(10, "context of 10 tokens"), (7, "shortest prompt has 4 tokens")])
def test_completions_that_never_fit_are_refused(max_tokens, message):
    with pytest.raises(InputError, match=message):
        make_prompts([problem(0)], ASK, WordTokenizer(), max_tokens, context=10)


def test_an_empty_prompt_is_refused_by_its_problem():
    with pytest.raises(InputError, match="problem p1 gives an empty prompt: remove it, or name another --template"):
        make_prompts([problem(0), problem(1, "")], Template("none", str, (), "digest"), WordTokenizer(), 6, context=10)


def test_a_problem_s_own_prompt_goes_before_the_template_and_is_taken_as_it_is():
    own = problem(1) | {"prompt": " {problem} as\n it is "}
    kept, _ = make_prompts([problem(0), own, problem(2) | {"prompt": None}], ASK, WordTokenizer(), 4, 100)
    assert [prompt.text for prompt in kept] == ["Q one two A", " {problem} as\n it is ", "Q one two A"]
    assert template_digest(kept, ASK) == "digest"
    assert template_digest(kept[1:2], ASK) == OWN_PROMPTS
    blank = problem(1) | {"prompt": " "}
    with pytest.raises(InputError, match=r"a\.jsonl: problem p1 gives an empty prompt: .* write its prompt as a text"):
        make_prompts([blank], ASK, WordTokenizer(), 4, 100, "a.jsonl")


def test_groups_come_in_the_order_of_the_prompts_with_the_verifiers_rewards():
    with Verifier() as verifier:
        groups = draw(BackwardsEngine(), verifier, prompts(3), Sampling(2, 4))
        assert [group.prompt.problem["id"] for group in groups] == ["p0", "p1", "p2"]
        assert [group.rewards for group in groups] == [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]


def test_of_several_answers_any_is_right_and_the_rollouts_keep_them_all():
    own = problem(0) | {"answer": "x+1", "other_answers": ["6", "\\frac{16}{2}"]}
    asked, _ = make_prompts([own, problem(1)], ASK, WordTokenizer(), 4, 100)
    with Verifier(accept_unevaluated=True) as verifier:
        groups = draw(BackwardsEngine(), verifier, asked, Sampling(2, 4))
        assert [group.rewards for group in groups] == [[0.0, 1.0], [0.0, 1.0]]
        [first, _], [other, _] = (group.rollouts("p") for group in groups)
    assert records.accepted(first) == ["x+1", "6", "\\frac{16}{2}"]
    assert "other_answers" not in other


def test_groups_can_be_taken_one_by_one_as_they_are_done():
    seen = {}
    with Verifier() as verifier:
        draw_each(BackwardsEngine(), verifier, prompts(3), Sampling(2, 4), seen.__setitem__)
        assert list(seen) == [2, 1, 0]
        assert [seen[index].num_tokens for index in seen] == [6, 4, 2]
        assert all(group.is_scored for group in seen.values() if group.rewards)


def test_a_groups_rollouts_are_whole_records():
    check = records.checker(records.Rollout)
    with Verifier() as verifier:
        [group] = draw(BackwardsEngine(), verifier, prompts(1), Sampling(2, 4))
        rollouts = group.rollouts("here/policy", step=3, first_sample=4)
    assert [check(rollout) for rollout in rollouts] == [None, None]
    assert [rollout["sample"] for rollout in rollouts] == [4, 5]
    assert rollouts[1] == {
        "problem_id": "p0", "sample": 5, "step": 3, "policy": "here/policy", "prompt": "Q one two A",
        "completion": "\\boxed{8}", "answer": "7", "reward": 0.0, "verdict": "wrong", "num_tokens": 1,
        "finish_reason": "stop",
        "token_ids": "AQ==",
    }  # fmt: skip
