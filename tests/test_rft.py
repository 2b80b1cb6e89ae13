import json
import math
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages import rft
from stages.core import jsonl, provenance
from stages.core.drawing.tokens import pack_ids, pack_log_probs, unpack_ids, unpack_log_probs
from stages.core.errors import CollapseError, InputError
from stages.core.policy import checkpoints
from stages.rft import card as cards
from stages.rft import examples as ready
from stages.rft import objective
from tests import ranks, warm

TWO_PROCESSES = Path(rft.__file__).parents[2] / "configs" / "accelerate" / "cpu2.yaml"
WORDS = [*"0123456789+-*()=,", "[L]", "[P]", "\\boxed{", "}"]
EXAMPLES = [
    {
        "problem_id": f"sums/{a}{b}{c}",
        "prompt": f"{a}+{b}*{c}=",
        "completion": "[P]" + "," * (a % 4) + f"{a}+{b * c}={a + b * c}\\boxed{{{a + b * c}}}",
        "pass_rate": 0.1,
    }
    for a in range(1, 5)
    for b in range(1, 4)
    for c in range(1, 3)
]


class Letters:
    """A tokenizer that knows letters: a begin token it always adds, an end token, and `th` as one token."""

    bos_token, eos_token_id = "^", 0

    def __call__(self, text, add_special_tokens=True):
        ids = [ord(letter) for letter in text.replace("th", "\u00fe").replace("$", "\0")]
        return {"input_ids": [ord("^"), *ids] if add_special_tokens else ids}


class SentencePieces:
    """A tokenizer in SentencePiece's way: `_` before the first word of a text, whatever the text begins with."""

    bos_token, eos_token_id = None, "</s>"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": list("_" + text.replace(" ", "_"))}


def example(prompt, completion):
    return {"problem_id": "p", "prompt": prompt, "completion": completion, "pass_rate": 0.1}


def unpacked(*examples):
    return [ready.unpack(example) for example in examples]


END = ready.Ending(0, frozenset([0, 1]))


def codes(text):
    return [ord(letter) for letter in text]


@pytest.mark.parametrize(
    ("prompt", "completion", "prompt_ids", "completion_ids"),
    [
        ("ab", "cd", codes("^ab"), [*codes("cd"), 0]),
        ("^ab", "cd", codes("^ab"), [*codes("cd"), 0]),  # the begin token is in the text already
        ("ab", "cd$", codes("^ab"), [*codes("cd"), 0]),  # the end token is in the text already
        ("at", "he", codes("^at"), [*codes("he"), 0]),  # "th" across the border: the engine began between
        ("ab", "", codes("^ab"), [0]),
        ("ab", "cd\1", codes("^ab"), [*codes("cd"), 1]),  # another end token is in the text already
    ],
)
def test_a_row_is_the_engines_prompt_then_the_completion_then_one_end_token(
    prompt, completion, prompt_ids, completion_ids
):
    row = ready.tokenize(Letters(), ready.unpack(example(prompt, completion)), END)
    assert row.input_ids == prompt_ids + completion_ids
    assert row.labels == [ready.IGNORED] * len(prompt_ids) + completion_ids
    assert row.num_labels == len(completion_ids)


def test_a_tokenizer_that_marks_the_begin_of_a_text_puts_no_space_between_prompt_and_completion():
    row = ready.tokenize(
        SentencePieces(), ready.unpack(example("a b", "c d")), ready.Ending("</s>", frozenset(["</s>"]))
    )
    assert row.input_ids == ["_", "a", "_", "b", "c", "_", "d", "</s>"]


def test_of_a_rollout_the_sampled_tokens_are_trained_on_however_the_tokenizer_would_cut_its_text():
    sampled = example("ab", "the") | {"token_ids": pack_ids([*codes("the"), 1])}
    assert ready.tokenize(Letters(), ready.unpack(sampled), END).labels[3:] == [*codes("the"), 1]
    truncated = example("ab", "the") | {"token_ids": pack_ids(codes("the"))}
    assert ready.tokenize(Letters(), ready.unpack(truncated), END).labels[3:] == codes("the")


CHAT = (
    "{% for m in messages %}<turn>{{ m.role }}:{{ m.content }}<end_of_turn>,{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def thinker():
    """A tokenizer with `<think>` as a special token and a chat template that ends turns by another than eos."""
    from stages.toy import pretrain

    tokenizer = pretrain.build_tokenizer([*WORDS, *":abcdefghijklmnopqrstuvwxyz", " "])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "<turn>", "<end_of_turn>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def test_a_thought_whose_marks_are_special_tokens_is_trained_on_from_ids_alone(thinker):
    think, turn = thinker.convert_tokens_to_ids(["<think>", "<end_of_turn>"])
    sampled = [think, *thinker.encode("1+2=3"), turn]
    completion = thinker.decode(sampled, skip_special_tokens=True)
    record = example("1+2=", completion) | {"token_ids": pack_ids(sampled)}
    end = ready.ending(thinker, [thinker.eos_token_id, turn])
    assert ready.check_ids(thinker, unpacked(record), len(thinker)) == []
    row = ready.tokenize(thinker, ready.unpack(record), end)
    assert row.labels[-len(sampled) :] == sampled


def test_a_text_ends_as_the_chat_template_ends_a_turn_where_its_prompt_is_a_chat_and_else_by_eos(thinker):
    turn = thinker.convert_tokens_to_ids("<end_of_turn>")
    chat = thinker.apply_chat_template([{"role": "user", "content": "1"}], tokenize=False, add_generation_prompt=True)
    end = ready.ending(thinker, [thinker.eos_token_id, turn])
    assert ready.tokenize(thinker, ready.unpack(example(chat, "2")), end).labels[-2:] == [thinker.encode("2")[0], turn]
    assert ready.tokenize(thinker, ready.unpack(example("1+1=", "2")), end).labels[-1] == thinker.eos_token_id
    alone = ready.ending(thinker, [thinker.eos_token_id])  # an engine that does not know the turn's end
    assert ready.tokenize(thinker, ready.unpack(example(chat, "2")), alone).labels[-1] == thinker.eos_token_id


def test_ids_of_another_tokenizer_are_refused_and_an_edited_text_is_named(thinker):
    ids = thinker.encode("1+2=3")
    good, edited = (example("1", text) | {"token_ids": pack_ids(ids)} for text in (thinker.decode(ids), "4"))
    assert ready.check_ids(thinker, unpacked(good, good, edited | {"problem_id": "e"}, example("1", "2")), 100) == ["e"]
    with pytest.raises(InputError, match="2 of 3 examples hold token_ids that do not give their text"):
        ready.check_ids(thinker, unpacked(good, edited, edited), 100)
    with pytest.raises(InputError, match="holds token 99, and the policy has 99"):
        ready.check_ids(thinker, unpacked(example("1", "2") | {"token_ids": pack_ids([99])}), 99)


def test_examples_with_ids_of_a_padded_vocabulary_are_left_out_and_named(thinker):
    good = example("1", "3") | {"token_ids": pack_ids(thinker.encode("3"))}
    padded = example("1", "3") | {"token_ids": pack_ids([*thinker.encode("3"), len(thinker)]), "problem_id": "padded"}
    good, padded, text = examples = unpacked(good, padded, example("1", "2"))
    assert ready.check_ids(thinker, examples, len(thinker) + 8) == []
    assert ready.without_unknown(thinker, examples) == ([good, text], ["padded"])
    with pytest.raises(InputError, match="each of 1 examples holds tokens that the policy's tokenizer lacks"):
        ready.without_unknown(thinker, [padded])


def test_an_example_longer_than_the_bound_is_left_out_whole_and_named():
    short, long = example("a", "b"), example("a", "b" * 9) | {"problem_id": "long"}
    rows, left_out = ready.tokenize_fitting(Letters(), unpacked(long, short), 4, END)
    assert [row.input_ids for row in rows] == [[*codes("^ab"), 0]]
    assert left_out == ["long"]
    with pytest.raises(InputError, match="none of 1 examples fits into 4 tokens, prompt included"):
        ready.tokenize_fitting(Letters(), unpacked(long), 4, END)


def test_every_epoch_sees_every_example_once_in_an_order_of_its_own():
    lengths = [5, 9, 1, 7, 7, 3, 2]
    steps = ready.order(lengths, batch_size=3, epochs=2, seed=1)
    assert [len(step) for step in steps] == [3, 3, 1, 3, 3, 1]
    first, second = ([number for step in half for number in step] for half in (steps[:3], steps[3:]))
    assert sorted(first) == sorted(second) == list(range(7))
    assert [set(step) for step in steps[:3]] != [set(step) for step in steps[3:]]
    assert all(lengths[a] >= lengths[b] for step in steps for a, b in pairwise(step))
    assert steps == ready.order(lengths, batch_size=3, epochs=2, seed=1)
    assert steps != ready.order(lengths, batch_size=3, epochs=2, seed=2)


@pytest.mark.parametrize(("longest", "size"), [(8, 12), (9, 6), (16, 6), (25, 4), (26, 3), (34, 2), (51, 1), (500, 1)])
def test_a_microbatch_divides_the_share_and_keeps_to_the_token_budget(longest, size):
    assert ready.microbatch_size(12, longest, token_budget=100) == size


def test_the_learning_rate_rises_to_its_peak_and_falls_in_a_line_to_the_last_share():
    shares = [ready.lr_share(step, 21, warmup_share=0.1, last_share=0.1) for step in range(21)]
    assert shares[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert shares[2:] == pytest.approx([1 - 0.9 * step / 18 for step in range(19)])
    assert ready.lr_share(0, 1, warmup_share=0.1, last_share=0.1) == 1
    assert ready.lr_share(0, 2, warmup_share=1, last_share=0.1) == 0.5
    assert [ready.lr_share(step, 3, 0, 0) for step in range(3)] == [1, 0.5, 0]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"epochs": 0}, "--epochs 0: must be at least 1"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"lr": -1.0}, "--lr -1.0: must be at least 0"),
        ({"warmup_share": 1.5}, "--warmup-share 1.5: must be at most 1"),
        ({"beta2": 1.0}, "--beta2 1.0: must be below 1"),
        ({"dtype": "float16"}, "--dtype float16: must be one of auto, float32, bfloat16"),
    ],
)
def test_an_option_out_of_its_bounds_is_refused_by_its_flag(options, fault):
    with pytest.raises(InputError, match=fault):
        rft.Options(policy="policy", examples=Path("examples.jsonl"), out=Path("out"), **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A policy of 20 thousand parameters with tied embeddings, and examples of several lengths."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from stages.toy import pretrain

    root = tmp_path_factory.mktemp("rft")
    tokenizer = pretrain.build_tokenizer(WORDS)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=1,  # a head of 32, the smallest that vLLM has on the CPU
            num_key_value_heads=1,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    checkpoints.save(model, tokenizer, root / "policy")
    jsonl.write(root / "examples.jsonl", EXAMPLES)
    return SimpleNamespace(root=root, policy=str(root / "policy"), examples=root / "examples.jsonl")


def tune(files, out, **options):
    paths = {"policy": files.policy, "examples": files.examples, "out": out}
    rft.run(rft.Options(**({"batch_size": 8, "lr": 3e-3} | paths | options)))
    return out


def weights(path):
    from safetensors.torch import load_file

    return load_file(Path(path) / "model.safetensors")


def largest_difference(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def distance(first, second):
    return sum((first[name].double() - second[name].double()).square().sum().item() for name in first) ** 0.5


def log_of(out):
    header, *lines = (out / "log.tsv").read_text().splitlines()
    return [dict(zip(header.split("\t"), map(float, line.split("\t")), strict=True)) for line in lines]


@pytest.fixture(scope="module")
def tuned(files):
    return tune(files, files.root / "tuned", epochs=3)


def loss_by_hand(files, examples):
    """The mean of -log p over completion and end tokens, one example at a time, in plain torch."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(files.policy)
    model = AutoModelForCausalLM.from_pretrained(files.policy)
    total, count = torch.tensor(0.0), 0
    for record in examples:
        prompt, completion = (tokenizer.encode(record[part]) for part in ("prompt", "completion"))
        completion = [*completion, tokenizer.eos_token_id]
        log_probs = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        for position, token in enumerate(completion, len(prompt)):
            total, count = total - log_probs[position - 1, token], count + 1
    return total / count, count, model


@pytest.mark.slow
@pytest.mark.parametrize("faster", [{}, {"compile_layers": True}, {"attn_implementation": "eager"}], ids=str)
def test_the_first_loss_and_gradient_are_those_of_the_completions_tokens_alone(files, faster, tmp_path, monkeypatch):
    from stages.core.policy import acceleration

    monkeypatch.setattr(acceleration, "COMPILER", "aot_eager")
    out = tune(files, tmp_path / "first", batch_size=len(EXAMPLES), **faster)
    loss, count, model = loss_by_hand(files, EXAMPLES)
    loss.backward()
    norm = sum(weight.grad.square().sum() for weight in model.parameters()).sqrt()
    [row] = log_of(out)
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert row["tokens"] == count


def weighted_by_hand(files, policy, records, kl):
    """The objective of `policy` in plain torch, one token at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(files.policy)
    model = AutoModelForCausalLM.from_pretrained(policy)
    start = AutoModelForCausalLM.from_pretrained(files.policy)
    total, count = torch.tensor(0.0), 0
    for record in records:
        prompt, completion = tokenizer.encode(record["prompt"]), unpack_ids(record["token_ids"])
        both = [one(torch.tensor([prompt + completion])).logits[0].softmax(-1) for one in (model, start)]
        probs, before = both
        ratio = 1.0
        for position, (token, log_prob) in enumerate(
            zip(completion, unpack_log_probs(record["log_probs"]), strict=True), len(prompt)
        ):
            ratio *= (before[position - 1, token].item() / math.exp(log_prob)) ** (1 / len(completion))
        weight = record["weight"] * min(1.0, ratio)
        for position, token in enumerate(completion, len(prompt)):
            p = probs[position - 1, token]
            total = total + (weight * -p.log() if weight >= 0 else -weight * p)
            q = before[position - 1].detach()
            total = total + kl * (q * (q / probs[position - 1]).log()).sum()
            count += 1
    return total / count, model


@pytest.mark.slow
@pytest.mark.parametrize("kl", [0.0, 0.7])
def test_weights_by_likelihood_failures_and_the_kl_term_are_those_of_plain_torch(files, kl):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(files.policy)
    records = []
    for number, one in enumerate(EXAMPLES):
        ids = [*tokenizer.encode(one["completion"]), tokenizer.eos_token_id]
        log_probs = pack_log_probs([-1.0 - (number * 7 + i) % 5 for i in range(len(ids))])
        weight = -0.5 if number % 4 == 0 else 1.0
        records.append(one | {"token_ids": pack_ids(ids), "log_probs": log_probs, "weight": weight})
    file = files.root / f"weighted{kl}.jsonl"
    jsonl.write(file, records)
    source = SimpleNamespace(policy=files.policy, examples=file)
    options = {"batch_size": len(EXAMPLES), "likelihood_weights": True, "kl": kl, "tokens_per_microbatch": 200}
    options |= {"lr": 0.03, "warmup_share": 0, "min_lr_share": 1}
    moved = tune(source, files.root / f"moved{kl}", **options)  # at the start policy itself the KL term is zero
    rows = log_of(tune(source, files.root / f"weighted{kl}", epochs=2, **options))
    assert len(rows) == 2
    for row, policy in zip(rows, (files.policy, moved), strict=True):
        loss, model = weighted_by_hand(files, policy, records, kl)
        loss.backward()
        norm = sum(weight.grad.square().sum() for weight in model.parameters()).sqrt()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    with_kl, without_kl = (weighted_by_hand(files, moved, records, weight)[0].item() for weight in (0.7, 0.0))
    assert with_kl > 1.01 * without_kl, "a term within the tolerance would be no test"


def test_an_example_weighs_the_geometric_mean_of_its_ratios_and_at_most_1():
    assert objective.likelihood_weight([-1.0, -3.0], [-0.5, -1.5]) == pytest.approx(math.exp(-1.0))
    assert objective.likelihood_weight([-0.5], [-9.0]) == 1.0
    assert objective.likelihood_weight([], []) == 1.0


def test_a_failure_costs_its_probability_and_its_gradient_is_bounded():
    import torch

    log_probs = torch.tensor([-0.1, -2.0, -80.0, -2.0], requires_grad=True)
    losses = objective.token_losses(log_probs, torch.tensor([-0.5, -0.5, -0.5, 2.0]))
    assert losses.tolist() == pytest.approx([0.5 * math.exp(-0.1), 0.5 * math.exp(-2), 0.0, 4.0])
    losses.sum().backward()
    assert log_probs.grad.tolist() == pytest.approx([0.5 * math.exp(-0.1), 0.5 * math.exp(-2), 0.0, -2.0])


def test_the_kl_term_is_torchs_and_zero_for_the_start_policy_itself():
    import torch

    logits, start = torch.randn(2, 5, 11), torch.randn(2, 5, 11)
    expected = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (start, logits)))
    assert torch.allclose(objective.kl_from_start(logits, start), expected, atol=1e-6)
    assert objective.kl_from_start(start, start).abs().max() < 1e-6


def test_weights_by_likelihood_need_a_log_prob_for_each_token():
    known = example("1", "2") | {"token_ids": pack_ids([1, 2]), "log_probs": pack_log_probs([-1.0, -2.0])}
    ready.check_log_probs(unpacked(known))
    for lacking in (example("1", "2"), known | {"log_probs": pack_log_probs([-1.0])}):
        with pytest.raises(InputError, match="--likelihood-weights: an example of problem p has no log-prob"):
            ready.check_log_probs(unpacked(known, lacking))


def test_the_base_is_fine_tuned_where_it_is_named_and_few_steps_are_warned_of(capsys):
    paths = {"policy": "runs/2/policy", "examples": Path("examples.jsonl"), "out": Path("out")}
    assert rft.Options(**paths, base="runs/0/policy", start="base").start_policy == "runs/0/policy"
    assert rft.Options(**paths, base="runs/0/policy").start_policy == "runs/2/policy"
    with pytest.raises(InputError, match="--start base: name the policy by --base"):
        rft.Options(**paths, start="base")
    rft._warn_of_few_steps(33, rft.Options(**paths, batch_size=8))
    assert "33 examples make only 5 optimizer steps of 8" in capsys.readouterr().err
    rft._warn_of_few_steps(33, rft.Options(**paths, batch_size=8, warn_below=5))
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_the_loss_falls_and_the_log_holds_every_step(tuned):
    log, metrics = log_of(tuned), json.loads((tuned / "metrics.json").read_text())
    assert [row["step"] for row in log] == list(range(1, 10))
    assert log[-1]["loss"] < log[0]["loss"] - 0.2
    assert log[-1]["lr"] == pytest.approx(3e-4)
    assert max(row["lr"] for row in log) == pytest.approx(3e-3)
    assert metrics["num_examples"] == len(EXAMPLES)
    assert metrics["num_tokens"] == sum(row["tokens"] for row in log)
    assert metrics["loss_last"] == pytest.approx(log[-1]["loss"], rel=1e-5)


@pytest.mark.slow
def test_the_output_is_a_checkpoint_and_its_account_and_nothing_else(files, tuned):
    from transformers import AutoModelForCausalLM

    account = {"log.tsv", "metrics.json", "manifest.json", "README.md"}
    assert {path.name for path in tuned.iterdir()} == {path.name for path in Path(files.policy).iterdir()} | account
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tuned / name).read_text() == (Path(files.policy) / name).read_text()
    model = AutoModelForCausalLM.from_pretrained(tuned)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    manifest = json.loads((tuned / "manifest.json").read_text())
    assert manifest["parameters"]["lr"] == 3e-3
    assert manifest["inputs"] == {path: provenance.digest(path) for path in (files.policy, str(files.examples))}
    assert not list(tuned.parent.glob(".*"))


@pytest.mark.slow
def test_the_model_card_is_read_by_the_hub_and_says_base_method_data_and_figures(files, tuned):
    from huggingface_hub import ModelCard

    card = ModelCard.load(tuned / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rloop", "rejection-fine-tuning", "math"],
    }
    metrics = json.loads((tuned / "metrics.json").read_text())
    for told in (
        f"**Base**: `{files.policy}`.",
        "rejection fine-tuning",
        f"`{files.examples}`, 24 completions of 24 problems.\n",
        f"| loss_last | {metrics['loss_last']:.4g} |",
        "| lr | 0.003 |",
        f"    {EXAMPLES[0]['prompt']}\n",
    ):
        assert told in card.text


def test_a_card_names_the_hub_id_that_the_policy_goes_back_to_and_how_its_examples_were_chosen(tmp_path):
    from huggingface_hub import ModelCard

    assert cards.base_of("org/model") == "org/model"
    assert cards.base_of(str(tmp_path)) == ""
    (tmp_path / "manifest.json").write_text(json.dumps({"base_model": "org/model"}))
    assert cards.base_of(str(tmp_path)) == "org/model"
    how = {"max_pass_rate": 0.1, "min_reward": 0.5}
    filtered = {"stage": "filter", "parameters": how, "counts": {"rollouts": 9000, "hard_problems": 7}}
    (tmp_path / "e.manifest.json").write_text(json.dumps(filtered))
    options = rft.Options(policy="runs/1/policy", examples=tmp_path / "e.jsonl", out=tmp_path / "out")
    manifest = {"base_model": "org/model", "parameters": dict.fromkeys(cards.SETTINGS, 1)}
    prompt = "---\n```\n{problem}: é\n\n# 1+1=\n"
    written = ModelCard(cards.card(options, manifest, {"loss": 0.5}, [example(prompt, "2")]))
    assert written.data.base_model == "org/model"
    assert "`runs/1/policy`, from `org/model`" in written.text
    assert "successes (a reward of\n  0.5 or more) among 9,000 rollouts" in written.text
    assert "on 7 problems with low pass rates in them." in written.text
    assert "    ---\n    ```\n    {problem}: é\n    \n    # 1+1=\n" in written.text


@pytest.mark.slow
def test_without_a_learning_rate_the_start_policy_comes_back(files):
    assert largest_difference(files.policy, tune(files, files.root / "still", lr=0.0, weight_decay=0.1)) == 0


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(files, tuned):
    again = tune(files, files.root / "again", epochs=3)
    assert largest_difference(tuned, again) == 0
    assert largest_difference(tuned, tune(files, files.root / "other", epochs=3, seed=1)) > 1e-4


@pytest.mark.slow
def test_the_weights_do_not_depend_on_the_micro_batches(files, tuned):
    one_by_one = tune(files, files.root / "one-by-one", epochs=3, tokens_per_microbatch=1)
    sizes = [
        json.loads((out / "manifest.json").read_text())["parameters"]["microbatch_size"] for out in (tuned, one_by_one)
    ]
    assert sizes == [8, 1]
    assert largest_difference(tuned, one_by_one) < 1e-5


@pytest.mark.slow
def test_the_weights_do_not_depend_on_the_number_of_processes(files):
    alone = tune(files, files.root / "alone", batch_size=10)
    launch = f"accelerate.commands.launch --config_file {TWO_PROCESSES} --main_process_port 0 -m rloop_cli"
    stage = f"rft --policy {files.policy} --examples {files.examples} --out {files.root / 'both'}"
    command = [sys.executable, "-m", *f"{launch} {stage} --batch-size 10 --lr 3e-3".split()]
    subprocess.run(command, check=True, env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})
    manifest = json.loads((files.root / "both" / "manifest.json").read_text())
    assert manifest["parameters"]["num_processes"] == 2
    assert [row["tokens"] for row in log_of(alone)] == [row["tokens"] for row in log_of(files.root / "both")]
    assert largest_difference(alone, files.root / "both") < 1e-5


@pytest.fixture(scope="module")
def half(files):
    """Fine-tuned in bfloat16 by one process."""
    return tune(files, files.root / "half", dtype="bfloat16", gradient_checkpointing=True)


@pytest.mark.slow
def test_a_policy_trained_in_bfloat16_is_saved_in_bfloat16_and_loads_everywhere(files, half):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert {tensor.dtype for tensor in weights(half).values()} == {torch.bfloat16}
    config, before = (json.loads((Path(path) / "config.json").read_text()) for path in (half, files.policy))
    assert config == before | {"dtype": "bfloat16"}
    model = AutoModelForCausalLM.from_pretrained(half)
    assert model.dtype == torch.bfloat16
    jsonl.write(files.root / "one.jsonl", [{"id": "1", "problem": "1+2", "answer": "3", "source": "sums"}])
    command = (
        f"sample --policy {half} --problems {files.root / 'one.jsonl'} --out {files.root / 'drawn.jsonl'} --dtype "
    )
    options = ["float32", "--template", "none", "--num-samples", "1", "--max-tokens", "8", "--temperature", "0"]
    process = warm.start([*command.split(), *options], files.root, files.root / "sample.log")
    process.join()
    assert process.exitcode == 0, (files.root / "sample.log").read_text()
    ((_, drawn),) = jsonl.read(files.root / "drawn.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(half)
    prompt = tokenizer("1+2", return_tensors="pt")["input_ids"]
    greedy = model.float().generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
    assert drawn["completion"] == tokenizer.decode(greedy, skip_special_tokens=True)


@pytest.mark.slow
def test_sharded_over_two_processes_in_bfloat16_the_weights_are_those_of_one_within_bfloat16(files, half):
    out = files.root / "sharded"
    stage = f"rft --policy {files.policy} --examples {files.examples} --out {out} --batch-size 8 --lr 3e-3"
    command = [*ranks.LAUNCH, *stage.split(), "--dtype", "bfloat16", "--gradient-checkpointing"]
    subprocess.run(command, check=True, cwd=ranks.ROOT, env=os.environ | ranks.ENVIRONMENT)
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["parameters"]["num_processes"], manifest["parameters"]["dtype"]) == (2, "bfloat16")
    assert (out / "config.json").read_text() == (half / "config.json").read_text()
    for here, there in zip(log_of(half), log_of(out), strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-3)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=0.1)
    apart = distance(weights(half), weights(out))
    assert apart < 0.15 * distance(weights(half), weights(files.policy))  # single tensors: 1 to 12 %


@pytest.mark.slow
def test_with_a_kl_term_too_the_weights_sharded_over_two_processes_are_those_of_one(files):
    alone, out = tune(files, files.root / "kl-alone", kl=0.7), files.root / "kl-sharded"
    stage = f"rft --policy {files.policy} --examples {files.examples} --out {out} --batch-size 8 --lr 3e-3 --kl 0.7"
    command = [*ranks.LAUNCH, *stage.split(), "--dtype", "float32"]
    subprocess.run(command, check=True, cwd=ranks.ROOT, env=os.environ | ranks.ENVIRONMENT)
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["parameters"]["num_processes"], manifest["parameters"]["kl"]) == (2, 0.7)
    assert [row["loss"] for row in log_of(out)] == pytest.approx([row["loss"] for row in log_of(alone)], rel=1e-4)
    assert largest_difference(alone, out) < 1e-5
    assert largest_difference(alone, tune(files, files.root / "kl-none")) > 1e-4, "the term does nothing"


@pytest.mark.slow
def test_with_adapters_the_loss_falls_and_what_is_written_is_the_policy_with_other_matrices(files, tuned):
    out = tune(files, files.root / "lora", epochs=3, lora_rank=32, lr=1e-2)
    first, last = (log_of(out)[step]["loss"] for step in (0, -1))
    assert first == pytest.approx(log_of(tuned)[0]["loss"], rel=1e-5)
    assert last < first - 0.15
    before, after = weights(files.policy), weights(out)
    assert before.keys() == after.keys()
    assert {name for name in before if not before[name].equal(after[name])} == {n for n in before if "proj.weight" in n}
    assert (out / "config.json").read_text() == (tuned / "config.json").read_text()


@pytest.mark.slow
def test_adapters_sharded_over_two_processes_in_bfloat16_come_to_what_one_makes_of_them(files, half):
    options = {"dtype": "bfloat16", "lora_rank": 4, "gradient_checkpointing": True}
    alone, out = files.root / "lora-alone", files.root / "lora-sharded"
    tune(SimpleNamespace(policy=str(half), examples=files.examples), alone, **options)
    stage = f"rft --policy {half} --examples {files.examples} --out {out} --batch-size 8 --lr 3e-3"
    command = [*ranks.LAUNCH, *stage.split(), "--dtype", "bfloat16", "--lora-rank", "4", "--gradient-checkpointing"]
    subprocess.run(command, check=True, cwd=ranks.ROOT, env=os.environ | ranks.ENVIRONMENT)
    for here, there in zip(log_of(alone), log_of(out), strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=2e-3)
    moved = distance(weights(alone), weights(half))
    assert moved > 0
    assert distance(weights(alone), weights(out)) < 0.3 * moved


@pytest.mark.slow
@pytest.mark.parametrize(("lr", "batch_size"), [(1e30, 8), (1e300, 8), (1e300, len(EXAMPLES))])
def test_a_collapsed_run_leaves_nothing_behind_be_it_in_its_last_step(files, lr, batch_size):
    with pytest.raises(CollapseError, match="lower --lr"):
        tune(files, files.root / "collapsed", lr=lr, batch_size=batch_size, max_grad_norm=0.0)
    assert not list(files.root.glob("*collapsed*"))


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    good, bad, empty = (tmp_path / f"{name}.jsonl" for name in ("good", "bad", "empty"))
    jsonl.write(good, EXAMPLES)
    bad.write_text(json.dumps(EXAMPLES[0]) + '\n{"problem_id": "p", "prompt": "1+1="}\n')
    empty.touch()
    occupied = tmp_path / "occupied"
    jsonl.write(occupied / "file.jsonl", EXAMPLES)
    before = sorted(tmp_path.rglob("*"))
    for examples, out, fault in [
        (good, occupied, "already holds something"),
        (bad, tmp_path / "out", "bad.jsonl:2: field 'completion' of Example is missing"),
        (empty, tmp_path / "out", "is empty"),
        (good, tmp_path / "out", "no such directory"),
    ]:
        with pytest.raises(InputError, match=fault):
            rft.run(rft.Options(policy=str(tmp_path / "nowhere"), examples=examples, out=out))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_pad_token_outside_the_vocabulary_does_not_matter(files, tuned):
    from transformers import AutoTokenizer

    policy = shutil.copytree(files.policy, files.root / "padded")
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.add_special_tokens({"pad_token": "<outside>"})
    tokenizer.save_pretrained(policy)
    padded = tune(SimpleNamespace(policy=str(policy), examples=files.examples), files.root / "outside", epochs=3)
    assert largest_difference(tuned, padded) == 0


@pytest.mark.slow
def test_more_tokens_than_the_context_are_refused(files):
    with pytest.raises(InputError, match="--max-tokens 65 is beyond the policy's context of 64"):
        tune(files, files.root / "long", max_tokens=65)
