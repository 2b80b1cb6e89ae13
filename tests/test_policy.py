"""Policies as files: what is refused in one line when they are broken, and what does not matter."""

import json
import os
import random
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stages.core.errors import InputError
from stages.core.policy import checkpoints

FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors.index.json")
WILD = (
    *(None, True, 0, -1, 1, 7, 10**9, 10**30, -(10**30), 0.5, 1e308, "", "x", "<eos>", "é\ud800", "../x", "x" * 300),
    *([], {}, [[]], [None], [1, "a"], {"a": None}, {"content": 5}, {"rope_type": "x"}, "Qwen2ForCausalLM", "gpt2"),
)


@pytest.fixture
def copied(tiny_policy, tmp_path):
    """A copy of `tiny_policy` to break, its weights named by an index."""
    policy = shutil.copytree(tiny_policy, tmp_path / "copied")
    (policy / "model.safetensors").rename(policy / "model-1.safetensors")
    names = load_file(policy / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (policy / "model.safetensors.index.json").write_text(json.dumps(index))
    return policy


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def check(policy):
    """All that every stage asks of a policy before it loads the weights."""
    path = checkpoints.resolve(str(policy))
    checkpoints.load_tokenizer(path)
    checkpoints.context_length(path)
    checkpoints.end_token_ids(path)
    checkpoints.check_shapes(path)


def positions(value, path=()):
    """Every position in a JSON value, as the keys that lead there."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from positions(inner, (*path, key))
    for key, inner in enumerate(value) if isinstance(value, list) else ():
        yield from positions(inner, (*path, key))


def mutated(text, rng):
    """The JSON `text` with something else in one place, or something cut."""
    kind = rng.randrange(10)
    if kind == 0:
        return text[: rng.randrange(len(text))]
    if kind == 1:
        at = rng.randrange(len(text))
        return text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
    value = json.loads(text)
    *outer, last = rng.choice([path for path in positions(value) if path])
    inner = value
    for key in outer:
        inner = inner[key]
    if kind == 2:
        del inner[last]
    else:
        inner[last] = rng.choice(WILD)
    return json.dumps(value).encode()


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_of_a_policy_whose_files_were_changed_at_random_nothing_but_one_line_comes_out(copied, name):
    rng = random.Random(name)
    before = (copied / name).read_bytes()
    refused = 0
    for _ in range(60):
        (copied / name).write_bytes(mutated(before, rng))
        try:
            check(copied)
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 0 < refused < 60


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_not_finite_is_refused_with_its_file_and_name(copied, bad, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in load_file(copied / "model-1.safetensors").items()}
    save_file(weights, copied / "model-1.safetensors")
    check(copied)
    weights["model.layers.1.mlp.up_proj.weight"][5, 3] = bad
    save_file(weights, copied / "model-1.safetensors")
    with pytest.raises(
        InputError, match=r"model-1.safetensors: weight model.layers.1.mlp.up_proj.weight is not finite"
    ):
        check(copied)


def test_the_largest_finite_weights_are_finite(copied):
    weights = {name: tensor.bfloat16() for name, tensor in load_file(copied / "model-1.safetensors").items()}
    weights["model.norm.weight"].fill_(torch.finfo(torch.bfloat16).max)
    save_file(weights, copied / "model-1.safetensors")
    check(copied)


@pytest.mark.parametrize(
    ("inner", "fault"),
    [
        ({"hidden_size": 8, "dtype": "float32"}, None),
        ({"hidden_size": 9, "dtype": "float32"}, "text_config.hidden_size is 8 in the one and 9 in the other"),
    ],
)
def test_a_configuration_within_another_is_compared_key_by_key(inner, fault, monkeypatch):
    configs = {"one": {"text_config": {"dtype": "bfloat16", "hidden_size": 8}}, "other": {"text_config": inner}}
    monkeypatch.setattr(checkpoints, "load_config", lambda path: SimpleNamespace(to_dict=lambda: configs[path.name]))
    monkeypatch.setattr(checkpoints, "end_token_ids", lambda path: [2])
    assert checkpoints.difference(Path("one"), Path("other")) == fault


def test_a_pad_token_beyond_the_vocabulary_does_not_matter(copied, tmp_path):
    size = json.loads((copied / "config.json").read_text())["vocab_size"]
    edit(copied / "config.json", pad_token_id=size)
    edit(copied / "tokenizer_config.json", pad_token="<outside>")
    check(copied)
    tokenizer = checkpoints.load_tokenizer(copied)
    assert tokenizer.pad_token_id >= size
    model = checkpoints.load_model(copied, torch.float32)
    assert model(torch.tensor([[1, 2]])).logits.isfinite().all()
    checkpoints.save(model, tokenizer, tmp_path / "saved")
    check(tmp_path / "saved")
    assert checkpoints.load_tokenizer(tmp_path / "saved").pad_token == "<outside>"


def test_weights_beyond_what_the_system_lets_a_file_grow_to_are_one_line(copied, tmp_path):
    model, tokenizer = checkpoints.load_model(copied, torch.float32), checkpoints.load_tokenizer(copied)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(InputError, match="saved: the weights cannot be written"):
            checkpoints.save(model, tokenizer, tmp_path / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_policy_without_a_pad_token_gets_none(copied):
    edit(copied / "tokenizer_config.json", pad_token=None)
    assert checkpoints.load_tokenizer(copied).pad_token is None


@pytest.mark.parametrize(
    ("name", "changes", "fault"),
    [
        ("generation_config.json", {"eos_token_id": "2"}, r"eos_token_id must be token ids, found '2'"),
        ("generation_config.json", {"eos_token_id": [1, 2.0]}, r"eos_token_id must be token ids, found 2.0"),
        ("generation_config.json", {"eos_token_id": -1}, r"eos_token_id must be token ids, found -1"),
        ("config.json", {"num_attention_heads": 0}, "config.json describes no language model: .*zero"),
        ("config.json", {"num_hidden_layers": 10**9}, "asks for 1000000000 layers"),
        ("config.json", {"vocab_size": "all"}, "config.json does not load"),
        ("config.json", {"max_position_embeddings": 0}, "config.json names no max_position_embeddings"),
        ("config.json", {"max_position_embeddings": 10**12}, "max_position_embeddings 1000000000000 is above 16777216"),
        ("model.safetensors.index.json", {"weight_map": {"a": 1}}, "expected a weight_map that names the files"),
        ("model.safetensors.index.json", {"weight_map": {"a": []}}, "expected a weight_map that names the files"),
        ("model.safetensors.index.json", {"weight_map": {"a": "x" * 300}}, "the weights are missing"),
        ("model.safetensors.index.json", {"weight_map": {"a": "../config.json"}}, "the weights are missing"),
    ],
)
def test_a_value_that_no_policy_can_have_is_named(copied, name, changes, fault):
    edit(copied / name, **changes)
    with pytest.raises(InputError, match=fault):
        check(copied)


@pytest.mark.parametrize(
    ("file", "content", "fault"),
    [
        ("model.gguf", b"GGUF", "GGUF, which is llama.cpp's form, is not read: take the checkpoint"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid", "model.safetensors is a Git LFS poi"),
        ("adapter_config.json", b'{"base_model_name_or_path": "own/base"}', "a LoRA adapter of own/base, which has to"),
        ("pytorch_model.bin", b"PK", "its weights are pickles .*save_pretrained.* writes them as safetensors"),
    ],
)
def test_another_form_of_a_policy_is_named_with_what_makes_a_checkpoint_of_it(tmp_path, file, content, fault):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / file).write_bytes(content)
    with pytest.raises(InputError, match=fault) as refused:
        checkpoints.resolve(str(tmp_path / "made"))
    assert "\n" not in str(refused.value)
    if file.endswith(".gguf"):
        with pytest.raises(InputError, match=fault):
            checkpoints.resolve(str(tmp_path / "made" / file))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"architectures": ["Qwen2ForSequenceClassification"]},
            "Qwen2ForSequenceClassification writes no text",
        ),
        ({"architectures": ["Qwen2Model"]}, "Qwen2Model writes no text"),
        ({"torch_dtype": "float1"}, "torch has no type 'float1'"),
        ({"rope_theta": "nan"}, "rope_theta must be a number above 0, found 'nan'"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": -5}},
            "rope_theta must be a number above 0",
        ),
    ],
)
def test_a_configuration_of_no_policy_that_can_write_is_one_line(copied, changes, fault):
    config = json.loads((copied / "config.json").read_text())
    config.pop("dtype")
    (copied / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=fault):
        checkpoints.resolve(str(copied))


def byte_level(policy, tokenizer_class):
    """Give `policy`, which becomes a Llama, a byte-level tokenizer that is said to be of another class."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the answer is the sum"] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(policy)
    edit(policy / "tokenizer_config.json", tokenizer_class=tokenizer_class)
    edit(policy / "config.json", model_type="llama", vocab_size=tokenizer.get_vocab_size())


def test_a_tokenizer_that_loses_text_is_refused(copied):
    byte_level(copied, "PreTrainedTokenizerFast")
    tokenizer = checkpoints.load_tokenizer(copied)
    assert tokenizer.decode(tokenizer("the sum\n is")["input_ids"]) == "the sum\n is"
    byte_level(copied, "LlamaTokenizerFast")
    with pytest.raises(InputError, match=r"its tokenizer loses text: .* comes back as 'Let\$x_1="):
        checkpoints.load_tokenizer(copied)


def test_a_saved_policy_has_the_end_tokens_and_settings_of_its_start_and_rope_in_both_forms(copied, tmp_path):
    settings = {"eos_token_id": [65, 3], "top_k": 1, "temperature": 0.1, "repetition_penalty": 2.0, "do_sample": False}
    (copied / "generation_config.json").write_text(json.dumps(settings))
    edit(copied / "config.json", rope_parameters={"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0})
    model, tokenizer = checkpoints.load_model(copied, torch.float32), checkpoints.load_tokenizer(copied)
    model.config.eos_token_id = model.config.pad_token_id = 7  # as a trainer may
    checkpoints.save(model, tokenizer, tmp_path / "saved")
    assert (tmp_path / "saved/generation_config.json").read_bytes() == (copied / "generation_config.json").read_bytes()
    before, after = (json.loads((path / "config.json").read_text()) for path in (copied, tmp_path / "saved"))
    assert [after[name] for name in checkpoints.SPECIAL_TOKENS] == [before[name] for name in checkpoints.SPECIAL_TOKENS]
    assert (after["rope_theta"], after["rope_scaling"]) == (50.0, {"rope_type": "linear", "factor": 2.0})
    again = checkpoints.load_model(tmp_path / "saved", torch.float32)
    assert again.config.rope_parameters == model.config.rope_parameters
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert checkpoints.difference(copied, tmp_path / "saved") is None


@pytest.mark.parametrize("is_nested", [False, True])
def test_end_tokens_within_a_text_config_are_kept_where_they_stand(tmp_path, is_nested):
    start, saved = tmp_path / "start", tmp_path / "saved"
    trained = {"eos_token_id": 7, "vocab_size": 9}
    for path, config in ((start, {"text_config": {"eos_token_id": 5}}),
                         (saved, {"text_config": trained} if is_nested else trained)):  # fmt: skip
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
    checkpoints._keep_settings(start, saved)
    after = json.loads((saved / "config.json").read_text())
    assert (after["text_config"] if is_nested else after) == {"eos_token_id": 5, "vocab_size": 9}
    assert json.loads((saved / "generation_config.json").read_text()) == {"eos_token_id": 5}


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_saved_weights_honour_the_umask(copied, tmp_path, mask):
    model, tokenizer = checkpoints.load_model(copied, torch.float32), checkpoints.load_tokenizer(copied)
    former = os.umask(mask)
    try:
        checkpoints.save(model, tokenizer, tmp_path / "saved")
    finally:
        os.umask(former)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "saved").iterdir()} == {0o666 & ~mask}


def test_end_tokens_beyond_the_vocabulary_do_not_matter(copied):
    edit(copied / "generation_config.json", eos_token_id=[10**9, checkpoints.load_tokenizer(copied).eos_token_id])
    check(copied)


def test_links_that_lead_in_a_circle_are_no_policy(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(InputError, match="no such directory"):
        checkpoints.resolve(str(tmp_path / "a"))
