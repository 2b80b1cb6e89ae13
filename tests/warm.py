"""Run commands in processes forked from one that has imported everything.

Importing torch and vLLM takes longer than a small stage runs; the tests run many small stages, and so import them once.
Each command still has a process of its own.
"""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from rloop_cli import app


def start(arguments: Sequence[str], directory: str | Path, log: str | Path) -> BaseProcess:
    """Start `rloop ARGUMENTS` in `directory`, its output appended to `log`; `join()`, then read `exitcode`."""
    process = context().Process(target=_command, args=(list(arguments), str(directory), str(log)))
    process.start()
    return process


def context() -> ForkServerContext:
    """A way to start processes that are forked from the one with the imports."""
    app.prepare_libraries()
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).parents[1]))  # the fork server has it from nothing else
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.imports"])
    return server


def _command(arguments: list[str], directory: str, log: str) -> None:
    os.chdir(directory)
    with Path(log).open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = ["rloop", *arguments]
    app.main()
