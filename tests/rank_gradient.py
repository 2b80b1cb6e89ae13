"""Run under a launcher: write the gradient of one fixed batch of rollouts, gathered over the ranks, to a file.

torchrun --nproc_per_node 2 -m tests.rank_gradient POLICY OUT ddp|fsdp2
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType

from stages.core.trainer import Trainer
from tests.test_trainer import OBJECTIVE, some_rollouts


def main(policy: str, out: str, kind: str) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    if kind == "fsdp2":  # accelerate offers FSDP on GPUs only; the sharding itself runs on gloo just as well
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
    trainer = Trainer(Path(policy), accelerator, OBJECTIVE)
    sharded = any(hasattr(parameter, "full_tensor") for parameter in trainer.model.parameters())
    assert sharded == (kind == "fsdp2")
    sums = trainer.gradient(some_rollouts(31))
    gradients = {}
    for name, parameter in accelerator.unwrap_model(trainer.model).named_parameters():
        gradient = parameter.grad
        gradients[name] = (gradient.full_tensor() if sharded else gradient).clone()
    trainer.optimizer.zero_grad()
    stats = trainer.update(some_rollouts(31, seed=1), 1e-3)
    weights = dict(trainer.weights())
    if accelerator.is_main_process:
        torch.save({"gradient": gradients, "sums": sums, "norms": stats.grad_norms, "weights": weights}, out)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(*sys.argv[1:])
