"""The stages in the order of the pipeline. Each reads and writes files; none imports another.

prepare   any source of problems                 -> problems.jsonl
toy       a seed                                 -> a directory: policy/, train.jsonl, <set>.jsonl
rl        policy + problems                      -> rollouts/, checkpoints/, log.tsv (DAPO from a start policy)
sample    policies + problems                    -> rollouts.jsonl
filter    rollouts                               -> examples.jsonl (successes on problems that stayed hard)
rft       start policy + examples                -> policy (the next start policy)
merge     policies + weights                     -> policy (their weighted average, instead of rft)
eval      policies + problems                    -> rollouts.jsonl, results.jsonl, metrics.json
regrade   an eval output or rollouts             -> the same, graded anew
analyze   evals                                  -> learning, forgetting and similarity matrices
report    a directory of runs                    -> tables and figures
"""

from importlib import import_module
from types import ModuleType

STAGES = ("prepare", "toy", "rl", "sample", "filter", "rft", "merge", "eval", "regrade", "analyze", "report")


def load(stage: str) -> ModuleType:
    """The module of a stage by its name. Importing it is fast: heavy libraries are imported when it runs."""
    return import_module(f"stages.{stage}")
