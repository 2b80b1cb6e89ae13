"""The weighted average of policies, against a plain computation on whole tensors."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages import merge
from stages.core.errors import InputError
from stages.core.policy import checkpoints


@pytest.fixture
def moved(tiny_policy, tmp_path):
    """`tiny_policy` with every weight moved by noise, as training leaves it."""
    path = shutil.copytree(tiny_policy, tmp_path / "moved")
    weights = load_file(path / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    new = {name: tensor + torch.randn(tensor.shape, generator=noise) for name, tensor in weights.items()}
    save_file(new, path / "model.safetensors", metadata={"format": "pt"})
    return path


def tensors(path):
    return dict(checkpoints.disk_weights(path))


def plainly(paths, weights):
    """The same by whole tensors in one expression."""
    first, *rest = (tensors(path) for path in paths)
    total = {name: weights[0] * tensor.float() for name, tensor in first.items()}
    for weight, other in zip(weights[1:], rest, strict=True):
        total = {name: tensor + weight * other[name].float() for name, tensor in total.items()}
    return {name: tensor.to(first[name].dtype) for name, tensor in total.items()}


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.75, 0.25], [-0.5, 1.5]])
def test_a_merged_policy_is_bit_for_bit_the_average(tiny_policy, moved, tmp_path, monkeypatch, weights):
    monkeypatch.setattr(merge, "AT_ONCE", 1000)  # a few rows at a time
    monkeypatch.setattr(merge, "SHARD", "100KB")  # and several files
    merge.run(merge.Options(policy=[str(tiny_policy), str(moved)], weight=weights, out=tmp_path / "merged"))
    merged, expected = tensors(tmp_path / "merged"), plainly([tiny_policy, moved], weights)
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert len(checkpoints.weight_files(tmp_path / "merged")) > 1


def test_a_merged_policy_loads_as_the_first_does_and_says_how_much_of_each_policy_it_is(tiny_policy, moved, tmp_path):
    out, names = tmp_path / "merged", [str(moved), str(tiny_policy), str(moved)]
    merge.run(merge.Options(policy=names, weight=[0.5, 0.25, 0.25], out=out))
    checkpoints.check_shapes(checkpoints.resolve(str(out)))
    model = checkpoints.load_model(out, torch.float32)
    expected = plainly([moved, tiny_policy], [0.75, 0.25])
    assert torch.equal(model.get_input_embeddings().weight, expected["model.embed_tokens.weight"])
    assert checkpoints.encode(checkpoints.load_tokenizer(out), ["1+2="]) == checkpoints.encode(
        checkpoints.load_tokenizer(tiny_policy), ["1+2="]
    )
    record = json.loads((out / "manifest.json").read_text())
    assert record["stage"] == "merge"
    assert record["parameters"]["weight"] == [0.75, 0.25]
    assert list(record["inputs"]) == [str(moved), str(tiny_policy)]


def test_a_directory_of_checkpoints_stands_for_its_last_one(tiny_policy, moved, tmp_path):
    for name, source in (("step_000001", tiny_policy), ("step_000002", moved)):
        shutil.copytree(source, tmp_path / "checkpoints" / name)
    merge.run(
        merge.Options(policy=[str(tiny_policy), str(tmp_path / "checkpoints")], weight=[0, 1], out=tmp_path / "merged")
    )
    merged, last = tensors(tmp_path / "merged"), tensors(moved)
    assert all(torch.equal(merged[name], last[name]) for name in last)


def test_the_type_is_that_of_the_first_policy(tiny_policy, moved, tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in load_file(moved / "model.safetensors").items()}
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    merge.run(merge.Options(policy=[str(moved), str(tiny_policy)], weight=[0.5, 0.5], out=tmp_path / "merged"))
    merged, expected = tensors(tmp_path / "merged"), plainly([moved, tiny_policy], [0.5, 0.5])
    assert all(tensor.dtype == torch.bfloat16 for tensor in merged.values())
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def without_a_layer(path):
    config = json.loads((path / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    config.pop("layer_types", None)
    (path / "config.json").write_text(json.dumps(config))
    last = f"model.layers.{config['num_hidden_layers']}."
    weights = load_file(path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(last)}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})


def test_policies_of_other_shapes_are_refused(tiny_policy, moved, tmp_path):
    without_a_layer(moved)
    with pytest.raises(InputError, match="cannot be averaged: layer_types is"):
        merge.run(merge.Options(policy=[str(tiny_policy), str(moved)], weight=[0.5, 0.5], out=tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (1, [1.0], "at least two policies"),
        (2, [1.0], "2 policies need as many weights, found 1"),
        (2, [0.5, 0.6], "sum to 1, these sum to 1.1"),
        (2, [0.5, float("nan")], "must be a finite number"),
        (2, [-1e30, 1e30], "sum to 1"),
    ],
)
def test_weights_that_make_no_average_are_refused(tiny_policy, tmp_path, names, weights, message):
    with pytest.raises(InputError, match=message):
        merge.run(merge.Options(policy=[str(tiny_policy)] * names, weight=weights, out=tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()
