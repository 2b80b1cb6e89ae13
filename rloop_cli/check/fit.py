"""Does it fit: the plan of memory.py for every call that trains or draws, and rules on the number of processes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rloop_cli.check.calls import Call, Launch, base_of, launched, policies_of
from stages.core.errors import InputError
from stages.core.policy import adapters, checkpoints, memory
from stages.core.policy.memory import Gpus, Shape


class Plan(NamedTuple):
    """What one call needs, in GiB a GPU: parts by moment ("updates", "draws"), their sum and the cache in tokens."""

    call: Call
    shape: Shape
    gpus: Gpus
    moments: dict[str, dict[str, float]]

    @property
    def engine(self) -> float:
        """GiB of the weights in the engine."""
        a_weight = memory.widths(self.call.options.dtype).product
        return a_weight * self.shape.parameters / getattr(self.call.options, "tensor_parallel", 1) / memory.GIB

    @property
    def cache_tokens(self) -> float | None:
        """Tokens that one engine's cache holds."""
        cached = self.moments.get("draws", {}).get("cache tokens (thousands)")
        return None if cached is None else 1000 * cached


def process_faults(calls: Sequence[Call]) -> Iterator[str]:
    """What rl, rft, sample and eval refuse when they see how many processes there are."""
    for call in calls:
        number = launched(call).num_processes if call.stage else None
        shared, batch = (getattr(call.options, name, 1) for name in ("tensor_parallel", "batch_size"))
        if number and number % shared:
            yield (
                f"{call.origin('--tensor-parallel')}: --tensor-parallel {shared}: must divide the number of processes, "
                f"{number}"
            )
        if number and call.stage == "rft" and batch % number:
            yield f"{call.origin('--batch-size')}: --batch-size {batch} does not divide among {number} processes"


def policy_faults(calls: Sequence[Call]) -> Iterator[str]:
    """Adapters that a policy has no layers for, and engines that can't be shared by so many."""
    for call in calls:
        base = base_of(calls, named[0]).path if (named := policies_of(call, calls)) else None
        if base is None:
            continue
        for refuse in (_refuse_sharing, _refuse_adapters):
            try:
                refuse(base, call.options)
            except InputError as error:
                yield f"{call.origin(str(error).split()[0])}: {error}"


def _refuse_sharing(base: Path, options: Any) -> None:
    if getattr(options, "tensor_parallel", 1) > 1:
        checkpoints.check_divisible(base, options.tensor_parallel)


def _refuse_adapters(base: Path, options: Any) -> None:
    if getattr(options, "lora_rank", 0):
        adapters.check(base, options)


def plans(calls: Sequence[Call], gpu_gib: float) -> tuple[list[Plan], list[str]]:
    """The plans of all calls that train or draw, alike ones once, and why there is none for others."""
    by_kind: dict[str, Plan] = {}
    unknown: dict[str, None] = {}
    for call in calls:
        if call.stage not in ("rl", "rft", "sample", "eval") or not (named := policies_of(call, calls)):
            continue
        base = base_of(calls, named[0]).path
        if base is None:
            continue
        launch = launched(call)
        try:
            shape = memory.read_shape(base)
        except InputError as error:
            unknown[str(error)] = None
            continue
        if launch.num_processes is None:
            unknown[f"{' '.join(call.launch)} names no number of processes"] = None
        else:
            plan = _plan(call, shape, launch, gpu_gib)
            by_kind.setdefault(f"{call.stage} {plan.moments}", plan)
    return list(by_kind.values()), list(unknown)


def _plan(call: Call, shape: Shape, launch: Launch, gpu_gib: float) -> Plan:
    options, gpus = call.options, Gpus(gpu_gib, launch.num_processes or 1, launch.is_sharded)
    moments: dict[str, dict[str, float]] = {}
    if call.stage in ("rl", "rft"):
        tokens = memory.planned_tokens(shape, options, gpus)
        moments["updates"] = memory.update(shape, replace(options, tokens_per_microbatch=tokens), gpus)
    if call.stage != "rft" and gpu_gib:
        moments["draws"] = memory.generation(shape, options, gpus, trains=call.stage == "rl")
    return Plan(call, shape, gpus, moments)


def lines(plans: Sequence[Plan], gpu_gib: float, longest: Mapping[str, int]) -> Iterator[str]:
    """A line for each plan: GiB by moment, and what the cache holds."""
    for plan in plans:
        said = [f"{moment} in {parts['sum']:.1f}" for moment, parts in plan.moments.items()]
        if plan.call.stage != "rft" and not gpu_gib:
            said.append(f"engine's weights {plan.engine:.1f} (--gpu-memory says what is left for its cache)")
        cached = "" if plan.cache_tokens is None else f", cache of {plan.cache_tokens / 1000:,.0f} k tokens"
        if plan.cache_tokens and plan.call.name in longest:
            cached += f", {plan.cache_tokens // longest[plan.call.name]:,.0f} of the longest sequences"
        yield f"{plan.call.stage}: {', '.join(said)}{f' of {gpu_gib:g}' if gpu_gib else ''} GiB a GPU{cached}"


def faults(plans: Sequence[Plan], gpu_gib: float, longest: Mapping[str, int]) -> Iterator[str]:
    """A line for each plan that does not fit a GPU, with the option that does."""
    for call, shape, gpus, moments in plans if gpu_gib else ():
        said: dict[str, str | None] = {}
        if "updates" in moments:
            said["--tokens-per-microbatch"] = memory.update_advice(shape, call.options, gpus)
        if "draws" in moments:
            needed, trains = longest.get(call.name, 1), call.stage == "rl"
            said["--memory-fraction"] = memory.engine_advice(shape, call.options, needed, gpus, trains=trains)
        for flag, advice in said.items():
            if advice:
                yield f"{call.origin(flag)}: {call.stage}: {advice}"
