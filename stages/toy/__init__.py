"""Toy: sets of arithmetic problems and a small base policy, made from two seeds.

It shows the effect of RLoop on two CPU cores: the base policy writes four styles of solution without looking at the
problem (arithmetic.py), and one of them, a short-cut, solves most of the training set.
train and valid hold the same mix; prec, paren and long lie outside of it:

    train, valid   3 or 4 numbers, no parentheses; the short-cut fails on `hard_frac` of them
    prec           3 or 4 numbers, no parentheses; the short-cut always fails
    paren          3 or 4 numbers, one pair of parentheses; the short-cut always fails
    long           5 numbers, no parentheses; the short-cut fails on half

No problem is in two sets, and the policy is pre-trained on none of them. For a rough policy in seconds, say in a test,
give --pretrain-steps 60 --pretrain-batch 32: it ends its texts, boxes a third of them, and is right 1 time in 100.
"""

import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated

from stages.core import jsonl, outputs
from stages.core.errors import InputError
from stages.core.options import PATH, OptionGroup, above, at_least, at_most
from stages.core.provenance import identify, is_done, manifest, recorded
from stages.core.records import Problem
from stages.toy import arithmetic


@dataclass(frozen=True, kw_only=True)
class Options(OptionGroup):
    """What `rloop toy` takes."""

    out: Annotated[
        Path, "directory to make: policy/, train.jsonl, valid.jsonl, prec.jsonl, paren.jsonl, long.jsonl", PATH
    ]
    seed: Annotated[int, "seed of the policy: its first weights and what it is pre-trained on", at_least(0)] = 0
    problems_seed: Annotated[int, "seed of the problem sets", at_least(0)] = 0
    num_train: Annotated[int, "problems to train on", at_least(1)] = 320
    num_test: Annotated[int, "problems in each of valid, prec, paren and long", at_least(1)] = 100
    hard_frac: Annotated[
        float, "share of train and valid that the short-cut gets wrong, 0 to 1", at_least(0), at_most(1)
    ] = 0.2
    pretrain_steps: Annotated[int, "steps of pre-training; 60 give a rough policy in seconds", at_least(1)] = 1300
    pretrain_batch: Annotated[int, "solutions in a step of pre-training", at_least(1)] = 64
    pretrain_lr: Annotated[float, "peak learning rate of pre-training", above(0), at_most(1)] = 3e-3


def run(options: Options) -> None:
    """Make the toy: five sets of arithmetic problems and a small base policy.

    Takes about two minutes on two cores; with the few steps of the example, some seconds.

    The examples in the help of toy, prepare, rl, sample, filter, rft, eval, analyze and report run one after the other.

    Example: rloop toy --out loop/0 --pretrain-steps 150 --pretrain-batch 32 --num-test 20
    """
    start, identity = time.monotonic(), identify("toy", options, recorded([]))
    if is_done(options.out, options.out / "manifest.json", lambda: identity):
        return
    with outputs.claimed(options.out), outputs.whole_dir(options.out) as beside:
        sets = make_sets(options.problems_seed, options.num_train, options.num_test, options.hard_frac)
        for name, expressions in sets.items():
            jsonl.write(beside / f"{name}.jsonl", problems(name, expressions))
        exclude = frozenset(str(expression) for expressions in sets.values() for expression in expressions)
        counts = _make_policy(beside / "policy", exclude, options)
        counts |= {name: len(expressions) for name, expressions in sets.items()}
        outputs.write_json(beside / "manifest.json", manifest(identity, counts, time.monotonic() - start))


def make_sets(seed: int, num_train: int, num_test: int, hard_frac: float) -> dict[str, list[arithmetic.Expression]]:
    """The five sets by name, without a problem in common."""
    kinds = {  # problems, share that the short-cut gets wrong, numbers in each, parentheses
        "train": (num_train, hard_frac, (3, 4), False),
        "valid": (num_test, hard_frac, (3, 4), False),
        "prec": (num_test, 1.0, (3, 4), False),
        "paren": (num_test, 1.0, (3, 4), True),
        "long": (num_test, 0.5, (5,), False),
    }
    rng = random.Random(seed)
    taken: set[str] = set()
    return {name: _make_set(rng, taken, name, *kind) for name, kind in kinds.items()}


def _make_set(
    rng: random.Random, taken: set[str], name: str, count: int, hard: float, sizes: tuple[int, ...], parentheses: bool
) -> list[arithmetic.Expression]:
    candidates = (arithmetic.draw(rng, rng.choice(sizes), parentheses) for _ in itertools.count())
    num_hard = round(count * hard)
    expressions = arithmetic.pick_mix(candidates, count - num_hard, num_hard, taken)
    if len(expressions) < count:
        raise InputError(f"there are fewer than {count} distinct problems for {name}: ask for fewer")
    rng.shuffle(expressions)
    return expressions


def problems(name: str, expressions: list[arithmetic.Expression]) -> Iterator[Problem]:
    """The records of a set; a problem reads `3+4*2=?`."""
    for number, expression in enumerate(expressions):
        yield {
            "id": f"toy-{name}/{number}",
            "problem": arithmetic.question(expression),
            "answer": str(arithmetic.truth(expression)),
            "source": f"toy-{name}",
        }


def _make_policy(path: Path, exclude: frozenset[str], options: Options) -> dict[str, float]:
    from rich.console import Console
    from rich.progress import track

    from stages.core.policy import checkpoints
    from stages.toy import pretrain  # torch and transformers: only once the input is known to be good

    tokenizer = pretrain.build_tokenizer(arithmetic.WORDS)
    model = pretrain.build_model(tokenizer, options.seed)
    pairs = arithmetic.draw_lessons(random.Random(options.seed), exclude)
    num_steps, size = options.pretrain_steps, options.pretrain_batch
    steps = pretrain.train(model, tokenizer, pairs, num_steps, size, options.pretrain_lr)
    losses = list(track(steps, "pre-training", total=num_steps, console=Console(stderr=True)))
    checkpoints.save(model, tokenizer, path)
    return {"policy_parameters": model.num_parameters(), "loss": fmean(losses[-pretrain.NUM_CHUNK_BATCHES :])}
