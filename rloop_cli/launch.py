"""`rloop launch`: a stage by the launcher that the params file names.

DVC does not see the launcher, so that another one, or more processes, makes nothing anew.
"""

import os
from pathlib import Path
from typing import Annotated

import typer
import yaml

from stages.core.errors import InputError

PARAMS = Path("params.yaml")


def launch(words: Annotated[list[str], typer.Argument(metavar="STAGE ...", help="the stage and its options")]) -> None:
    """Run a stage on the processes that `launch` in params.yaml asks for.

    The launcher stands before the stage as in a shell: with "launch: accelerate launch -m rloop_cli" the example is
    "accelerate launch -m rloop_cli rl ...". It is no part of DVC's graph: to change it makes nothing anew.

    Example: rloop launch rl --policy loop/0/policy --problems loop/0/train.jsonl --out loop/1/rl
    """
    command = f'{launcher(PARAMS)} "$@"'
    os.execvp("sh", ["sh", "-c", command, "rloop", *words])


def launcher(params: Path) -> str:
    """The launcher that a params file names. Raises InputError if the file is missing or names none."""
    if not params.is_file():
        raise InputError(f"{params}: no such file: rloop launch works in its directory")
    try:
        sections = yaml.safe_load(params.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{params}: not valid YAML: {' '.join(str(error).split())}") from None
    named = sections.get("launch") if isinstance(sections, dict) else None
    if not isinstance(named, str) or not named.strip():
        raise InputError(f"{params}: launch: expected what stands before a stage, such as rloop, found {named!r}")
    return named
