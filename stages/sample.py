"""Sample: draw rollouts from policies and keep them all. For metrics, or to resume an interrupted call, use eval.

Writes one Rollout a line: policies in the order of the options, problems in that of their file. FILE.manifest.json,
beside FILE.jsonl, says how it was made. Under `accelerate launch` every process draws a share, and the first writes
what one process would.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from stages.core import jsonl, outputs, provenance
from stages.core.drawing import sampling
from stages.core.drawing.request import Request, read_request
from stages.core.drawing.sampling import SamplingOptions, StartEngine
from stages.core.errors import InputError
from stages.core.grading import verifier
from stages.core.lifetime import end_with_parent
from stages.core.options import PATH, at_least
from stages.core.progress import warn
from stages.core.ranks import Ranks
from stages.core.records import Rollout


@dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions):
    """What `rloop sample` takes."""

    policy: Annotated[
        list[str], "policy to sample: a checkpoint, a directory of checkpoints, or a hub id; repeatable", PATH
    ]
    problems: Annotated[Path, "problems (JSONL); - is stdin", PATH]
    out: Annotated[Path, "file of rollouts to write (JSONL); - is stdout", PATH]
    num_samples: Annotated[int, "rollouts for each problem", at_least(1)] = 16
    temperature: Annotated[float, "sampling temperature", at_least(0)] = 1.0

    def __post_init__(self) -> None:
        """Raise InputError for samples that would all be the same."""
        super().__post_init__()
        sampling.refuse_alike(self.temperature, self.num_samples)


def run(options: Options) -> None:
    """Draw groups of rollouts from one policy or several, and score them.

    Several policies share one engine, so they need one architecture and one tokenizer. A problem whose prompt leaves
    no room for --max-tokens in the policy's context is left out, and named. FILE.manifest.json, beside FILE.jsonl, says
    how it was made.

    Example: rloop sample --policy loop/0/policy --problems loop/0/prec.jsonl --out loop/prec.jsonl --template none
    --max-tokens 72 --num-samples 4
    """
    draw(options, Request.start_engine)


def draw(options: Options, start_engine: StartEngine) -> None:
    """`run` with the engines that `start_engine` starts."""
    start, out = time.monotonic(), options.out
    end_with_parent()
    ranks = Ranks(options.tensor_parallel)
    request = ranks.together(lambda: _read(options, ranks))
    is_piped = str(out) == "-"  # without a manifest; so one process need not read the weights for their digests
    sources = [path for path in (options.problems, *request.policies.values()) if str(path) != "-"]
    inputs = provenance.recorded([] if is_piped and ranks.is_alone else sources, ranks)
    ranks.refuse_differences(inputs.digests | {"reward": request.rewards.digest})
    decides = provenance.versions() | verifier.VERSION
    identity = provenance.identify("sample", options, inputs, decides, **request.resolved)
    manifest_file, counts = out.with_suffix(".manifest.json"), Counter[str]()
    if ranks.on_first(lambda: provenance.is_done(out, manifest_file, lambda: identity)):
        return
    with ExitStack() as stack:
        ranks.on_first(lambda: stack.enter_context(outputs.claimed(out, manifest_file)))
        rollouts = sampling.rollouts(request, start_engine, stack.enter_context(request.rewards.grader(options.bare)))
        if not ranks.is_first:
            deque(rollouts, maxlen=0)  # draws what it has to
            return
        jsonl.write(out, _counted(rollouts, counts))
        warn(_summary(out, counts))
        if not is_piped:
            seconds = time.monotonic() - start
            outputs.write_json(manifest_file, provenance.manifest(identity, counts, seconds, **request.about))


def _counted(rollouts: Iterator[Rollout], counts: Counter[str]) -> Iterator[Rollout]:
    for rollout in rollouts:
        is_truncated, no_answer = rollout["finish_reason"] == "length", rollout["verdict"] == "no_answer"
        counts.update(rollouts=1, tokens=rollout["num_tokens"], correct=int(rollout["reward"] >= 1))
        counts.update(truncated=int(is_truncated), no_answer=int(no_answer))
        yield rollout


def _summary(out: Path, counts: Counter[str]) -> str:
    """What came of it, on one line."""
    names = {"correct": "correct", "truncated": "truncated", "no_answer": "without an answer"}
    shares = (f"{100 * counts[name] / counts['rollouts']:.1f} % {text}" for name, text in names.items())
    where = "stdout" if str(out) == "-" else out
    return f"{counts['rollouts']:,} rollouts in {where}: {', '.join(shares)}"


def _read(options: Options, ranks: Ranks) -> Request:
    """Check everything; the first rank says what the user should know."""
    if str(options.out) != "-":
        outputs.refuse_no_file(options.out)
        outputs.refuse_unwritable(options.out)
    if str(options.problems) == "-" and not ranks.is_alone:
        raise InputError("--problems -: several processes cannot share stdin: name a file")
    request = read_request(
        options.policy,
        {options.problems.stem: options.problems},
        options,
        ranks,
        num_samples=options.num_samples,
        temperature=options.temperature,
        limit=options.limit,
    )
    if ranks.is_first:
        request.warn_of_templates()
        if fault := request.too_long():
            warn(f"{fault}: they are left out")
    return request
