"""avg@k and pass@k of policies on sets of problems, by the paper's protocol.

For one set, OUT holds

    rollouts.jsonl   every completion         metrics.json    see scoring.py
    results.jsonl    counts by problem        manifest.json   how it came about
    greedy.jsonl     with --greedy: a completion of temperature 0 for each problem, which counts in no avg@k or pass@k
    kl.jsonl         with --kl-to: the KL divergence to a base along some of the completions, see divergence.py

For several, each set has them in OUT/<set>/, and OUT/metrics.json sums them up. For an average over sets run report.

Under `accelerate launch` every process draws a share of what is missing, policy by policy, into partial files of its
own; they meet before and after, and the first writes what one process would.
"""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from stages.core import jsonl, outputs, provenance, records
from stages.core.drawing import sampling
from stages.core.drawing.engine import Engine
from stages.core.drawing.request import Request, by_stem, read_request
from stages.core.drawing.rollouts import Group, Prompt
from stages.core.drawing.sampling import Engines, Meter, SamplingOptions, StartEngine
from stages.core.errors import InputError
from stages.core.grading import verifier
from stages.core.grading.scores import Grader
from stages.core.grading.verifier import Verifier
from stages.core.lifetime import end_with_parent, going_on
from stages.core.options import PATH, at_least, following
from stages.core.outputs import read_json
from stages.core.provenance import Identity, Inputs
from stages.core.ranks import Ranks
from stages.core.records import Divergence
from stages.core.study.metrics import KS
from stages.eval import divergence, partial, scoring, selection, votes
from stages.eval.partial import Groups, Keeper, Stems

ROLLOUTS, GREEDY, KL = "rollouts.jsonl", "greedy.jsonl", "kl.jsonl"
Drawn = Mapping[str, Iterator[Any]]  # a set's rollouts, and the Divergences along them, by the names of their files


class Drawing(NamedTuple):
    """What is drawn into one file of each set, the stems of its partial files, and what marks its rollouts.

    Of the first `num_scored` samples of each group the token ids are kept besides.
    """

    request: Request
    stems: Stems
    marks: dict[str, Any]
    num_scored: int = 0


@dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions):
    """What `rloop eval` takes."""

    policy: Annotated[list[str], "a checkpoint, a directory of checkpoints, or a hub id; repeatable", PATH] = field(
        default_factory=list
    )
    problems: Annotated[list[Path], "a set of problems (JSONL), called by its file's name; repeatable", PATH] = field(
        default_factory=list
    )
    out: Annotated[Path, "directory to write", PATH]
    selected: Annotated[
        list[Path],
        "evaluate what counts of this eval output: the policy that it selected, the last checkpoint of each run, and "
        "what is no checkpoint of a run; repeatable",
        PATH,
    ] = field(default_factory=list)
    all_checkpoints: Annotated[bool, "with --selected: every policy of these eval outputs", PATH] = False
    regrade: Annotated[Path | None, "grade the rollouts of this eval output, or of this file, once more", PATH] = None
    num_samples: Annotated[int, "rollouts for each problem", at_least(1)] = 32
    k: Annotated[list[int], "a k of pass@k; repeatable", at_least(1)] = following(
        f"those of {', '.join(map(str, KS))} that --num-samples allows, or that number itself",
        lambda options: [k for k in KS if k <= options.num_samples] or [options.num_samples],
    )
    maj: Annotated[bool, "maj@k, too: the chance that the answer given most often among k samples is right"] = False
    greedy: Annotated[bool, "beside the samples one completion at temperature 0 for each problem"] = False
    kl_to: Annotated[str, "measure the KL divergence to this policy, such as the base, too", PATH] = ""
    kl_samples: Annotated[int, "with --kl-to: completions of each problem that it is measured on", at_least(1)] = 1
    select: Annotated[str, "name the best policy on the first set by this metric, such as pass@32"] = ""

    def __post_init__(self) -> None:
        """Raise InputError for options that cannot work together."""
        super().__post_init__()
        if self.regrade is not None:
            if self.policy or self.selected or self.kl_to or self.problems or self.limit or self.greedy:
                drawing = "--policy, --selected, --problems, --limit, --greedy and --kl-to"
                raise InputError(f"--regrade draws nothing: leave out {drawing}")
            if self.has_own_rewards:
                raise InputError("--regrade grades by math-verify: leave out --reward, or draw anew")
            return
        if not self.problems:
            raise InputError("--problems is missing: name at least one file of problems")
        if Path("-") in self.problems:
            raise InputError("--problems -: name a file, for an interrupted call must find the same problems again")
        sampling.refuse_alike(self.temperature, self.num_samples)
        scoring.check_metrics(self.num_samples, self.k, self.select, self.maj, self.greedy)
        if self.maj and self.has_own_rewards:
            raise InputError("--maj asks math-verify which answers are equivalent: leave it out, or --reward")


def run(options: Options) -> None:
    """Evaluate policies: avg@k and pass@k with their intervals, and which differences between policies are real.

    Several policies share one engine, so they need one architecture and one tokenizer. A call that was interrupted
    goes on where it stopped when it is repeated, with any number of processes. The same call gives the same samples,
    whatever the order of the problems, the other policies and the number of processes, up to the rounding of floats in
    the engine's batches.

    With --selected the policies of one evaluation are asked on other sets: every checkpoint on the validation set,
    say, and then only those on the test sets that it left standing.

    With --kl-to every policy is compared with a base on completions that it drew itself: both are run over the first
    --kl-samples of each problem, when all are drawn. That loads two policies and costs two passes, far less than
    drawing the rest, and as much GPU memory as both policies have weights.

    With --regrade nothing is drawn: the verdicts of stored rollouts are worked out anew by math-verify as it is now,
    OUT is written from them, and what changed is shown. The stored rollouts stay as they are. So --regrade --maj
    adds maj@k, for which the verifier says which answers are equivalent, to an evaluation without it.

    Example: rloop eval --policy loop/0/policy --policy loop/1/rl/checkpoints --policy loop/1/policy
    --problems loop/0/valid.jsonl --out loop/eval/valid --template none --max-tokens 72 --num-samples 8 --k 8
    """
    draw(options, Request.start_engine)


def draw(options: Options, start_engine: StartEngine) -> None:
    """`run` with the engines that `start_engine` starts, if something is left to draw."""
    start = time.monotonic()
    end_with_parent()
    ranks = Ranks(options.tensor_parallel)
    if options.regrade is not None:
        ranks.together(lambda: outputs.refuse_unwritable(options.out))
        parameters = {name: getattr(options, name) for name in ("k", "maj", "select", "bare")}
        regrade_rollouts(options.regrade, options.out, parameters, ranks)
        return
    request = ranks.together(lambda: _read(options, ranks))
    num_scored = options.kl_samples if options.kl_to else 0
    base = ranks.together(lambda: divergence.checked(options.kl_to, num_scored, request))
    inputs = ranks.together(
        lambda: provenance.recorded([*options.problems, *request.policies.values(), *([base] if base else [])])
    )
    ranks.together(lambda: selection.refuse_changed(options.selected, inputs.digests))
    decides = provenance.versions() | verifier.VERSION
    resolved = request.resolved | ({"kl_to": inputs.digests[str(base)]} if base else {})
    identity = provenance.identify("eval", options, inputs, decides, **resolved)
    ranks.refuse_differences(inputs.digests | decides | request.seen)
    with ExitStack() as stack:
        place = ranks.on_first(lambda: _begin(options.out, identity, list(request.policies), stack))
        if place is None:
            return
        ranks.refuse_unseen(place / partial.SETTINGS)
        stems = _stems(request, options.problems, inputs.digests)
        drawings = _drawings(request, stems, options.greedy, num_scored)
        with going_on(lambda: "what was drawn is kept: the same command draws the rest"):
            _draw_missing(drawings, place, start_engine, options.bare)
            ranks.wait()
            if base:
                scored = divergence.stems_of(stems, num_scored, resolved["kl_to"])
                divergence.score_missing(request, stems, num_scored, base, scored, place)
                drawings[KL] = Drawing(request, scored, {})
        if not ranks.is_first:
            return
        stored = {
            name: {file: _stored(drawing, name, place) for file, drawing in drawings.items()} for name in request.sets
        }
        summaries = _write(options.out, stored, _manifest(identity, request), start)
        shutil.rmtree(place)
    _print(summaries)


def _read(options: Options, ranks: Ranks) -> Request:
    """Check everything; the first rank says what the user should know."""
    outputs.refuse_unwritable(options.out)
    request = read_request(
        selection.added(options.policy, options.selected, options.all_checkpoints),
        by_stem(options.problems),
        options,
        ranks,
        num_samples=options.num_samples,
        temperature=options.temperature,
        limit=options.limit,
    )
    if fault := request.too_long():  # an average over fewer problems would be another figure
        raise InputError(f"{fault}: lower it, or remove them")
    if ranks.is_first:
        request.warn_of_templates()
    return request


def _begin(out: Path, identity: Identity, policies: list[str], stack: ExitStack) -> Path | None:
    """Lock `out` for as long as `stack` lives; its partial directory, or None if `out` is done."""
    stack.enter_context(outputs.locked(out))
    if _is_done(out, identity, policies):
        print(f"{out} is already done: the same policies, problems and parameters")
        return None
    outputs.refuse_occupied(out)
    return partial.directory(out, identity)


def _manifest(identity: Identity, request: Request) -> dict[str, Any]:
    """What the manifests of all sets have in common."""
    return provenance.manifest(identity, {}, 0, **request.about, template_digest=request.template.digest)


def _is_done(out: Path, identity: Identity, policies: list[str]) -> bool:
    """Whether `out` is what this call would write.

    Raises InputError if only the version of the verifier differs: --regrade is enough.
    """
    known = provenance.read_manifest(out / "manifest.json")
    if known.get("stage") != "eval" or known.get("policies") != policies:
        return False
    if replace(identity, versions=provenance.versions()).differences(known):
        return False
    if changes := identity.differences(known):
        raise InputError(
            f"{out} was graded by another verifier ({', '.join(changes)}): grade it anew with --regrade {out} and "
            "another --out, or remove it"
        )
    return True


def _stems(request: Request, problem_files: list[Path], digests: Mapping[str, str]) -> Stems:
    """The stems of the partial files; two names of one checkpoint share theirs."""
    return {
        (file.stem, name): f"{digests[str(file)][:16]}-{digests[str(policy)][:16]}"
        for file in problem_files
        for name, policy in request.policies.items()
    }


def _drawings(request: Request, stems: Stems, greedy: bool, num_scored: int) -> dict[str, Drawing]:
    """What is drawn, by the file that it is written to; stems begin with hexadecimal digits unless greedy."""
    drawings = {ROLLOUTS: Drawing(request, stems, {}, num_scored)}
    if greedy:
        at_zero = replace(request, sampling=replace(request.sampling, num_samples=1, temperature=0.0))
        drawings[GREEDY] = Drawing(at_zero, {key: f"greedy-{stem}" for key, stem in stems.items()}, {"greedy": True})
    return drawings


def _draw_missing(drawings: Mapping[str, Drawing], place: Path, start_engine: StartEngine, bare: bool) -> None:
    """Draw what is not in `place`, policy by policy; a policy that lacks nothing is not loaded."""
    request = drawings[ROLLOUTS].request
    wanted = {stem: drawing.num_scored for drawing in drawings.values() for stem in drawing.stems.values()}
    kept = request.ranks.on_first(lambda: {stem: partial.kept(place, stem, num) for stem, num in wanted.items()})
    engines = Engines(request, start_engine)
    num_groups = len(request.prompts) * len(request.policies) * len(drawings)
    with request.grader(bare, has_scored=any(kept.values())) as grader, Meter(num_groups, request.ranks) as meter:
        for name, path in request.policies.items():
            missing = [partial.missing(request, name, drawing.stems, kept) for drawing in drawings.values()]
            if any(missing):
                engine = engines.holding(path)  # on every rank, whose share of a few may be nothing
            for drawing, own in zip(drawings.values(), missing, strict=True):
                meter.start(name, len(own), len(request.prompts) - len(own))
                if own:
                    _draw(drawing, name, place, request.ranks.share(own), engine, grader, meter)
    if any(wanted.values()):
        engines.close()  # two policies need its memory now


def _draw(
    drawing: Drawing,
    name: str,
    place: Path,
    share: Sequence[tuple[str, Prompt]],
    engine: Engine,
    grader: Grader,
    meter: Meter,
) -> None:
    """Draw groups of one policy; each is kept as soon as it is scored."""
    request = drawing.request
    with ExitStack() as stack:
        keepers = {
            stem: stack.enter_context(Keeper(place, stem, request.ranks.engine, drawing.num_scored))
            for stem in (dict(share) if request.ranks.keeps else ())
        }
        for part in sampling.parts(request, share):
            _draw_part(request, name, part, keepers, engine, grader, meter)


def _draw_part(
    request: Request,
    name: str,
    part: Sequence[tuple[str, Prompt]],
    keepers: Mapping[str, Keeper],
    engine: Engine,
    grader: Grader,
    meter: Meter,
) -> None:
    def keep(number: int, group: Group) -> None:
        if keepers:
            keepers[part[number][0]].add(group, name)

    prompts = [prompt for _, prompt in part]
    with request.ranks.raise_once():
        sampling.draw_scored(engine, grader, prompts, request.seeded(prompts), meter, keep)


def _stored(drawing: Drawing, set_name: str, place: Path) -> Iterator[Any]:
    """A set's rollouts, or Divergences, by policy, problem and sample, in the order of the request."""
    for name in drawing.request.policies:
        with Groups(place, drawing.stems[set_name, name]) as groups:
            for prompt in drawing.request.sets[set_name]:
                for rollout in groups.get(prompt.problem["id"]):
                    own: Any = {**rollout, "policy": name}  # it may have been drawn under another name
                    yield own | drawing.marks


def _write(out: Path, sets: Mapping[str, Drawn], manifest: dict[str, Any], start: float) -> dict[str, Any]:
    """Write `out` whole; return what each set's metrics.json holds."""
    parameters, summaries = manifest["parameters"], {}
    with outputs.whole_dir(out) as beside:
        for name, drawn in sets.items():
            place = beside if len(sets) == 1 else beside / name
            results = _counted(place, drawn, parameters["maj"], parameters["bare"])
            jsonl.write(place / "results.jsonl", results)
            summaries[name] = scoring.measure(results, parameters["k"], parameters["select"])
            outputs.write_json(place / "metrics.json", summaries[name])
            sums = {name: sum(result[f"num_{name}"] for result in results) for name in ("samples", "tokens")}
            counts = {"rollouts": sums["samples"], "tokens": sums["tokens"]}
            end = {"set": name, "counts": counts, "seconds": round(time.monotonic() - start, 3)}
            outputs.write_json(place / "manifest.json", manifest | end)
        if len(sets) > 1:
            outputs.write_json(beside / "metrics.json", scoring.overview(summaries))
            outputs.write_json(beside / "manifest.json", manifest | {"seconds": round(time.monotonic() - start, 3)})
    return summaries


def _counted(place: Path, drawn: Drawn, maj: bool, bare: bool) -> list[Any]:
    """Write the files of a set, and return its Results; with `maj` these count the votes."""
    tally, ballots = scoring.Tally(), votes.Ballots(bare)
    rollouts = drawn[ROLLOUTS]
    jsonl.write(place / ROLLOUTS, map(tally.add, map(ballots.add, rollouts) if maj else rollouts))
    if GREEDY in drawn:
        jsonl.write(place / GREEDY, map(tally.add, drawn[GREEDY]))
    if KL in drawn:
        jsonl.write(place / KL, map(tally.add_divergence, drawn[KL]))
    results = tally.results
    if maj:
        with Verifier() as graders:
            ballots.count(results, graders)
    return results


def _print(summaries: dict[str, Any]) -> None:
    for name, measured in summaries.items():
        print(f"{name}\n{scoring.summary_table(measured)}\n")
        if measured["differences"]:
            print(f"{scoring.difference_table(measured)}\n")
    if chosen := next(iter(summaries.values())).get("selected"):
        print(f"best on {next(iter(summaries))} by {chosen['metric']}: {chosen['policy']}")


def regrade_rollouts(source: Path, out: Path, parameters: Mapping[str, Any], ranks: Ranks) -> None:
    """Grade stored rollouts with today's verifier into `out`, and show what changed; every rank grades a share.

    `parameters` are eval's k, maj, select and bare.
    """
    start = time.monotonic()
    files = ranks.together(lambda: _stored_files(source))
    former = ranks.together(lambda: provenance.read_manifest(source / "manifest.json"))
    digests = {str(file): provenance.digest(file) for own in files.values() for file in own.values()}
    ranks.refuse_differences(digests | verifier.VERSION)
    identity = Identity(
        "eval",
        {**former.get("parameters", {}), **parameters},
        Inputs({**former.get("inputs", {}), **digests}, {}),
        {**former.get("versions", {}), **verifier.VERSION},
    )
    manifest = provenance.manifest(identity, {}, 0, regraded=str(source))
    manifest |= {"policies": former.get("policies", []), "template_digest": former.get("template_digest", "")}
    manifest |= {name: former[name] for name in ("stamps", "paths") if name in former}
    changes = {name: scoring.Changes() for name in files}
    with ExitStack() as stack:
        ranks.on_first(lambda: stack.enter_context(outputs.claimed(out)))
        with Verifier(bare=parameters["bare"]) as graders:
            graded = [file for own in files.values() for kind, file in own.items() if kind != KL]
            verdicts = {file: scoring.grade(file, graders, ranks) for file in graded}
        if not ranks.is_first:
            return
        sets = {
            name: {
                kind: records.read(file, Divergence)
                if kind == KL
                else scoring.regraded(file, verdicts[file], changes[name])
                for kind, file in own.items()
            }
            for name, own in files.items()
        }
        summaries = _write(out, sets, manifest, start)
    _print(summaries)
    for name, change in changes.items():
        print(f"{name}: {scoring.change_table(change, summaries[name], parameters['k'])}")


def _stored_files(source: Path) -> dict[str, dict[str, Path]]:
    """The rollouts files of an eval output by set, in its order, and name; `source` may be such a file itself."""
    if not source.is_dir():
        if str(source) == "-" or (source.exists() and not source.is_file()):
            raise InputError(f"--regrade {source}: name a plain file, for it is read twice")
        return {source.stem: {ROLLOUTS: source}}
    first = [f"{name}/rollouts.jsonl" for name in read_json(source / "metrics.json").get("sets", ())]
    others = sorted(source.glob("*/rollouts.jsonl"))
    paths = dict.fromkeys([source / "rollouts.jsonl", *(source / name for name in first), *others])
    files = [path for path in paths if path.exists()]
    if not files:
        raise InputError(f"--regrade {source} holds no rollouts.jsonl: name an eval output, or a file of rollouts")
    stored = {file: {name: file.with_name(name) for name in (ROLLOUTS, GREEDY, KL)} for file in files}
    return {
        read_json(file.parent / "manifest.json").get("set", file.parent.name): {
            name: path for name, path in own.items() if path.exists()
        }
        for file, own in stored.items()
    }
