"""What `rloop rl` takes: paths, and the settings of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from stages.core.drawing.engine import MemoryFraction
from stages.core.drawing.request import RequestOptions
from stages.core.errors import InputError
from stages.core.options import PATH, ROUNDING, WITHOUT_EFFECT, above, at_least, at_most, below, following, one_of
from stages.core.policy.memory import TrainingOptions
from stages.rl import dapo


@dataclass(frozen=True, kw_only=True)
class Settings(TrainingOptions, RequestOptions):
    """The section `rl` of params.yaml: all but paths. The defaults are the paper's, or DAPO's where it is silent."""

    steps: Annotated[int, "training steps; each draws groups and updates the policy", at_least(1)] = 200
    problems_per_step: Annotated[
        int, "groups in a full batch; dynamic sampling draws more and keeps the first informative ones", at_least(1)
    ] = 512
    group_size: Annotated[int, "rollouts for each problem", at_least(2)] = 16
    temperature: Annotated[float, "sampling temperature", above(0)] = 1.0
    max_rounds: Annotated[
        int,
        "at most N sampling rounds, and N full batches' worth of groups, in a step; a short batch is then trained on",
        at_least(1),
    ] = 10
    minibatches: Annotated[int, "optimizer updates on each step's rollouts", at_least(1)] = 16
    clip_low: Annotated[float, "the ratio is clipped below 1 - clip_low", above(0), below(1)] = 0.2
    clip_high: Annotated[float, "the ratio is clipped above 1 + clip_high", above(0)] = 0.28
    reward_correct: Annotated[float, "a correct completion's reward in the advantage, with math-verify alone"] = 1.0
    reward_wrong: Annotated[float, "any other completion's reward in the advantage, with math-verify alone"] = -1.0
    overlong_buffer: Annotated[
        int, "tokens before max_tokens over which the overlong penalty grows; 0 is off", at_least(0)
    ] = following("512, at most a quarter of --max-tokens", lambda options: min(512, options.max_tokens // 4))
    overlong_penalty: Annotated[float, "overlong penalty at max_tokens", at_least(0)] = 1.0
    advantage: Annotated[
        str,
        "a rollout's advantage: its reward minus the group's mean, divided by the standard deviation (dapo), by "
        "nothing (centred), or by the mean (maxrl)",
        one_of(*dapo.ADVANTAGES),
    ] = "dapo"
    advantage_eps: Annotated[float, "added to what the advantage is divided by", at_least(0)] = 1e-6
    entropy_target: Annotated[
        float,
        "an entropy term keeps the policy from less entropy than this, in nats a token, by a coefficient that grows "
        "below it and falls above; 0 is off",
        at_least(0),
    ] = 0.0
    entropy_delta: Annotated[float, "that coefficient begins at 0 and changes by this each step", at_least(0)] = (
        following("1e-4 with --entropy-target", lambda options: 1e-4 if options.entropy_target else 0.0)
    )
    importance_cap: Annotated[
        float, "cap on the trainer/engine probability ratio that weights each token; 0 is off", at_least(0)
    ] = 2.0
    engine_log_probs: Annotated[
        bool,
        "take the engine's log-probs for the old ones, which spares the pass that scores later mini-batches; the clip "
        "then holds the engine's mismatch, too, and importance_cap weighs nothing",
    ] = False
    rollout_dtype: Annotated[
        str,
        "fp8: the engine's linear layers compute in FP8, their weights rounded anew at each hand-over, on a GPU that "
        "has it (RTX 40, L40S, H100 and newer); auto: as --dtype",
        one_of("auto", "fp8"),
    ] = "auto"
    lr: Annotated[float, "learning rate of AdamW after the warm-up", at_least(0), at_most(1)] = 1e-6
    warmup_steps: Annotated[int, "training steps over which the learning rate grows to its full value", at_least(0)] = (
        10
    )
    weight_decay: Annotated[float, "weight decay of AdamW", at_least(0)] = 0.1
    beta1: Annotated[float, "decay of AdamW's first moment", at_least(0), below(1)] = 0.9
    beta2: Annotated[float, "decay of AdamW's second moment", at_least(0), below(1)] = 0.999
    max_grad_norm: Annotated[float, "the gradient is scaled down to this norm", above(0)] = 1.0
    alarm_grad_norm: Annotated[
        float, "a gradient norm above this is counted as an alarm in the log", WITHOUT_EFFECT
    ] = 50.0
    memory_fraction: MemoryFraction = 0.5
    mismatch_bound: Annotated[
        float,
        "trainer/engine log-prob difference allowed at start-up: the largest in float32, the mean in bfloat16; "
        "0 is 1e-3 in float32, 0.1 in bfloat16",
        at_least(0),
        WITHOUT_EFFECT,
    ] = 0.0
    checkpoint_every: Annotated[
        int, "training steps between checkpoints; the last step always has one", at_least(1)
    ] = 50
    save_every: Annotated[
        int, "training steps between the states that a killed run resumes from", at_least(1), WITHOUT_EFFECT
    ] = 10
    keep_state: Annotated[
        bool, "keep the last state of a finished run, so that more --steps can go on from it", WITHOUT_EFFECT
    ] = True
    valid_every: Annotated[
        int,
        "training steps between measurements on --valid; start policy and last step are measured too",
        at_least(1),
        WITHOUT_EFFECT,
    ] = 10
    valid_samples: Annotated[
        int, "rollouts for each problem of --valid: the k of its avg@k", at_least(1), WITHOUT_EFFECT
    ] = 4
    tracker: Annotated[
        str,
        "also log to an accelerate tracker: tensorboard, wandb, or none",
        one_of("none", "tensorboard", "wandb"),
        WITHOUT_EFFECT,
    ] = "none"
    seed: Annotated[int, "seed of data order and sampling"] = 0

    def __post_init__(self) -> None:
        """Raise InputError for options that cannot work together, by the flag's name."""
        super().__post_init__()
        if self.overlong_buffer > self.max_tokens:
            raise InputError(
                f"--overlong-buffer {self.overlong_buffer}: must be at most --max-tokens {self.max_tokens}"
            )
        if bool(self.entropy_target) != bool(self.entropy_delta):
            raise InputError(
                f"--entropy-delta {self.entropy_delta:g} with --entropy-target {self.entropy_target:g}: give both, or "
                "neither for no entropy term"
            )
        if self.rollout_dtype == "fp8" and not self.importance_cap:
            raise InputError("--rollout-dtype fp8 draws from another policy than is trained: it needs --importance-cap")
        if self.advantage == "maxrl" and (min(self.reward_correct, self.reward_wrong) < 0 or self.overlong_buffer):
            raise InputError(
                "--advantage maxrl divides by the mean reward, so none may be below 0: give --reward-wrong 0 and "
                "--overlong-buffer 0"
            )


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """The options of `rloop rl`."""

    policy: Annotated[str, "start policy: a checkpoint directory or a hub id", PATH]
    problems: Annotated[Path, "problems to train on (JSONL)", PATH]
    out: Annotated[Path, "directory to write", PATH]
    valid: Annotated[
        Path | None, "problems to measure avg@k on during training (JSONL), which it does not affect", WITHOUT_EFFECT
    ] = None
    restart_if_changed: Annotated[
        bool,
        "if OUT holds a run with other settings, move it aside and start over; a run is continued if only --steps grew",
        WITHOUT_EFFECT,
    ] = False
    exact: Annotated[
        bool,
        "go on only if floats are rounded as before (the same processes, micro-batch, versions, ...); on a GPU also "
        "compute in a fixed order, which is slower",
        ROUNDING,
    ] = False

    def __post_init__(self) -> None:
        """Raise InputError for inputs that an interrupted run could not read again."""
        super().__post_init__()
        for name, path in (("problems", self.problems), ("valid", self.valid)):
            if path == Path("-"):
                raise InputError(f"--{name} -: name a file: an interrupted run must find the same problems again")
