"""DAPO updates of a policy with accelerate, in one process or many, weights in float32.

The gradient of an update is that of one sum over all its tokens divided by their number, however the sequences are
spread over ranks and micro-batches.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.utils import disable_dropout_in_model

from stages.core.errors import InputError, in_one_line
from stages.core.lifetime import interrupts_wait
from stages.core.policy import acceleration, adapters, checkpoints, heads, memory
from stages.core.policy.batching import microbatches
from stages.core.policy.checkpoints import IGNORED, PADDING
from stages.core.progress import warn
from stages.core.ranks import Ranks, process_state
from stages.rl import dapo, prefixes
from stages.rl.batching import shares, split
from stages.rl.options import Settings

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process that saves its state


@dataclass(eq=False)
class TokenRollout:
    """A rollout as the trainer needs it; `engine_log_probs` has one entry for each completion token, in nats.

    `old_log_probs` are the trainer's own before the step's first update; None if they are computed on the fly.
    """

    prompt_ids: list[int]
    completion_ids: Sequence[int]
    engine_log_probs: Sequence[float]
    advantage: float
    old_log_probs: torch.Tensor | None = field(default=None, repr=False)

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass
class UpdateStats:
    """A step's updates: sums over its completion tokens, and what became of each optimizer update.

    The mismatch counts `num_compared` of the tokens: those that are scored with the weights that sampled.
    """

    num_tokens: int = 0
    num_compared: int = 0
    loss: float = 0.0
    entropy: float = 0.0
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    mismatch: float = 0.0
    mismatch_max: float = 0.0
    grad_norms: list[float] = field(default_factory=list)
    num_skipped: int = 0
    num_halvings: int = 0

    SUMS = ("loss", "entropy", "clipped_low", "clipped_high", "mismatch")

    def mean(self, name: str) -> float:
        """A sum divided by the number of tokens; NaN if nothing was trained on."""
        number = self.num_compared if name == "mismatch" else self.num_tokens
        return float(getattr(self, name)) / number if number else float("nan")


class Trainer:
    """A policy under training; every rank holds one and calls the same methods in the same order.

    With LoRA only the adapters are trained: optimizer and state hold nothing else, and the weights are those of `path`.
    A micro-batch has at most `token_budget` tokens; it is halved where memory runs out.
    """

    def __init__(self, path: Path, accelerator: Accelerator, settings: Settings):
        self.accelerator = accelerator
        self.ranks = Ranks(settings.tensor_parallel, accelerator.process_index, accelerator.num_processes)
        self.settings = settings
        self.dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32  # of the engine
        self.tokenizer = checkpoints.load_tokenizer(path)
        model = checkpoints.load_model(path, torch.float32, settings.attn_implementation, by_first=True)
        without_dropout(model)
        adapters.attach(model, settings, settings.seed, is_bfloat16=accelerator.mixed_precision == "bf16")
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        heads.add_head(model, settings.temperature)
        keeps_whole = torch.cuda.is_available() or accelerator.is_fsdp2 or settings.compile_layers
        self._shares_prompts = not keeps_whole and prefixes.fits(model)  # a cache is compiled anew for each layer
        if self._shares_prompts:
            prefixes.add_prefixes(model)
        acceleration.choose_attention(model, settings.attn_implementation, self.dtype is torch.bfloat16)
        if settings.compile_layers:
            acceleration.compile_layers(model)
        self.token_budget = token_budget(path, accelerator, settings)
        optimizer = torch.optim.AdamW(
            adapters.trained(model).values(),
            lr=0.0,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        if self.ranks.is_first and self.dtype is torch.bfloat16 and not accelerator.is_fsdp2 and _has_experts(model):
            warn("outside FSDP2 a mixture of experts computes its experts in float32: see configs/accelerate")
        acceleration.reduce_in_float32(accelerator)
        if accelerator.is_fsdp2:
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
        else:  # without DDP, whose ranks wait for each other within a pass: see _repeating
            self.model = accelerator.prepare_model(model, evaluation_mode=True)
            self.optimizer = accelerator.prepare_optimizer(optimizer)
        plan = accelerator.parallelism_config
        self._is_hybrid = accelerator.is_fsdp2 and plan is not None and plan.dp_replicate_enabled
        self.model.train()

    def update(self, rollouts: Sequence[TokenRollout], lr: float, entropy_weight: float = 0.0) -> UpdateStats:
        """The step's optimizer updates, one a mini-batch. `rollouts` is the whole batch, the same on every rank.

        The mean entropy, in nats a token, times `entropy_weight` is taken off the loss.
        An update with a non-finite loss or gradient norm is skipped and counted; the weights never see it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        parts = [[rollouts[i] for i in part] for part in split(range(len(rollouts)), self.settings.minibatches)]
        stats = UpdateStats()
        for part in parts[1:]:  # the first update sees the weights that sampled, so its ratio needs no second forward
            if not self.settings.engine_log_probs:
                self._repeating(partial(self._remember_log_probs, part), part, stats)
        for part in parts:
            self._update(part, stats, entropy_weight)
        for rollout in rollouts:
            rollout.old_log_probs = None
        return stats

    def gradient(self, rollouts: Sequence[TokenRollout], entropy_weight: float = 0.0) -> torch.Tensor:
        """Make the gradient of one update on `rollouts`; return the sums over all ranks that `UpdateStats` names."""
        return self._summed(self.ranks.gather(self._accumulate(rollouts, entropy_weight)))

    def _accumulate(self, rollouts: Sequence[TokenRollout], entropy_weight: float) -> torch.Tensor:
        """Accumulate the gradient of this rank's share of an update; its sums for `UpdateStats`, on the CPU."""
        num_tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
        scale = self.accelerator.num_processes if self.accelerator.is_fsdp2 else 1  # it averages over ranks
        passes = self._passes(rollouts)
        sums = torch.zeros(len(UpdateStats.SUMS) + 1, dtype=torch.float64, device=self.accelerator.device)
        for number, (batch, counts) in enumerate(passes, 1):
            if self._is_hybrid:  # the sums of each group of ranks are added up once, in the last pass
                self.model.set_requires_all_reduce(number == len(passes))
            loss, values = self._loss(batch, counts, entropy_weight)
            self.accelerator.backward(loss * scale / num_tokens)
            sums[:-1] += values[:-1]
            sums[-1] = torch.maximum(sums[-1], values[-1])
        return sums.cpu()

    def _summed(self, by_rank: Sequence[torch.Tensor]) -> torch.Tensor:
        """Add up the gradients of all ranks where FSDP2 has not; and what `_accumulate` gave, the last a maximum."""
        if not self.ranks.is_alone and not self.accelerator.is_fsdp2:
            for parameter in adapters.trained(self.model).values():
                if parameter.grad is None:  # an expert that no token of this rank met
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)
        gathered = torch.stack([*by_rank])
        return torch.cat([gathered[:, :-1].sum(0), gathered[:, -1].max()[None]])

    def log_probs(self, rollouts: Sequence[TokenRollout]) -> list[torch.Tensor]:
        """Log-probabilities of the completion tokens of each rollout under the current weights, computed here.

        Every rank must call it, on rollouts of its own; all make as many passes as the one that needs most.
        """
        by_number: dict[int, torch.Tensor] = {}
        batches = self._microbatches(rollouts)
        for number in range(max(self.ranks.gather(len(batches)))):
            batch = batches[min(number, len(batches) - 1)]
            picked = [rollouts[index] for index in batch]
            scored = self._scored_alone(picked)
            for row, index in enumerate(batch):
                by_number[index] = scored[row, self._span(rollouts[index])].float().cpu()
        return [by_number[index] for index in range(len(rollouts))]

    def _scored_alone(self, batch: Sequence[TokenRollout]) -> torch.Tensor:
        """Log-probabilities of a pass that no update follows.

        Until a backward pass ends it, FSDP2 of torch 2.11 takes the next one for a part of it, since the fused head
        passes by the module of the output head; so here one follows that changes nothing.
        """
        with torch.set_grad_enabled(self.accelerator.is_fsdp2):
            scored = self._forward(batch).log_probs
        if self.accelerator.is_fsdp2:
            self.accelerator.backward(0.0 * scored.sum())
            self.optimizer.zero_grad()
        return scored.detach()

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The full weights by their checkpoint names, for the engine; on many ranks all must iterate together.

        They are in the type that the engine computes in, as a saved checkpoint's are.
        """
        model = self.accelerator.unwrap_model(self.model)
        return checkpoints.as_saved(acceleration.full_weights(model, self.dtype), model)

    def release(self) -> None:
        """Give back the memory that only an update needs, so that the engine may have it."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()

    def save_checkpoint(self, path: Path) -> None:
        """Write a checkpoint directory in the engine's type; every rank calls it, the first writes."""
        model = self.accelerator.unwrap_model(self.model)
        acceleration.save_policy(self.accelerator, model, self.tokenizer, path, self.dtype)

    def save_state(self, path: Path) -> None:
        """Write weights and optimizer as `load_state` takes them back, bit for bit; each rank writes its own part."""
        try:
            with interrupts_wait():
                save_parts(self._state(), checkpoint_id=path)
        except CheckpointException as error:
            reason = in_one_line(next(iter(error.failures.values()))[0])
            raise InputError(
                f"{path}: the state cannot be written ({reason}): make room; then the same command goes on"
            ) from error

    def load_state(self, path: Path) -> None:
        """Take back what `save_state` wrote, under this number of ranks or another."""
        state = self._state()
        with interrupts_wait():
            load_parts(state, checkpoint_id=path)
        weights, moments = state["model"], state["optimizer"]
        set_state_dict(
            self.model,
            self.optimizer.optimizer,
            model_state_dict=weights,
            optim_state_dict=moments,
            options=StateDictOptions(strict=not self.settings.lora_rank),  # frozen weights are not in it
        )

    def _state(self) -> dict[str, Any]:
        """Weights and moments of what is trained, sharded as they are here."""
        optimizer = self.optimizer.optimizer
        begins = not optimizer.state
        model_state, optimizer_state = get_state_dict(self.model, optimizer)
        if begins:  # torch has made the moments by a step on nothing, which must not count
            for state in optimizer.state.values():
                state["step"].zero_()
        if self.settings.lora_rank:
            adapter = adapters.trained(self.accelerator.unwrap_model(self.model))
            model_state = {name: weight for name, weight in model_state.items() if name in adapter}
        return {"model": model_state, "optimizer": optimizer_state}

    def _update(self, rollouts: Sequence[TokenRollout], stats: UpdateStats, entropy_weight: float) -> None:
        sums = self._summed(self._repeating(partial(self._accumulate, rollouts, entropy_weight), rollouts, stats))
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if math.isfinite(norm) and torch.isfinite(sums).all():
            self.optimizer.step()
        else:
            stats.num_skipped += 1
        self.optimizer.zero_grad()
        num_tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
        stats.num_tokens += num_tokens
        if self.settings.engine_log_probs and stats.grad_norms:  # the updates before this one have moved the weights
            sums[[UpdateStats.SUMS.index("mismatch"), -1]] = 0.0
        else:
            stats.num_compared += num_tokens
        stats.grad_norms.append(norm)
        for name, value in zip(UpdateStats.SUMS, sums.tolist(), strict=False):
            setattr(stats, name, getattr(stats, name) + value)
        stats.mismatch_max = max(stats.mismatch_max, float(sums[-1]))

    def _repeating(self, work: Callable[[], Any], rollouts: Sequence[TokenRollout], stats: UpdateStats) -> list[Any]:
        """What `work`, passes over `rollouts`, gives on each rank.

        If one has no memory for it, all repeat it with half the micro-batch: no weight has moved until then. Under
        FSDP2 the ranks that have memory wait for the others within their pass, and nothing reaches them there: the
        error passes on, this process ends, and the launcher ends the others.
        """
        while True:
            value, fault = None, ""
            try:
                value = work()
            except torch.OutOfMemoryError as error:
                if self.accelerator.is_fsdp2:
                    raise
                fault = in_one_line(error)  # not the error itself, which would hold the memory
            by_rank = self.ranks.gather((value, fault))
            faults = [fault for _, fault in by_rank if fault]
            if not faults:
                return [value for value, _ in by_rank]
            self.release()
            if self.token_budget <= max(rollout.length for rollout in rollouts):
                raise torch.OutOfMemoryError(faults[0])
            stats.num_halvings += 1
            self.token_budget //= 2
            if self.ranks.is_first:
                warn(f"out of memory in an update: it is repeated with {self.token_budget:,} tokens a micro-batch")

    def _loss(
        self, batch: Sequence[TokenRollout], counts: bool, entropy_weight: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss summed over a micro-batch's tokens, and the values for UpdateStats, the last one a maximum."""
        output = self._forward(batch)
        mask = output.label_mask & counts
        log_probs = torch.where(mask, output.log_probs.float(), 0.0)
        engine = self._aligned([torch.tensor(r.engine_log_probs) for r in batch], batch, mask)
        own = log_probs.detach()
        if batch[0].old_log_probs is not None:
            own = self._aligned([r.old_log_probs for r in batch if r.old_log_probs is not None], batch, mask)
        old = engine if self.settings.engine_log_probs else own
        cap = self.settings.importance_cap
        importance = dapo.importance_weights(old, engine, cap) if cap else None
        advantages = torch.tensor([[r.advantage] for r in batch], device=mask.device)
        clip_low, clip_high = self.settings.clip_low, self.settings.clip_high
        surrogate = dapo.token_loss(log_probs, old, advantages, mask, clip_low, clip_high, importance)
        entropy = ((output.entropy if entropy_weight else output.entropy.detach()) * mask).sum()
        loss = surrogate.loss - entropy_weight * entropy if entropy_weight else surrogate.loss
        clipped = [surrogate.clipped_low, surrogate.clipped_high]
        difference = (own - engine).abs() * mask
        sums = [loss.detach(), entropy.detach(), *clipped, difference.sum(), difference.max()]
        return loss, torch.stack([value.double() for value in sums])

    def _forward(self, batch: Sequence[TokenRollout]) -> Any:
        """Score the completion tokens of `batch`. Padding is on the right, where causal attention never looks."""
        device = self.accelerator.device
        rows = [torch.cat([_ids(r.prompt_ids[self._begin(r) :]), _ids(r.completion_ids)]) for r in batch]
        labels = [row.clone() for row in rows]
        for row, rollout in zip(labels, batch, strict=True):
            row[: len(row) - len(rollout.completion_ids)] = IGNORED
        shared: dict[str, Any] = {}
        if self._shares_prompts:
            prompts = [rollout.prompt_ids for rollout in batch]
            shared = {"prefixes": prefixes.build(prompts, [len(row) for row in rows], device)}
        ids, targets = pad_sequence(rows, True, PADDING), pad_sequence(labels, True, IGNORED)
        return self.model(input_ids=ids.to(device), labels=targets.to(device), fused_lm_head=True, **shared)

    def _begin(self, rollout: TokenRollout) -> int:
        """The prompt token that its row begins with: the last one if what is before it is computed once for many."""
        return len(rollout.prompt_ids) - 1 if self._shares_prompts else 0

    def _span(self, rollout: TokenRollout) -> slice:
        """Where its completion's tokens are in a row of shifted labels."""
        start = len(rollout.prompt_ids) - 1 - self._begin(rollout)
        return slice(start, start + len(rollout.completion_ids))

    def _aligned(
        self, values: Sequence[torch.Tensor], batch: Sequence[TokenRollout], like: torch.Tensor
    ) -> torch.Tensor:
        """Per-token values of the completions, laid out as the shifted labels are: (sequences, tokens - 1)."""
        laid = torch.zeros(like.shape)
        for row, value, rollout in zip(laid, values, batch, strict=True):
            row[self._span(rollout)] = value
        return laid.to(like.device)

    def _remember_log_probs(self, rollouts: Sequence[TokenRollout]) -> None:
        with torch.no_grad():
            for batch, counts in self._passes(rollouts):
                scored = self._forward(batch).log_probs
                for row, rollout in zip(scored, batch if counts else [], strict=False):
                    rollout.old_log_probs = row[self._span(rollout)].float().cpu()

    def _passes(self, rollouts: Sequence[TokenRollout]) -> list[tuple[list[TokenRollout], bool]]:
        """This rank's micro-batches, and whether they count: all ranks make equally many passes, some on nothing."""
        plans = []
        for share in shares([rollout.length for rollout in rollouts], self.accelerator.num_processes):
            dealt = [rollouts[number] for number in share]
            plans.append([[dealt[number] for number in batch] for batch in self._microbatches(dealt)])
        mine = plans[self.accelerator.process_index]
        idle = max(len(plan) for plan in plans) - len(mine)
        shortest = min(rollouts, key=lambda rollout: rollout.length)
        return [(batch, True) for batch in mine] + [([shortest], False)] * idle

    def _microbatches(self, rollouts: Sequence[TokenRollout]) -> list[list[int]]:
        if not self._shares_prompts:
            return microbatches([rollout.length for rollout in rollouts], self.token_budget)
        prompts = [rollout.prompt_ids for rollout in rollouts]
        return microbatches([len(r.completion_ids) + 1 for r in rollouts], self.token_budget, prompts)


def _ids(tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.long)


def _has_experts(model: Any) -> bool:
    config = model.config.get_text_config()
    return any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


def without_dropout(model: Any) -> None:
    """Turn dropout off, also in training: log-probabilities are to be those of the policy that sampled."""
    disable_dropout_in_model(model)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):  # a number in most decoders, not a module
            module.attention_dropout = 0.0


def token_budget(path: Path, accelerator: Accelerator, settings: Settings) -> int:
    """The tokens of a micro-batch, given or by the memory plan; one for all ranks, also on GPUs of several kinds."""
    gpus = memory.Gpus(memory.gpu_memory(), accelerator.num_processes, accelerator.is_fsdp2)
    tokens = memory.planned_tokens(memory.planned_shape(path, gpus.gib), settings, gpus)
    vocabulary = checkpoints.load_config(path).get_text_config().vocab_size
    ranks = Ranks(settings.tensor_parallel, accelerator.process_index, accelerator.num_processes)
    return min(ranks.gather(heads.token_budget(tokens, vocabulary)))


def start_accelerator(settings: Settings, out: Path = Path()) -> Accelerator:
    """Join the launched processes, in the compute type and with the tracker of `settings`, which writes below `out`."""
    tracker = None if settings.tracker == "none" else settings.tracker
    process_state()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # or several gloo processes would each take themselves for the only one
        mixed_precision="bf16" if acceleration.uses_bfloat16(settings.dtype) else "no",
        log_with=tracker,
        project_dir=str(out / "tracker") if tracker else None,
    )
    refuse_others(accelerator.distributed_type, accelerator.is_fsdp2)
    return accelerator


def refuse_others(kind: DistributedType, is_fsdp2: bool) -> None:
    """Raise InputError for a launcher that shares the policy in another way than FSDP2, as FSDP1 or DeepSpeed do."""
    whole = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if kind not in whole and not is_fsdp2:
        raise InputError(
            f"the launcher's configuration asks for {kind.value}, other than FSDP2: give fsdp_version: 2, as in "
            "configs/accelerate/gpu8-fsdp2.yaml"
        )
