"""Fine-tune the start policy on the examples: the next start policy.

Writes OUT as a checkpoint directory that transformers and vLLM load as it is, with log.tsv, metrics.json, manifest.json
and a model card, README.md, beside the weights. The loss is on the completion alone: of a rollout the tokens that were
sampled, of a text its tokens and an end token. Weights and optimizer are float32 in training; what is written is in the
compute type. OUT appears whole or not at all.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from stages.core import outputs, records, tabular
from stages.core.errors import InputError
from stages.core.lifetime import end_with_parent
from stages.core.options import PATH, WITHOUT_EFFECT, at_least, at_most, below, one_of
from stages.core.policy.memory import TrainingOptions
from stages.core.progress import warn
from stages.core.provenance import identify, is_done, manifest, recorded
from stages.core.ranks import Ranks
from stages.core.records import Example

if TYPE_CHECKING:
    from stages.rft.examples import Tokenized


@dataclass(frozen=True, kw_only=True)
class Options(TrainingOptions):
    """What `rloop rft` takes; by default the paper's one epoch, the rest as usual for small sets of examples."""

    policy: Annotated[str, "start policy: a checkpoint directory or a hub id", PATH]
    examples: Annotated[Path, "examples to learn from (JSONL)", PATH]
    out: Annotated[Path, "directory to write", PATH]
    epochs: Annotated[int, "times that every example is seen", at_least(1)] = 1
    lr: Annotated[float, "peak learning rate of AdamW", at_least(0)] = 1e-5
    batch_size: Annotated[int, "examples in an optimizer step, all processes together", at_least(1)] = 32
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
        int, "examples longer than this, prompt included, are left out; 0 is the policy's context", at_least(0)
    ] = 0
    start: Annotated[
        str,
        "the policy to fine-tune: --policy, or --base, as with examples of all iterations together",
        one_of("policy", "base"),
    ] = "policy"
    base: Annotated[str, "the policy that the first iteration started from; needed with --start base", PATH] = ""
    likelihood_weights: Annotated[
        bool, "weigh each example by how likely it is under the start policy; needs rollouts with log-probs, as rl's"
    ] = False
    kl: Annotated[
        float, "weight of KL(start policy || policy) on the completion tokens; doubles the memory", at_least(0)
    ] = 0.0
    warn_below: Annotated[int, "warn if there are fewer optimizer steps than this", at_least(0), WITHOUT_EFFECT] = 10
    seed: Annotated[int, "seed of the order of the examples", at_least(0), below(2**32)] = 0
    restart_if_changed: Annotated[
        bool, "if OUT holds a policy of other settings or inputs, move that aside and make it anew", WITHOUT_EFFECT
    ] = False

    def __post_init__(self) -> None:
        """Raise InputError for --start base without --base."""
        super().__post_init__()
        if self.start == "base" and not self.base:
            raise InputError("--start base: name the policy by --base")

    @property
    def start_policy(self) -> str:
        """The policy that is fine-tuned."""
        return self.base if self.start == "base" else self.policy


def run(options: Options) -> None:
    """Fine-tune the start policy on examples: the next start policy.

    Example: rloop rft --policy loop/0/policy --examples loop/1/examples.jsonl --out loop/1/policy --lr 7e-4
    --batch-size 8
    """
    started = time.perf_counter()
    end_with_parent()
    ranks = Ranks()
    read = ranks.together(lambda: _read(options, ranks))

    from stages.core.policy.acceleration import uses_bfloat16
    from stages.rft.card import card
    from stages.rft.finetuning import fine_tune, planned  # torch and TRL: only once the input is known to be good

    inputs = recorded([read.path, *([options.examples] if str(options.examples) != "-" else [])], ranks)
    ranks.refuse_differences(inputs.digests)
    dtype = "bfloat16" if uses_bfloat16(options.dtype) else "float32"
    plan = planned(read.path, read.rows, options, ranks.num_ranks)
    rounding = {"num_processes": ranks.num_ranks, "microbatch_size": plan.size}
    identity = identify("rft", options, inputs, rounding=rounding, dtype=dtype)
    manifest_file, restart = options.out / "manifest.json", options.restart_if_changed
    if ranks.on_first(lambda: is_done(options.out, manifest_file, lambda: identity, restart)):
        return
    with ExitStack() as stack:
        ranks.on_first(lambda: stack.enter_context(outputs.claimed(options.out)))
        beside = None
        if ranks.is_first:
            if read.left_out:
                longer = f"longer than {read.max_tokens} tokens with their prompt ({tabular.some(read.left_out)})"
                warn(f"{len(read.left_out)} examples are left out: {longer}")
            _warn_of_few_steps(len(read.rows), options)
            if plan.advice:
                warn(plan.advice)
            beside = stack.enter_context(outputs.whole_dir(options.out))
        with ranks.raise_once():
            tuned = fine_tune(read.path, read.tokenizer, read.rows, options, plan.size, beside)
        if beside is None:
            return
        seconds = time.perf_counter() - started
        figures = {"num_examples": len(read.rows), "num_left_out": len(read.left_out), **tuned.figures}
        tabular.write_tsv(beside / "log.tsv", tuned.log)
        outputs.write_json(beside / "metrics.json", figures | {"seconds": round(seconds, 3)})
        counts = {"examples": len(read.rows), "examples_left_out": read.left_out, "steps": len(tuned.log)}
        record = manifest(identity, counts, seconds, base_model=read.base)
        outputs.write_json(beside / "manifest.json", record)
        (beside / "README.md").write_text(card(options, record, figures, read.examples), encoding="utf-8")


class _Read(NamedTuple):
    """What is trained on: `rows` are the `examples` that have at most `max_tokens`."""

    path: Path
    base: str
    tokenizer: Any
    examples: list[Example]
    rows: "list[Tokenized]"
    left_out: list[str]
    max_tokens: int


def _read(options: Options, ranks: Ranks) -> _Read:
    """Read and check policy and examples, without the weights."""
    outputs.refuse_unwritable(options.out)
    if not (options.out / "manifest.json").is_file():
        outputs.refuse_occupied(options.out)
    if str(options.examples) == "-" and not ranks.is_alone:
        raise InputError("--examples -: several processes cannot share stdin: name a file")
    if options.batch_size % ranks.num_ranks:
        raise InputError(
            f"--batch-size {options.batch_size} does not divide among {ranks.num_ranks} processes: change it"
        )
    packed = list(records.read(options.examples, Example))

    from stages.core.policy import acceleration, adapters, checkpoints
    from stages.rft.card import base_of
    from stages.rft.examples import check_ids, check_log_probs, ending, tokenize_fitting, unpack, without_unknown

    path, base = checkpoints.resolve(options.start_policy), base_of(options.start_policy)
    if ranks.is_first:  # the others have the same, or are refused
        checkpoints.check_shapes(path)
    adapters.check(path, options)
    acceleration.check(options)
    tokenizer = checkpoints.load_tokenizer(path)
    context = checkpoints.context_length(path)
    max_tokens = options.max_tokens or context
    if max_tokens > context:
        raise InputError(f"--max-tokens {max_tokens} is beyond the policy's context of {context}: lower it")
    examples = [unpack(example) for example in packed]
    differing = check_ids(tokenizer, examples, checkpoints.load_config(path).get_text_config().vocab_size)
    if differing and ranks.is_first:
        names = tabular.some(differing)
        warn(f"{len(differing)} examples ({names}) have another text than their token_ids: the tokens are trained on")
    examples, unknown = without_unknown(tokenizer, examples)
    if unknown and ranks.is_first:
        names = tabular.some(unknown)
        warn(f"{len(unknown)} examples ({names}) are left out: they hold ids that stand for no text in the tokenizer")
    end = ending(tokenizer, checkpoints.end_token_ids(path))
    if options.likelihood_weights:
        check_log_probs(examples)
    rows, left_out = tokenize_fitting(tokenizer, examples, max_tokens, end)
    return _Read(path, base, tokenizer, [each.example for each in examples], rows, left_out, max_tokens)


def _warn_of_few_steps(num_examples: int, options: Options) -> None:
    num_steps = options.epochs * -(-num_examples // options.batch_size)
    if num_steps < options.warn_below:
        warn(
            f"{num_examples} examples make only {num_steps} optimizer steps of {options.batch_size}: choose more in "
            "filter (--hardest, --min-problems), or lower --batch-size"
        )
