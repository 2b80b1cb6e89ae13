"""The whole command line: the stages' commands, and `check`, which reads them as a params file would call them."""

import inspect
import os
import sys

from rloop_cli import check
from rloop_cli.commands import app, command, ending_in_one_line
from rloop_cli.launch import launch

app.command("check")(command(check.run))
_words = [*inspect.signature(launch).parameters.values()]
app.command("launch", context_settings={"allow_interspersed_args": False})(
    ending_in_one_line(launch, _words, launch.__doc__ or "")
)


def main() -> None:
    """Run the command line. Ctrl-C exits with code 130, a closed pipe quietly."""
    prepare_libraries()
    app(sys.argv[1:] or ["--help"], prog_name="rloop")


def prepare_libraries() -> None:
    """Set the environment variables that libraries read when imported; those that the user has set stay."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin cost several times as much on a busy core
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # hides a line on NUMA binding
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its warnings are checks that we make ourselves
