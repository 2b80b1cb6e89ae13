"""Sample: draw rollouts from policies and keep them all. For metrics, or to resume an interrupted call, use eval.

Writes one Rollout a line: policies in the order of the options, problems in the order of their file.
"""

from pathlib import Path
from typing import Annotated

from stages.core import jsonl, outputs, sampling, tabular
from stages.core.options import PLACE, at_least, checked
from stages.core.progress import warn
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
    if str(out) != "-":
        outputs.refuse_no_file(out)
        outputs.refuse_occupied(out)
    plan = sampling.plan(policy, [problems], num_samples, options)
    sampling.warn_of_templates(plan)
    if plan.left_out:
        warn(f"{len(plan.left_out)} problems are too long for the policy's context: {tabular.some(plan.left_out)}")
    with outputs.claimed(out), Verifier(bare=options.bare) as verifier:
        jsonl.write(out, sampling.rollouts(plan, plan.start_engine, verifier))
