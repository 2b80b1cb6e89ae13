"""Stages on architectures whose weights vLLM takes in its own ways; `python -m tests.architectures` tries them all."""

from pathlib import Path

import pytest

from stages.core.engine import VllmEngine
from tests.architectures import ARCHITECTURES, Trial, outcome

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


def test_the_table_of_the_documentation_names_what_is_tried():
    table = (Path(__file__).parents[1] / "docs/architectures.md").read_text()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")]
    assert rows[1:] == list(ARCHITECTURES)
