"""LoRA: what is trained, what the engine and checkpoints get, and what is refused."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from stages import rl
from stages.core.errors import InputError
from stages.core.policy import adapters, checkpoints
from stages.rl.trainer import Trainer, start_accelerator
from tests.test_trainer import OPTIONS, close, some_rollouts

LORA = replace(OPTIONS, lora_rank=8)


def begin(policy, **changes):
    return Trainer(policy, Accelerator(), replace(LORA, **changes))


def copied(weights):
    return {name: weight.clone() for name, weight in weights}


def same(weights, others):
    return weights.keys() == others.keys() and all(
        torch.equal(weight, others[name]) for name, weight in weights.items()
    )


def frozen(trainer):
    return {name: weight for name, weight in trainer.model.named_parameters() if not weight.requires_grad}


def gradients(trainer):
    return {name: weight.grad for name, weight in adapters.trained(trainer.model).items()}


@pytest.fixture(scope="session")
def coarse_policy(tiny_policy, tmp_path_factory):
    """`tiny_policy` with its weights rounded to bfloat16, in a checkpoint of that type."""
    path = shutil.copytree(tiny_policy, tmp_path_factory.mktemp("coarse") / "policy")
    model = checkpoints.load_model(tiny_policy, torch.bfloat16)
    checkpoints.save(model, checkpoints.load_tokenizer(tiny_policy), path)
    return path


@pytest.mark.parametrize("policy", ["tiny_policy", "tied_policy"])
def test_before_the_first_update_the_weights_are_the_start_policy_s_bit_for_bit(policy, request):
    path = request.getfixturevalue(policy)
    assert same(dict(begin(path).weights()), dict(checkpoints.disk_weights(path)))


def test_only_the_adapters_are_trained_and_the_start_policy_stays_as_it_is(tiny_policy):
    trainer = begin(tiny_policy, weight_decay=0.1)
    before = copied(frozen(trainer).items())
    trainer.gradient(some_rollouts(8))
    assert all(weight.grad is None for weight in frozen(trainer).values())
    assert len(gradients(trainer)) == 2 * 7 * 2  # A and B of seven layers in each of two blocks
    trainer.update(some_rollouts(8, seed=1), 1e-2)
    trainer.update(some_rollouts(8, seed=2), 1e-2)
    assert same(before, frozen(trainer))
    held = {parameter for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert held == set(adapters.trained(trainer.model).values())


@pytest.mark.parametrize("policy", ["tiny_policy", "tied_policy"])
def test_a_checkpoint_is_the_policy_with_its_adapters_and_names_none(policy, request, tmp_path):
    trainer = begin(request.getfixturevalue(policy))
    for seed in range(2):
        trainer.update(some_rollouts(8, seed), 1e-2)
    trainer.save_checkpoint(tmp_path / "policy")
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        own, saved, start = (
            model.eval()(ids).logits
            for model in (
                trainer.model,
                checkpoints.load_model(tmp_path / "policy", torch.float32),
                checkpoints.load_model(request.getfixturevalue(policy), torch.float32),
            )
        )
    assert (own - saved).abs().max() < 1e-4
    assert (own - start).abs().max() > 0.1
    checkpoints.check_shapes(tmp_path / "policy")
    assert sorted(path.name for path in (tmp_path / "policy").iterdir()) == sorted(
        path.name for path in request.getfixturevalue(policy).iterdir()
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradients_of_an_adapter_are_the_full_matrix_s_times_its_other_half(tiny_policy, tmp_path, checkpointing):
    """With W = W0 + s B A, dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW."""
    trainer = begin(tiny_policy, gradient_checkpointing=checkpointing, lora_alpha=4.0)
    trainer.update(some_rollouts(8), 1e-2)  # B is zero before
    trainer.save_checkpoint(tmp_path / "policy")
    whole = Trainer(tmp_path / "policy", Accelerator(), OPTIONS)
    sums, whole_sums = (each.gradient(some_rollouts(16, seed=1)) for each in (trainer, whole))
    assert torch.allclose(sums, whole_sums, rtol=1e-4)
    halves = adapters.trained(trainer.model)
    for name, weight in whole.model.named_parameters():
        if not name.endswith("proj.weight"):
            continue
        a, b = (halves[name.replace("weight", f"lora_{half}.default.weight")] for half in "AB")
        assert close(b.grad, 0.5 * weight.grad @ a.T, 1e-3)
        assert close(a.grad, 0.5 * b.T @ weight.grad, 1e-3)


def loss_after(policy, rank, steps=30):
    """The loss on one fixed batch once the matrices of the layers, or adapters on them, were trained on it."""
    model = checkpoints.load_model(policy, torch.float32)
    adapters.attach(model, rl.Settings(lora_rank=rank, lora_alpha=float(rank or 1)), seed=0, is_bfloat16=False)
    matrices = [weight for name, weight in adapters.trained(model).items() if "proj." in name and "weight" in name]
    optimizer = torch.optim.AdamW(matrices, lr=3e-3, weight_decay=0.0)
    ids = torch.randint(2, 60, (8, 24), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.slow
def test_adapters_as_large_as_the_layers_learn_as_much_as_the_matrices_themselves(tiny_policy):
    whole = loss_after(tiny_policy, rank=0)
    assert whole < 0.2  # from 5.5
    assert loss_after(tiny_policy, rank=64) < 1.2 * whole
    assert loss_after(tiny_policy, rank=2) > 10 * whole


def test_a_state_holds_the_adapters_alone_and_is_taken_back_bit_for_bit(tied_policy, tmp_path):
    trainer = begin(tied_policy, lora_rank=2)
    trainer.update(some_rollouts(8), 1e-2)
    trainer.save_state(tmp_path / "state")
    held = sum(weight.numel() for weight in adapters.trained(trainer.model).values())
    state = trainer._state()
    assert sum(weight.numel() for weight in state["model"].values()) == held
    assert sum(moment.numel() for moments in state["optimizer"]["state"].values() for moment in moments.values()) == (
        2 * held + len(state["model"])  # two moments, and each tensor's count of steps
    )
    trainer.update(some_rollouts(8, seed=1), 1e-2)
    other = begin(tied_policy, lora_rank=2, seed=5)
    other.load_state(tmp_path / "state")
    other.update(some_rollouts(8, seed=1), 1e-2)
    assert same(dict(other.weights()), dict(trainer.weights()))


def test_the_first_values_come_from_the_seed_and_leave_torch_s_generator_alone(tiny_policy):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, again, other = (adapters.trained(begin(tiny_policy, seed=seed).model) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert same(first, again)
    assert not same(first, other)


@pytest.fixture
def in_bfloat16():
    """An accelerator that computes in bfloat16; those that are made later do not."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield start_accelerator(rl.Settings(dtype="bfloat16"))
    AcceleratorState._reset_state(reset_partial_state=True)


def test_in_bfloat16_what_it_holds_without_loss_is_held_in_it_and_computes_the_same(
    coarse_policy, tiny_policy, in_bfloat16
):
    trainer = Trainer(coarse_policy, in_bfloat16, LORA)
    held = {name.split(".")[-3 if "base_layer" in name else -2]: w.dtype for name, w in frozen(trainer).items()}
    assert held["down_proj"] == held["q_proj"] == held["lm_head"] == torch.bfloat16
    assert held["embed_tokens"] == held["norm"] == torch.float32
    assert {weight.dtype for weight in adapters.trained(trainer.model).values()} == {torch.float32}
    whole = Trainer(coarse_policy, in_bfloat16, OPTIONS)
    rollouts = some_rollouts(8)
    assert all(map(torch.equal, trainer.log_probs(rollouts), whole.log_probs(rollouts)))
    assert same(dict(trainer.weights()), dict(whole.weights()))
    assert {w.dtype for w in frozen(Trainer(tiny_policy, in_bfloat16, LORA)).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"lora_rank": -1}, "--lora-rank -1: must be at least 0"),
        ({"lora_rank": 4, "lora_alpha": 0.0}, "--lora-alpha 0.0: must be above 0"),
        ({"lora_rank": 65}, r"--lora-rank 65: model\.layers\.0\.self_attn\.q_proj is 64 x 64: take at most 64"),
        ({"lora_rank": 4, "lora_targets": "q_proj,k_prj"}, "--lora-targets k_prj: no layer has this name"),
        ({"lora_rank": 4, "lora_targets": "lm_head"}, "some of down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj"),
        ({"lora_rank": 4, "lora_targets": "embed_tokens"}, "--lora-targets embed_tokens: no layer has this name"),
        ({"lora_rank": 4, "lora_targets": ""}, "--lora-targets : no layer has this name"),
    ],
)
def test_adapters_that_do_not_fit_the_policy_are_refused_by_the_flag(tiny_policy, options, fault):
    with pytest.raises(InputError, match=fault):
        adapters.check(tiny_policy, rl.Settings(**options))


def test_targets_are_named_by_the_ends_of_their_names(tiny_policy):
    def targets(names):
        return {name.partition(".lora")[0] for name in adapters.trained(begin(tiny_policy, lora_targets=names).model)}

    assert targets("1.mlp.up_proj,v_proj") == {
        *("model.layers.1.mlp.up_proj", "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj")
    }
    assert len(targets("all-linear")) == 14


@pytest.mark.slow
def test_an_adapter_is_refused_with_the_command_that_merges_it(tiny_policy, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = checkpoints.load_model(tiny_policy, torch.float32)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(tiny_policy)
    adapted.save_pretrained(tmp_path / "adapter")
    shutil.copy(tiny_policy / "config.json", tmp_path / "adapter")
    with pytest.raises(InputError, match=f"adapter: a LoRA adapter of {tiny_policy}, which has to be merged") as caught:
        checkpoints.resolve(str(tmp_path / "adapter"))
    (tmp_path / "adapter/config.json").unlink()
    command = re.search('python -c ".*?"', str(caught.value)).group()
    subprocess.run(["bash", "-c", command.replace("python", sys.executable, 1)], cwd=tmp_path, check=True)
    written = dict(checkpoints.disk_weights(tmp_path / "merged"))
    expected = adapted.merge_and_unload().state_dict()
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in written)
