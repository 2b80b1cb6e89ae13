"""What several files share: tiny policies, the toy, and one real engine for the whole run of the tests."""

import os
import signal
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch comes in: on tiny policies a second thread only waits
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # where there is one, it leaves its core to the other tests

import pytest

from stages import eval as evaluation
from stages.core import jsonl
from stages.core.policy import checkpoints
from stages.toy import arithmetic
from tests.scripted import ScriptedEngines, problem

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell, and in what it starts

LONG = "rl pipeline ranks trainer rft cli kernels gpu architectures tensor_parallel readme engine toy".split()  # noqa: SIM905


def pytest_collection_modifyitems(items):
    """The files that take longest come first, or one process would be busy with them at the end and the other idle."""
    order = {f"test_{name}": rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="module", autouse=True)
def new_accelerate_state():
    """A file meets nothing that accelerate keeps of an earlier one in the same process, such as its precision."""
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def make_policy(tmp_path_factory):
    """A function that makes a checkpoint of random weights of the given kind and size; it reads the toy."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from stages.toy import pretrain

    def make(std=0.2, words=arithmetic.WORDS, seed=0, kind="qwen2", **config):
        tokenizer = pretrain.build_tokenizer(words)
        shape = {
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(shape | config)))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in (parameter for parameter in model.parameters() if parameter.dim() == 2):
                weight.normal_(std=std, generator=generator)
        path = tmp_path_factory.mktemp("policies") / "policy"
        checkpoints.save(model, tokenizer, path)
        return path

    return make


@pytest.fixture(scope="session")
def tiny_policy(make_policy):
    """A policy with an output head of its own."""
    return make_policy()


@pytest.fixture(scope="session")
def other_policy(make_policy):
    """A policy of the same shape as `tiny_policy`, with other weights."""
    return make_policy(std=0.3, seed=1)


@pytest.fixture(scope="session")
def tied_policy(make_policy):
    """A policy of the same shape as `tiny_policy`, with other weights and tied embeddings."""
    return make_policy(std=0.3, seed=1, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The output of `rloop toy` with a rough policy: right form, rarely the right answer."""
    from stages import toy

    path = tmp_path_factory.mktemp("toy") / "toy"
    toy.run(toy.Options(out=path, num_train=60, num_test=20, pretrain_steps=60))
    return path


@pytest.fixture
def problems(tmp_path):
    """A file of twelve sums."""
    jsonl.write(tmp_path / "sums.jsonl", map(problem, range(12)))
    return tmp_path / "sums.jsonl"


@pytest.fixture
def engines():
    """Starts the scripted engines of a test, and keeps them."""
    return ScriptedEngines()


@pytest.fixture
def run(engines):
    """A function that evaluates policies with `engines`."""

    def evaluate(policies, problems, out, **options):
        files = problems if isinstance(problems, list) else [problems]
        paths = {"policy": [str(policy) for policy in policies], "problems": files, "out": out}
        how = {"template": "none", "max_tokens": 32, "num_samples": 4, "k": [1, 4]}
        evaluation.draw(evaluation.Options(**paths, **how | options), engines)

    return evaluate


@pytest.fixture(scope="session")
def engine(tiny_policy):
    """The real engine with the weights of `tiny_policy`; whoever loads others loads these again."""
    from stages.core.drawing.engine import VllmEngine

    return VllmEngine(tiny_policy, max_model_len=96)
