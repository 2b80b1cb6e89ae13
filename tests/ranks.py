"""Run under a launcher: FSDP2 over gloo. accelerate offers it on GPUs only; the sharding itself runs on the CPU too.

torchrun --nproc_per_node 2 -m tests.ranks gradient POLICY OUT ddp|fsdp2     the gradient of one fixed batch, to a file
torchrun --nproc_per_node 2 -m tests.ranks rl ...                            the stage, its policy sharded
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType

from rloop_cli.app import main as rloop
from stages import rl
from stages.rl.trainer import Trainer


def shard(accelerator: Accelerator) -> Accelerator:
    """What accelerate does with configs/accelerate/*-fsdp2.yaml where there are GPUs."""
    accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    return accelerator


def gradient(policy: str, out: str, kind: str) -> None:
    from tests.test_trainer import OBJECTIVE, some_rollouts

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    if kind == "fsdp2":
        shard(accelerator)
    trainer = Trainer(Path(policy), accelerator, OBJECTIVE)
    sharded = any(hasattr(parameter, "full_tensor") for parameter in trainer.model.parameters())
    assert sharded == (kind == "fsdp2")
    sums = trainer.gradient(some_rollouts(31))
    gradients = {}
    for name, parameter in accelerator.unwrap_model(trainer.model).named_parameters():
        gradient = parameter.grad
        gradients[name] = (gradient.full_tensor() if sharded else gradient).clone()
    trainer.optimizer.zero_grad()
    state = Path(out).parent / "state"
    trainer.save_state(state)
    norms = trainer.update(some_rollouts(31, seed=1), 1e-3).grad_norms
    weights = {name: weight.clone() for name, weight in trainer.weights()}
    trainer.load_state(state)
    trainer.update(some_rollouts(31, seed=1), 1e-3)
    again = {name: weight.clone() for name, weight in trainer.weights()}
    if accelerator.is_main_process:
        torch.save({"gradient": gradients, "sums": sums, "norms": norms, "weights": weights, "again": again}, out)
    accelerator.wait_for_everyone()


def stage() -> None:
    """`rloop rl` as it is, but for the accelerator."""
    make = rl._accelerator
    rl._accelerator = lambda knobs, out: shard(make(knobs, out))
    rloop()


if __name__ == "__main__":
    if sys.argv[1] == "gradient":
        gradient(*sys.argv[2:])
    else:
        stage()
