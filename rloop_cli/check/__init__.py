"""`rloop check`: what can be known before a GPU hour is spent.

graph reads dvc.yaml as DVC does; calls, files, prompts, fit, counts, times and notes judge it; report puts it together.
Nothing is run, written or fetched.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from stages.core.errors import InputError
from stages.core.options import PATH, OptionGroup, at_least


@dataclass(frozen=True, kw_only=True)
class Options(OptionGroup):
    """What `rloop check` takes."""

    params: Annotated[Path, "params file, read in the place of params.yaml", PATH] = Path("params.yaml")
    runs: Annotated[Path, "directory of runs whose figures say how long it takes", PATH] = Path("runs")
    gpu_memory: Annotated[
        float, "GiB that each GPU offers (a card of 24 GB some 22, of 80 GB 79), to hold the plan against", at_least(0)
    ] = 0.0


def run(options: Options) -> None:
    """Check a params file and the graph that it makes, without running anything.

    Reads every command of dvc.yaml as it would run and names each fault in a line: options, files that no stage makes,
    templates, prompts that do not fit the context, and with --gpu-memory what does not fit a GPU. Without a fault it
    shows a prompt, the longest sequences, memory by the plan of docs/memory.md, how much is drawn, and how long that
    takes by the figures of a run that is there. What has to be made first is named and checked once it is there.

    Example: rloop check --params params.yaml --gpu-memory 22
    """
    from rloop_cli.check import graph
    from rloop_cli.check.report import report

    calls, faults = graph.read(options.params)
    said = report(calls, options.runs, options.gpu_memory)
    if not (faults := [*faults, *said.faults]):
        print(said.summary)
        return
    lines = (" ".join(fault.split()) for fault in faults)
    raise InputError("\nrloop: ".join(lines))  # the door begins the first line so
