"""avg@k and pass@k of policies on sets of problems, by the paper's protocol.

What OUT holds is said in core/study/scoring.py; for an average over sets run report. Every policy is measured at each
--temperature; of several temperatures each set is written once for each, as set@temperature.

Under `accelerate launch` every process draws a share of what is missing, policy by policy, into partial files of its
own; they meet before and after, and the first writes what one process would.
"""

import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from stages.core import outputs, provenance
from stages.core.drawing import sampling
from stages.core.drawing.request import Request, by_stem, read_request
from stages.core.drawing.sampling import SamplingOptions, StartEngine
from stages.core.errors import InputError
from stages.core.grading import verifier
from stages.core.grading.ballots import Ballots
from stages.core.lifetime import end_with_parent, going_on
from stages.core.options import PATH, at_least, following
from stages.core.ranks import Ranks
from stages.core.study import scoring
from stages.core.study.metrics import KS, usual_ks
from stages.core.study.scoring import GREEDY, KL, ROLLOUTS, Drawn
from stages.eval import divergence, drawing, partial, selection
from stages.eval.drawing import Drawing


@dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions):
    """What `rloop eval` takes."""

    policy: Annotated[list[str], "a checkpoint, a directory of checkpoints, or a hub id; repeatable", PATH] = field(
        default_factory=list
    )
    problems: Annotated[list[Path], "a set of problems (JSONL), named after its file; repeatable", PATH] = field(
        default_factory=list
    )
    out: Annotated[Path, "directory to write", PATH]
    selected: Annotated[
        list[Path],
        "evaluate these policies of this eval output: the one that it selected, the last checkpoint of each run, and "
        "all that are no checkpoints of a run; repeatable",
        PATH,
    ] = field(default_factory=list)
    all_checkpoints: Annotated[bool, "with --selected: every policy of these eval outputs", PATH] = False
    temperature: Annotated[
        list[float],
        "sampling temperature; repeatable: each set is then measured as set@temperature, and the lowest selects",
        at_least(0),
    ] = field(default_factory=lambda: [1.0])
    num_samples: Annotated[int, "rollouts for each problem", at_least(1)] = 32
    k: Annotated[list[int], "a k of pass@k; repeatable", at_least(1)] = following(
        f"those of {', '.join(map(str, KS))} that --num-samples allows, or that number itself",
        lambda options: usual_ks(options.num_samples),
    )
    maj: Annotated[bool, "also maj@k: the chance that the most frequent answer among k samples is right"] = False
    greedy: Annotated[bool, "also draw one completion at temperature 0 for each problem"] = False
    kl_to: Annotated[str, "also measure the KL divergence to this policy, such as the base", PATH] = ""
    kl_samples: Annotated[int, "with --kl-to: completions of each problem that it is measured on", at_least(1)] = 1
    select: Annotated[str, "name the best policy on the first set by this metric, such as avg@32"] = ""

    def __post_init__(self) -> None:
        """Raise InputError for options that cannot work together."""
        super().__post_init__()
        if not self.problems:
            raise InputError("--problems is missing: name at least one file of problems")
        if Path("-") in self.problems:
            raise InputError("--problems -: name a file: an interrupted call must find the same problems again")
        for temperature in self.temperature:
            sampling.refuse_alike(temperature, self.num_samples)
        if len(names := [f"{temperature:g}" for temperature in self.temperature]) > len(set(names)):
            raise InputError(f"--temperature {', '.join(names)}: name each once")
        object.__setattr__(self, "temperature", sorted(self.temperature))
        scoring.check_metrics(self.num_samples, self.k, self.select, self.maj, self.greedy)
        if self.maj and self.has_own_rewards:
            raise InputError("--maj counts answers that math-verify finds equivalent: leave out --maj or --reward")


def run(options: Options) -> None:
    """Evaluate policies: avg@k and pass@k with their intervals, and which differences between policies are real.

    Several policies share one engine, so they need one architecture and one tokenizer. A call that was interrupted
    goes on where it stopped when it is repeated, with any number of processes. The same call gives the same samples,
    whatever the order of the problems, the other policies and the number of processes, up to the rounding of floats in
    the engine's batches.

    With --selected the policies that an earlier evaluation selected are evaluated on other sets: all checkpoints on
    the validation set, say, and then only the best ones on the test sets.

    With --kl-to every policy is compared with a base on completions that it drew itself: both are run over the first
    --kl-samples of each problem, once all are drawn. That loads two policies and costs two passes, far less than
    drawing the rest, and as much GPU memory as both policies have weights.

    Example: rloop eval --policy loop/0/policy --policy loop/1/rl/checkpoints --policy loop/1/policy
    --problems loop/0/valid.jsonl --out loop/eval/valid --template none --max-tokens 72 --num-samples 8 --k 8
    """
    draw(options, Request.start_engine)


def draw(options: Options, start_engine: StartEngine) -> None:
    """`run` with the engines that `start_engine` starts, if something is left to draw."""
    start = time.monotonic()
    end_with_parent()
    ranks = Ranks(options.tensor_parallel)
    request = ranks.together(lambda: _read(options, ranks))
    num_scored = options.kl_samples if options.kl_to else 0
    base = ranks.together(lambda: divergence.checked(options.kl_to, num_scored, options.temperature, request))
    sources = [*options.problems, *request.policies.values(), *([base] if base else [])]
    inputs = provenance.recorded(sources, ranks)
    ranks.together(lambda: selection.refuse_changed(options.selected, inputs.digests))
    decides = provenance.versions() | verifier.VERSION
    resolved = request.resolved | ({"kl_to": inputs.digests[str(base)]} if base else {})
    identity = provenance.identify("eval", options, inputs, decides, **resolved)
    ranks.refuse_differences(inputs.digests | decides | request.seen)
    with ExitStack() as stack:
        directory = ranks.on_first(lambda: partial.begin(options.out, identity, list(request.policies), stack))
        if directory is None:
            return
        ranks.refuse_unseen(directory / partial.SETTINGS)
        sampled = drawing.samples(request, inputs.digests, options.temperature, num_scored)
        greedy = drawing.greedy(request, inputs.digests) if options.greedy else None
        with going_on(lambda: "what was drawn is kept: the same command draws the rest"):
            drawing.draw_missing([*sampled, *([greedy] if greedy else [])], directory, start_engine, options.bare)
            ranks.wait()
            scored = [divergence.score_missing(each, base, resolved["kl_to"], directory) for each in sampled if base]
        if not ranks.is_first:
            return
        sets: dict[str, Drawn] = {}
        for index, each in enumerate(sampled):
            kinds = {ROLLOUTS: each} | ({GREEDY: greedy} if greedy else {}) | ({KL: scored[index]} if base else {})
            sets |= _sets(kinds, directory, options)
        manifest = provenance.manifest(identity, {}, 0, **request.about, template_digest=request.template.digest)
        summaries = scoring.write(options.out, sets, manifest, options.k, options.select, start)
        shutil.rmtree(directory)
    scoring.print_tables(summaries)


def _sets(kinds: Mapping[str, Drawing], directory: Path, options: Options) -> dict[str, Drawn]:
    """Every set at one temperature, which its name ends with if there are several; `kinds` are by file."""
    suffix = f"@{kinds[ROLLOUTS].temperature:g}" if len(options.temperature) > 1 else ""
    return {
        f"{name}{suffix}": Drawn(
            {file: drawing.stored(each, name, directory) for file, each in kinds.items()},
            kinds[ROLLOUTS].temperature,
            Ballots(options.bare) if options.maj else None,
        )
        for name in kinds[ROLLOUTS].request.sets
    }


def _read(options: Options, ranks: Ranks) -> Request:
    """Check everything; the first rank says what the user should know."""
    outputs.refuse_unwritable(options.out)
    request = read_request(
        selection.added(options.policy, options.selected, options.all_checkpoints),
        by_stem(options.problems),
        options,
        ranks,
        num_samples=options.num_samples,
        temperature=options.temperature[0],
        limit=options.limit,
    )
    if fault := request.too_long():  # an average over fewer problems would be another figure
        raise InputError(f"{fault}: lower it, or remove them")
    if ranks.is_first:
        request.warn_of_templates()
    return request
