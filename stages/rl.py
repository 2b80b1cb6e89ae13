"""Explore: DAPO from a start policy for a fixed number of steps, every rollout kept.

Writes OUT/rollouts/step_*.jsonl, OUT/checkpoints/step_*/, OUT/log.tsv, OUT/metrics.json and OUT/manifest.json.
Killed at any moment, the same command goes on where it stopped. What was left out on purpose: a KL term, an entropy
bonus and a reward model; DAPO has none.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """Every knob of the stage with its default: the paper's, or DAPO's own where the paper is silent."""

    steps: Annotated[int, "training steps; in each, groups are generated and the policy is updated"] = 200
    problems_per_step: Annotated[int, "groups in a full batch (dynamic sampling refills up to this number)"] = 512
    group_size: Annotated[int, "rollouts for each problem"] = 16
    max_tokens: Annotated[int, "most tokens in a completion"] = 2048
    temperature: Annotated[float, "sampling temperature"] = 1.0
    template: Annotated[str, "prompt template: boxed, qwen-math, r1-zero, dapo, chat, none or a file"] = "boxed"
    max_rounds: Annotated[int, "rounds of generation in a step before a batch that is not full is taken as it is"] = 10
    minibatches: Annotated[int, "optimizer updates on each step's rollouts"] = 16
    clip_low: Annotated[float, "the ratio is clipped below 1 - clip_low"] = 0.2
    clip_high: Annotated[float, "the ratio is clipped above 1 + clip_high"] = 0.28
    reward_correct: Annotated[float, "reward of a correct completion in the advantage"] = 1.0
    reward_wrong: Annotated[float, "reward of any other completion in the advantage"] = -1.0
    overlong_buffer: Annotated[int, "tokens before max_tokens over which the overlong penalty grows; 0 is off"] = 512
    overlong_penalty: Annotated[float, "overlong penalty at max_tokens"] = 1.0
    advantage_eps: Annotated[float, "added to the group's standard deviation"] = 1e-6
    importance_cap: Annotated[float, "cap of the trainer/engine probability ratio that weighs a token; 0 is off"] = 2.0
    lr: Annotated[float, "learning rate of AdamW after the warm-up"] = 1e-6
    warmup_steps: Annotated[int, "training steps over which the learning rate grows from 0"] = 10
    weight_decay: Annotated[float, "weight decay of AdamW"] = 0.1
    beta1: Annotated[float, "first moment's decay of AdamW"] = 0.9
    beta2: Annotated[float, "second moment's decay of AdamW"] = 0.999
    max_grad_norm: Annotated[float, "the gradient is scaled down to this norm"] = 1.0
    alarm_grad_norm: Annotated[float, "a gradient norm above this is counted as an alarm in the log"] = 50.0
    tokens_per_microbatch: Annotated[int, "most tokens, padding included, in one forward and backward pass"] = 16384
    gradient_checkpointing: Annotated[bool, "recompute activations in the backward pass to save memory"] = False
    dtype: Annotated[str, "compute type: float32, bfloat16, or auto (bfloat16 on a GPU, float32 elsewhere)"] = "auto"
    memory_fraction: Annotated[float, "share of a GPU's memory for the engine"] = 0.5
    mismatch_bound: Annotated[float, "float32: largest trainer/engine log-prob difference allowed at start-up"] = 1e-3
    checkpoint_every: Annotated[int, "training steps between checkpoints; the last step always has one"] = 50
    tracker: Annotated[str, "also log to an accelerate tracker: tensorboard, wandb, or none"] = "none"
    seed: Annotated[int, "seed of data order and sampling"] = 0


def run(
    policy: Annotated[str, "start policy: a checkpoint directory or a hub id"],
    problems: Annotated[Path, "problems to train on (JSONL)"],
    out: Annotated[Path, "directory to write"],
    knobs: Knobs,
) -> None:
    """Explore with DAPO from a start policy and keep every rollout.

    Example: rloop rl --policy toy/policy --problems toy/train.jsonl --out runs/1/rl --template none --steps 3
    """
    from stages.core.exploration import explore

    explore(policy, problems, out, knobs)
