"""vLLM's C code for RMSNorm where it is right, and its compiled mode, which takes new weights too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages.core.drawing import kernels
from stages.core.drawing.engine import EngineOptions, Sampling, VllmEngine
from stages.core.errors import InputError
from stages.core.policy import checkpoints

pytestmark = pytest.mark.slow


def prefer_c():
    """Let vLLM's operations try the C code first, in the whole process, as an eager engine does; return them."""
    order_of = kernels.norms()
    from vllm import ir

    for name, order in order_of.items():
        getattr(ir.ops, name).set_default(order)
    return ir.ops


def rows(kind):
    torch.manual_seed(0)
    whole = torch.randn(7, 300)
    return {"whole": whole[:, 100:164].contiguous(), "a part of each": whole[:, 100:164],
            "heads": whole[:, 100:292].view(7, 3, 64)}[kind]  # fmt: skip


@pytest.mark.parametrize(("kind", "is_c"), [("whole", True), ("a part of each", False), ("heads", False)])
def test_the_c_code_runs_only_where_rows_lie_one_after_another(kind, is_c):
    ops = prefer_c()
    x, weight = rows(kind), torch.linspace(0.5, 1.5, 64)
    assert (ops.rms_norm.dispatch(x, weight, 1e-5).provider == kernels.PROVIDER) == is_c
    norm = (x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()) * weight
    assert torch.allclose(ops.rms_norm(x, weight, 1e-5), norm, atol=1e-5)
    together, added = ops.fused_add_rms_norm(x.clone(), torch.ones_like(x), weight, 1e-5)
    norm = ((x + 1) / ((x + 1).square().mean(-1, keepdim=True) + 1e-5).sqrt()) * weight
    assert torch.allclose(added, x + 1)
    assert torch.allclose(together, norm, atol=1e-5)


def test_log_probs_come_without_ranks():
    from vllm.v1.sample.sampler import Sampler

    kernels.leave_ranks_out()
    log_probs, tokens = torch.randn(3, 9).log_softmax(-1), torch.tensor([4, 0, 8])
    ours = Sampler.gather_logprobs(log_probs, 0, tokens)
    assert torch.equal(ours.logprobs[:, 0], log_probs[range(3), tokens])
    assert ours.logprob_token_ids.tolist() == [[4], [0], [8]] and ours.selected_token_ranks.tolist() == [
        0,
        0,
        0,
    ]


def test_without_a_compiler_the_compiled_mode_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"--compile: there is no C\+\+ compiler \(no-such-compiler\): install g"):
        kernels.options(is_compiled=True)


def test_a_compiled_engine_takes_new_weights_and_draws_what_an_eager_one_draws(
    engine, tiny_policy, other_policy, monkeypatch
):
    monkeypatch.setattr("vllm.v1.engine.core.cleanup_dist_env_and_memory", lambda: None)  # `engine` needs the groups
    monkeypatch.setattr(torch._dynamo.config, "disable", True)  # so that it is taken back
    prompts = [[5, 6, 7], [8, 9]]
    how = Sampling(4, 16, seeds=[1, 2])
    compiled = VllmEngine(tiny_policy, EngineOptions(compile=True), max_model_len=96)
    assert compiled.swap_fault(lambda: checkpoints.disk_weights(tiny_policy)) is None
    for policy in (other_policy, tiny_policy):
        drawn = []
        for one in (engine, compiled):
            one.load(checkpoints.disk_weights(policy))
            drawn.append(one.generate(prompts, how))
        eager, ours = (torch.tensor([p for group in groups for c in group for p in c.log_probs]) for groups in drawn)
        assert torch.allclose(eager, ours, atol=1e-4)
    compiled.close()
    prefer_c()  # `engine` goes on


def test_compiled_code_is_kept_for_policies_of_one_kind_wherever_they_lie(tiny_policy, other_policy, make_policy):
    from vllm.engine.arg_utils import EngineArgs

    kernels.key_by_content()
    kernels.key_by_content()  # as every engine does
    keys = []
    for policy in (tiny_policy, other_policy, make_policy(intermediate_size=80)):
        config = EngineArgs(model=str(policy), max_model_len=96, dtype="float32").create_engine_config()
        keys.append(config.compute_hash())
        assert config.model_config.model == str(policy)
    assert keys[0] == keys[1] != keys[2]


START = """
import sys
from pathlib import Path
from stages.core.drawing.engine import EngineOptions, VllmEngine
VllmEngine(Path(sys.argv[1]), EngineOptions(compile=True), max_model_len=96)
from torch._dynamo.utils import counters
print("counts", counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"])
"""


def test_of_two_start_policies_of_one_kind_only_the_first_is_compiled(tiny_policy, other_policy, tmp_path):
    """Each in a process of its own, as in two iterations."""
    counts = []
    for policy in (tiny_policy, other_policy):
        command = [sys.executable, "-c", START, str(policy)]
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        counts.append([*map(int, done.stdout.partition("counts ")[2].split())])
    (compiled, _), (compiled_again, loaded) = counts
    assert compiled > 0 == compiled_again
    assert loaded == compiled
