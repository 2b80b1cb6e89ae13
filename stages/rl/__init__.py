"""Explore: DAPO from a start policy for a fixed number of steps, every rollout kept.

Writes OUT/rollouts/step_*.jsonl, OUT/checkpoints/step_*/, OUT/log.tsv, OUT/metrics.json and OUT/manifest.json.
Killed at any moment, the same command goes on where it stopped; so does a finished run that is given more --steps. For
that OUT/state/, 12 bytes a trained parameter, is kept. As in DAPO there is no KL term, no entropy bonus and no reward
model.
"""

import importlib.util
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from stages.core.drawing.engine import EngineOptions, MemoryFraction
from stages.core.drawing.templates import TemplateName
from stages.core.errors import InputError
from stages.core.grading.rewards import RewardOptions
from stages.core.options import PATH, WITHOUT_EFFECT, above, at_least, at_most, below, one_of
from stages.core.policy.adapters import LoraOptions
from stages.core.progress import warn
from stages.core.provenance import Identity, digest, identify_run, manifest, versions
from stages.core.ranks import Ranks, process_state

if TYPE_CHECKING:
    from accelerate import Accelerator

    from stages.core.drawing.engine import VllmEngine
    from stages.core.drawing.rollouts import Prompt
    from stages.core.drawing.templates import Template
    from stages.core.grading.rewards import Rewards
    from stages.rl.rundir import RunDir

TOTALS = (
    *("num_groups", "num_kept", "num_surplus", "num_dropped", "num_rounds"),
    *("num_rollouts", "num_trained", "rollout_tokens", "update_tokens", "short_batch", "skipped_updates"),
    *(
        "grad_alarms",
        "mismatch_alarms",
        "timeouts",
        "errors",
        "seconds",
        "generate_s",
        "verify_s",
        "update_s",
        "handover_s",
        "valid_s",
    ),
)  # the columns of log.tsv whose sums metrics.json holds


@dataclass(frozen=True, kw_only=True)
class Options(EngineOptions, RewardOptions, LoraOptions):
    """The options with their defaults: the paper's, or DAPO's own if the paper is silent."""

    steps: Annotated[int, "training steps; in each, groups are drawn and the policy is updated", at_least(1)] = 200
    problems_per_step: Annotated[
        int, "groups in a full batch; dynamic sampling draws more, and the first informative ones fill it", at_least(1)
    ] = 512
    group_size: Annotated[int, "rollouts for each problem", at_least(2)] = 16
    max_tokens: Annotated[int, "most tokens in a completion", at_least(1)] = 2048
    temperature: Annotated[float, "sampling temperature", above(0)] = 1.0
    template: TemplateName = "boxed"
    max_rounds: Annotated[
        int,
        "rounds of drawing in a step, and full batches drawn in all of them, before one not full is taken as it is",
        at_least(1),
    ] = 10
    minibatches: Annotated[int, "optimizer updates on each step's rollouts", at_least(1)] = 16
    clip_low: Annotated[float, "the ratio is clipped below 1 - clip_low", above(0), below(1)] = 0.2
    clip_high: Annotated[float, "the ratio is clipped above 1 + clip_high", above(0)] = 0.28
    reward_correct: Annotated[float, "reward of a correct completion in the advantage, by math-verify alone"] = 1.0
    reward_wrong: Annotated[float, "reward of any other completion in the advantage, by math-verify alone"] = -1.0
    overlong_buffer: Annotated[
        int, "tokens before max_tokens over which the overlong penalty grows; 0 is off", at_least(0)
    ] = 512
    overlong_penalty: Annotated[float, "overlong penalty at max_tokens", at_least(0)] = 1.0
    advantage_eps: Annotated[float, "added to the group's standard deviation", at_least(0)] = 1e-6
    importance_cap: Annotated[
        float, "cap of the trainer/engine probability ratio that weighs a token; 0 is off", at_least(0)
    ] = 2.0
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
    tokens_per_microbatch: Annotated[
        int, "most tokens, padding included, in one forward and backward pass", at_least(1)
    ] = 16384
    gradient_checkpointing: Annotated[bool, "recompute activations in the backward pass to save memory"] = False
    dtype: Annotated[
        str,
        "compute type: float32, bfloat16, or auto (bfloat16 on a GPU, float32 elsewhere)",
        one_of("auto", "float32", "bfloat16"),
    ] = "auto"
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


def run(
    policy: Annotated[str, "start policy: a checkpoint directory or a hub id", PATH],
    problems: Annotated[Path, "problems to train on (JSONL)", PATH],
    out: Annotated[Path, "directory to write", PATH],
    options: Options,
    valid: Annotated[
        Path | None, "problems to measure avg@k on while it trains (JSONL); the run stays the same", WITHOUT_EFFECT
    ] = None,
    restart_if_changed: Annotated[
        bool,
        "if OUT holds a run with other settings, remove that and start over; more --steps alone go on",
        WITHOUT_EFFECT,
    ] = False,
) -> None:
    """Explore with DAPO from a start policy and keep every rollout.

    Example: rloop rl --policy loop/0/policy --problems loop/problems.jsonl --out loop/1/rl --template none --steps 2
    --problems-per-step 8 --max-tokens 72 --overlong-buffer 0 --minibatches 1 --lr 3e-4
    """
    given = locals()

    from stages.core.drawing.rollouts import asked_by
    from stages.core.grading import verifier
    from stages.core.lifetime import end_with_parent, going_on
    from stages.rl.rundir import RunDir

    end_with_parent()
    ranks = Ranks(options.tensor_parallel)
    path = ranks.together(lambda: _checked_places(policy, problems, out, options))
    asked = ranks.together(lambda: _asked(path, problems, valid, options, ranks))
    accelerator = _accelerator(options, out)
    if accelerator.is_main_process:
        _warn_of(asked, options.max_tokens)
    inputs = {"policy": digest(path), "problems": digest(problems)}
    resolved = {
        "processes": accelerator.num_processes,
        "template_digest": asked.template.digest,
        **asked.rewards.resolved,
    }
    identity = identify_run(run, given, inputs, versions() | verifier.VERSION, **resolved)
    _refuse_differences(ranks, identity, valid)
    directory = RunDir(out)
    with ExitStack() as stack:
        finished, done = ranks.on_first(lambda: _begin(directory, identity, restart_if_changed, stack))
        if not finished:
            paths = {"policy": policy, "problems": str(problems)}
            paths |= {"template_digest": asked_by(asked.prompts, asked.template)}
            paths |= {"valid": str(valid), "valid_digest": digest(valid)} if valid else {}
            with going_on(directory.where_it_goes_on):
                _go_on(accelerator, directory, done, identity, paths, path, asked, options)
        elif accelerator.is_main_process:
            warn(f"{out} already holds this run, finished: nothing to do")
        if accelerator.is_main_process and not options.keep_state:
            directory.forget_state()


def _checked_places(policy: str, problems: Path, out: Path, options: Options) -> Path:
    """Where the policy is on disk. Raises InputError for what can't be read or written, without a look inside."""
    from stages.core import outputs
    from stages.core.policy import checkpoints

    if problems == Path("-"):
        raise InputError("--problems -: name a file, for an interrupted run must find the same problems again")
    outputs.refuse_unwritable(out)
    if options.tracker != "none" and importlib.util.find_spec(options.tracker) is None:
        raise InputError(f"--tracker {options.tracker}: that package is not installed: pip install {options.tracker}")
    return checkpoints.resolve(policy)


def _refuse_differences(ranks: Ranks, identity: Identity, valid: Path | None) -> None:
    """Raise InputError if ranks see different files or packages: they would draw, and train on, different prompts."""
    seen = {**identity.inputs.digests, **identity.versions, "template": identity.parameters["template_digest"]}
    seen["reward"] = identity.parameters["reward_digest"]
    ranks.refuse_differences(seen | ({"valid": digest(valid)} if valid else {}))


class Asked(NamedTuple):
    """What the policy is asked: the prompts that fit its `context` (in tokens), and the ids of those that don't.

    `valid` are the prompts of the validation set, all of which fit.
    """

    prompts: "list[Prompt]"
    valid: "list[Prompt]"
    left_out: list[str]
    template: "Template"
    ends: tuple[list[int], list[str]]
    context: int
    rewards: "Rewards"


def _asked(path: Path, problems: Path, valid: Path | None, options: Options, ranks: Ranks) -> Asked:
    """Read and check policy and problems, without an engine."""
    from stages.core import records
    from stages.core.drawing import templates
    from stages.core.drawing.rollouts import make_prompts
    from stages.core.grading import rewards
    from stages.core.policy import adapters, checkpoints
    from stages.rl import validation

    rewarded = rewards.read(options)
    tokenizer = checkpoints.load_tokenizer(path)
    template = templates.load(options.template, tokenizer)
    ranks.refuse_uneven()
    checkpoints.check_shapes(path)
    checkpoints.check_divisible(path, ranks.tensor_parallel)
    adapters.check(path, options)
    context = checkpoints.context_length(path)
    asked = records.read_problems(problems)
    prompts, left_out = make_prompts(asked, template, tokenizer, options.max_tokens, context, problems)
    asked_too = validation.read(valid, template, tokenizer, options.max_tokens, context) if valid is not None else []
    rewards.check(rewarded, [*prompts, *asked_too], tokenizer, ranks.is_first)
    return Asked(prompts, asked_too, left_out, template, template.end_tokens(tokenizer), context, rewarded)


def _go_on(
    accelerator: "Accelerator",
    directory: "RunDir",
    done: int,
    identity: Identity,
    paths: dict[str, str],
    path: Path,
    asked: Asked,
    options: Options,
) -> None:
    """Do the steps after `done`, and finish the run."""
    if options.tracker != "none":
        config = {name: str(value) if isinstance(value, list) else value for name, value in asdict(options).items()}
        accelerator.init_trackers("rloop-rl", config=config)
    _explore(accelerator, directory, done, paths["policy"], path, identity.inputs.digests["policy"], asked, options)
    if accelerator.is_main_process:
        _finish(directory, identity, paths, options, asked.left_out)
    for tracker in accelerator.trackers:
        tracker.finish()


def _explore(
    accelerator: "Accelerator",
    directory: "RunDir",
    done: int,
    policy: str,
    path: Path,
    origin: str,
    asked: Asked,
    options: Options,
) -> None:
    """Build engine, grader, trainer and explorer, and do the steps that are left."""
    from stages.core.drawing.engine import Sampling
    from stages.core.lifetime import stop_signal
    from stages.rl import validation
    from stages.rl.explorer import Explorer
    from stages.rl.trainer import Trainer

    engine = _start_engine(accelerator, path, asked, options)
    trainer = Trainer(path, accelerator, options)
    stop_ids, stop = asked.ends
    sampling = Sampling(
        options.group_size, options.max_tokens, options.temperature, stop=tuple(stop), stop_token_ids=tuple(stop_ids)
    )
    with asked.rewards.grader() as grader, stop_signal() as stop_flag:
        explorer = Explorer(options, accelerator, engine, grader, trainer, asked.prompts, sampling, origin)
        explorer.validation = validation.of(asked.valid, sampling, options)
        apart = explorer.check_hand_over()
        if accelerator.is_main_process:
            warn(engine.capacity)
            warn(
                f"engine and trainer agree to {apart.mean:.1e} in log-probability on average, {apart.largest:.1e} at "
                f"most ({accelerator.mixed_precision} autocast)"
            )
        explorer.run(directory, stop_flag, done, policy)


def _start_engine(accelerator: "Accelerator", path: Path, asked: Asked, options: Options) -> "VllmEngine":
    """The engine of this rank, with room for the longest prompt and completion."""
    from stages.core.drawing.engine import VllmEngine, fitting

    longest, valid_longest = (
        max((len(prompt.token_ids) for prompt in prompts), default=0) + options.max_tokens
        for prompts in (asked.prompts, asked.valid)
    )
    with Ranks(options.tensor_parallel).raise_once():
        engine = VllmEngine(
            path,
            options,
            max_model_len=max(longest, valid_longest),
            sleeps=True,
            distributed=accelerator.num_processes > 1,
        )
    if not options.max_sequences:  # long prompts of --valid must not change the batches, whose rounding rollouts have
        engine.max_sequences = fitting(engine.cache_tokens, longest)
    return engine


def _accelerator(options: Options, out: Path) -> "Accelerator":
    import torch
    from accelerate import Accelerator

    from stages.core.policy.acceleration import uses_bfloat16

    tracker = None if options.tracker == "none" else options.tracker
    process_state()
    return Accelerator(
        cpu=not torch.cuda.is_available(),  # or several gloo processes would each take themselves for the only one
        mixed_precision="bf16" if uses_bfloat16(options.dtype) else "no",
        log_with=tracker,
        project_dir=str(out / "tracker") if tracker else None,
    )


def _begin(directory: "RunDir", identity: Identity, restart_if_changed: bool, stack: ExitStack) -> tuple[bool, int]:
    """Lock the run for as long as `stack` lives; whether it is finished, and after which step to go on."""
    from stages.core import outputs

    stack.enter_context(outputs.locked(directory.path))
    finished = directory.begin(identity, restart_if_changed)
    done = 0 if finished else directory.resume_step()
    if done:
        warn(f"going on after step {done}")
    return finished, done


def _finish(
    directory: "RunDir", identity: Identity, paths: dict[str, str], options: Options, left_out: list[str]
) -> None:
    """Check that every step was done, and write metrics.json and manifest.json."""
    from stages.rl import validation
    from stages.rl.rundir import step_name

    rows = directory.log_rows()
    assert [row["step"] for row in rows] == list(range(1, options.steps + 1)), "log.tsv does not hold each planned step"
    files = sorted(file.stem for file in directory.path.glob("rollouts/*.jsonl"))
    assert files == [step_name(step) for step in range(1, options.steps + 1)], "a step's rollouts are missing"
    totals = {name: sum(row[name] for row in rows) for name in TOTALS}
    metrics = {
        "steps": len(rows),
        **totals,
        "pass_rate_first": rows[0]["pass_rate"],
        "pass_rate_last": rows[-1]["pass_rate"],
        "entropy_last": rows[-1].get("entropy"),
        "grad_norm_max": _most(rows, "grad_norm_max"),
        "peak_memory_gib": _most(rows, "peak_memory_gib"),
        "num_preemptions": sum(row.get("num_preemptions", 0) for row in rows),
        **validation.figures(rows),
    }
    counts = {"steps": len(rows), "rollouts": int(totals["num_rollouts"]), "problems_left_out": left_out}
    directory.finish(metrics, manifest(identity, counts, totals["seconds"], **paths))


def _most(rows: list[dict[str, float]], name: str) -> float | None:
    """The largest value of a column; None if it is empty."""
    return max((row[name] for row in rows if name in row), default=None)


def _warn_of(asked: Asked, max_tokens: int) -> None:
    """Name the problems that are left out, and those of the validation set that are trained on, too."""
    from stages.core import tabular
    from stages.core.drawing.rollouts import no_room
    from stages.rl import validation

    if asked.left_out:
        warn(f"{no_room(asked.left_out, max_tokens, asked.context)}: they are left out")
    if ids := validation.in_both(asked.prompts, asked.valid):
        warn(
            f"{len(ids)} of {len(asked.valid)} problems of --valid are trained on, too ({tabular.some(ids)}): the "
            "figure will flatter the policy"
        )
