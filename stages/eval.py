"""avg@k and pass@k of policies on one file of problems, by the paper's protocol.

Writes OUT/rollouts.jsonl (every completion), OUT/results.jsonl (counts by policy and problem), OUT/metrics.json (see
core/evaluation.py) and OUT/manifest.json. Several sets are several calls: an average over sets of other sizes and
sources is the business of a table, not of an evaluation. Left out on purpose: majority voting.
"""

import shutil
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from stages.core import evaluation, jsonl, outputs, partial, records, sampling, verifier
from stages.core.engine import Engine
from stages.core.errors import InputError
from stages.core.metrics import KS
from stages.core.partial import Groups
from stages.core.records import Rollout
from stages.core.rollouts import Group, draw_each
from stages.core.runs import read_json
from stages.core.sampling import Meter, Plan, StartEngine
from stages.core.verifier import Verifier

MAX_WAITING = 32  # groups whose scores may be under way before the engine waits for the verifier


def run(
    *,
    policy: Annotated[list[str], "policy to evaluate: a checkpoint directory or a hub id; repeat it for several"] = [],  # noqa: B006
    problems: Annotated[Path | None, "problems to ask (JSONL)"] = None,
    out: Annotated[Path, "directory to write: rollouts.jsonl, results.jsonl, metrics.json, manifest.json"],
    regrade: Annotated[Path | None, "grade the rollouts of this eval output, or of this file, once more"] = None,
    num_samples: Annotated[int, "rollouts for each problem"] = 32,
    k: Annotated[list[int], "a k of pass@k; repeat it for several"] = list(KS),  # noqa: B006
    select: Annotated[str, "write the best policy by this metric (pass@32, avg@32, ...) into metrics.json"] = "",
    knobs: sampling.Knobs,
) -> None:
    """Evaluate policies: avg@k and pass@k with their intervals, and which differences between policies are real.

    Several policies share one engine, so they need one architecture and one tokenizer. One call is one file of
    problems. A call that was interrupted goes on where it stopped when it is repeated. The same call gives the same
    samples, whatever the order of the problems, up to the rounding of floats in the engine's batches.

    With --regrade nothing is drawn: the verdicts of stored rollouts are worked out anew by the verifier as it is now,
    OUT is written from them, and what changed is shown. The stored rollouts stay as they are.

    Example: rloop eval --policy toy/policy --problems toy/valid.jsonl --out evals/valid --template none --max-tokens 80
    """
    if regrade is not None:
        _regrade(regrade, out, k, select, knobs.bare)
        return
    if problems is None or not problems.is_file():
        raise InputError(f"--problems {problems or 'is missing'}: name a file of problems (JSONL)")
    evaluation.check_metrics(num_samples, k, select)
    plan = sampling.plan(policy, problems, num_samples, knobs)
    _refuse_left_out(plan)
    sampling.warn_of_templates(plan)
    parameters = {"num_samples": num_samples, "k": k, "select": select, **asdict(knobs)}
    evaluate(plan, problems, out, parameters, plan.start_engine)


def evaluate(plan: Plan, problems: Path, out: Path, parameters: dict[str, Any], start_engine: StartEngine) -> None:
    """Draw what is not there yet and write `out`; an engine is started only where something is left to draw."""
    start = time.monotonic()
    inputs = {str(problems): outputs.digest(problems)}
    inputs |= {name: outputs.digest(path) for name, path in plan.policies.items()}
    manifest = outputs.manifest("eval", parameters, inputs, {}, 0) | {"template_digest": plan.template.digest}
    with outputs.locked(out):
        if _is_done(out, manifest):
            print(f"{out} is already done: the same policies, problems and parameters")
            return
        outputs.refuse_occupied(out)
        place = partial.directory(out, _settings(plan, inputs[str(problems)]))
        with ExitStack() as stack:
            groups = {name: stack.enter_context(Groups(place / f"{inputs[name][:32]}.jsonl")) for name in plan.policies}
            _draw_missing(plan, groups, start_engine)
            found = _write(out, _stored(plan, groups), manifest, start)
        shutil.rmtree(place)
    _print(found)


def _refuse_left_out(plan: Plan) -> None:
    """An average over fewer problems would not be the one that was asked for."""
    if plan.left_out:
        raise InputError(
            f"{len(plan.left_out)} problems, such as {plan.left_out[0]}, leave no room for --max-tokens "
            f"{plan.sampling.max_tokens} in the policy's context of {plan.context} tokens: lower it, or remove them"
        )


def _is_done(out: Path, manifest: dict[str, Any]) -> bool:
    """Whether `out` is what this call would write; how much memory the engine may take changes no figure."""
    found = read_json(out / "manifest.json")

    def essence(manifest: dict[str, Any]) -> Any:
        parameters = {name: value for name, value in manifest["parameters"].items() if name != "memory_fraction"}
        return manifest["stage"], parameters, manifest["inputs"], manifest["template_digest"]

    return found.get("stage") == "eval" and "regraded" not in found and essence(found) == essence(manifest)


def _settings(plan: Plan, problems_digest: str) -> dict[str, Any]:
    """All that a group of rollouts depends on, but its policy."""
    knobs = {name: value for name, value in asdict(plan.knobs).items() if name not in ("memory_fraction", "template")}
    return {
        "problems": problems_digest,
        "num_samples": plan.sampling.num_samples,
        "template_digest": plan.template.digest,
        "verifier": verifier.VERSION,
        **knobs,
    }


def _draw_missing(plan: Plan, groups: dict[str, Groups], start_engine: StartEngine) -> None:
    """Fill `groups`, policy by policy, with one engine."""
    engine: Engine | None = None
    with Verifier(bare=plan.knobs.bare) as verifier, Meter(plan.num_groups) as meter:
        for name, kept in groups.items():
            meter.start(name, len(kept))
            if len(kept) < len(plan.prompts):
                engine = sampling.engine_for(plan.policies[name], engine, start_engine)
                _draw(plan, name, kept, engine, verifier, meter)


def _draw(plan: Plan, name: str, kept: Groups, engine: Engine, verifier: Verifier, meter: Meter) -> None:
    """Draw the groups that one policy lacks; each is kept as soon as it is scored."""
    waiting: deque[Group] = deque()

    def keep(max_waiting: int) -> None:
        while waiting and (len(waiting) > max_waiting or waiting[0].is_scored):
            group = waiting.popleft()
            meter.scored(group.rewards)
            kept.add(group.rollouts(name))

    def drawn(_: int, group: Group) -> None:
        meter.drawn(group.num_tokens)
        waiting.append(group)
        keep(MAX_WAITING)

    missing = [prompt for prompt in plan.prompts if prompt.problem["id"] not in kept]
    for part, how in plan.parts(missing):
        draw_each(engine, verifier, part, how, drawn)
    keep(0)


def _stored(plan: Plan, groups: dict[str, Groups]) -> Iterator[Rollout]:
    """All rollouts by policy, problem and sample, in the order of the plan."""
    for name, kept in groups.items():
        for prompt in plan.prompts:
            for rollout in kept.get(prompt.problem["id"]):
                yield {**rollout, "policy": name}  # it may have been drawn under another name


def _write(out: Path, rollouts: Iterator[Rollout], manifest: dict[str, Any], start: float) -> dict[str, Any]:
    """Write `out` whole; return what metrics.json holds."""
    tally = evaluation.Tally()
    with outputs.whole_dir(out) as beside:
        count = jsonl.write(beside / "rollouts.jsonl", map(tally.add, rollouts))
        jsonl.write(beside / "results.jsonl", tally.results)
        parameters = manifest["parameters"]
        found = evaluation.measure(tally.results, parameters["k"], parameters["select"])
        outputs.write_json(beside / "metrics.json", found)
        counts = {"rollouts": count, "tokens": sum(result["num_tokens"] for result in tally.results)}
        seconds = round(time.monotonic() - start, 3)
        outputs.write_json(beside / "manifest.json", {**manifest, "counts": counts, "seconds": seconds})
    return found


def _print(found: dict[str, Any]) -> None:
    print(evaluation.summary_table(found))
    if found["differences"]:
        print(f"\n{evaluation.difference_table(found)}")
    if "selected" in found:
        print(f"\nbest by {found['selected']['metric']}: {found['selected']['policy']}")


def _regrade(source: Path, out: Path, k: list[int], select: str, bare: bool) -> None:
    """Grade stored rollouts with today's verifier into `out`, and show what changed."""
    start = time.monotonic()
    file = source / "rollouts.jsonl" if source.is_dir() else source
    former = read_json(file.parent / "manifest.json") if source.is_dir() else {}
    parameters = {**former.get("parameters", {}), "k": k, "select": select, "bare": bare}
    manifest = outputs.manifest("eval", parameters, former.get("inputs", {}), {}, 0)
    manifest |= {"template_digest": former.get("template_digest", ""), "regraded": {str(file): outputs.digest(file)}}
    outputs.refuse_occupied(out)
    before = evaluation.Tally()
    changes: Counter[tuple[str, str, str]] = Counter()

    def graded() -> Iterator[Rollout]:
        with Verifier(bare=bare) as verifier:
            for old, new in evaluation.regrade(records.read(file, Rollout), verifier):
                before.add(old)
                if old["verdict"] != new["verdict"]:
                    changes[old["policy"], old["verdict"], new["verdict"]] += 1
                yield new

    with outputs.locked(out):
        found = _write(out, graded(), manifest, start)
    _print(found)
    print(f"\n{evaluation.change_table(evaluation.measure(before.results, k), found, changes)}")
