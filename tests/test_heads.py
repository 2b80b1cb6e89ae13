"""The head that a CPU wants gives what TRL's fused one gives, whatever a policy does to its logits."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from stages.core.policy import heads
from stages.core.policy.checkpoints import IGNORED

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16,
         "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": None}  # fmt: skip
MODELS = {
    "tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=True)),
    "untied": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=False)),
    "capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=0.5)),
}


def some_model(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # away from the uniform
    return model


def batch():
    ids = torch.randint(61, (4, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    for row, length in enumerate((3, 7, 1, 12)):  # the last row has no label
        labels[row, :length] = IGNORED
    labels[1, -2:] = IGNORED
    return {"input_ids": ids, "labels": labels}


def scored(model, of=("log_probs",)):
    output = model(**batch(), fused_lm_head=True)
    weights = torch.linspace(-1, 1, output.log_probs.numel()).reshape(output.log_probs.shape)
    sum((output[name] * weights * turn).sum() for turn, name in enumerate(of, 1)).backward()
    return output, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", MODELS)
def test_both_heads_give_the_same(name, temperature, monkeypatch):
    plain, fused = some_model(name), some_model(name)
    monkeypatch.setattr(heads, "CHUNK", 5 * 61)  # several chunks, the last one not full
    heads.add_plain_head(plain, temperature)
    add_fused_lm_head(fused, temperature, outputs=("log_probs", "entropy", "is_top1"))
    (ours, gradient), (theirs, expected) = scored(plain), scored(fused)
    assert torch.equal(ours.label_mask, theirs.label_mask)
    assert torch.equal(ours.is_top1, theirs.is_top1)
    assert torch.allclose(ours.log_probs, theirs.log_probs, atol=1e-5)
    assert torch.allclose(ours.entropy, theirs.entropy, atol=1e-5)
    assert expected.norm() > 0.1
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("of", [("entropy",), ("log_probs", "entropy")], ids="-".join)
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_of_the_entropy_is_that_of_autograd_and_of_the_fused_head(name, of, monkeypatch):
    plain, fused, written_out = (some_model(name) for _ in range(3))
    monkeypatch.setattr(heads, "CHUNK", 5 * 61)
    heads.add_plain_head(plain, 0.8)
    add_fused_lm_head(fused, 0.8, outputs=("log_probs", "entropy"))
    ours, gradient = scored(plain, of)
    labels = batch()["labels"][:, 1:]
    log_probs = (written_out(batch()["input_ids"]).logits[:, :-1] / 0.8).log_softmax(-1)
    values = {"entropy": -(log_probs.exp() * log_probs).sum(-1),
              "log_probs": log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]}  # fmt: skip
    assert torch.allclose(ours.entropy, values["entropy"] * ours.label_mask, atol=1e-5)
    weights = torch.linspace(-1, 1, labels.numel()).reshape(labels.shape) * ours.label_mask
    sum((values[part] * weights * turn).sum() for turn, part in enumerate(of, 1)).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in written_out.parameters()])
    assert expected.norm() > 0.1
    for computed in (gradient, scored(fused, of)[1]):
        assert (computed - expected).norm() < 1e-5 * expected.norm()


def test_in_bfloat16_log_probs_are_float32_and_no_further_from_the_exact_ones_than_those_of_the_fused_head():
    exact, plain, fused = (some_model("untied") for _ in range(3))
    heads.add_plain_head(exact)
    heads.add_plain_head(plain)
    add_fused_lm_head(fused, outputs=("log_probs", "entropy"))
    true, expected = scored(exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (ours, gradient), (theirs, other) = scored(plain), scored(fused)
    assert ours.log_probs.dtype == torch.float32
    assert (ours.log_probs != ours.log_probs.bfloat16())[ours.label_mask].float().mean() > 0.4
    assert 0 < (ours.log_probs - true.log_probs).norm() < 1.2 * (theirs.log_probs - true.log_probs).norm()
    assert 0 < (gradient - expected).norm() < 1.2 * (other - expected).norm()


def test_a_batch_without_labels_has_a_gradient_of_zero():
    model = some_model("tied")
    heads.add_plain_head(model)
    ids = batch()["input_ids"]
    output = model(input_ids=ids, labels=torch.full_like(ids, IGNORED), fused_lm_head=True)
    output.log_probs.sum().backward()
    assert not output.label_mask.any()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_logits_are_what_they_were_without_the_head_and_after_it():
    model = some_model("capped")
    before = model(batch()["input_ids"]).logits
    heads.add_plain_head(model, 0.5)
    model(**batch(), fused_lm_head=True)
    assert torch.equal(model(batch()["input_ids"]).logits, before)


def test_a_large_vocabulary_makes_micro_batches_small_enough_for_memory():
    assert heads.token_budget(16384, 96) == 16384
    assert heads.token_budget(16384, 2**17) == 2**11
    assert heads.token_budget(1, 2**30) == 1
