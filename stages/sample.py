"""Sample: draw rollouts from policies and keep them all. For metrics, or to resume an interrupted call, use eval.

Writes one Rollout a line: policies in the order of the options, problems in the order of their file; beside FILE.jsonl
FILE.manifest.json says how it came about. Under `accelerate launch` every process draws a share, and the first writes
what one process would.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

from stages.core import jsonl, outputs, provenance
from stages.core.drawing import sampling
from stages.core.drawing.rollouts import no_room
from stages.core.errors import InputError
from stages.core.grading import verifier
from stages.core.lifetime import end_with_parent
from stages.core.options import PATH, at_least, checked
from stages.core.progress import warn
from stages.core.ranks import Ranks
from stages.core.records import Rollout


@checked
def run(
    *,
    policy: Annotated[
        list[str], "policy to ask: a checkpoint, a directory of checkpoints, or a hub id; repeatable", PATH
    ],
    problems: Annotated[Path, "problems to ask (JSONL); - is stdin", PATH],
    out: Annotated[Path, "file of rollouts to write (JSONL); - is stdout", PATH],
    num_samples: Annotated[int, "rollouts for each problem", at_least(1)] = 16,
    options: sampling.Options,
) -> None:
    """Draw groups of rollouts from one policy or several, and score them.

    Several policies share one engine, so they need one architecture and one tokenizer. A problem whose prompt leaves
    no room for --max-tokens in the policy's context is left out, and named. Beside FILE.jsonl FILE.manifest.json says
    how it came about.

    Example: rloop sample --policy loop/0/policy --problems loop/0/prec.jsonl --out loop/prec.jsonl --template none
    --max-tokens 72 --num-samples 4
    """
    given, start = locals(), time.monotonic()
    end_with_parent()
    ranks = Ranks(options.tensor_parallel)
    plan = ranks.together(lambda: _plan(policy, problems, out, num_samples, options, ranks))
    is_piped = str(out) == "-"  # without a manifest; so one process need not read the weights for their digests
    sources = [path for path in (problems, *plan.policies.values()) if str(path) != "-"]
    read = ranks.together(lambda: provenance.recorded([] if is_piped and ranks.is_alone else sources))
    ranks.refuse_differences(read.digests | {"reward": plan.rewards.digest})
    manifest_file, counts = out.with_suffix(".manifest.json"), Counter[str]()
    with ExitStack() as stack:
        ranks.on_first(lambda: stack.enter_context(outputs.claimed(out, manifest_file)))
        rollouts = sampling.rollouts(plan, plan.start_engine, stack.enter_context(plan.grader()))
        if not ranks.is_first:
            deque(rollouts, maxlen=0)  # draws what it has to
            return
        jsonl.write(out, _counted(rollouts, counts))
        if not is_piped:
            decides = provenance.versions() | verifier.VERSION
            identity = provenance.identify_run(run, given, read.digests, decides, **plan.resolved)
            seconds = time.monotonic() - start
            record = provenance.manifest(identity, counts, seconds, **plan.about, stamps=read.stamps)
            outputs.write_json(manifest_file, record)


def _counted(rollouts: Iterator[Rollout], counts: Counter[str]) -> Iterator[Rollout]:
    for rollout in rollouts:
        counts.update(rollouts=1, tokens=rollout["num_tokens"], correct=int(rollout["reward"] >= 1))
        yield rollout


def _plan(
    policy: list[str], problems: Path, out: Path, num_samples: int, options: sampling.Options, ranks: Ranks
) -> sampling.Plan:
    """Check everything; the first rank says what the user should know."""
    if str(out) != "-":
        outputs.refuse_no_file(out)
        outputs.refuse_occupied(out)
    if str(problems) == "-" and not ranks.is_alone:
        raise InputError("--problems -: several processes cannot share stdin: name a file")
    plan = sampling.plan(policy, [problems], num_samples, options, ranks)
    if ranks.is_first:
        sampling.warn_of_templates(plan)
        if plan.left_out:
            warn(f"{no_room(plan.left_out, options.max_tokens, plan.context)}: they are left out")
    return plan
