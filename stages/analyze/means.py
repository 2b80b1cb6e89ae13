"""Matrices in single numbers: their means above the diagonal, where j comes after i.

    mean_forgetting                    over all pairs of checkpoints of the run
    mean_forgetting_at_common_steps    over those at steps that RL and RLoop both have, so that the two can be compared
    mean_forgetting_within_iterations  over pairs within an iteration, from its start policy on (the paper's 5.4)
    mean_forgetting_across_iterations  over pairs with a reset between them; for RL, one of RLoop's at the same step
    floor_of_forgetting                what chance alone forgets with half of the samples: the two halves of one policy

and so for learning and similarity.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from stages.core.records import Matrix, Similarity
from stages.core.study.runs import BASE, RL, RLOOP, Position, iteration_of

if TYPE_CHECKING:
    from stages.core.study.metrics import Array


def measure(
    matrices: Sequence[Matrix], steps: Sequence[Similarity], paths: Mapping[str, Sequence[Position]]
) -> dict[str, dict[str, float]]:
    """The means of each run's matrices, and of similarity within its checkpoints."""
    import numpy as np

    resets = sorted({position.step for path in paths.values() for position in path if position.ends_iteration})
    common = set.intersection(*(set(by_step(paths[run])) for run in (RL, RLOOP))) if {RL, RLOOP} <= paths.keys() else {}
    means: dict[str, dict[str, float]] = {}
    for matrix in matrices:
        values, name = np.asarray(matrix["values"]), f"mean_{matrix['name']}"
        of_run = means.setdefault(matrix["run"] or matrix["compared"], {})
        of_run[name] = float(values[np.triu_indices(len(values), 1)].mean())
        path = paths.get(matrix["run"], [])
        if matrix["name"] == "forgetting_of_halves":
            of_run["floor_of_forgetting"] = float(values.diagonal().mean())
        if path and resets:
            within = is_within(path, resets)
            pairs = {"within_iterations": within, "across_iterations": np.triu(~within, 1)}
            of_run |= {f"{name}_{kind}": float(values[chosen].mean()) for kind, chosen in pairs.items() if chosen.any()}
        if matrix["run"] in (RL, RLOOP) and len(common) > 1:
            rows = [index for step, index in by_step(path).items() if step in common]
            of_run[f"{name}_at_common_steps"] = float(values[rows][:, rows][np.triu_indices(len(rows), 1)].mean())
    for run in dict.fromkeys(row["run"] for row in steps):
        means[run]["mean_similarity_within"] = float(np.mean([row["within"] for row in steps if row["run"] == run]))
    return means


def by_step(path: Sequence[Position]) -> dict[int, int]:
    """Step -> index in `path` of the checkpoint at that step.

    If RLoop has two policies at a step, the end of an iteration's RL and the fine-tuned start of the next, the
    former counts, since it is a checkpoint of RL as those of vanilla RL are.
    """
    indices: dict[int, int] = {}
    for index, position in enumerate(path):  # RL's endpoint comes before the fine-tuned policy of its step
        indices.setdefault(position.step, index)
    return indices


def is_within(path: Sequence[Position], resets: Sequence[int]) -> "Array":
    """[i, j]: whether no reset lies between the checkpoints i and j, for j after i; bool, False elsewhere."""
    import numpy as np

    before = np.array([_resets_before(position, resets) for position in path])
    after = np.array([_resets_before(position, resets, is_start=True) for position in path])
    return np.triu(after[:, None] == before[None, :], 1)


def _resets_before(position: Position, resets: Sequence[int], is_start: bool = False) -> int:
    """Resets up to a checkpoint as the end of a phase, or as its start, which an own reset at its step precedes."""
    if position.method in (RLOOP, BASE):
        iteration = iteration_of(position.policy)
        return iteration if position.ends_iteration or not iteration else iteration - 1
    return sum(step <= position.step if is_start else step < position.step for step in resets)
