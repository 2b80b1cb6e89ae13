"""Fine-tune the start policy on the examples: the next start policy.

Writes OUT as a checkpoint directory that transformers and vLLM load as it is, with log.tsv, metrics.json and
manifest.json beside the weights. The loss is on the completion alone, its end token included. OUT appears whole or
not at all.
"""

import csv
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from stages.core import outputs, records
from stages.core.errors import InputError
from stages.core.records import Example


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """Every knob of the stage with its default; the paper's one epoch, the rest usual for small sets of examples."""

    epochs: Annotated[int, "times that every example is seen"] = 1
    lr: Annotated[float, "peak learning rate of AdamW"] = 1e-5
    batch_size: Annotated[int, "examples in an optimizer step, all processes together"] = 32
    tokens_per_microbatch: Annotated[int, "most tokens, padding included, in one forward and backward pass"] = 16384
    warmup_share: Annotated[float, "share of the steps over which the learning rate grows"] = 0.1
    min_lr_share: Annotated[float, "share of the peak learning rate that the last step runs at"] = 0.1
    weight_decay: Annotated[float, "weight decay of AdamW"] = 0.0
    beta1: Annotated[float, "first moment's decay of AdamW"] = 0.9
    beta2: Annotated[float, "second moment's decay of AdamW"] = 0.95
    max_grad_norm: Annotated[float, "the gradient is scaled down to this norm; 0 is off"] = 1.0
    max_tokens: Annotated[int, "longer examples, prompt included, are left out; 0 is the policy's context"] = 0
    dtype: Annotated[str, "compute type: float32, bfloat16, or auto (bfloat16 on a GPU, float32 elsewhere)"] = "auto"
    gradient_checkpointing: Annotated[bool, "recompute activations in the backward pass to save memory"] = False
    seed: Annotated[int, "seed of the order of the examples"] = 0


def run(
    policy: Annotated[str, "start policy: a checkpoint directory or a hub id"],
    examples: Annotated[Path, "examples to learn from (JSONL)"],
    out: Annotated[Path, "directory to write"],
    knobs: Knobs,
) -> None:
    """Fine-tune the start policy on examples: the next start policy.

    Example: rloop rft --policy toy/policy --examples runs/1/examples.jsonl --out runs/1/policy --lr 7e-4
    """
    started = time.perf_counter()
    outputs.refuse_occupied(out)
    _check(knobs)
    chosen = list(records.read(examples, Example))

    from stages.core import policy as policies  # torch and TRL: only once the input is known to be good
    from stages.core.examples import tokenize_fitting

    path = policies.resolve(policy)
    tokenizer = policies.load_tokenizer(path)
    context = policies.context_length(path)
    if knobs.max_tokens > context:
        raise InputError(f"--max-tokens {knobs.max_tokens} is beyond the policy's context of {context}: lower it")
    rows, left_out = tokenize_fitting(tokenizer, chosen, knobs.max_tokens or context)

    from stages.core.finetuning import fine_tune, is_main

    with outputs.whole_dir(out) if is_main() else nullcontext() as beside:
        tuned = fine_tune(path, tokenizer, rows, knobs, beside)
        if beside is None:
            return
        seconds = time.perf_counter() - started
        metrics = {
            "num_examples": len(rows),
            "num_left_out": len(left_out),
            "num_steps": len(tuned.log),
            "num_tokens": tuned.num_tokens,
            "first_loss": tuned.log[0]["loss"],
            "last_loss": tuned.log[-1]["loss"],
            "padding_share": round(tuned.padding_share, 4),
            "seconds": round(seconds, 3),
        }
        parameters = {"policy": policy, "examples": str(examples), "out": str(out), **asdict(knobs), **tuned.settings}
        inputs = {"policy": outputs.digest(path), "examples": outputs.digest(examples)}
        outputs.write_json(beside / "metrics.json", metrics)
        outputs.write_json(beside / "manifest.json", outputs.manifest("rft", parameters, inputs, metrics, seconds))
        _write_log(beside / "log.tsv", tuned.log)
    _say(metrics, left_out, out)


def _check(knobs: Knobs) -> None:
    """Raise InputError for a knob out of its bounds."""
    for name in ("epochs", "batch_size", "tokens_per_microbatch"):
        if getattr(knobs, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("lr", "weight_decay", "max_grad_norm", "max_tokens"):
        if getattr(knobs, name) < 0:
            raise InputError(f"--{name.replace('_', '-')} must not be negative")
    for name in ("warmup_share", "min_lr_share"):
        if not 0 <= getattr(knobs, name) <= 1:
            raise InputError(f"--{name.replace('_', '-')} must be between 0 and 1")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(knobs, name) < 1:
            raise InputError(f"--{name} must be at least 0 and below 1")
    if knobs.dtype not in ("auto", "float32", "bfloat16"):
        raise InputError(f"--dtype must be auto, float32 or bfloat16, not {knobs.dtype}")


def _write_log(path: Path, rows: list[dict[str, float]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        log = csv.DictWriter(file, rows[0], delimiter="\t", lineterminator="\n")
        log.writeheader()
        log.writerows(rows)


def _say(metrics: dict[str, Any], left_out: list[str], out: Path) -> None:
    """One line on stderr, and one more where examples were left out."""
    if left_out:
        problems = ", ".join(left_out[:3])
        print(f"rft: {len(left_out)} examples were too long and left out, such as of {problems}", file=sys.stderr)
    print(
        f"rft: {metrics['num_examples']} examples in {metrics['num_steps']} steps, "
        f"loss {metrics['first_loss']:.4f} -> {metrics['last_loss']:.4f}: {out}",
        file=sys.stderr,
    )
