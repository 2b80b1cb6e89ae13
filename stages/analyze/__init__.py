"""Analyze: what a run learns, forgets and repeats, from the evaluations of its checkpoints (the paper's section 3).

For each method in the evaluations (RLoop over its iterations, vanilla RL): the learning, forgetting and similarity
matrices over its checkpoints, similarity by step, retention and turnover of the problems that the base solves, and
pass@k with samples of several checkpoints (temporal sampling). For RLoop against vanilla RL: the differential
forgetting matrix over the steps that both have. Everything is computed from stored counts and texts, without torch or
an engine.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from stages.analyze import curves, dynamics, similarity
from stages.core import outputs
from stages.core.errors import InputError
from stages.core.options import PATH, at_least, checked
from stages.core.progress import warn
from stages.core.provenance import digest, identify_run, manifest
from stages.core.records import Result
from stages.core.study import lineage
from stages.core.study.metrics import KS
from stages.core.study.runs import (
    BASE,
    RL,
    RLOOP,
    Evaluation,
    Place,
    find_evals,
    places,
    read_evals,
    read_rollouts,
    root_of,
    way,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

DEFINITIONS = {
    "learning": "share of problems solved at step j and not at step i",
    "forgetting": "share of problems solved at step i and not at step j",
    "similarity": "mean Jaccard similarity of bigrams over all pairs of completions of steps i and j",
    "differential_forgetting": "forgetting of {0} minus forgetting of {1}; positive where {1} forgets less",
}
NUMBERS = {"learning": "2a", "forgetting": "2b", "similarity": "2c", "differential_forgetting": "5a"}


@checked
def run(
    evals: Annotated[list[str], "an eval's output, or a directory of them (repeatable)", PATH],
    out: Annotated[str, "directory to write", PATH],
    runs: Annotated[str, "directory of runs; default: the one that the evals lie in", PATH] = "",
    iterations: Annotated[str, "the iterations that count, as in '1 2 3'; the rest is left out"] = lineage.ALL,
    set_: Annotated[str, "problem set to analyze, where the evals hold several"] = "",
    min_correct: Annotated[
        int, "a problem is solved where at least so many of its samples are correct", at_least(1)
    ] = 1,
    ks: Annotated[list[int], "the k of pass@k with samples of several checkpoints (repeatable)", at_least(1)] = [*KS],  # noqa: B006
    compare: Annotated[
        list[str], "run to compare with another; twice, for differential forgetting; default: RL and RLoop"
    ] = [],  # noqa: B006
) -> None:
    """Compute learning, forgetting and similarity, retention and temporal sampling of checkpoints from eval outputs.

    What does not descend from the base and the runs as they are now is left out, and named.

    Example: rloop analyze --evals loop/eval --set valid --out loop/analysis
    """
    given, start = locals(), time.monotonic()
    outputs.refuse_occupied(out)
    directories = find_evals(evals)
    root = root_of(directories, runs)
    line = lineage.Line(root, directories, lineage.chosen(iterations))
    evaluations = read_evals(directories, line.keeps)
    for left_out in line.left_out:
        warn(f"left out: {left_out}")
    evaluation = _one_set(evaluations, set_)
    for unequal in line.unequal(dict.fromkeys(evaluation.homes.values())):
        warn(unequal)
    ways = _ways(places(evaluation.results, root, line.bases))
    pair = _pair(ways, compare)
    matrices, steps = _matrices(evaluation, ways, min_correct, pair)
    of_steps = curves.measure(evaluation, ways, min_correct, ks)
    with outputs.claimed(out), outputs.whole_dir(out) as directory:
        _write(directory, matrices, of_steps, steps)
        metrics = _metrics(matrices, steps)
        outputs.write_json(directory / "metrics.json", metrics)
        inputs = {str(path / "results.jsonl"): digest(path / "results.jsonl") for path in directories}
        identity = identify_run(run, given, inputs, set=evaluation.problem_set, compare=list(pair or ()))
        counts = {"checkpoints": len(evaluation.results), "problems": len(next(iter(evaluation.results.values())))}
        record = manifest(identity, counts, time.monotonic() - start, evals=evals, left_out=line.left_out)
        outputs.write_json(directory / "manifest.json", record)


def _one_set(evaluations: Mapping[str, Evaluation], wanted: str) -> Evaluation:
    """The evaluation of the set `wanted`, or of the only one there is."""
    if not evaluations:
        raise InputError("nothing of the evals descends from what is there now: evaluate again")
    if wanted and wanted not in evaluations:
        raise InputError(f"--set {wanted}: the evals hold {', '.join(evaluations)}")
    if not wanted and len(evaluations) > 1:
        raise InputError(f"the evals hold several problem sets: name one of {', '.join(evaluations)} by --set")
    return evaluations[wanted or next(iter(evaluations))]


def _ways(places: Sequence[Place]) -> dict[str, list[Place]]:
    """Each method's places from the base on, if it has a checkpoint to compare; two at one place are an InputError."""
    methods = [method for method in dict.fromkeys(place.method for place in places) if method != BASE]
    ways = {method: way(places, method) for method in methods}
    for method, on_way in ways.items():
        labels = [place.label for place in on_way]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            both = " and ".join(place.policy for place in on_way if place.label == twice)
            raise InputError(f"two policies stand at step {twice} of {method}: {both}; name the evals of one run")
    ways = {method: on_way for method, on_way in ways.items() if len(on_way) > 1}
    if not ways:
        raise InputError("the evals hold no two checkpoints of one run: evaluate more --policy .../checkpoints/step_N")
    return ways


def _pair(ways: Mapping[str, list[Place]], wanted: Sequence[str]) -> tuple[str, str] | None:
    """The two runs whose forgetting is compared; None if --compare names none and RL and RLoop are not both there."""
    first, second = wanted if len(wanted) == 2 else (RL, RLOOP)
    if {first, second} <= ways.keys() and first != second and len(wanted) in (0, 2):
        return first, second
    if wanted:
        runs = ", ".join(ways)
        raise InputError(f"--compare {' '.join(wanted)}: name two different runs of {runs}, each by its own --compare")
    return None


# {"name", "set", "run", "number", "definition", "labels", "policies", "values" [labels, labels]}
Matrix = dict[str, Any]


def _matrices(
    evaluation: Evaluation, ways: Mapping[str, list[Place]], min_correct: int, pair: tuple[str, str] | None
) -> tuple[list[Matrix], list[dict[str, Any]]]:
    texts = _completions(evaluation)
    matrices, steps = [], []
    forgotten: dict[str, Any] = {}
    for method, on_way in ways.items():
        results: list[list[Result]] = [evaluation.results[place.policy] for place in on_way]
        is_solved = dynamics.solved(results, min_correct)
        forgotten[method] = dynamics.forgetting(is_solved)
        matrices.append(_matrix("learning", method, on_way, dynamics.learning(is_solved)))
        matrices.append(_matrix("forgetting", method, on_way, forgotten[method]))
        if silent := [place.policy for place in on_way if place.policy not in texts]:
            home = evaluation.homes[silent[0]]
            warn(f"no similarity of {method}: {home} holds no rollouts.jsonl with completions of {silent[0]}")
            continue
        alike, within_distinct = similarity.similarity_matrix([texts[place.policy] for place in on_way])
        matrices.append(_matrix("similarity", method, on_way, alike))
        steps += _similarity_by_step(method, on_way, alike, within_distinct)
    if pair:
        matrices += _differential(pair, ways, forgotten)
    return [matrix | {"set": evaluation.problem_set} for matrix in matrices], steps


def _completions(evaluation: Evaluation) -> dict[str, dict[str, list[str]]]:
    """Policy -> problem id -> its completions; InputError if their number differs from the results'."""
    drawn: dict[str, dict[str, dict[int, str]]] = {}
    for rollout in read_rollouts(evaluation):
        samples = drawn.setdefault(rollout["policy"], {}).setdefault(rollout["problem_id"], {})
        if rollout["sample"] in samples:
            where = f"{evaluation.homes[rollout['policy']] / 'rollouts.jsonl'}: sample {rollout['sample']}"
            raise InputError(f"{where} of {rollout['problem_id']} stands there twice: evaluate it again")
        samples[rollout["sample"]] = rollout["completion"]
    for policy, of_policy in drawn.items():
        counted = {result["problem_id"]: result["num_samples"] for result in evaluation.results[policy]}
        for problem in counted | of_policy:
            count, expected = len(of_policy.get(problem, ())), counted.get(problem, 0)
            if count != expected:
                where = f"{evaluation.homes[policy]}: {policy} has {count} rollouts of {problem}"
                raise InputError(f"{where} and {expected} samples in results.jsonl: evaluate it again")
    return {
        policy: {problem: list(samples.values()) for problem, samples in of_policy.items()}
        for policy, of_policy in drawn.items()
    }


def _matrix(name: str, run: str, on_way: Sequence[Place], values: "NDArray[Any]") -> Matrix:
    return {
        "name": name,
        "run": run,
        "number": NUMBERS[name],
        "definition": DEFINITIONS[name],
        "labels": [place.label for place in on_way],
        "policies": [place.policy for place in on_way],
        "values": values.tolist(),
    }


def _differential(
    pair: tuple[str, str], ways: Mapping[str, list[Place]], forgotten: Mapping[str, "NDArray[Any]"]
) -> list[Matrix]:
    """Forgetting of the first run minus that of the second, over the steps that both were evaluated at."""
    first, second = pair
    of_first, of_second = _by_step(ways[first]), _by_step(ways[second])
    common = sorted(of_first.keys() & of_second.keys())
    if len(common) < 2:
        return []
    rows, others = [of_first[step] for step in common], [of_second[step] for step in common]
    values = forgotten[first][rows][:, rows] - forgotten[second][others][:, others]
    on_way = [
        Place(f"{ways[first][i].policy} | {ways[second][j].policy}", "", step, str(step))
        for i, j, step in zip(rows, others, common, strict=True)
    ]
    record = _matrix("differential_forgetting", "", on_way, values)
    return [record | {"definition": record["definition"].format(first, second), "compared": f"{first} - {second}"}]


def _by_step(on_way: Sequence[Place]) -> dict[int, int]:
    """Step -> index in `on_way` of the checkpoint at that step.

    If RLoop has two policies at a step, the end of an iteration's RL and the fine-tuned start of the next, the
    former counts, since it is a checkpoint of RL as those of vanilla RL are.
    """
    turns: dict[int, int] = {}
    for turn, place in enumerate(on_way):  # RL's endpoint comes before the fine-tuned policy of its step
        turns.setdefault(place.step, turn)
    return turns


def _similarity_by_step(
    method: str, on_way: Sequence[Place], alike: "NDArray[Any]", within_distinct: "NDArray[Any]"
) -> list[dict[str, Any]]:
    """For each checkpoint: similarity within it (by the paper's formula, and of distinct samples) and to the others."""
    rows = []
    for index, place in enumerate(on_way):
        within = alike[index, index]
        rows.append(
            {
                "run": method,
                "step": place.step,
                "after_rft": int(place.ends_iteration),
                "within": float(within),
                "within_distinct": float(within_distinct[index]),
                "to_others": float((alike[index].sum() - within) / (len(on_way) - 1)),
                "policy": place.policy,
            }
        )
    return rows


def _metrics(matrices: Sequence[Matrix], steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """In numbers: each matrix's mean above the diagonal, and the mean of similarity within over steps."""
    import numpy as np

    metrics: dict[str, Any] = {}
    for matrix in matrices:
        above = np.asarray(matrix["values"])[np.triu_indices(len(matrix["labels"]), 1)]
        metrics.setdefault(matrix["run"] or matrix["compared"], {})[f"mean_{matrix['name']}"] = float(above.mean())
    for method in dict.fromkeys(row["run"] for row in steps):
        within = [row["within"] for row in steps if row["run"] == method]
        metrics[method]["mean_similarity_within"] = sum(within) / len(within)
    return metrics


def _write(
    directory: Path, matrices: Sequence[Matrix], of_steps: Sequence[curves.Curve], steps: Sequence[Mapping[str, Any]]
) -> None:
    from stages.core.study import figures

    plotted = [*figures.of_matrices(matrices), *map(figures.of_curve, of_steps)]
    for record, figure in zip([*matrices, *of_steps], plotted, strict=True):
        outputs.write_json(directory / f"{figure.name}.json", record)
        figures.save(figure, directory)
    if steps:
        outputs.write_json(directory / "similarity_by_step.json", {"steps": list(steps)})
        figures.save(figures.of_similarity(steps), directory)
