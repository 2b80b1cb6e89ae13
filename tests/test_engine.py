"""The real engine against transformers: the same log-probabilities, whatever weights were handed over."""

import json
import re
import shutil
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from stages import rl
from stages.core.drawing import engine as engine_module
from stages.core.drawing.engine import (
    BLOCK_TOKENS,
    MAX_BATCHED_TOKENS,
    MAX_SEQUENCES,
    EngineOptions,
    Sampling,
    VllmEngine,
    fitting,
    seed_of,
)
from stages.core.errors import InputError
from stages.core.policy import checkpoints
from stages.core.ranks import STEP_LIMIT

QUESTIONS = [f"{a}+{b}*{c}=?" for a in range(1, 5) for b in range(1, 4) for c in range(2, 4)]


@pytest.fixture
def prompts(engine):
    return checkpoints.encode(engine.tokenizer, QUESTIONS)


@pytest.fixture
def restored(engine, tiny_policy):
    """The engine, which gets its own weights back in the end."""
    yield engine
    engine.load(checkpoints.disk_weights(tiny_policy))


def seeded(num_samples, max_tokens, prompts, seed=0, **how):
    """How to sample `prompts`, each with a seed of its own."""
    return Sampling(num_samples, max_tokens, seeds=[seed_of(seed, index) for index in range(len(prompts))], **how)


def log_probs(path, prompt, completion):
    """transformers' log-probabilities of the tokens of a completion."""
    model = checkpoints.load_model(path, torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


def worst_difference(engine, path, prompts):
    groups = engine.generate(prompts[:4], seeded(2, 24, prompts[:4], seed=3))
    return max(
        float((log_probs(path, prompt, completion.token_ids) - torch.tensor(completion.log_probs)).abs().max())
        for prompt, group in zip(prompts, groups, strict=False)
        for completion in group
    )


@pytest.mark.slow
def test_log_probabilities_agree_with_transformers_after_the_start(engine, tiny_policy, prompts):
    assert worst_difference(engine, tiny_policy, prompts) < 1e-4


@pytest.mark.slow
def test_log_probabilities_agree_after_swaps_on_an_engine_that_can(restored, tiny_policy, other_policy, prompts):
    assert restored.swap_fault(lambda: checkpoints.disk_weights(tiny_policy)) is None
    before = worst_difference(restored, other_policy, prompts)
    restored.load(checkpoints.disk_weights(other_policy))
    assert worst_difference(restored, other_policy, prompts) < 1e-4 < 0.1 < before
    restored.load(checkpoints.disk_weights(tiny_policy))
    assert worst_difference(restored, tiny_policy, prompts) < 1e-4


def swap_nothing(load, weights):
    dict(weights)


def swap_half(load, weights):
    """The head is left behind."""
    load((name, tensor) for name, tensor in weights if not name.startswith("lm_head"))


def swap_wrong(load, weights):
    load((name, tensor.flip(0) if "down_proj" in name else tensor) for name, tensor in weights)


def swap_unknown(load, weights):
    load((f"no.{name}", tensor) for name, tensor in weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("swap", "fault"),
    [(swap_nothing, "nats a token"), (swap_half, "nats a token"), (swap_wrong, "nats a token"),
     (swap_unknown, "vLLM says: ValueError: There is no module or parameter named 'no'")],
)  # fmt: skip
def test_an_engine_that_takes_weights_wrongly_says_so(restored, tiny_policy, monkeypatch, swap, fault):
    load = restored.load
    monkeypatch.setattr(restored, "load", lambda weights: swap(load, weights))
    said = restored.swap_fault(lambda: checkpoints.disk_weights(tiny_policy))
    assert fault in said
    assert "\n" not in said


@pytest.mark.slow
def test_a_policy_that_vllm_does_not_know_or_cannot_hold_is_refused_in_one_line(tiny_policy, tmp_path):
    strange = shutil.copytree(tiny_policy, tmp_path / "strange")
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen9ForNothing"]}))
    for policy, length, sequences, reason in (
        (strange, 96, 0, "Qwen9ForNothing"),
        (tiny_policy, 10**9, 0, "max_model_len"),
        (tiny_policy, 96, 10**9, "max_num_seqs"),
    ):
        with pytest.raises(InputError, match=f"vLLM .* does not start with it .*{reason}") as refused:
            VllmEngine(policy, EngineOptions(max_sequences=sequences), max_model_len=length)
        assert "\n" not in str(refused.value)


def test_a_quantization_is_one_of_vllms_and_is_handed_on(tiny_policy, monkeypatch):
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    def start(policy, **options):
        raise InputError(options["quantization"])

    assert rl.FP8 in QUANTIZATION_METHODS
    monkeypatch.setattr(engine_module, "_start", start)
    with pytest.raises(InputError, match=f"^{rl.FP8}$"):
        VllmEngine(tiny_policy, max_model_len=96, quantization=rl.FP8)


@pytest.mark.slow
def test_a_call_says_how_far_it_is_while_no_group_is_done(engine, prompts, monkeypatch, capsys):
    engine.generate(prompts, seeded(4, 16, prompts))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(engine_module, "SILENCE_S", 0)
    engine.generate(prompts, seeded(4, 16, prompts))
    first, *_ = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"rloop: drawing: 0 of {len(prompts)} groups done, \d+ tokens so far, [\d,]+ tokens/s", first)


@pytest.mark.slow
def test_the_same_seeds_give_the_same_samples_and_others_others(engine, prompts):
    first, again, other = (engine.generate(prompts, seeded(4, 16, prompts, seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_a_call_without_a_seed_for_each_prompt_is_refused():
    engine = VllmEngine.__new__(VllmEngine)
    engine._llm = SimpleNamespace(reset_prefix_cache=lambda: True, llm_engine=None)
    with pytest.raises(ValueError, match="shorter"):
        engine.generate([[1, 2]], Sampling(1, 1))


@pytest.mark.slow
def test_every_request_of_the_engine_has_a_seed_of_its_own():
    from vllm.v1.engine.parallel_sampling import ParentRequest

    requests = {}
    core = SimpleNamespace(
        add_request=lambda name, prompt, params: requests.update({name: params}),
        get_num_unfinished_requests=lambda: len(requests),
        has_unfinished_requests=lambda: False,
        step=list,
        abort_request=lambda names: None,
    )
    engine = VllmEngine.__new__(VllmEngine)
    engine._llm = SimpleNamespace(reset_prefix_cache=lambda: True, llm_engine=core)
    engine.max_sequences, engine._under_way, engine.num_preemptions = 8, {}, None
    with pytest.raises(AssertionError, match="lost completions"):
        engine.generate([[1, 2], [1, 2]], seeded(4, 8, [0, 1]))
    children = [
        ParentRequest(SimpleNamespace(external_req_id=name, request_id=name, params=params)).get_child_info(sample)[1]
        for name, params in requests.items()
        for sample in range(4)
    ]
    assert [child.seed for child in children] == [seed_of(0, index) + sample for index in (0, 1) for sample in range(4)]


def test_seeds_keep_apart_and_leave_room_for_the_samples():
    seeds = [seed_of(seed, f"p{number}") for seed in (0, 1) for number in range(2000)]
    assert min(seeds) >= 0 and max(seeds) + 10_000 < 2**63
    assert min(b - a for a, b in pairwise(sorted(seeds))) > 10_000
    on_the_cpu = sorted(seed % 2**32 for seed in seeds)  # its generator knows 32 bits
    assert sum(b - a < 32 for a, b in pairwise(on_the_cpu)) < 3


@pytest.mark.slow
def test_with_a_seed_for_each_prompt_their_order_does_not_matter(engine, prompts):
    seeds = list(range(1000, 1000 + 100 * len(prompts), 100))
    forth = engine.generate(prompts, Sampling(4, 16, seeds=seeds, log_probs=False))
    back = engine.generate(prompts[::-1], Sampling(4, 16, seeds=seeds[::-1], log_probs=False))[::-1]
    same = [one == other for one, other in zip(forth, back, strict=True)]
    assert sum(same) >= len(same) - 1  # one may have met a rounding of another batch
    assert len({completion.text for group in forth for completion in group}) > 80


@pytest.mark.slow
def test_whole_blocks_of_a_prompt_are_computed_once_for_all_its_samples(engine, tiny_policy, prompts, monkeypatch):
    scheduler = engine._llm.llm_engine.engine_core.engine_core.scheduler
    schedule, computed = scheduler.schedule, []

    def noted(*args):
        computed.append(schedule(*args))
        return computed[-1]

    monkeypatch.setattr(scheduler, "schedule", noted)
    prompt = (prompts[0] * BLOCK_TOKENS)[: 2 * BLOCK_TOKENS + 6]
    (group,) = engine.generate([prompt], seeded(8, 4, [prompt]))
    assert computed[0].total_num_scheduled_tokens == len(prompt) + 7 * 6
    for completion in group:
        expected = log_probs(tiny_policy, prompt, completion.token_ids)
        assert torch.allclose(torch.tensor(completion.log_probs), expected, atol=1e-4)


@pytest.mark.slow
def test_completions_end_at_the_end_token_or_at_the_bound(engine, prompts):
    end = engine.tokenizer.eos_token_id
    completions = [c for group in engine.generate(prompts, seeded(8, 32, prompts, log_probs=False)) for c in group]
    stopped = [completion for completion in completions if completion.finish_reason == "stop"]
    assert 0 < len(stopped) < len(completions)
    assert all(completion.token_ids.index(end) == len(completion.token_ids) - 1 for completion in stopped)
    assert all("<eos>" not in completion.text and completion.log_probs == [] for completion in stopped)
    cut = [completion for completion in completions if completion.finish_reason == "length"]
    assert all(len(completion.token_ids) == 32 and end not in completion.token_ids for completion in cut)


@pytest.mark.slow
@pytest.mark.parametrize("as_token", [True, False])
def test_a_template_can_end_completions_by_a_token_or_by_a_text(engine, prompts, as_token):
    token = engine.tokenizer.convert_tokens_to_ids("}")
    how = {"stop_token_ids": (token,)} if as_token else {"stop": ("}",)}
    completions = [c for group in engine.generate(prompts, seeded(8, 64, prompts, **how)) for c in group]
    held = [completion for completion in completions if token in completion.token_ids]
    assert len(held) > 20
    assert all(completion.token_ids.index(token) == len(completion.token_ids) - 1 for completion in held)
    assert all(completion.text.endswith("}") and completion.finish_reason == "stop" for completion in held)


@pytest.mark.slow
def test_an_interrupted_call_leaves_nothing_behind(engine, prompts):
    calm = engine.generate(prompts, seeded(4, 16, prompts, 5))

    def interrupt(index, completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, seeded(1, 80, prompts), interrupt)  # the first to end has many others beside it
    assert engine.generate(prompts, seeded(4, 16, prompts, 5)) == calm


def test_an_engine_that_another_process_keeps_from_sleeping_says_so_in_one_line():
    """As vLLM does it where memory of the GPU that it gives back is taken by another process at once."""

    def sleep(level):
        raise AssertionError("Memory usage increased after sleeping.")

    engine = object.__new__(VllmEngine)
    engine.sleeps, engine._llm = True, SimpleNamespace(sleep=sleep)
    with pytest.raises(
        InputError, match=r"wants the GPU for itself \(AssertionError: Memory usage increased after sleeping\.\)"
    ):
        engine.sleep()


def test_as_many_sequences_are_under_way_as_fit_at_half_of_the_longest_length():
    assert fitting(417_000, 150 + 2048) == 379
    assert fitting(10**7, 2198) == MAX_SEQUENCES
    assert fitting(2200, 2198) == 2
    assert fitting(1000, 2198) == 1


@pytest.mark.slow
def test_settings_of_sampling_that_a_policy_names_change_nothing_and_unknown_ids_are_named(
    engine, tiny_policy, prompts, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("vllm.v1.engine.core.cleanup_dist_env_and_memory", lambda: None)  # `engine` needs the groups
    policy = shutil.copytree(tiny_policy, tmp_path / "policy")
    settings = {"top_k": 1, "top_p": 0.1, "temperature": 0.1, "repetition_penalty": 2.0, "max_new_tokens": 1}
    file = policy / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    told = VllmEngine(policy, max_model_len=96)
    assert told.generate(prompts, seeded(4, 16, prompts)) == engine.generate(prompts, seeded(4, 16, prompts))
    assert capsys.readouterr().err == ""
    told._num_known = 1  # as if the tokenizer had one token alone
    for _ in range(2):
        told.generate(prompts, seeded(4, 16, prompts))
    assert capsys.readouterr().err.count("samples ids that its tokenizer lacks") == 1
    told.close()


@pytest.fixture
def start_small(tiny_policy, monkeypatch):
    """Start engines with a cache of 1,024 tokens, for about ten sequences."""
    start, num_blocks = engine_module._start, 1024 // BLOCK_TOKENS
    monkeypatch.setattr(
        engine_module, "_start", lambda policy, **options: start(policy, **options, num_gpu_blocks_override=num_blocks)
    )
    monkeypatch.setattr("vllm.v1.engine.core.cleanup_dist_env_and_memory", lambda: None)  # `engine` needs the groups
    started = []

    def small(**options):
        started.append(VllmEngine(tiny_policy, EngineOptions(**options), max_model_len=96))
        return started[-1]

    yield small
    for engine in started:
        engine.close()


@pytest.mark.slow
def test_more_sequences_than_fit_are_preempted_and_counted_and_draw_the_same(engine, start_small, prompts):
    calm, before = engine.generate(prompts, seeded(4, 80, prompts)), engine.num_preemptions
    fitted, crowded = start_small(), start_small(max_sequences=64)
    assert fitted.max_sequences == fitting(fitted.cache_tokens, 96) < crowded.max_sequences == 64
    assert 700 < fitted.cache_tokens <= 1024
    assert f"{fitted.cache_tokens // 96} sequences of the longest length (96)" in fitted.capacity
    for small in (fitted, crowded):
        drawn = small.generate(prompts, seeded(4, 80, prompts))
        same = [one == other for one, other in zip(drawn, calm, strict=True)]
        assert sum(same) >= len(same) - 1  # one may have met a rounding of another batch
    assert before == engine.num_preemptions == 0
    assert fitted.num_preemptions < crowded.num_preemptions


@pytest.mark.slow
def test_seeded_prompts_beyond_one_pass_of_the_engine_are_all_answered(engine, prompts):
    many = [prompts[i % len(prompts)] for i in range(MAX_BATCHED_TOKENS // min(map(len, prompts)) + 50)]
    sampling = Sampling(1, 2, seeds=list(range(len(many))), log_probs=False)
    assert len(engine.generate(many, sampling)) == len(many)


@pytest.mark.slow
def test_the_groups_of_ranks_that_vllm_makes_have_the_time_limit_of_the_others(engine):
    options = engine._distributed(True)
    limits = [options[name] for name in ("distributed_timeout_seconds", "cpu_distributed_timeout_seconds")]
    assert limits == [STEP_LIMIT.total_seconds()] * 2
