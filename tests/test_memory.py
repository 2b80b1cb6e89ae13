"""The memory plan: its arithmetic against torch's own bytes, the tables of the docs, the configurations."""

import random
import re
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import gpu_check, rounds
from benchmarks import memory as plans
from stages import rl
from stages.core.options import declared
from stages.core.policy import adapters, memory
from stages.core.policy.memory import Gpus, Shape
from stages.rl import Settings

ROOT = Path(__file__).parents[1]
SMALL = Shape(hidden=96, mlp=512, layers=3, heads=6, kv_heads=2, head_dim=16, vocab=331, tied=True)
SAMPLES, TOKENS = (2, 6), 64


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._add, output)
        return output

    def _add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.sizes.values()))


def configuration(shape):
    return Qwen2Config(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.mlp, head_dim=shape.head_dim,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
    )  # fmt: skip


def model(rank, checkpointing=False, width=memory.AUTOCAST):
    """A decoder of the SMALL shape as rl trains it: rounded weights, so that frozen ones may be held in bfloat16.

    Under FSDP2 all weights of a pass are in bfloat16.
    """
    model = Qwen2ForCausalLM(configuration(SMALL)).train()
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    adapters.attach(model, Settings(lora_rank=rank), seed=0, is_bfloat16=width is not memory.FLOAT32)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.bfloat16() if width is memory.SHARDED else model


def states(model, samples, width):
    with torch.autocast("cpu", torch.bfloat16, enabled=width is memory.AUTOCAST):
        ids = torch.arange(samples * TOKENS).view(samples, TOKENS) % SMALL.vocab
        return model.model(input_ids=ids, use_cache=False).last_hidden_state


def saved_bytes(model, samples, width):
    """The bytes that a forward pass saves for its backward pass, each storage once, the weights left out."""
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept, sizes = [], {}

    def pack(tensor):
        kept.append(tensor)  # or its address would be given to the next one
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states(model, samples, width)
    return sum(size for address, size in sizes.items() if address not in own)


def a_token(measure):
    """What `measure` grows by with each token more: what does not depend on their number drops out."""
    few, many = map(measure, SAMPLES)
    return (many - few) / (TOKENS * (SAMPLES[1] - SAMPLES[0]))


WIDTHS = pytest.mark.parametrize(
    "width", [memory.AUTOCAST, memory.FLOAT32, memory.SHARDED], ids=["bfloat16", "float32", "sharded"]
)


@WIDTHS
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_the_bytes_that_torch_saves(rank, checkpointing, width):
    trained = model(rank, checkpointing, width)
    measured = a_token(lambda samples: saved_bytes(trained, samples, width))
    assert measured == memory.activations(SMALL, rank, checkpointing, width)


@WIDTHS
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.slow
def test_the_most_that_is_alive_in_a_pass_is_below_the_plan_by_a_third_at_most(rank, checkpointing, width):
    def peak(samples):
        trained = model(rank, checkpointing, width)
        with Live() as live:
            states(trained, samples, width).sum().backward()
        return live.peak

    how = rank, checkpointing, width
    planned = memory.activations(SMALL, *how) + memory.backward_work(SMALL, *how)
    assert 0.67 * planned < a_token(peak) <= planned


@pytest.mark.parametrize("name", plans.SHAPES)
def test_parameters_are_those_of_the_model(name):
    shape = plans.SHAPES[name]
    with torch.device("meta"):
        whole = Qwen2ForCausalLM(configuration(shape))
    assert sum(weight.numel() for weight in whole.parameters()) == shape.parameters


@pytest.mark.parametrize("width", [memory.AUTOCAST, memory.FLOAT32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("rank", [0, 5])
def test_what_is_held_are_the_bytes_of_the_model_and_of_its_optimizer(rank, width):
    small = model(rank, width=width)
    trained = adapters.trained(small).values()
    planned = memory.held(SMALL, rank, width)
    assert sum(weight.nbytes for weight in small.parameters()) == planned["weights"]
    assert 2 * planned["gradients"] == planned["moments"] == 2 * sum(weight.nbytes for weight in trained)
    layers = [layer for layer in small.model.modules() if isinstance(layer, torch.nn.Linear)]
    rounded = [weight for layer in layers for weight in layer.parameters(False) if weight.requires_grad]
    assert planned["casts"] == (2 * sum(map(torch.numel, rounded)) if width is memory.AUTOCAST else 0)


def test_in_float32_update_and_engine_take_the_bytes_counted_by_hand():
    """Qwen2.5-0.5B: 494,032,768 weights, 136,134,656 of them in the embedding, which is the head; a key of 128."""
    shape, options = plans.SHAPES["Qwen/Qwen2.5-0.5B"], Settings(dtype="float32", tokens_per_microbatch=1024)
    parts = memory.update(shape, options)
    assert parts["weights"] + parts["moments"] + parts["gradients"] == 16 * 494_032_768 / memory.GIB
    layer = 8 * (896 + 128) + 4 * 14 + 8 * 896 + 2 * (4 * 896 + 4) + 8 * 896 + 16 * 4864
    kept = 24 * layer + (4 * 896 + 4) + 4 * 896 + 8
    assert parts["activations"] == 1024 * kept / memory.GIB and parts["casts"] == 0
    drawing = memory.generation(shape, options, Gpus(80))
    assert drawing["hand-over"] == 2 * 4 * 136_134_656 / memory.GIB
    cache = 40 * memory.GIB - 4 * 494_032_768 - 2 * memory.GIB
    assert drawing["cache tokens (thousands)"] == pytest.approx(cache / (24 * 2 * 128 * 4) / 1000)
    half = memory.generation(shape, replace(options, dtype="auto"), Gpus(80))
    assert half["cache tokens (thousands)"] > 2 * drawing["cache tokens (thousands)"]


def test_shared_among_gpus_a_policy_with_adapters_takes_the_bytes_counted_by_hand():
    """Qwen2.5-7B on eight: 6,525,417,472 weights in linear layers, 544,997,376 in the embedding and in the head."""
    shape, rank = plans.SHAPES["Qwen/Qwen2.5-7B"], 32
    parts = memory.update(shape, Settings(lora_rank=rank, tokens_per_microbatch=4096), Gpus(79, 8, is_sharded=True))
    vectors, adapter = 57 * 3584, 28 * 32 * (4 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18944))
    frozen = 2 * (6_525_417_472 + 544_997_376) + 4 * (544_997_376 + vectors)
    assert parts["weights"] == (frozen + 4 * adapter) // 8 / memory.GIB
    assert parts["moments"] == 2 * parts["gradients"] == 8 * adapter / 8 / memory.GIB
    layer = (6_525_417_472 + vectors + adapter) // 28
    assert parts["gathered"] == 2 * (2 * layer + 544_997_376) / memory.GIB
    kept = 4 * (3584 + 512) + 4 * 28 + 4 * 3584 + 2 * (4 * 3584 + 4) + 7 * 2 * rank + 8 * 18944
    assert parts["activations"] == 4096 * 28 * kept / memory.GIB and "casts" not in parts


def configurations_of_one_gpu():
    return [path for path in sorted((ROOT / "configs").glob("*.yaml")) if "One GPU" in path.read_text().split("\n")[0]]


@pytest.mark.parametrize("path", configurations_of_one_gpu(), ids=lambda path: path.name)
def test_a_configuration_for_one_gpu_fits_the_memory_that_it_names(path):
    shape, gpu, _, options = plans.plan(path)
    offered = plans.GPUS[gpu]
    drawing = memory.generation(shape, options, Gpus(offered))
    assert memory.update(shape, options)["sum"] < 0.95 * offered
    assert drawing["sum"] < 0.95 * offered
    assert drawing["cache tokens (thousands)"] > 100
    rft = plans.rft_options(path)
    assert memory.update(shape, rft)["sum"] < 0.95 * offered


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("qwen*.yaml")), ids=lambda path: path.name)
def test_a_configuration_says_what_a_step_takes_by_the_plan_and_the_estimate(path):
    assert plans.told(path) in path.read_text()


def test_the_estimate_of_a_step_is_near_what_is_simulated_for_7_b():
    shape, gpu, number, options = plans.plan(ROOT / "configs/qwen2.5-math-7b.yaml")
    simulated = next(rounds.by_rounds(rounds.stream(0.5, random.Random(0)), 512, 8, 512, 1, ahead=True))
    assert plans.seconds(shape, options, gpu, number)["draw"] == pytest.approx(simulated.seconds, rel=0.2)
    checkpointed = replace(options, gradient_checkpointing=True)
    plain, again = (plans.seconds(shape, given, gpu, number)["update"] for given in (options, checkpointed))
    assert plain == pytest.approx(0.8 * again, rel=0.02), "a fifth of an update, as docs/memory-many-gpus.md says"


def test_the_tables_of_the_docs_are_those_that_the_plan_prints():
    docs = (ROOT / "docs/memory.md").read_text()
    assert len(configurations_of_one_gpu()) == 2
    for table in plans.overview().split("\n\n"):
        assert table in docs


def several_gpus(**changes):
    return Settings(
        **{"gradient_checkpointing": True, "tokens_per_microbatch": 16384, "memory_fraction": 0.5} | changes
    )


def test_on_eight_gpus_the_plan_comes_to_the_sums_of_the_docs():
    shape, options = plans.SHAPES["Qwen/Qwen2.5-7B"], several_gpus()
    updating = memory.update(shape, options, Gpus(79, 8, is_sharded=True))
    drawing = memory.generation(shape, options, Gpus(79, 8, is_sharded=True))
    docs = (ROOT / "docs/memory-many-gpus.md").read_text()
    assert f"| **sum within the layers** | | **{updating['sum'] - updating['context']:.1f}** |" in docs
    assert f"| **sum** | | **{drawing['sum']:.0f}** |" in docs
    assert "22.3 GiB hold 417,000 tokens" in docs
    assert drawing["cache tokens (thousands)"] == pytest.approx(417, rel=0.01)


def test_the_paper_s_configuration_fits_eight_gpus_as_it_and_the_docs_say():
    path = ROOT / "configs/qwen2.5-math-7b.yaml"
    given = yaml.safe_load(path.read_text())["rl"]
    names = ("gradient_checkpointing", "tokens_per_microbatch", "memory_fraction")
    shape, options = plans.SHAPES["Qwen/Qwen2.5-7B"], several_gpus(**{name: given[name] for name in names})
    updating = memory.update(shape, options, Gpus(79, 8, is_sharded=True))["sum"]
    drawing = memory.generation(shape, options, Gpus(79, 8, is_sharded=True))
    docs = (ROOT / "docs/memory-many-gpus.md").read_text()
    assert max(updating, drawing["sum"]) < 0.95 * 79
    assert f"{updating:.1f} of 79 GiB" in path.read_text() and f"{updating:.1f} GiB in all" in docs
    assert f"{drawing['cache tokens (thousands)']:.0f},000 tokens of cache" in docs


@pytest.mark.parametrize(("number", "fraction", "column"), [(8, 0.35, 0), (16, 0.6, 1), (32, 0.75, 2)])
def test_a_shared_engine_and_a_sharded_policy_of_32_b_take_what_the_tables_of_the_docs_say(number, fraction, column):
    shape, docs = plans.SHAPES["Qwen/Qwen2.5-32B"], (ROOT / "docs/memory-many-gpus.md").read_text()

    def cell(row):
        """The number in the row of the table, without its bold face."""
        (line,) = (line for line in docs.splitlines() if line.startswith(row))
        return line.strip("|").split("|")[column + 1].strip(" *")

    for tokens, row in ((16384, "| **sum** | **90"), (4096, "| with 4,096 tokens")):
        options = several_gpus(tokens_per_microbatch=tokens)
        assert f"{memory.update(shape, options, Gpus(79, number, is_sharded=True))['sum']:.1f}" == cell(row)
    for shared in (2, 4, 8):
        options = several_gpus(memory_fraction=fraction, tensor_parallel=shared)
        drawing = memory.generation(shape, options, Gpus(79, number, is_sharded=True))
        cached = drawing["cache tokens (thousands)"] * 1000 * number / shared
        said = cell(f"| k = {shared} |").replace(",", "")
        assert cached == pytest.approx(int(said), rel=0.01) if said else cached < 0


def test_the_plan_proposes_what_fits_and_says_what_to_change():
    shape = plans.SHAPES["Qwen/Qwen2.5-0.5B"]
    plain = several_gpus(gradient_checkpointing=False)
    assert memory.fitting_tokens(shape, plain, Gpus(79)) == 16384
    tokens = memory.fitting_tokens(shape, plain, Gpus(22))
    assert tokens == 4096
    for number, fits in ((tokens, True), (2 * tokens, False)):
        planned = memory.TrainingOptions(tokens_per_microbatch=number)
        assert (memory.update(shape, planned)["sum"] <= 0.95 * 22) == fits
    assert memory.update_advice(shape, plain, Gpus(79)) is None
    said = "an update takes 34.9 GiB by the plan, and the GPU has 22.0: --tokens-per-microbatch 4096 fits"
    assert memory.update_advice(shape, plain, Gpus(22)) == said


@pytest.mark.parametrize(
    ("gpu_gib", "advice"),
    [
        (79, "--lora-rank 32 --tokens-per-microbatch 16384 fits"),
        (30, "--lora-rank 32 --tokens-per-microbatch 8192 fits"),
        (10, "no option makes it fit; share the policy among GPUs"),
    ],
)
def test_a_policy_whose_weights_alone_do_not_fit_is_told_of_adapters_or_more_gpus(gpu_gib, advice):
    said = memory.update_advice(plans.SHAPES["Qwen/Qwen2.5-7B"], several_gpus(), Gpus(gpu_gib))
    assert advice in said


def test_the_engine_s_share_that_fits_beside_the_trainer_is_proposed():
    shape, options = plans.SHAPES["Qwen/Qwen2.5-0.5B"], Settings(memory_fraction=0.9)
    said = memory.engine_advice(shape, options, 1024, Gpus(22))
    assert said == "drawing takes 27.3 GiB by the plan, and the GPU has 22.0: --memory-fraction 0.6 fits"
    assert memory.engine_advice(shape, replace(options, memory_fraction=0.6), 1024, Gpus(22)) is None
    for fraction, fits in ((0.6, True), (0.65, False)):  # it is the most that does, in twentieths
        needed = memory.generation(shape, replace(options, memory_fraction=fraction), Gpus(22))["sum"]
        assert (needed <= 0.95 * 22) == fits


def test_sequences_that_the_cache_cannot_hold_are_named_with_how_many_it_can():
    shape, options = plans.SHAPES["Qwen/Qwen2.5-1.5B"], Settings(memory_fraction=0.6, lora_rank=32)
    assert memory.engine_advice(shape, options, 1000, Gpus(22)) is None
    many = replace(options, max_sequences=10**4)
    said = memory.engine_advice(shape, many, 1000, Gpus(22))
    fraction, sequences = re.search(
        r"needs 5,000,000: --memory-fraction (\S+) --max-sequences (\d+) fits", said
    ).groups()
    fitting = replace(many, memory_fraction=float(fraction), max_sequences=int(sequences))
    assert memory.engine_advice(shape, fitting, 1000, Gpus(22)) is None
    assert memory.engine_advice(shape, replace(fitting, max_sequences=int(sequences) + 9), 1000, Gpus(22))
    whole = memory.engine_advice(plans.SHAPES["Qwen/Qwen2.5-7B"], Settings(), 1000, Gpus(79))
    assert whole.endswith("no --memory-fraction makes it fit; take --lora-rank, or share the policy among GPUs")


def test_rl_is_told_at_its_start_what_of_its_options_does_not_fit_the_card(tiny_policy):
    asked = {"policy": "tiny", "problems": Path("problems.jsonl"), "out": Path("out")}
    options = rl.Options(**asked, tokens_per_microbatch=2**21, memory_fraction=0.95)
    update, drawing = rl._advice(tiny_policy, options, 96, Gpus(4))
    assert update.endswith("--tokens-per-microbatch 16384 fits") and update.startswith("an update takes ")
    assert drawing.endswith("--memory-fraction 0.55 fits") and drawing.startswith("drawing takes ")
    fitting = replace(options, tokens_per_microbatch=0, memory_fraction=0.55)
    assert rl._advice(tiny_policy, fitting, 96, Gpus(4)) == []
    assert rl._advice(tiny_policy, options, 96, memory.NO_GPU) == []  # no GPU


@pytest.mark.parametrize("options", [Settings(), plans.rft_options(ROOT / "configs/qwen2.5-math-7b.yaml")])
def test_a_micro_batch_is_by_the_plan_unless_it_is_given_without_a_plan_16384_tokens_or_2048(tiny_policy, options):
    shape, card = memory.planned_shape(tiny_policy, 1.87), Gpus(1.87)
    assert options.tokens_per_microbatch == 0
    assert (memory.planned_tokens(None, options, card), memory.planned_tokens(None, options, memory.NO_GPU)) == (
        16384,
        2048,
    )
    assert memory.planned_tokens(shape, options, card) == memory.fitting_tokens(shape, options, card) < 16384
    assert memory.planned_tokens(shape, replace(options, tokens_per_microbatch=100), card) == 100
    assert memory.planned_shape(tiny_policy, memory.gpu_memory()) is None, "no test runs on a GPU but those marked gpu"


def test_the_gpu_check_of_the_readme_fits_the_card_of_24_gb_that_it_names():
    words = f"{gpu_check.COMMON} {gpu_check.REAL}".split()
    given = {name.lstrip("-").replace("-", "_"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    options = Settings(**{name: declared(Settings)[name].type(value) for name, value in given.items()})
    shape, card = plans.SHAPES["Qwen/Qwen2.5-0.5B"], plans.GPUS[24]
    assert options.tokens_per_microbatch == 0 and memory.fitting_tokens(shape, options, Gpus(card)) == 4096
    assert memory.engine_advice(shape, options, 1024, Gpus(card)) is None
