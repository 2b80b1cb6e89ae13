"""Fine-tune the start policy on the examples: the next start policy.

Writes OUT as a checkpoint directory that transformers and vLLM load as it is, with log.tsv, metrics.json, manifest.json
and a model card, README.md, beside the weights. The loss is on the completion alone, its end token included. Weights
and optimizer are float32 while it trains; what is written is in the compute type. OUT appears whole or not at all.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from stages.core import outputs, records, tabular
from stages.core.adapters import LoraOptions
from stages.core.errors import InputError
from stages.core.options import PLACE, at_least, at_most, below, one_of
from stages.core.progress import warn
from stages.core.provenance import digest, identify, manifest
from stages.core.records import Example


@dataclass(frozen=True, kw_only=True)
class Options(LoraOptions):
    """The options with their defaults: the paper's one epoch, the rest usual for small sets of examples."""

    epochs: Annotated[int, "times that every example is seen", at_least(1)] = 1
    lr: Annotated[float, "peak learning rate of AdamW", at_least(0)] = 1e-5
    batch_size: Annotated[int, "examples in an optimizer step, all processes together", at_least(1)] = 32
    tokens_per_microbatch: Annotated[
        int, "most tokens, padding included, in one forward and backward pass", at_least(1)
    ] = 16384
    warmup_share: Annotated[float, "share of the steps over which the learning rate grows", at_least(0), at_most(1)] = (
        0.1
    )
    min_lr_share: Annotated[
        float, "share of the peak learning rate that the last step runs at", at_least(0), at_most(1)
    ] = 0.1
    weight_decay: Annotated[float, "weight decay of AdamW", at_least(0)] = 0.0
    beta1: Annotated[float, "first moment's decay of AdamW", at_least(0), below(1)] = 0.9
    beta2: Annotated[float, "second moment's decay of AdamW", at_least(0), below(1)] = 0.95
    max_grad_norm: Annotated[float, "the gradient is scaled down to this norm; 0 is off", at_least(0)] = 1.0
    max_tokens: Annotated[
        int, "longer examples, prompt included, are left out; 0 is the policy's context", at_least(0)
    ] = 0
    dtype: Annotated[
        str,
        "compute type: float32, bfloat16, or auto (bfloat16 on a GPU, float32 elsewhere)",
        one_of("auto", "float32", "bfloat16"),
    ] = "auto"
    gradient_checkpointing: Annotated[bool, "recompute activations in the backward pass to save memory"] = False
    seed: Annotated[int, "seed of the order of the examples", at_least(0), below(2**32)] = 0


def run(
    policy: Annotated[str, "start policy: a checkpoint directory or a hub id", PLACE],
    examples: Annotated[Path, "examples to learn from (JSONL)", PLACE],
    out: Annotated[Path, "directory to write", PLACE],
    options: Options,
) -> None:
    """Fine-tune the start policy on examples: the next start policy.

    Example: rloop rft --policy loop/0/policy --examples loop/1/examples.jsonl --out loop/1/policy --lr 7e-4
    --batch-size 8
    """
    given, started = locals(), time.perf_counter()
    outputs.refuse_occupied(out)
    chosen = list(records.read(examples, Example))

    from stages.core import adapters, policies
    from stages.core.lifetime import end_with_parent
    from stages.rft.card import base_of, card
    from stages.rft.examples import tokenize_fitting

    end_with_parent()
    path, base = policies.resolve(policy), base_of(policy)
    policies.check_shapes(path)
    adapters.check(path, options)
    tokenizer = policies.load_tokenizer(path)
    context = policies.context_length(path)
    if options.max_tokens > context:
        raise InputError(f"--max-tokens {options.max_tokens} is beyond the policy's context of {context}: lower it")
    rows, left_out = tokenize_fitting(tokenizer, chosen, options.max_tokens or context)

    from stages.rft.finetuning import fine_tune, is_main  # torch and TRL: only once the input is known to be good

    if not is_main():
        fine_tune(path, tokenizer, rows, options, out=None)
        return
    _say_left_out(left_out, options.max_tokens or context)
    with outputs.claimed(out), outputs.whole_dir(out) as beside:
        tuned = fine_tune(path, tokenizer, rows, options, beside)
        inputs = {"policy": digest(path), "examples": digest(examples)}
        seconds = time.perf_counter() - started
        figures = {"num_examples": len(rows), "num_left_out": len(left_out), **tuned.figures}
        tabular.write_tsv(beside / "log.tsv", tuned.log)
        outputs.write_json(beside / "metrics.json", figures | {"seconds": round(seconds, 3)})
        counts = {"examples": len(rows), "examples_left_out": left_out, "steps": len(tuned.log)}
        identity = identify(run, given, inputs, **tuned.settings)
        record = manifest(identity, counts, seconds, policy=policy, examples=str(examples), base_model=base)
        outputs.write_json(beside / "manifest.json", record)
        (beside / "README.md").write_text(card(record, figures, chosen), encoding="utf-8")


def _say_left_out(left_out: list[str], max_tokens: int) -> None:
    if left_out:
        names = tabular.some(left_out)
        warn(f"{len(left_out)} examples are left out: longer than {max_tokens} tokens with their prompt ({names})")
