"""Run commands in processes forked from one that has imported everything.

Importing torch and vLLM takes longer than a small stage runs. An experiment over seeds, or the tests, run many small
stages in a row and so import them once. Each command still has a process of its own.
"""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from rloop_cli import app

IMPORTS = "rloop_cli.imports"


def start(arguments: Sequence[str], directory: str | Path, log: str | Path) -> BaseProcess:
    """Start `rloop ARGUMENTS` in `directory`, its output appended to `log`; `join()`, then read `exitcode`."""
    app.prepare_libraries()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([IMPORTS])
    process = context.Process(target=_command, args=(list(arguments), str(directory), str(log)))
    process.start()
    return process


def _command(arguments: list[str], directory: str, log: str) -> None:
    os.chdir(directory)
    with Path(log).open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = ["rloop", *arguments]
    app.main()
