"""Supervised fine-tuning of a policy on tokenised examples with TRL's SFTTrainer, one process or many.

The gradient of an optimizer step is that of one sum over all its completion tokens divided by their number, however
the examples are spread over processes and micro-batches. Weights, optimizer and the sums of gradients are float32
whatever the compute type; the policy is saved in the compute type.

Examples are not packed: neighbours have about the same length, so there is little padding to save. No checkpoints are
written on the way: an epoch of RFT is short.
"""

import copy
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from stages.core.errors import CollapseError, InputError
from stages.core.policy import adapters, checkpoints, heads, memory
from stages.core.policy.acceleration import (
    choose_attention,
    compile_layers,
    reduce_in_float32,
    save_policy,
    uses_bfloat16,
)
from stages.core.policy.checkpoints import IGNORED, PADDING
from stages.core.progress import StepProgress
from stages.core.ranks import process_state
from stages.rft import Options
from stages.rft.examples import Tokenized, lr_share, microbatch_size, order
from stages.rft.objective import kl_from_start, likelihood_weight, token_losses


@dataclass
class Tuned:
    """The result of a fine-tuning: the log's rows, one an optimizer step, and what sums it up."""

    log: list[dict[str, float]] = field(default_factory=list)
    num_tokens: int = 0
    padding_share: float = 0.0

    @property
    def figures(self) -> dict[str, float]:
        """The whole in a few numbers: steps, tokens, the loss at both ends, the share of padding."""
        return {
            "num_steps": len(self.log),
            "num_tokens": self.num_tokens,
            "loss_first": self.log[0]["loss"],
            "loss_last": self.log[-1]["loss"],
            "padding_share": self.padding_share,
        }


class Planned(NamedTuple):
    """What the memory plan gives: examples in a micro-batch of one process, and what to change if it does not fit."""

    size: int
    advice: str | None


def planned(path: Path, rows: Sequence[Tokenized], options: Options, num_processes: int) -> Planned:
    """The micro-batches of a fine-tuning of the policy at `path`, by the memory of the GPU, if there is one."""
    vocabulary = checkpoints.load_config(path).get_text_config().vocab_size
    gpus = memory.Gpus(memory.gpu_memory(), num_processes, os.environ.get("ACCELERATE_USE_FSDP") == "true")
    shape = memory.planned_shape(path, gpus.gib)
    budget = heads.token_budget(memory.planned_tokens(shape, options, gpus), vocabulary)
    size = microbatch_size(options.batch_size // num_processes, max(map(len, rows)), budget)
    return Planned(size, memory.update_advice(shape, options, gpus) if shape else None)


def fine_tune(
    path: Path, tokenizer: Any, rows: Sequence[Tokenized], options: Options, size: int, out: Path | None
) -> Tuned:
    """Train the policy at `path` on `rows`, `size` of them in a micro-batch of a process.

    The checkpoint is written to the directory `out` (None: not this process).

    Every launched process must call this, with a batch that divides among them. Raises CollapseError if loss or
    gradient are no longer finite.
    """
    share = options.batch_size // process_state().num_processes
    steps = order([len(row) for row in rows], options.batch_size, options.epochs, options.seed)
    counts = [sum(rows[number].num_labels for number in step) for step in steps]
    watch = _Watch(counts, StepProgress("rft", len(steps), quiet=out is None))
    logging.disable_progress_bar()  # ours is the only one
    logging.set_verbosity_error()  # the trainer warns of changes to the configuration, which are undone below
    start = _Start.load(path, options)
    rows = start.weighted(rows) if options.likelihood_weights else rows
    model = checkpoints.load_model(path, torch.float32, options.attn_implementation, by_first=True)
    adapters.attach(model, options, options.seed, uses_bfloat16(options.dtype))
    if options.compile_layers:
        compile_layers(model)
    configs = copy.deepcopy((model.config, model.generation_config))
    with tempfile.TemporaryDirectory() as scratch, watch.progress:
        trainer = _Trainer(
            model=model,
            args=_config(options, size, share // size, scratch),
            train_dataset=_dataset(rows, steps, options.batch_size),
            processing_class=tokenizer,
            data_collator=_Collator(pad_token_id=PADDING),
            callbacks=[watch],
        )
        if not torch.cuda.is_available():  # in the place of the fused one that it has added
            heads.add_plain_head(trainer.model)
            choose_attention(trainer.model, options.attn_implementation, trainer.args.bf16)
        trainer.schedule = (options.warmup_share, options.min_lr_share)
        if options.kl or any(row.weight != 1 for row in rows):
            trainer.start, trainer.kl = start, options.kl
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    assert len(watch.log) == len(steps), f"{len(watch.log)} steps were done, {len(steps)} planned"
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    model.config, model.generation_config = configs  # the trainer writes its own pad token and tags into them
    dtype = "bfloat16" if trainer.args.bf16 else "float32"
    save_policy(trainer.accelerator, model, tokenizer, out, getattr(torch, dtype))
    if out is not None:
        _refuse_collapsed(out)
    return Tuned(
        log=watch.log,
        num_tokens=sum(counts),
        padding_share=_padding_share([[len(rows[number]) for number in step] for step in steps], size),
    )


def _refuse_collapsed(out: Path) -> None:
    """Raise CollapseError where the weights that were written are not finite: no loss follows the last update."""
    try:
        checkpoints.check_finite(out)
    except InputError as error:
        raise CollapseError("the last step left weights that are not finite: lower --lr") from error


def _config(options: Options, size: int, accumulation: int, scratch: str) -> SFTConfig:
    on_gpu = torch.cuda.is_available()
    return SFTConfig(
        output_dir=scratch,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,  # the data set holds the epochs one after another
        train_sampling_strategy="sequential",
        max_length=None,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.beta1,
        adam_beta2=options.beta2,
        max_grad_norm=options.max_grad_norm,
        bf16=uses_bfloat16(options.dtype),
        gradient_checkpointing=options.gradient_checkpointing,
        use_cpu=not on_gpu,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=on_gpu,
        seed=options.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,  # the weights
    )


def _dataset(rows: Sequence[Tokenized], steps: Sequence[Sequence[int]], batch_size: int) -> Dataset:
    """The rows in the order they are trained on, each step filled up to `batch_size` with rows that teach nothing.

    Without these, a launcher with several processes would repeat examples to make the last step even.
    """
    blank = Tokenized([PADDING] * 2, [IGNORED] * 2)
    ordered = [row for step in steps for row in [*(rows[n] for n in step), *[blank] * (batch_size - len(step))]]
    return Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in ordered],
            "labels": [row.labels for row in ordered],
            "weights": [row.weight for row in ordered],
        }
    )


def _padding_share(steps: Sequence[Sequence[int]], size: int) -> float:
    """The share of padding among the tokens that go through the model, by the lengths of each step's examples."""
    padded = used = 0
    for lengths in steps:
        for start in range(0, len(lengths), size):
            used += sum(lengths[start : start + size])
            padded += size * max(lengths[start : start + size])
    return 1.0 - used / padded


class _Collator(DataCollatorForLanguageModeling):
    """TRL's, with the weight of each example."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        return {**batch, "weights": torch.tensor([example["weights"] for example in examples])}


class _Start:
    """The start policy beside the one that is trained, for what is measured against it; no `model` if nothing is."""

    def __init__(self, model: Any):
        self.model = model

    @classmethod
    def load(cls, path: Path, options: Options) -> "_Start":
        """The policy at `path`, without gradients, in the compute type."""
        if not options.kl and not options.likelihood_weights:
            return cls(None)
        dtype = torch.bfloat16 if uses_bfloat16(options.dtype) else torch.float32
        return cls(checkpoints.load_model(path, dtype).eval().requires_grad_(False).to(process_state().device))

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(examples, tokens, vocabulary); padding stands on the right, where no token before it sees it."""
        logits: torch.Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits

    def weighted(self, rows: Sequence[Tokenized]) -> list[Tokenized]:
        """The rows with `likelihood_weight` as a factor of their weights; each process computes a share of them."""
        state = process_state()
        mine = range(state.process_index, len(rows), state.num_processes)
        weights = {number: likelihood_weight(self._log_probs(rows[number]), rows[number].log_probs) for number in mine}
        weights = dict(gather_object(list(weights.items())))
        return [replace(row, weight=row.weight * weights[number]) for number, row in enumerate(rows)]

    def _log_probs(self, row: Tokenized) -> list[float]:
        ids = torch.tensor([row.input_ids], device=self.model.device)
        log_probs = self.logits(ids)[0, -row.num_labels - 1 : -1].float().log_softmax(-1)
        return [float(value) for value in log_probs.gather(-1, ids[0, -row.num_labels :, None])[:, 0]]


class _Trainer(SFTTrainer):
    """TRL's trainer with our schedule: transformers' own have no linear fall to a share of the peak.

    With a `start` its loss is that of objective.py: weights of examples, a KL term. Both are sums over the completion
    tokens divided by the number of those of all processes.
    """

    schedule: tuple[float, float]  # share of steps that warm up, share of the peak that the last step runs at
    start: _Start | None = None
    kl: float = 0.0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        weights = inputs.pop("weights")
        if self.start is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        mask = labels != IGNORED
        of_token = weights[:, None].expand_as(mask)[mask]
        if self.kl:
            kept = {name: value for name, value in inputs.items() if name != "labels"}
            logits = model(**kept, use_cache=False).logits[:, :-1][mask].float()
            own = logits.log_softmax(-1).gather(-1, labels[mask][:, None])[:, 0]
            kl = kl_from_start(logits, self.start.logits(inputs["input_ids"])[:, :-1][mask])
            losses = token_losses(own, of_token) + self.kl * kl
        else:
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
            losses = token_losses(outputs.log_probs[mask], of_token)
        loss = losses.sum() / torch.as_tensor(num_items_in_batch).clamp(min=1) * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        reduce_in_float32(self.accelerator)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        def share(step: int) -> float:
            return lr_share(min(step, num_training_steps - 1), num_training_steps, *self.schedule)

        optimizer = optimizer or self.optimizer
        assert optimizer is not None
        self.lr_scheduler = LambdaLR(optimizer, share)
        return self.lr_scheduler


class _Watch(TrainerCallback):
    """Keeps a row for each optimizer step, moves the progress bar, and stops at a non-finite loss or gradient."""

    def __init__(self, counts: Sequence[int], progress: StepProgress):
        self.counts, self.progress = counts, progress
        self.log: list[dict[str, float]] = []
        self.started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:  # the summary that the trainer logs at its end
            return
        step, loss, grad_norm = state.global_step, logs["loss"], logs["grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise CollapseError(f"step {step}: the loss is {loss}, the gradient's norm {grad_norm}: lower --lr")
        self.log.append(
            {
                "step": step,
                "loss": loss,
                "lr": logs["learning_rate"],
                "grad_norm": grad_norm,
                "tokens": self.counts[step - 1],
                "seconds": time.perf_counter() - self.started,
            }
        )
        self.progress.step(step, f"loss {loss:.4f}")
