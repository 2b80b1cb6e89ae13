"""Run on two gloo ranks: accelerate launch --config_file configs/accelerate/gpu8-fsdp2.yaml --num_processes 2 ...

    -m tests.ranks numbers POLICY OUT     gradients and log-probabilities of one fixed batch, to a file; of adapters
                                          on the policy in `coarse` beside OUT, to lora.pt there
    -m tests.ranks hybrid POLICY OUT      the same in float32 on four ranks: two groups of two, each with all weights
    -m tests.ranks rl|rft ...             the stage, its policy sharded
    -m tests.ranks starved rl ...         the same, and the second rank has no memory for its first update

accelerate offers FSDP on GPUs only; the sharding itself runs on the CPU, too. So it is told that there are GPUs, and
goes its usual way from what the launcher puts into the environment.
"""

import os
import socket
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from pytest import MonkeyPatch
from trl.trainer.utils import add_fused_lm_head

from rloop_cli.app import main as rloop
from stages import rl
from stages.core.policy import heads
from stages.core.policy.adapters import trained
from stages.core.ranks import STEP_LIMIT
from stages.rl.trainer import Trainer, start_accelerator
from tests import warm

ROOT = Path(__file__).parents[1]
LAUNCH = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"),
    *("--config_file", str(ROOT / "configs/accelerate/gpu8-fsdp2.yaml"), "-m", "tests.ranks"),
)
HYBRID = {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}
DDP = (  # to be followed by a command of rloop
    *(sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"),
    *("--config_file", str(ROOT / "configs/accelerate/cpu2.yaml"), "-m", "rloop_cli"),
)
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
LIMIT_S = 400  # beside other work, too; a rank that is not done then is taken for one that hangs


def start(arguments, *directories):
    """Start `rloop ARGUMENTS` as one gloo rank in each of `directories`, forked; each writes to log-<rank> there.

    In the place of arguments a function may stand, which gets directory and log.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = warm.context()
    work = arguments if callable(arguments) else partial(warm._command, list(map(str, arguments)))
    processes = []
    for rank, directory in enumerate(directories):
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(directories), "MASTER_PORT": port}
        launched |= {"LOCAL_WORLD_SIZE": len(directories), "MASTER_ADDR": "127.0.0.1", **ENVIRONMENT}
        processes.append(context.Process(target=_be_rank, args=(launched, work, str(directory))))
        processes[-1].start()
    return processes


def _be_rank(launched, work, directory):
    os.environ |= {name: str(value) for name, value in launched.items()}
    work(directory, f"{directory}/log-{launched['RANK']}")


def finish(processes):
    """The exit codes of the ranks; None for one that hangs, which is ended."""
    end = time.monotonic() + LIMIT_S
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def offer_fsdp() -> None:
    """Let several gloo ranks pass for GPUs where the launcher asks for FSDP."""
    begin = PartialState.__init__

    def begin_as_gpus(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU and os.environ["ACCELERATE_USE_FSDP"] == "true":
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = begin_as_gpus


def numbers(policy: str, out: str) -> None:
    numbers = {}
    for kind, dtype in (*product(("ddp", "fsdp2"), ("float32", "bfloat16")), ("fsdp2-fused", "float32")):
        os.environ["ACCELERATE_USE_FSDP"] = str(kind != "ddp").lower()
        AcceleratorState._reset_state(reset_partial_state=True)
        with MonkeyPatch.context() as patch:
            if kind == "fsdp2-fused":  # as on a GPU
                patch.setattr(heads, "add_plain_head", partial(add_fused_lm_head, outputs=("log_probs", "entropy")))
            numbers[kind, dtype] = numbers_of(policy, Path(out).parent / f"{kind}-{dtype}", kind, dtype)
    AcceleratorState._reset_state(reset_partial_state=True)
    coarse = str(Path(out).parent / "coarse")  # the same in bfloat16
    lora = numbers_of(coarse, Path(out).parent / "lora", "fsdp2", "bfloat16", lora_rank=8)
    if PartialState().is_main_process:
        torch.save(numbers, out)
        torch.save(lora, Path(out).with_name("lora.pt"))
    PartialState().wait_for_everyone()


def hybrid(policy: str, out: str) -> None:
    found = numbers_of(policy, Path(out).with_suffix(""), "fsdp2", "float32")
    if PartialState().is_main_process:
        torch.save(found, out)
    PartialState().wait_for_everyone()


def starve() -> None:
    """Let the second rank have no memory for its first update: the check of the hand-over scores, this sums up."""
    accumulate = Trainer._accumulate

    def starved(self, *how):
        if not self.ranks.is_first:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return accumulate(self, *how)

    Trainer._accumulate = starved


def numbers_of(policy: str, state: Path, kind: str, dtype: str, **changes: int) -> dict:
    from tests.test_trainer import OPTIONS, some_rollouts

    accelerator = start_accelerator(rl.Settings(dtype=dtype))
    assert accelerator.num_processes == int(os.environ["WORLD_SIZE"]) > 1
    planned = OPTIONS.tokens_per_microbatch * (1 + accelerator.process_index)  # as on GPUs of different memory
    changes = {"gradient_checkpointing": True, "tokens_per_microbatch": planned} | changes
    trainer = Trainer(Path(policy), accelerator, replace(OPTIONS, **changes))
    assert trainer.token_budget == OPTIONS.tokens_per_microbatch
    sharded = any(hasattr(parameter, "full_tensor") for parameter in trainer.model.parameters())
    assert sharded == (kind != "ddp")
    group = torch.distributed.group.WORLD._get_backend(accelerator.device)
    assert group.options._timeout == STEP_LIMIT
    log_probs = trainer.log_probs(some_rollouts(31))
    assert all(weight.numel() for _, weight in trainer.weights())  # as at the start of rl: scored, then handed over
    sums = trainer.gradient(some_rollouts(31))
    gradients = gradients_of(trainer, sharded)
    trainer.release()
    trainer.gradient(some_rollouts(31), 0.5)
    with_entropy = gradients_of(trainer, sharded)
    trainer.release()
    trainer.save_state(state / "first")  # before the first update: there are no moments yet
    norms = trainer.update(some_rollouts(31, seed=1), 1e-3).grad_norms
    trainer.save_state(state / "second")
    trainer.update(some_rollouts(31, seed=2), 1e-3)
    weights = {name: weight.clone() for name, weight in trainer.weights()}
    if "lora_rank" in changes:
        assert_merged(accelerator.unwrap_model(trainer.model), weights)
    again = {}
    for part in ("first", "second"):
        trainer.load_state(state / part)
        if part == "first":
            trainer.update(some_rollouts(31, seed=1), 1e-3)
        trainer.update(some_rollouts(31, seed=2), 1e-3)
        again[part] = {name: weight.clone() for name, weight in trainer.weights()}
    if kind == "ddp" and dtype == "float32":
        check_starved(trainer, state / "second")
    return {
        "gradient": gradients, "with_entropy": with_entropy, "sums": sums, "log_probs": log_probs, "norms": norms,
        "weights": weights, "again": again,
    }  # fmt: skip


def gradients_of(trainer: Trainer, sharded: bool) -> dict[str, torch.Tensor]:
    parameters = trained(trainer.accelerator.unwrap_model(trainer.model)).items()
    return {name: (weight.grad.full_tensor() if sharded else weight.grad).clone() for name, weight in parameters}


def check_starved(trainer: Trainer, state: Path) -> None:
    """Both ranks halve the micro-batch of an update as often as one of them needs, and it comes to the same."""
    from tests.test_trainer import some_rollouts

    trainer.settings = replace(trainer.settings, minibatches=2)
    forward, weights = trainer._forward, []
    budget = trainer.token_budget
    for is_limited in (False, True):

        def limited(batch, is_limited=is_limited):
            if is_limited and not trainer.ranks.is_first and trainer.token_budget > budget / 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(batch)

        trainer._forward = limited
        trainer.load_state(state)
        stats = trainer.update(some_rollouts(31, seed=3), 1e-3)
        assert stats.num_halvings == 2 * is_limited
        weights.append({name: weight.clone() for name, weight in trainer.weights()})
    assert all((weight - weights[1][name]).abs().max() < 1e-5 for name, weight in weights[0].items())


def assert_merged(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Sharded weights and adapters, each gathered first, come to the same as what the trainer hands over."""
    whole = {name: parameter.full_tensor().detach().float() for name, parameter in model.named_parameters()}
    for name in (name for name in whole if name.endswith(".base_layer.weight")):
        layer = name.removesuffix(".base_layer.weight")
        a, b = (whole[f"{layer}.lora_{half}.default.weight"] for half in "AB")
        merged = (whole[name] + model.get_submodule(layer).scaling["default"] * b @ a).bfloat16()
        assert (merged == weights[f"{layer}.weight"]).float().mean() > 0.99  # the rest falls on the other side
        assert (merged == whole[name].bfloat16()).float().mean() < 0.8


if __name__ == "__main__":
    offer_fsdp()
    if sys.argv[1] in ("numbers", "hybrid"):
        {"numbers": numbers, "hybrid": hybrid}[sys.argv[1]](*sys.argv[2:])
    else:
        if sys.argv[1] == "starved":
            del sys.argv[1]
            starve()
        rloop()
