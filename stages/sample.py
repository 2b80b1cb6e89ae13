"""Sample: draw rollouts from policies and keep them all. For metrics, or to resume an interrupted call, use eval.

Writes one Rollout a line: policies in the order of the options, problems in the order of their file. Under `accelerate
launch` every process draws a share, and the first writes what one process would.
"""

from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

from stages.core import jsonl, outputs, sampling
from stages.core.errors import InputError
from stages.core.lifetime import end_with_parent
from stages.core.options import PLACE, at_least, checked
from stages.core.progress import warn
from stages.core.provenance import digest
from stages.core.ranks import Ranks
from stages.core.rollouts import no_room
from stages.core.verifier import Verifier


@checked
def run(
    *,
    policy: Annotated[
        list[str], "policy to ask: a checkpoint, a directory of checkpoints, or a hub id; repeatable", PLACE
    ],
    problems: Annotated[Path, "problems to ask (JSONL); - is stdin", PLACE],
    out: Annotated[Path, "file of rollouts to write (JSONL); - is stdout", PLACE],
    num_samples: Annotated[int, "rollouts for each problem", at_least(1)] = 16,
    options: sampling.Options,
) -> None:
    """Draw groups of rollouts from one policy or several, and score them.

    Several policies share one engine, so they need one architecture and one tokenizer. A problem whose prompt leaves
    no room for --max-tokens in the policy's context is left out, and named.

    Example: rloop sample --policy loop/0/policy --problems loop/0/prec.jsonl --out loop/prec.jsonl --template none
    --max-tokens 72 --num-samples 4
    """
    end_with_parent()
    ranks = Ranks(options.tensor_parallel)
    plan = ranks.together(lambda: _plan(policy, problems, out, num_samples, options, ranks))
    if not ranks.is_alone:
        ranks.refuse_differences({str(path): digest(path) for path in (problems, *plan.policies.values())})
    with ExitStack() as stack:
        ranks.on_first(lambda: stack.enter_context(outputs.claimed(out)))
        rollouts = sampling.rollouts(plan, plan.start_engine, stack.enter_context(Verifier(bare=options.bare)))
        if ranks.is_first:
            jsonl.write(out, rollouts)
        else:
            deque(rollouts, maxlen=0)  # draws what it has to


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
