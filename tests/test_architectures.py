"""Stages on architectures whose weights vLLM takes in its own ways; `python -m tests.architectures` tries them all."""

from pathlib import Path

import pytest
import torch

from stages.core.drawing.engine import VllmEngine
from stages.core.policy import checkpoints
from stages.rl.trainer import without_dropout
from tests.architectures import ARCHITECTURES, Trial, make, outcome

AWKWARD = {
    "Llama, tied": "a head that is the embedding",
    "Qwen3-MoE": "experts that transformers fuses and vLLM packs",
    "Gemma 2": "no head in vLLM, and attention with a cap",
    "GPT-2": "other names, transposed weights",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", AWKWARD)
def test_every_stage_agrees_with_transformers(name, tmp_path):
    trial = Trial(name, tmp_path)
    assert [outcome(stage) for stage in (trial.rft, trial.sample, trial.eval, trial.rl)] == ["agrees"] * 4


@pytest.mark.slow
def test_where_weights_cannot_be_swapped_sample_starts_the_engine_anew_and_rl_says_why(tmp_path, monkeypatch, capsys):
    trial = Trial("Qwen2", tmp_path)
    trial.policies = trial.starts
    monkeypatch.setattr(VllmEngine, "swap_fault", lambda engine, weights: "they get lost on the way")
    assert trial.sample() == "agrees"
    assert capsys.readouterr().err.count("started anew for each policy") == 1
    refusal = outcome(trial.rl)
    assert refusal.endswith("vLLM cannot take new weights of its kind: they get lost on the way")
    assert not list(tmp_path.glob("rl/rollouts/*"))


@pytest.mark.parametrize("name", ["GPT-2", "Mistral"])
def test_without_dropout_a_policy_computes_in_training_what_it_samples_by(name, tmp_path):
    config = make(name, tmp_path) / "config.json"
    config.write_text(config.read_text().replace('"attention_dropout": 0.0', '"attention_dropout": 0.3'))
    model, tokens = checkpoints.load_model(tmp_path, torch.float32), torch.tensor([[5, 6, 7, 8]])
    sampled_by = model.eval()(tokens).logits
    assert not torch.allclose(model.train()(tokens).logits, sampled_by, atol=1e-3)
    without_dropout(model)
    assert torch.allclose(model.train()(tokens).logits, sampled_by, atol=1e-5)


def test_the_table_of_the_documentation_names_what_is_tried():
    table = (Path(__file__).parents[1] / "docs/architectures.md").read_text()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")]
    assert rows[1:] == list(ARCHITECTURES)
