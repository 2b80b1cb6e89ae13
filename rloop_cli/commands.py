"""One Typer app: each stage's `run` as a command, and a user's mistake as one line.

A stage's `Options` declare what it takes (stages/core/options.py); no stage imports Typer.
"""

import errno
import inspect
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NoReturn, get_type_hints

import typer
from typer.core import TyperGroup

from stages import STAGES, load
from stages.core import options
from stages.core.errors import CollapseError, InputError, in_one_line
from stages.core.options import Following, Option, OptionGroup

RUN_ERROR = 1
USER_ERROR = 2
INTERRUPTED = 130
REFUSED = (  # by the machine, so no bug of ours
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE, errno.ENOLCK, errno.ENOMEM),
)
OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError")
MEMORY = ("--tokens-per-microbatch", "--memory-fraction", "--max-sequences")  # what stages can do with less of it
EXAMPLE_WIDTH = 72  # with its indent fits a terminal of 80 columns, so that nothing wraps it


class OneLineGroup(TyperGroup):
    """The commands. An unknown command or option is an error of one line, without Typer's usage text."""

    def main(self, *args: Any, **options: Any) -> NoReturn:
        """Run the command line, and leave with its exit code."""
        try:
            code = super().main(*args, **options | {"standalone_mode": False})
        except typer.TyperException as error:
            context = getattr(error, "ctx", None)
            path = context.command_path if context else self.name
            message = " ".join(error.format_message().split()).rstrip(".")
            typer.echo(f"rloop: {message}; see {path} --help", err=True)
            code = error.exit_code
        sys.exit(code)


app = typer.Typer(
    name="rloop",
    cls=OneLineGroup,
    help="RLoop: short RL runs in a loop, each from a policy fine-tuned on what the last one found.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
        "max_content_width": 120,
    },
)


def _print_version(asked: bool) -> None:
    if asked:
        import importlib.metadata

        typer.echo(f"rloop {importlib.metadata.version('rloop')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """RLoop: short RL runs in a loop, each from a policy fine-tuned on what the last one found."""


def command(run: Callable[..., Any]) -> Callable[..., None]:
    """A stage's `run` for Typer: its `Options` as options of the command line."""
    group = get_type_hints(run)["options"]
    debug = typer.Option("--debug", help="show the whole traceback of an error")
    parameters = [*map(_parameter, options.declared(group).values()), _keyword("debug", Annotated[bool, debug], False)]
    return ending_in_one_line(lambda **given: run(made(group, given)), parameters, run.__doc__ or "")


def made(group: type[OptionGroup], given: Mapping[str, Any]) -> OptionGroup:
    """The group of options of what Typer read; it reads None where a default follows other options."""
    follow = {name for name, option in options.declared(group).items() if isinstance(option.default, Following)}
    return group(**{name: value for name, value in given.items() if name not in follow or value not in (None, [])})


def ending_in_one_line(
    work: Callable[..., None], parameters: list[inspect.Parameter], text: str
) -> Callable[..., None]:
    """`work` for Typer, with these parameters and the help `text`, and an error of the user's as one line.

    Raises typer.Exit: 2 for an InputError, a missing permission, a full disk or memory; 1 for a CollapseError; 130 for
    Ctrl-C. Any other exception is a bug of ours and passes on as a traceback.
    """

    def call(debug: bool = False, **given: Any) -> None:
        try:
            work(**given)
        except InputError as error:
            _fail(error, USER_ERROR, debug)
        except CollapseError as error:
            _fail(error, RUN_ERROR, debug)
        except KeyboardInterrupt as interruption:
            if os.environ.get("RANK", "0") != "0":  # of the processes of a launch the first says it
                raise typer.Exit(INTERRUPTED) from None
            _fail(f"interrupted; {str(interruption) or 'nothing is written before the end'}", INTERRUPTED, debug)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            _fail(f"{error.filename or 'writing'}: {error.strerror}", USER_ERROR, debug)
        except (MemoryError, RuntimeError) as error:
            if type(error).__name__ not in OUT_OF_MEMORY:  # torch's is not imported for its name alone
                raise
            lower = [flag for flag in MEMORY if flag.strip("-").replace("-", "_") in given]
            remedy = f": lower {', '.join(lower)}" if lower else ""
            _fail(f"out of memory ({in_one_line(error)}){remedy}", USER_ERROR, debug)

    call.__doc__ = _with_copyable_example(text)
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


def _with_copyable_example(text: str) -> str:
    """The help `text` whose last paragraph, "Example: rloop ...", is not wrapped but broken as a shell reads it."""
    before, _, example = inspect.cleandoc(text).partition("Example: ")
    lines = textwrap.wrap(example, EXAMPLE_WIDTH, break_long_words=False, break_on_hyphens=False)
    return f"{before}\b\nExample:\n  " + " \\\n    ".join(lines)


def _parameter(option: Option) -> inspect.Parameter:
    """The option as a keyword parameter that Typer reads; - and _ are the same in its flag."""
    flags = [f"{option.flag}/--no-{option.flag[2:]}"] if option.type is bool else [option.flag]
    choices = [choice for rule in option.rules for choice in rule.choices]
    complete = (lambda: choices) if choices else None
    follows = option.default if isinstance(option.default, Following) else None
    shown = follows.text if follows else True
    declared = typer.Option(*flags, help=option.help_with_rules, autocompletion=complete, show_default=shown)
    return _keyword(option.name, Annotated[option.type, declared], None if follows else option.default)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _fail(error: Exception | str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    typer.echo(f"rloop: {error}", err=True)
    raise typer.Exit(code)


for _stage in STAGES:
    app.command(_stage)(command(load(_stage).run))
