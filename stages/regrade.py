"""Regrade: the verdicts of stored rollouts, worked out anew by math-verify as it is now, and what changed by it."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from stages.core import outputs, provenance, records
from stages.core.errors import InputError
from stages.core.grading import verifier
from stages.core.grading.ballots import Ballots
from stages.core.grading.rewards import GradingOptions
from stages.core.grading.verifier import Verifier
from stages.core.lifetime import end_with_parent
from stages.core.options import PATH, at_least
from stages.core.outputs import read_json
from stages.core.provenance import Identity, Inputs
from stages.core.ranks import Ranks
from stages.core.records import Divergence, Rollout, Verdict
from stages.core.study import scoring
from stages.core.study.metrics import usual_ks
from stages.core.study.scoring import GREEDY, KL, ROLLOUTS, Drawn, ResultCounter
from stages.core.tabular import aligned

BATCH = 4096  # rollouts given to the verifier at once


@dataclass(frozen=True, kw_only=True)
class Options(GradingOptions):
    """What `rloop regrade` takes."""

    rollouts: Annotated[Path, "an eval output, or a file of rollouts", PATH]
    out: Annotated[Path, "directory to write", PATH]
    k: Annotated[list[int], "a k of pass@k; repeatable; if none is given, those of the evaluation", at_least(1)] = (
        field(default_factory=list)
    )
    maj: Annotated[bool, "maj@k, too: the chance that the answer given most often among k samples is right"] = False
    select: Annotated[str, "name the best policy on the first set by this metric, such as pass@32"] = ""
    bare: Annotated[bool, "a completion without box and 'Answer:' line counts by its bare final expression"] = False


def run(options: Options) -> None:
    """Grade stored rollouts once more, write OUT as eval does, and show which verdicts and metrics changed.

    Nothing is drawn, and the stored rollouts stay as they are. With --maj this adds maj@k, for which the verifier says
    which answers are equivalent, to an evaluation without it. Under `accelerate launch` every process grades a share.

    Example: rloop regrade --rollouts loop/eval/valid --out loop/regraded --maj
    """
    started, ranks = time.monotonic(), Ranks()
    end_with_parent()
    ranks.together(lambda: outputs.refuse_unwritable(options.out))
    files = ranks.together(lambda: _stored_files(options.rollouts))
    inputs = provenance.recorded((file for own in files.values() for file in own.values()), ranks)
    former = ranks.together(lambda: provenance.read_manifest(options.rollouts / "manifest.json"))
    ranks.refuse_differences(inputs.digests | verifier.VERSION)
    changes = {name: Changes() for name in files}
    with ExitStack() as stack:
        ranks.on_first(lambda: stack.enter_context(outputs.claimed(options.out)))
        with Verifier(bare=options.bare, accept_unevaluated=options.accept_unevaluated) as grader:
            graded = [file for own in files.values() for kind, file in own.items() if kind != KL]
            verdicts = {file: grade(file, grader, ranks) for file in graded}
        if not ranks.is_first:
            return
        ks = options.k or former.get("parameters", {}).get("k") or _ks(next(iter(files.values()))[ROLLOUTS])
        sets = {name: _drawn(own, verdicts, changes[name], options) for name, own in files.items()}
        manifest = _manifest(options, ks, former, inputs)
        summaries = scoring.write(options.out, sets, manifest, ks, options.select, started)
    scoring.print_tables(summaries)
    for name, change in changes.items():
        print(f"{name}: {change_table(change, summaries[name], ks)}")


def _manifest(options: Options, ks: Sequence[int], former: Mapping[str, Any], inputs: Inputs) -> dict[str, Any]:
    """What the evaluation's manifest said, but for what was graded anew."""
    own = {"k": list(ks), **{name: getattr(options, name) for name in ("maj", "select", "bare", "accept_unevaluated")}}
    identity = Identity(
        "regrade",
        {**former.get("parameters", {}), **own},
        Inputs({**former.get("inputs", {}), **inputs.digests}, {**former.get("stamps", {}), **inputs.stamps}),
        {**former.get("versions", {}), **verifier.VERSION},
    )
    kept = {name: former[name] for name in ("policies", "paths", "template_digest") if name in former}
    return provenance.manifest(identity, {}, 0, **kept)


def _stored_files(source: Path) -> dict[str, dict[str, Path]]:
    """The files of an eval output by set, in its order, and name; `source` may be a file of rollouts itself."""
    if not source.is_dir():
        if str(source) == "-" or (source.exists() and not source.is_file()):
            raise InputError(f"--rollouts {source}: name a plain file, for it is read twice")
        return {source.stem: {ROLLOUTS: source}}
    first = [f"{name}/{ROLLOUTS}" for name in read_json(source / "metrics.json").get("sets", ())]
    others = sorted(source.glob(f"*/{ROLLOUTS}"))
    paths = dict.fromkeys([source / ROLLOUTS, *(source / name for name in first), *others])
    files = [path for path in paths if path.exists()]
    if not files:
        raise InputError(f"--rollouts {source} holds no {ROLLOUTS}: name an eval output, or a file of rollouts")
    return {
        read_json(file.parent / "manifest.json").get("set", file.parent.name): {
            name: path for name in (ROLLOUTS, GREEDY, KL) if (path := file.with_name(name)).exists()
        }
        for file in files
    }


def _drawn(
    files: Mapping[str, Path],
    verdicts: Mapping[Path, Sequence[Sequence[Verdict]]],
    changes: "Changes",
    options: Options,
) -> Drawn:
    """A set's records with the verdicts of now."""
    contents: dict[str, Iterator[Any]] = {
        kind: records.read(file, Divergence) if kind == KL else regraded(file, verdicts[file], changes)
        for kind, file in files.items()
    }
    temperature = read_json(files[ROLLOUTS].with_name("manifest.json")).get("temperature")
    return Drawn(contents, temperature, Ballots(options.bare) if options.maj else None)


def _ks(file: Path) -> list[int]:
    """The usual k of pass@k for the smallest number of samples that a file's rollouts have of a problem."""
    counter = ResultCounter()
    for rollout in records.read(file, Rollout):
        counter.add(rollout)
    return usual_ks(min((result["num_samples"] for result in counter.results), default=1))


class Changes:
    """What regrading changed: verdicts by (policy, old, new), and the results before."""

    def __init__(self) -> None:
        self.before = ResultCounter()
        self.verdicts: Counter[tuple[str, str, str]] = Counter()

    def add(self, old: Rollout, new: Rollout) -> None:
        self.before.add(old)
        if old["verdict"] != new["verdict"]:
            self.verdicts[old["policy"], old["verdict"], new["verdict"]] += 1


def grade(file: Path, verifier: Verifier, ranks: Ranks) -> list[list[Verdict]]:
    """The verdicts of the rollouts of `file` as `verifier` gives them now, by rank: each grades a share."""
    return ranks.gather(ranks.together(lambda: _grade_share(file, verifier, ranks)))


def _grade_share(file: Path, verifier: Verifier, ranks: Ranks) -> list[Verdict]:
    own = (rollout for rank, rollout in _shared_out(file, ranks.num_ranks) if rank == ranks.rank)
    verdicts: list[Verdict] = []
    while batch := list(islice(own, BATCH)):
        if any("rewards" in rollout for rollout in batch):
            raise InputError(
                f"--rollouts {file}: its rewards are not math-verify's (--reward): draw anew to change them"
            )
        pairs = [(rollout["completion"], records.accepted(rollout)) for rollout in batch]
        scores = verifier.submit(pairs, [rollout["prompt"] for rollout in batch]).result()
        verdicts += (score.verdict for score in scores)
    return verdicts


def regraded(file: Path, verdicts: Sequence[Sequence[Verdict]], changes: Changes) -> Iterator[Rollout]:
    """The rollouts of `file` with the `verdicts` of `grade`; `changes` counts the differences."""
    by_rank = list(map(iter, verdicts))
    for rank, old in _shared_out(file, len(verdicts)):
        verdict = next(by_rank[rank])
        new: Rollout = {**old, "verdict": verdict, "reward": 1.0 if verdict == "correct" else 0.0}
        changes.add(old, new)
        yield new


def _shared_out(file: Path, num_ranks: int) -> Iterator[tuple[int, Rollout]]:
    """Each rollout of `file` with the rank that grades it: all of a problem have one, which knows its answers then."""
    numbers: dict[str, int] = {}
    for rollout in records.read(file, Rollout):
        yield numbers.setdefault(rollout["problem_id"], len(numbers)) % num_ranks, rollout


def change_table(changes: Changes, after: dict[str, Any], ks: Sequence[int]) -> str:
    """The verdicts that changed, and every metric that moved with them."""
    if not changes.verdicts:
        return "no verdict changed"
    before = scoring.measure(changes.before.results, ks)["policies"]
    rows = [["policy", "verdict", "rollouts"]]
    rows += [[policy, f"{old} -> {new}", str(count)] for (policy, old, new), count in changes.verdicts.most_common()]
    moved = [["policy", "metric", "before", "after"]]
    for policy, summary in after["policies"].items():
        pairs = ((name, before[policy][name], summary[name]) for name in scoring.metric_names(before[policy]))
        moved += [[policy, name, scoring.percent(old), scoring.percent(new)] for name, old, new in pairs if old != new]
    return "\n".join([f"{sum(changes.verdicts.values())} verdicts changed", aligned(rows), "", aligned(moved)])
