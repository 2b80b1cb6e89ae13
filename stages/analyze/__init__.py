"""Analyze: what a run learns, forgets and repeats, from the evaluations of its checkpoints (the paper's section 3).

For each method in the evaluations (RLoop over its iterations, vanilla RL): the learning, forgetting and similarity
matrices over its checkpoints, similarity by step, retention and turnover of the problems that the base solves, and
pass@k with samples of several checkpoints (temporal sampling). For RLoop against vanilla RL: the differential
forgetting matrix over the steps that both have. Everything is computed from stored counts and texts, without torch or
an engine.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from stages.analyze import curves, dynamics, means, similarity
from stages.core import outputs
from stages.core.errors import InputError
from stages.core.options import PATH, OptionGroup, at_least
from stages.core.progress import warn
from stages.core.provenance import identify, manifest, recorded
from stages.core.records import Curve, Matrix, Result, Similarity
from stages.core.study import lineage
from stages.core.study.metrics import KS
from stages.core.study.runs import (
    BASE,
    RL,
    RLOOP,
    Evaluation,
    Position,
    find_evals,
    named_set,
    path_of,
    positions,
    read_evals,
    read_rollouts,
    root_of,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

DEFINITIONS = {
    "learning": "share of problems solved at step j and not at step i",
    "forgetting": "share of problems solved at step i and not at step j",
    "forgetting_of_halves": (
        "share of problems solved by half of the samples of step i and not by half of those of step j; on the diagonal "
        "the two halves of one policy's samples, so what chance alone forgets"
    ),
    "similarity": "mean Jaccard similarity of bigrams over all pairs of completions of steps i and j",
    "differential_forgetting": "forgetting of {0} minus forgetting of {1}; positive where {1} forgets less",
}
NUMBERS = {"learning": "2a", "forgetting": "2b", "similarity": "2c", "differential_forgetting": "5a"}  # in the paper


@dataclass(frozen=True, kw_only=True)
class Options(OptionGroup):
    """What `rloop analyze` takes."""

    evals: Annotated[list[Path], "an eval's output, or a directory of them; repeatable", PATH]
    out: Annotated[Path, "directory to write", PATH]
    runs: Annotated[Path | None, "directory of runs; default: the one that the evals lie in", PATH] = None
    iterations: Annotated[str, "use only these iterations, as in '1 2 3'"] = lineage.ALL
    set_: Annotated[str, "problem set to analyze, where the evals hold several"] = ""
    min_correct: Annotated[int, "a problem is solved if at least this many samples are correct", at_least(1)] = 1
    ks: Annotated[list[int], "the k of pass@k with samples of several checkpoints; repeatable", at_least(1)] = field(
        default_factory=lambda: [*KS]
    )
    compare: Annotated[
        list[str], "run to compare with another; given twice, for differential forgetting; default: RL and RLoop"
    ] = field(default_factory=list)


def run(options: Options) -> None:
    """Compute learning, forgetting and similarity, retention and temporal sampling of checkpoints from eval outputs.

    What does not descend from the base and the runs as they are now is left out, and named.

    Example: rloop analyze --evals loop/eval --set valid --out loop/analysis
    """
    start = time.monotonic()
    outputs.refuse_occupied(options.out)
    directories = find_evals(options.evals)
    root = root_of(directories, options.runs)
    descent = lineage.Lineage(root, directories, lineage.chosen(options.iterations))
    evaluations = read_evals(directories, descent.keeps)
    for left_out in descent.left_out:
        warn(f"left out: {left_out}")
    evaluation = _one_set(evaluations, options.set_)
    for unequal in descent.unequal(dict.fromkeys(evaluation.homes.values())):
        warn(unequal)
    paths = _paths(positions(evaluation.results, root, descent.bases))
    pair = _pair(paths, options.compare)
    matrices, steps = _matrices(evaluation, paths, options.min_correct, pair)
    over_steps = curves.measure(evaluation, paths, options.min_correct, options.ks)
    with outputs.claimed(options.out), outputs.whole_dir(options.out) as directory:
        _write(directory, matrices, over_steps, steps, evaluation.temperature)
        outputs.write_json(directory / "metrics.json", means.measure(matrices, steps, paths))
        read = recorded(path / "results.jsonl" for path in directories)
        identity = identify("analyze", options, read, set=evaluation.problem_set, compare=list(pair or ()))
        counts = {"checkpoints": len(evaluation.results), "problems": len(next(iter(evaluation.results.values())))}
        record = manifest(identity, counts, time.monotonic() - start, left_out=descent.left_out)
        outputs.write_json(directory / "manifest.json", record)


def _one_set(evaluations: Mapping[str, Evaluation], wanted: str) -> Evaluation:
    """The evaluation of the set `wanted`, of several temperatures at the lowest, or of the only one there is."""
    if not evaluations:
        raise InputError("nothing of the evals descends from what is there now: evaluate again")
    name = named_set(wanted, evaluations)
    if wanted and not name:
        raise InputError(f"--set {wanted}: the evals hold {', '.join(evaluations)}")
    if not wanted and len(evaluations) > 1:
        raise InputError(f"the evals hold several problem sets: name one of {', '.join(evaluations)} by --set")
    if name != wanted:
        warn(f"{name} is analyzed, of {wanted} that at the lowest temperature")
    return evaluations[name or next(iter(evaluations))]


def _paths(positions: Sequence[Position]) -> dict[str, list[Position]]:
    """Each method's path from the base on, if there are checkpoints to compare; two at one step are an InputError."""
    methods = [method for method in dict.fromkeys(position.method for position in positions) if method != BASE]
    paths = {method: path_of(positions, method) for method in methods}
    for method, path in paths.items():
        labels = [position.label for position in path]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            both = " and ".join(position.policy for position in path if position.label == twice)
            raise InputError(f"two policies are at step {twice} of {method}: {both}; name the evals of one run")
    paths = {method: path for method, path in paths.items() if len(path) > 1}
    if not paths:
        raise InputError("the evals hold no two checkpoints of one run: evaluate more --policy .../checkpoints/step_N")
    return paths


def _pair(paths: Mapping[str, list[Position]], wanted: Sequence[str]) -> tuple[str, str] | None:
    """The two runs whose forgetting is compared; None if --compare names none and RL and RLoop are not both there."""
    first, second = wanted if len(wanted) == 2 else (RL, RLOOP)
    if {first, second} <= paths.keys() and first != second and len(wanted) in (0, 2):
        return first, second
    if wanted:
        runs = ", ".join(paths)
        raise InputError(f"--compare {' '.join(wanted)}: name two different runs of {runs}, each by its own --compare")
    return None


def _matrices(
    evaluation: Evaluation, paths: Mapping[str, list[Position]], min_correct: int, pair: tuple[str, str] | None
) -> tuple[list[Matrix], list[Similarity]]:
    name, texts = evaluation.problem_set, _completions(evaluation)
    matrices: list[Matrix] = []
    steps: list[Similarity] = []
    forgotten: dict[str, Any] = {}
    for method, path in paths.items():
        results: list[list[Result]] = [evaluation.results[position.policy] for position in path]
        is_solved = dynamics.solved(results, min_correct)
        forgotten[method] = dynamics.forgetting(is_solved)
        halves = dynamics.forgetting_of_halves(results, min_correct)
        matrices.append(_matrix("learning", name, method, path, dynamics.learning(is_solved)))
        matrices.append(_matrix("forgetting", name, method, path, forgotten[method]))
        matrices.append(_matrix("forgetting_of_halves", name, method, path, halves))
        if silent := [position.policy for position in path if position.policy not in texts]:
            home = evaluation.homes[silent[0]]
            warn(f"no similarity of {method}: {home} holds no rollouts.jsonl with completions of {silent[0]}")
            continue
        alike, within_distinct = similarity.similarity_matrix([texts[position.policy] for position in path])
        matrices.append(_matrix("similarity", name, method, path, alike))
        steps += _similarity_by_step(method, path, alike, within_distinct)
    if pair:
        matrices += _differential(pair, name, paths, forgotten)
    return matrices, steps


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


def _matrix(name: str, problem_set: str, run: str, path: Sequence[Position], values: "NDArray[Any]") -> Matrix:
    return {
        "name": name,
        "set": problem_set,
        "run": run,
        "number": NUMBERS.get(name, ""),
        "definition": DEFINITIONS[name],
        "labels": [position.label for position in path],
        "policies": [position.policy for position in path],
        "values": values.tolist(),
    }


def _differential(
    pair: tuple[str, str],
    problem_set: str,
    paths: Mapping[str, list[Position]],
    forgotten: Mapping[str, "NDArray[Any]"],
) -> list[Matrix]:
    """Forgetting of the first run minus that of the second, over the steps that both were evaluated at."""
    first, second = pair
    of_first, of_second = means.by_step(paths[first]), means.by_step(paths[second])
    common = sorted(of_first.keys() & of_second.keys())
    if len(common) < 2:
        return []
    rows, others = [of_first[step] for step in common], [of_second[step] for step in common]
    values = forgotten[first][rows][:, rows] - forgotten[second][others][:, others]
    path = [
        Position(f"{paths[first][i].policy} | {paths[second][j].policy}", "", step, str(step))
        for i, j, step in zip(rows, others, common, strict=True)
    ]
    record = _matrix("differential_forgetting", problem_set, "", path, values)
    return [{**record, "definition": record["definition"].format(first, second), "compared": f"{first} - {second}"}]


def _similarity_by_step(
    method: str, path: Sequence[Position], alike: "NDArray[Any]", within_distinct: "NDArray[Any]"
) -> list[Similarity]:
    """For each checkpoint: similarity within it (by the paper's formula, and of distinct samples) and to the others."""
    rows: list[Similarity] = []
    for index, position in enumerate(path):
        within = alike[index, index]
        rows.append(
            {
                "run": method,
                "step": position.step,
                "after_rft": int(position.ends_iteration),
                "within": float(within),
                "within_distinct": float(within_distinct[index]),
                "to_others": float((alike[index].sum() - within) / (len(path) - 1)),
                "policy": position.policy,
            }
        )
    return rows


def _write(
    directory: Path,
    matrices: Sequence[Matrix],
    over_steps: Sequence[Curve],
    steps: Sequence[Similarity],
    temperature: str,
) -> None:
    from stages.core.study import figures

    for matrix in matrices:
        matrix["temperature"] = temperature
    for curve in over_steps:
        curve["temperature"] = temperature
    plotted = [*figures.of_matrices(matrices), *map(figures.of_curve, over_steps)]
    for record, figure in zip([*matrices, *over_steps], plotted, strict=True):
        outputs.write_json(directory / f"{figure.name}.json", record)
        figures.save(figure, directory)
    if steps:
        outputs.write_json(directory / "similarity_by_step.json", {"temperature": temperature, "steps": list(steps)})
        figures.save(figures.of_similarity(steps, temperature), directory)
