"""Explore: DAPO from a start policy for a fixed number of steps, every rollout kept.

Writes OUT/rollouts/step_*.jsonl, OUT/checkpoints/step_*/, OUT/log.tsv, OUT/metrics.json and OUT/manifest.json.
Killed at any moment, the same command goes on where it stopped; so does a finished run that is given more --steps. For
that OUT/state/, 12 bytes a trained parameter, is kept. As in DAPO there is no KL term and no reward model, and an
entropy term only with --entropy-target.
"""

import importlib.util
import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.errors import InputError
from stages.core.progress import warn
from stages.core.provenance import Identity, identify, manifest, recorded, versions
from stages.core.ranks import Ranks
from stages.rl.options import Options as Options
from stages.rl.options import Settings as Settings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from stages.core.drawing.engine import VllmEngine
    from stages.core.drawing.request import Request
    from stages.core.policy.memory import Gpus
    from stages.rl.rundir import RunDir

TRAIN, VALID = "problems", "valid"  # the sets of the request
FP8 = "fp8_per_tensor"  # vLLM's name for weights that it rounds itself, at its start and when they are handed over


def run(options: Options) -> None:
    """Explore with DAPO from a start policy and keep every rollout.

    Example: rloop rl --policy loop/0/policy --problems loop/problems.jsonl --out loop/1/rl --template none --steps 2
    --problems-per-step 8 --max-tokens 72 --overlong-buffer 0 --minibatches 1 --lr 3e-4
    """
    from stages.core.grading import verifier
    from stages.core.lifetime import end_with_parent, going_on
    from stages.core.policy.acceleration import compute_exactly
    from stages.rl.rundir import BUDGET, RunDir
    from stages.rl.trainer import start_accelerator, token_budget

    end_with_parent()
    ranks = Ranks(options.tensor_parallel)
    request = ranks.together(lambda: _read(options, ranks))
    if options.exact:
        compute_exactly()
    accelerator = ranks.together(lambda: start_accelerator(options, options.out))
    inputs, directory = recorded([request.path, options.problems], ranks), RunDir(options.out)
    rounding = {"processes": ranks.num_ranks, BUDGET: token_budget(request.path, accelerator, options)}
    identity = identify("rl", options, inputs, versions() | verifier.VERSION, rounding, **request.resolved)
    if not options.tokens_per_microbatch:  # a run goes on with what it was planned with, on whatever GPU
        known = ranks.on_first(lambda: directory.planned_budget(identity))
        identity = replace(identity, parameters={**identity.parameters, BUDGET: known or rounding[BUDGET]})
    seen = {**identity.inputs.digests, **identity.versions, **request.seen}
    ranks.refuse_differences(seen | (recorded([options.valid], ranks).digests if options.valid else {}))
    with ExitStack() as stack:
        finished, done = ranks.on_first(lambda: _begin(directory, identity, options, stack))
        if not finished:
            with going_on(directory.where_it_goes_on), ranks.raise_once():
                _explore(accelerator, ranks, directory, done, identity, request, options)
            if ranks.is_first:
                _finish(directory, identity, request, options)
            for tracker in accelerator.trackers:
                tracker.finish()
        elif ranks.is_first:
            warn(f"{options.out} already holds this run, finished: nothing to do")
        if ranks.is_first and not options.keep_state:
            directory.forget_state()


def _read(options: Options, ranks: Ranks) -> "Request":
    """Read and check policy and problems, without an engine. Raises InputError for the first fault."""
    from stages.core import outputs, tabular
    from stages.core.drawing.request import read_request
    from stages.core.policy import acceleration, adapters
    from stages.rl import validation

    outputs.refuse_unwritable(options.out)
    if options.tracker != "none" and importlib.util.find_spec(options.tracker) is None:
        raise InputError(f"--tracker {options.tracker}: that package is not installed: pip install {options.tracker}")
    request = read_request(
        [options.policy],
        {TRAIN: options.problems} | ({VALID: options.valid} if options.valid else {}),
        options,
        ranks,
        num_samples=options.group_size,
        temperature=options.temperature,
        log_probs=True,
    )
    if len(request.policies) > 1:
        raise InputError(f"--policy {options.policy} holds {len(request.policies)} checkpoints: name one of them")
    adapters.check(request.path, options)
    _refuse_unreachable(options.entropy_target, request.path)
    acceleration.check(options)
    if options.rollout_dtype == "fp8" and (fault := acceleration.fp8_fault(options.dtype, acceleration.capability())):
        raise InputError(f"--rollout-dtype fp8: {fault}: leave it out")
    if options.valid and (fault := request.too_long(VALID)):  # fewer problems would give another figure
        raise InputError(f"--valid {options.valid}: {fault}: lower it, or remove them")
    if ranks.is_first and (fault := request.too_long(TRAIN)):
        warn(f"{fault}: they are left out")
    if ranks.is_first and options.valid and (ids := validation.in_both(*request.sets.values())):
        warn(
            f"{len(ids)} of {len(request.sets[VALID])} problems of --valid are trained on, too ({tabular.some(ids)}): "
            "the figure will flatter the policy"
        )
    return request


def _refuse_unreachable(target: float, policy: Path) -> None:
    """Raise InputError for more nats a token than the policy's vocabulary allows."""
    from stages.core.policy import checkpoints

    vocabulary = checkpoints.load_config(policy).get_text_config().vocab_size
    if target >= (most := math.log(vocabulary)):
        raise InputError(
            f"--entropy-target {target:g}: must be below {most:.3g} nats a token, the most that a vocabulary of "
            f"{vocabulary:,} allows"
        )


def _begin(directory: "RunDir", identity: Identity, options: Options, stack: ExitStack) -> tuple[bool, int]:
    """Lock the run for as long as `stack` lives; whether it is finished, and after which step to go on."""
    from stages.core import outputs

    stack.enter_context(outputs.locked(directory.path))
    finished = directory.begin(identity, options.restart_if_changed, options.exact)
    done = 0 if finished else directory.resume_step()
    if done:
        warn(f"going on after step {done}")
    return finished, done


def _explore(
    accelerator: "Accelerator",
    ranks: Ranks,
    directory: "RunDir",
    done: int,
    identity: Identity,
    request: "Request",
    options: Options,
) -> None:
    """Build engine, grader, trainer and explorer, and do the steps after `done`."""
    from stages.core.lifetime import stop_signal
    from stages.core.policy import memory
    from stages.rl import validation
    from stages.rl.explorer import Explorer, StartPolicy
    from stages.rl.rundir import BUDGET
    from stages.rl.trainer import Trainer

    if options.tracker != "none":
        config = {name: str(value) if isinstance(value, list) else value for name, value in options.values.items()}
        accelerator.init_trackers("rloop-rl", config=config)
    ((name, path),) = request.policies.items()
    policy = StartPolicy(name, path, identity.inputs.digests[str(path)])
    if ranks.is_first:
        gpus = memory.Gpus(memory.gpu_memory(), ranks.num_ranks, accelerator.is_fsdp2)
        used = replace(options, tokens_per_microbatch=identity.parameters[BUDGET])
        for line in _advice(path, used, request.longest(), gpus):
            warn(line)
    engine = _start_engine(request, options)
    trainer = Trainer(path, accelerator, options)
    trainer.token_budget = identity.parameters[BUDGET]
    with request.rewards.grader() as grader, stop_signal() as stop_flag:
        explorer = Explorer(
            options, ranks, accelerator, engine, grader, trainer, request.sets[TRAIN], request.sampling, policy,
            validation.of(request.sets.get(VALID, []), request.sampling, options), stop_flag,
        )  # fmt: skip
        apart = explorer.check_hand_over()
        if ranks.is_first:
            warn(
                f"engine and trainer agree to {apart.mean:.1e} in log-probability on average, {apart.largest:.1e} at "
                f"most ({accelerator.mixed_precision} autocast)"
            )
        explorer.run(directory, done)


def _advice(policy: Path, options: Options, longest: int, gpus: "Gpus") -> list[str]:
    """What to change of what does not fit the GPU by the plan of docs/memory.md, in the update and in the engine."""
    from stages.core.policy import memory

    if (shape := memory.planned_shape(policy, gpus.gib)) is None:
        return []
    advice = memory.update_advice(shape, options, gpus), memory.engine_advice(shape, options, longest, gpus)
    return [line for line in advice if line]


def _start_engine(request: "Request", options: Options) -> "VllmEngine":
    """The engine of this rank, with room for the longest prompt and completion."""
    from stages.core.drawing.engine import fitting

    engine = request.start_engine(
        request.path, sleeps=True, quantization=FP8 if options.rollout_dtype == "fp8" else None
    )
    if not options.max_sequences:  # long prompts of --valid must not change the batches, whose rounding rollouts have
        engine.max_sequences = fitting(engine.cache_tokens, request.longest(TRAIN))
    return engine


def _finish(directory: "RunDir", identity: Identity, request: "Request", options: Options) -> None:
    """Check that every step was done, and write metrics.json and manifest.json."""
    from stages.core.drawing.rollouts import template_digest
    from stages.rl import steplog
    from stages.rl.rundir import step_name

    rows = directory.log_rows()
    assert [row["step"] for row in rows] == list(range(1, options.steps + 1)), "log.tsv does not hold each planned step"
    files = sorted(file.stem for file in directory.path.glob("rollouts/*.jsonl"))
    assert files == [step_name(step) for step in range(1, options.steps + 1)], "a step's rollouts are missing"
    metrics = steplog.metrics(rows)
    counts = {
        "steps": len(rows),
        "rollouts": int(metrics["num_rollouts"]),
        "problems_left_out": request.left_out[TRAIN],
    }
    about: dict[str, Any] = {"changes": directory.changes} if directory.changes else {}
    about |= {"template_digest": template_digest(request.sets[TRAIN], request.template)}
    about["rollout_digests"] = directory.rollout_digests()
    directory.finish(metrics, manifest(identity, counts, metrics["seconds"], **about))
