"""The trainer's gradient: the same however the work is cut, and the same as TRL's for the same batch."""

import os
import random
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, FalconConfig, LlamaConfig
from trl.trainer.utils import add_fused_lm_head

from stages import rl
from stages.core.errors import InputError
from stages.core.policy import acceleration, checkpoints, heads
from stages.core.policy.adapters import trained
from stages.rl import prefixes
from stages.rl.trainer import TokenRollout, Trainer, UpdateStats, refuse_others, start_accelerator, without_dropout
from tests import ranks
from tests.architectures import ARCHITECTURES, make

OPTIONS = rl.Settings(minibatches=1, tokens_per_microbatch=4096, weight_decay=0.0)


def some_rollouts(count, seed=0):
    """Groups of four; the prompt of the third has one token."""
    draw = random.Random(seed)
    rollouts = []
    for number in range(count):
        if number % 4 == 0:
            prompt = [draw.randrange(2, 60) for _ in range(1 if number == 8 else draw.randint(3, 9))]
        completion = [draw.randrange(2, 60) for _ in range(draw.randint(1, 40))]
        engine = [draw.gauss(-4.1, 0.3) for _ in completion]
        rollouts.append(TokenRollout(prompt, completion, engine, draw.choice([-1.3, -0.2, 0.4, 1.7])))
    return rollouts


@pytest.fixture(params=["plain", "fused"])
def head(request, monkeypatch):
    """The trainer's head: that of a CPU, and that of a GPU."""
    if request.param == "fused":
        monkeypatch.setattr(heads, "add_plain_head", partial(add_fused_lm_head, outputs=("log_probs", "entropy")))


def gradient_of(trainer):
    return torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])


def gradient_and_sums(policy, rollouts, **changes):
    trainer = Trainer(policy, Accelerator(), replace(OPTIONS, **changes))
    sums = trainer.gradient(rollouts)
    return gradient_of(trainer), sums


def close(a, b, relative):
    return ((a - b).norm() / b.norm()).item() < relative


def test_the_gradient_does_not_depend_on_the_token_budget(tiny_policy):
    rollouts = some_rollouts(48)
    whole, sums = gradient_and_sums(tiny_policy, rollouts, tokens_per_microbatch=10**6)
    for budget in (1, 100, 700):
        cut, cut_sums = gradient_and_sums(tiny_policy, rollouts, tokens_per_microbatch=budget)
        assert close(cut, whole, 1e-5)
        assert torch.allclose(cut_sums, sums, rtol=1e-5)


def with_entropy_term(policy, weight=0.5, **changes):
    trainer = Trainer(policy, Accelerator(), replace(OPTIONS, **changes))
    sums = trainer.gradient(some_rollouts(31), weight)
    return gradient_of(trainer), sums


def test_with_an_entropy_term_too_the_gradient_does_not_depend_on_the_token_budget(tiny_policy):
    whole, sums = with_entropy_term(tiny_policy)
    cut, cut_sums = with_entropy_term(tiny_policy, tokens_per_microbatch=100)
    assert close(cut, whole, 1e-5)
    assert torch.allclose(cut_sums, sums, rtol=1e-5)
    assert not close(gradient_and_sums(tiny_policy, some_rollouts(31))[0], whole, 0.01), "the term does nothing"


def test_the_gradient_does_not_depend_on_the_order_of_the_rollouts(tiny_policy):
    rollouts = some_rollouts(32)
    shuffled = random.Random(1).sample(rollouts, len(rollouts))
    assert close(gradient_and_sums(tiny_policy, shuffled)[0], gradient_and_sums(tiny_policy, rollouts)[0], 1e-5)


COMPILED = [{"compile_layers": True}, {"compile_layers": True, "gradient_checkpointing": True}]


@pytest.mark.parametrize(
    ("entropy_weight", "faster"),
    [
        (0.0, {}),
        (0.7, {}),
        (0.0, {"attn_implementation": "eager"}),
        *(pytest.param(0.0, one, marks=pytest.mark.slow) for one in COMPILED),
    ],
    ids=str,
)
def test_the_gradient_is_that_of_the_token_mean_written_out_in_plain_torch(
    tiny_policy, head, entropy_weight, faster, monkeypatch
):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(acceleration, "COMPILER", "aot_eager")
    rollouts = some_rollouts(12)
    trainer = Trainer(tiny_policy, Accelerator(), replace(OPTIONS, importance_cap=1.5, **faster))
    sums = trainer.gradient(rollouts, entropy_weight)
    gradient = gradient_of(trainer)
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    total, tokens = 0.0, sum(len(rollout.completion_ids) for rollout in rollouts)
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        scores = model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
        own = scores.gather(-1, torch.tensor(rollout.completion_ids)[:, None])[:, 0]
        weight = (own.detach() - torch.tensor(rollout.engine_log_probs)).exp().clamp(max=1.5)
        total = total - (weight * (own - own.detach()).exp() * rollout.advantage).sum()
        total = total + entropy_weight * (scores.exp() * scores).sum()
    (total / tokens).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert close(gradient, expected, 1e-5)
    assert sums[0].item() == pytest.approx(total.item(), rel=1e-5)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "OLMo 2"])
def test_a_prompt_computed_once_gives_the_gradient_of_one_computed_for_each_completion(name, tmp_path, monkeypatch):
    """Prompts of 3 to 60 tokens, so that Gemma's window of 32 begins in the prompt, in it, and after it."""
    policy = make(name, tmp_path / "policy")
    draw = random.Random(0)
    prompts = [[draw.randrange(2, 30) for _ in range(length)] for length in (3, 30, 60)]
    rollouts = [replace(rollout, prompt_ids=prompts[number % 3]) for number, rollout in enumerate(some_rollouts(24))]
    for rollout in rollouts:
        rollout.completion_ids = [token % 30 for token in rollout.completion_ids]
    once = outcome_of(policy, rollouts)
    monkeypatch.setattr(prefixes, "fits", lambda model: False)
    each = outcome_of(policy, rollouts)
    assert close(once.gradient, each.gradient, 1e-5)
    assert torch.allclose(once.sums, each.sums, rtol=1e-5)
    assert torch.allclose(once.log_probs, each.log_probs, atol=1e-5)
    assert once.num_tokens < 0.75 * each.num_tokens


def test_with_the_engines_log_probs_as_the_old_ones_the_clip_bounds_the_ratio_to_the_engine(tiny_policy):
    from transformers import AutoModelForCausalLM

    rollouts = some_rollouts(12)
    gradient, sums = gradient_and_sums(tiny_policy, rollouts, engine_log_probs=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    total, apart, tokens = 0.0, 0.0, sum(len(rollout.completion_ids) for rollout in rollouts)
    for rollout in rollouts:
        scores = model(torch.tensor([rollout.prompt_ids + rollout.completion_ids])).logits[0].log_softmax(-1)
        completion, engine = torch.tensor(rollout.completion_ids), torch.tensor(rollout.engine_log_probs)
        own = scores[len(rollout.prompt_ids) - 1 : -1].gather(-1, completion[:, None])[:, 0]
        ratio = (own - engine).exp()
        least = torch.minimum(ratio * rollout.advantage, ratio.clamp(0.8, 1.28) * rollout.advantage)
        total, apart = total - least.sum(), apart + (own - engine).abs().sum()
    (total / tokens).backward()
    assert close(gradient, torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), 1e-5)
    assert sums[0].item() == pytest.approx(total.item(), rel=1e-5)
    names = UpdateStats.SUMS
    assert sums[names.index("mismatch")].item() == pytest.approx(apart.item(), rel=1e-5)
    assert sums[names.index("clipped_low")] + sums[names.index("clipped_high")] > 0


def test_with_the_engines_log_probs_as_the_old_ones_no_pass_scores_later_mini_batches(tiny_policy, monkeypatch):
    trainer = Trainer(tiny_policy, Accelerator(), replace(OPTIONS, minibatches=2, engine_log_probs=True))
    monkeypatch.setattr(trainer, "_remember_log_probs", None)
    assert len(trainer.update(some_rollouts(16), lr=1e-3).grad_norms) == 2


def test_the_mismatch_is_never_that_of_weights_which_the_steps_own_updates_have_moved(tiny_policy):
    trainer = Trainer(tiny_policy, Accelerator(), replace(OPTIONS, minibatches=4, engine_log_probs=True))
    rollouts = some_rollouts(16)
    rollouts = [
        replace(one, engine_log_probs=own.tolist())
        for one, own in zip(rollouts, trainer.log_probs(rollouts), strict=True)
    ]
    stats = trainer.update(rollouts, lr=1e-2)
    assert stats.mismatch_max < 1e-4 and stats.mean("mismatch") < 1e-5
    moved = zip(rollouts, trainer.log_probs(rollouts), strict=True)
    assert max(abs(own - torch.tensor(one.engine_log_probs)).max() for one, own in moved) > 0.1


@pytest.mark.slow
def test_layers_are_compiled_as_often_for_ten_as_for_one_and_keep_the_names_of_weights(make_policy, monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(acceleration, "COMPILER", counter)
    torch._dynamo.reset()
    policy = make_policy(num_hidden_layers=10)
    trainer = Trainer(policy, Accelerator(), replace(OPTIONS, compile_layers=True))
    trainer.gradient(some_rollouts(12))
    trainer.gradient(some_rollouts(24, seed=1))
    trainer.log_probs(some_rollouts(7, seed=2))
    assert 0 < counter.frame_count <= 4, "whatever the lengths; torch gives up at eight"
    assert dict(trainer.weights()).keys() == dict(checkpoints.disk_weights(policy)).keys()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"attn_implementation": "flash_attention_2"}, "flash_attention_2: it computes in bfloat16 on a GPU only"),
        ({"compile_layers": True}, r"--compile-layers: there is no C\+\+ compiler \(no-such-compiler\)"),
    ],
)
def test_what_this_machine_cannot_run_is_refused_in_one_line(options, fault, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=fault):
        acceleration.check(replace(OPTIONS, **options))


def test_a_launcher_that_shards_the_policy_otherwise_than_fsdp2_is_refused_in_one_line():
    from accelerate.utils import DistributedType

    for kind, is_fsdp2 in (("NO", False), ("MULTI_CPU", False), ("MULTI_GPU", False), ("FSDP", True)):
        refuse_others(DistributedType[kind], is_fsdp2)
    for kind in ("FSDP", "DEEPSPEED"):
        with pytest.raises(InputError, match=f"asks for {kind}, other than FSDP2: give fsdp_version: 2"):
            refuse_others(DistributedType[kind], False)


def test_without_memory_an_update_is_repeated_with_half_the_micro_batch_and_comes_out_the_same(
    tiny_policy, monkeypatch, capsys
):
    rollouts, trainers = some_rollouts(32), [Trainer(tiny_policy, Accelerator(), OPTIONS) for _ in range(2)]
    stats = trainers[0].update(rollouts, lr=1e-3)
    forward = Trainer._forward

    def limited(self, batch):
        if len(batch) > 12:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch)

    monkeypatch.setattr(Trainer, "_forward", limited)
    monkeypatch.setattr(trainers[1], "token_budget", 1024)
    again = trainers[1].update(rollouts, lr=1e-3)
    assert again.num_halvings >= 1 and stats.num_halvings == 0
    assert "it is repeated with 512 tokens a micro-batch" in capsys.readouterr().err
    assert again.grad_norms == pytest.approx(stats.grad_norms, rel=1e-5)
    assert again.loss == pytest.approx(stats.loss, rel=1e-5)
    monkeypatch.setattr(Trainer, "_forward", lambda self, batch: limited(self, [None] * 13))
    with pytest.raises(torch.OutOfMemoryError):
        trainers[1].update(rollouts, lr=1e-3)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["Qwen2", "Gemma 3", "Mixtral"])
@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}, {"gradient_checkpointing": True}], ids=str)
def test_on_two_threads_a_gradient_is_the_same_each_time(name, changes, tmp_path, two_threads):
    policy = make(name, tmp_path / "policy")
    prompts = [[2 + i % 28 for i in range(start, start + 60)] for start in (0, 9)]
    rollouts = [replace(rollout, prompt_ids=prompts[number % 2]) for number, rollout in enumerate(some_rollouts(64))]
    for rollout in rollouts:
        rollout.completion_ids = [token % 30 for token in rollout.completion_ids]
    trainer, gradients = Trainer(policy, Accelerator(), replace(OPTIONS, **changes)), []
    for _ in range(3):
        trainer.optimizer.zero_grad()
        trainer.gradient(rollouts)
        gradients.append(torch.cat([weight.grad.flatten() for weight in trained(trainer.model).values()]))
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def outcome_of(policy, rollouts):
    """Of a fresh trainer; `num_tokens` are those that the decoder embedded for the gradient, padding included."""
    trainer = Trainer(policy, Accelerator(), OPTIONS)
    sizes = []
    hook = trainer.model.get_input_embeddings().register_forward_hook(lambda _, ids, __: sizes.append(ids[0].numel()))
    sums = trainer.gradient(rollouts)
    hook.remove()
    log_probs = torch.cat(trainer.log_probs(rollouts))
    return SimpleNamespace(gradient=gradient_of(trainer), sums=sums, log_probs=log_probs, num_tokens=sum(sizes))


def test_prompts_are_not_shared_where_a_decoder_keeps_more_than_keys_and_values_or_recomputes(tiny_policy):
    from transformers import AutoModelForCausalLM, Qwen3NextConfig

    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    assert prefixes.fits(model)
    model.gradient_checkpointing_enable()
    assert not prefixes.fits(model)
    linear = Qwen3NextConfig(num_hidden_layers=4)
    assert "linear_attention" in linear.layer_types
    assert not prefixes.fits(SimpleNamespace(config=linear, is_gradient_checkpointing=False))


def test_old_log_probs_keep_the_ratio_when_a_step_has_several_updates(tiny_policy):
    """One update on two halves' worth of old log-probs equals the loss with ratios taken before the first update."""
    rollouts = some_rollouts(16)
    trainer = Trainer(tiny_policy, Accelerator(), replace(OPTIONS, minibatches=2))
    before = trainer.log_probs(rollouts[8:])
    stats = trainer.update(rollouts, lr=1e-2)
    after = trainer.log_probs(rollouts[8:])
    assert len(stats.grad_norms) == 2
    assert max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True)) > 0.01
    engine = [torch.tensor(rollout.engine_log_probs) for rollout in rollouts[8:]]
    mismatch = sum(float((own - theirs).abs().sum()) for own, theirs in zip(before, engine, strict=True))
    first = Trainer(tiny_policy, Accelerator(), OPTIONS).gradient(rollouts[:8])
    names = UpdateStats.SUMS
    assert stats.mismatch == pytest.approx(mismatch + float(first[names.index("mismatch")]), rel=1e-5)
    assert stats.clipped_low + stats.clipped_high > 0


def test_a_non_finite_update_never_reaches_the_weights(tiny_policy):
    trainer = Trainer(tiny_policy, Accelerator(), OPTIONS)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    rollouts = some_rollouts(4)
    rollouts[2].advantage = float("inf")
    stats = trainer.update(rollouts, lr=1.0)
    assert stats.num_skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert trainer.update(some_rollouts(4), lr=1e-3).num_skipped == 0


def test_a_released_trainer_holds_no_gradients(tiny_policy):
    trainer = Trainer(tiny_policy, Accelerator(), OPTIONS)
    trainer.gradient(some_rollouts(4))
    assert all(parameter.grad is not None for parameter in trainer.model.parameters())
    trainer.release()
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True], ids=["first update", "later update"])
def test_loss_and_gradient_agree_with_trl(tiny_policy, tmp_path, old, head):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    rollouts = some_rollouts(16)
    trainer = Trainer(tiny_policy, Accelerator(), replace(OPTIONS, importance_cap=0.0))
    if old:
        generator = torch.Generator().manual_seed(0)
        for rollout, own in zip(rollouts, trainer.log_probs(rollouts), strict=True):
            rollout.old_log_probs = own + 0.3 * torch.randn(len(own), generator=generator)
    sums = trainer.gradient(rollouts)
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    arguments = GRPOConfig(
        output_dir=str(tmp_path), loss_type="dapo", epsilon=0.2, epsilon_high=0.28, beta=0.0, num_generations=2,
        per_device_train_batch_size=16, temperature=1.0, report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    oracle = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32), lambda **_: [0.0], arguments,
        train_dataset=Dataset.from_list([{"prompt": "1"}] * 16), processing_class=tokenizer,
    )  # fmt: skip
    oracle.model.train()
    oracle.current_gradient_accumulation_steps = 1
    tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
    loss = oracle.compute_loss(oracle.model, trl_inputs(rollouts, tokenizer.pad_token_id, tokens))
    loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in oracle.model.parameters()])
    assert float(sums[0]) / tokens == pytest.approx(loss.item(), rel=1e-5)
    assert close(gradient_of(trainer), expected, 1e-5)


def trl_inputs(rollouts, pad, tokens):
    width = max(len(rollout.prompt_ids) for rollout in rollouts)
    length = max(len(rollout.completion_ids) for rollout in rollouts)

    def left(values, fill):
        return torch.tensor([[fill] * (width - len(value)) + value for value in values])

    def right(values, fill):
        return torch.tensor([value + [fill] * (length - len(value)) for value in values])

    inputs = {
        "prompt_ids": left([rollout.prompt_ids for rollout in rollouts], pad),
        "prompt_mask": left([[1] * len(rollout.prompt_ids) for rollout in rollouts], 0),
        "completion_ids": right([rollout.completion_ids for rollout in rollouts], pad),
        "completion_mask": right([[1] * len(rollout.completion_ids) for rollout in rollouts], 0),
        "advantages": torch.tensor([rollout.advantage for rollout in rollouts]),
        "num_items_in_batch": torch.tensor(tokens),
    }
    if rollouts[0].old_log_probs is not None:
        inputs["old_per_token_logps"] = right([rollout.old_log_probs.tolist() for rollout in rollouts], 0.0)
    return inputs


def test_a_pad_token_outside_the_vocabulary_does_not_matter(tiny_policy, tmp_path):
    from transformers import AutoTokenizer

    policy = shutil.copytree(tiny_policy, tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(policy)
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<outside>"})
    assert tokenizer.pad_token_id == size
    tokenizer.save_pretrained(policy)
    rollouts = some_rollouts(12)
    assert torch.equal(gradient_and_sums(policy, rollouts)[0], gradient_and_sums(tiny_policy, rollouts)[0])


def test_a_policy_with_dropout_is_trained_without(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    for model in (
        GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)),
        Qwen2ForCausalLM(Qwen2Config(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=2, attention_dropout=0.5)),
    ):  # fmt: skip
        without_dropout(model)
        ids = torch.arange(20)[None]
        assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


@pytest.fixture(scope="module")
def both_ranks(tiny_policy, tmp_path_factory):
    """What two ranks made of one batch, by (ddp or fsdp2, dtype); beside the file, the states that they saved."""
    out = tmp_path_factory.mktemp("ranks") / "found.pt"
    checkpoints.save(
        checkpoints.load_model(tiny_policy, torch.bfloat16),
        checkpoints.load_tokenizer(tiny_policy),
        out.parent / "coarse",
    )
    done = launched("numbers", tiny_policy, out)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out), out.parent


def launched(*arguments, num=2, **environment):
    """What came of `num` ranks of `tests.ranks ARGUMENTS`."""
    command = [*ranks.LAUNCH[:-2], "--num_processes", str(num), *ranks.LAUNCH[-2:], *arguments]
    return subprocess.run(
        command, cwd=ranks.ROOT, env=os.environ | ranks.ENVIRONMENT | environment, capture_output=True, text=True,
        check=False, timeout=2 * ranks.LIMIT_S,
    )  # fmt: skip


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def trainer_in(dtype, policy):
    AcceleratorState._reset_state(reset_partial_state=True)
    return Trainer(policy, start_accelerator(rl.Settings(dtype=dtype)), OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2-fused"])
def test_the_gradient_does_not_depend_on_the_number_of_ranks(tiny_policy, both_ranks, kind):
    case = both_ranks[0][kind, "float32"]
    trainer = Trainer(tiny_policy, Accelerator(), OPTIONS)
    sums = trainer.gradient(some_rollouts(31))
    assert close(flat(case["gradient"]), gradient_of(trainer), 1e-5)
    assert torch.allclose(case["sums"], sums, rtol=1e-5)
    assert close(flat(case["with_entropy"]), with_entropy_term(tiny_policy)[0], 1e-5)
    trainer.optimizer.zero_grad()
    assert case["norms"] == pytest.approx(trainer.update(some_rollouts(31, seed=1), 1e-3).grad_norms, rel=1e-5)
    assert set(case["weights"]) == set(dict(trainer.weights()))


@pytest.mark.slow
def test_nor_on_groups_of_ranks_of_which_each_shards_the_policy(tiny_policy, tmp_path):
    """Two by two, as accelerate's parallelism_config asks for; the state is taken back by one process."""
    done = launched("hybrid", tiny_policy, tmp_path / "found.pt", num=4, **ranks.HYBRID)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")
    trainer = trainer_in("float32", tiny_policy)
    sums = trainer.gradient(some_rollouts(31))
    assert close(flat(found["gradient"]), gradient_of(trainer), 1e-5)
    assert torch.allclose(found["sums"], sums, rtol=1e-5)
    for again in found["again"].values():
        assert all(torch.equal(weight, again[name]) for name, weight in found["weights"].items())
    trainer.optimizer.zero_grad()
    trainer.load_state(tmp_path / "found/second")
    trainer.update(some_rollouts(31, seed=2), 1e-3)
    assert all((weight - found["weights"][name]).abs().max() < 1e-5 for name, weight in trainer.weights())


@pytest.mark.slow
def test_a_rank_without_memory_for_a_sharded_update_ends_all_with_a_line(toy, tmp_path):
    """The other one waits for it within its pass, where nothing reaches it but the launcher."""
    run = ["rl", "--policy", toy / "policy", "--problems", toy / "train.jsonl", "--out", tmp_path / "rl"]
    how = ["--template", "none", "--steps", "2", "--problems-per-step", "4", "--group-size", "4", "--max-tokens", "32"]
    done = launched("starved", *run, *how, "--overlong-buffer", "0")
    assert done.returncode != 0
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("rloop: out of memory"))
    assert "while updating in step 1 (OutOfMemoryError: CUDA out of memory): lower --tokens-per-microbatch" in line


def test_in_bfloat16_on_a_cpu_short_sequences_and_no_others_have_their_attention_by_plain_products(
    tiny_policy, monkeypatch
):
    exact = gradient_and_sums(tiny_policy, some_rollouts(31))[0]
    errors = {}
    for longest in (512, 0):
        monkeypatch.setattr(acceleration, "SHORT_TOKENS", longest)
        trainer = trainer_in("bfloat16", tiny_policy)
        trainer.gradient(some_rollouts(31))
        errors[trainer.model.config._attn_implementation] = (gradient_of(trainer) - exact).norm()
    assert 0 < errors["eager"] < 1.2 * errors["sdpa"]
    assert trainer_in("float32", tiny_policy).model.config._attn_implementation == "sdpa"


def test_a_policy_whose_attention_transformers_does_not_exchange_keeps_it():
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    falcon, llama = (
        AutoModelForCausalLM.from_config(kind(**sizes, **own))
        for kind, own in ((FalconConfig, {}), (LlamaConfig, {"intermediate_size": 16}))
    )
    for model in (falcon, llama):
        acceleration.choose_attention(model, "auto", is_bfloat16=True)
        model(input_ids=torch.tensor([[3, 4, 5]]))
    assert falcon.config._attn_implementation == "sdpa" and "forward" not in vars(falcon)
    assert llama.config._attn_implementation == "eager"


@pytest.mark.slow
def test_in_bfloat16_only_the_products_are_rounded(tiny_policy, both_ranks):
    """Log-probabilities and sums over ranks are float32, and so differ from bfloat16's few values.

    Bounds as measured: one rank and DDP (autocast) are 4.2 % from the exact gradient, and 1 % from each other, since on
    two ranks other completions of a prompt are summed before they are rounded; FSDP2, which keeps the residual stream
    in bfloat16 too, as vLLM does, is some 5 % from both.
    """
    exact = gradient_and_sums(tiny_policy, some_rollouts(31))[0]
    trainer = trainer_in("bfloat16", tiny_policy)
    own = torch.cat(trainer.log_probs(some_rollouts(31)))
    trainer.gradient(some_rollouts(31))
    alone = gradient_of(trainer)
    assert not close(alone, exact, 1e-2), "this was not bfloat16"
    for kind, bound in (("ddp", 0.02), ("fsdp2", 0.08)):
        case = both_ranks[0][kind, "bfloat16"]
        log_probs, gradient = torch.cat(case["log_probs"]), flat(case["gradient"])
        assert log_probs.dtype == gradient.dtype == torch.float32
        for values in (log_probs, gradient[gradient != 0]):
            assert (values != values.bfloat16()).float().mean() > 0.4
        assert (log_probs - own).abs().mean() < 0.05
        assert close(gradient, alone, bound)
        assert close(gradient, exact, 0.08)
        assert {weight.dtype for weight in case["weights"].values()} == {torch.bfloat16}


@pytest.mark.slow
def test_a_saved_state_is_taken_back_bit_for_bit_and_by_another_number_of_ranks_too(tiny_policy, both_ranks):
    cases, directory = both_ranks
    for (kind, dtype), case in cases.items():
        files = sorted(path.name for path in (directory / f"{kind}-{dtype}" / "second").glob("*.distcp"))
        assert files == ["__0_0.distcp", "__1_0.distcp"], "not every rank wrote its part"
        for again in case["again"].values():
            assert all(torch.equal(weight, again[name]) for name, weight in case["weights"].items())
        if dtype == "float32":
            alone = trainer_in(dtype, tiny_policy)
            alone.load_state(directory / f"{kind}-{dtype}" / "second")
            alone.update(some_rollouts(31, seed=2), 1e-3)
            for name, weight in alone.weights():
                assert (weight - case["weights"][name]).abs().max() < 1e-5


@pytest.mark.slow
def test_adapters_are_trained_over_sharded_frozen_weights_and_their_state_taken_back_bit_for_bit(both_ranks):
    """FSDP2 in bfloat16: frozen matrices in it, adapters and their gradients in float32."""
    coarse, case = both_ranks[1] / "coarse", torch.load(both_ranks[1] / "lora.pt")
    exact = Trainer(coarse, Accelerator(), replace(OPTIONS, lora_rank=8))
    exact.gradient(some_rollouts(31))
    gradients = case["gradient"]
    assert {name: gradient.dtype for name, gradient in gradients.items()} == dict.fromkeys(
        trained(exact.model), torch.float32
    )
    assert close(flat(gradients), torch.cat([weight.grad.flatten() for weight in trained(exact.model).values()]), 0.08)
    assert case["norms"][0] > 0
    for again in case["again"].values():
        assert all(torch.equal(weight, again[name]) for name, weight in case["weights"].items())
    start = dict(checkpoints.disk_weights(coarse))
    moved = {name for name, weight in case["weights"].items() if not torch.equal(weight, start[name])}
    assert moved == {name for name in start if name.endswith("proj.weight")}


@pytest.mark.slow
def test_a_tied_policy_is_saved_and_taken_back(tied_policy, tmp_path):
    trainer = trainer_in("float32", tied_policy)
    trainer.update(some_rollouts(8), 1e-3)
    trainer.save_state(tmp_path / "state")
    saved = {name: weight.clone() for name, weight in trainer.weights()}
    trainer.update(some_rollouts(8, seed=1), 1e-3)
    after = {name: weight.clone() for name, weight in trainer.weights()}
    trainer.load_state(tmp_path / "state")
    assert all(torch.equal(weight, saved[name]) for name, weight in trainer.weights())
    trainer.update(some_rollouts(8, seed=1), 1e-3)
    assert all(torch.equal(weight, after[name]) for name, weight in trainer.weights())


def test_a_mixture_of_experts_outside_fsdp2_is_warned_of_in_bfloat16(tmp_path, capsys):
    trainer_in("bfloat16", make("Mixtral", tmp_path / "policy"))
    assert "outside FSDP2 a mixture of experts computes its experts in float32" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_gpu_without_bfloat16_is_refused_in_a_line(dtype, monkeypatch):
    answers = {"is_available": True, "is_bf16_supported": False, "get_device_name": "Tesla V100"}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer, **_: answer)
    with pytest.raises(InputError, match=f"--dtype {dtype}: Tesla V100 has no bfloat16: add --dtype float32"):
        acceleration.uses_bfloat16(dtype)
    assert not acceleration.uses_bfloat16("float32")
