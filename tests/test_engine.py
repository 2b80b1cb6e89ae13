"""The real engine against transformers: the same log-probabilities, whatever weights were handed over."""

import pytest
import torch

from stages.core import policies
from stages.core.engine import MAX_BATCHED_TOKENS, Sampling

pytestmark = pytest.mark.slow

QUESTIONS = [f"{a}+{b}*{c}=?" for a in range(1, 5) for b in range(1, 4) for c in range(2, 4)]


@pytest.fixture
def prompts(engine):
    return policies.encode(engine.tokenizer, QUESTIONS)


@pytest.fixture
def restored(engine, tiny_policy):
    """The engine, which gets its own weights back in the end."""
    yield engine
    engine.load(policies.disk_weights(tiny_policy))


def log_probs(path, prompt, completion):
    """transformers' log-probabilities of the tokens of a completion."""
    model = policies.load_model(path, torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


def worst_difference(engine, path, prompts):
    groups = engine.generate(prompts[:4], Sampling(2, 24, seed=3))
    return max(
        float((log_probs(path, prompt, completion.token_ids) - torch.tensor(completion.log_probs)).abs().max())
        for prompt, group in zip(prompts, groups, strict=False)
        for completion in group
    )


def test_log_probabilities_agree_with_transformers_after_the_start(engine, tiny_policy, prompts):
    assert worst_difference(engine, tiny_policy, prompts) < 1e-4


def test_log_probabilities_agree_after_swaps_of_tied_and_untied_weights(restored, tiny_policy, tied_policy, prompts):
    before = worst_difference(restored, tied_policy, prompts)
    restored.load(policies.disk_weights(tied_policy))
    assert worst_difference(restored, tied_policy, prompts) < 1e-4 < 0.1 < before
    restored.load(policies.disk_weights(tiny_policy))
    assert worst_difference(restored, tiny_policy, prompts) < 1e-4


def test_the_same_call_gives_the_same_samples_and_another_seed_others(engine, prompts):
    first, again, other = (engine.generate(prompts, Sampling(4, 16, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_with_a_seed_for_each_prompt_their_order_does_not_matter(engine, prompts):
    seeds = list(range(1000, 1000 + 100 * len(prompts), 100))
    forth = engine.generate(prompts, Sampling(4, 16, seeds=seeds, log_probs=False))
    back = engine.generate(prompts[::-1], Sampling(4, 16, seeds=seeds[::-1], log_probs=False))[::-1]
    same = [one == other for one, other in zip(forth, back, strict=True)]
    assert sum(same) >= len(same) - 1  # one may have met a rounding of another batch
    assert len({completion.text for group in forth for completion in group}) > 80


def test_completions_end_at_the_end_token_or_at_the_bound(engine, prompts):
    end = engine.tokenizer.eos_token_id
    completions = [c for group in engine.generate(prompts, Sampling(8, 32, log_probs=False)) for c in group]
    stopped = [completion for completion in completions if completion.finish_reason == "stop"]
    assert 0 < len(stopped) < len(completions)
    assert all(completion.token_ids.index(end) == len(completion.token_ids) - 1 for completion in stopped)
    assert all("<eos>" not in completion.text and completion.log_probs == [] for completion in stopped)
    cut = [completion for completion in completions if completion.finish_reason == "length"]
    assert all(len(completion.token_ids) == 32 and end not in completion.token_ids for completion in cut)


@pytest.mark.parametrize("as_token", [True, False])
def test_a_template_can_end_completions_by_a_token_or_by_a_text(engine, prompts, as_token):
    token = engine.tokenizer.convert_tokens_to_ids("}")
    how = {"stop_token_ids": (token,)} if as_token else {"stop": ("}",)}
    completions = [c for group in engine.generate(prompts, Sampling(8, 64, **how)) for c in group]
    held = [completion for completion in completions if token in completion.token_ids]
    assert len(held) > 20
    assert all(completion.token_ids.index(token) == len(completion.token_ids) - 1 for completion in held)
    assert all(completion.text.endswith("}") and completion.finish_reason == "stop" for completion in held)


def test_an_interrupted_call_leaves_nothing_behind(engine, prompts):
    calm = engine.generate(prompts, Sampling(4, 16, seed=5))

    def interrupt(index, completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, Sampling(1, 80), interrupt)  # the first to end has many others beside it
    assert engine.generate(prompts, Sampling(4, 16, seed=5)) == calm


def test_seeded_prompts_beyond_one_pass_of_the_engine_are_all_answered(engine, prompts):
    many = [prompts[i % len(prompts)] for i in range(MAX_BATCHED_TOKENS // min(map(len, prompts)) + 50)]
    sampling = Sampling(1, 2, seeds=list(range(len(many))), log_probs=False)
    assert len(engine.generate(many, sampling)) == len(many)
