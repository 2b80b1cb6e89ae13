"""One Typer app: registers each stage's `run` as a command, and turns a user's mistake into one line.

A stage's `run` holds plain annotations, `Annotated[int, "help text"] = 16`, so that no stage knows of the command
line; a parameter typed as a dataclass is spread into its fields, each an option of its own.
"""

import dataclasses
import errno
import inspect
import math
import os
import sys
import textwrap
import traceback
from collections.abc import Callable
from typing import Annotated, Any, NoReturn, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperGroup

from stages import STAGES, load
from stages.core.errors import CollapseError, InputError

RUN_ERROR = 1
USER_ERROR = 2
REFUSED = (  # by the machine, so no bug of ours
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE, errno.ENOLCK, errno.ENOMEM),
)
EXAMPLE_WIDTH = 72  # with its indent fits a terminal of 80 columns, so that nothing wraps it


class OneLineGroup(TyperGroup):
    """The commands; what the command line does not know is said in one line, without the usage around it."""

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
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
        "max_content_width": 120,
    },
)


def command(run: Callable[..., Any]) -> Callable[..., None]:
    """Wrap a stage's `run` for Typer: dataclass parameters spread into options, errors in one line.

    Raises typer.Exit: 2 for an InputError, or for a right or room that the disk refuses; 1 for a CollapseError. Any
    other exception passes on as a traceback, since it is our mistake.
    """
    hints = get_type_hints(run, include_extras=True)
    parameters = inspect.signature(run).parameters
    groups = {name: hints[name] for name in parameters if dataclasses.is_dataclass(hints[name])}

    def call(debug: bool, **options: Any) -> None:
        try:
            _refuse_wild(options)
            for name, group in groups.items():
                options[name] = group(**{field.name: options.pop(field.name) for field in dataclasses.fields(group)})
            run(**options)
        except InputError as error:
            _fail(error, USER_ERROR, debug)
        except CollapseError as error:
            _fail(error, RUN_ERROR, debug)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            _fail(f"{error.filename or 'writing'}: {error.strerror}", USER_ERROR, debug)

    call.__doc__ = _with_copyable_example(run.__doc__ or "")
    call.__signature__ = inspect.Signature(_options(parameters, hints, groups))  # type: ignore[attr-defined]
    return call


def _refuse_wild(options: dict[str, Any]) -> None:
    """Raise InputError for a number that no option means, and that would end as a traceback somewhere below."""
    for name, value in options.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise InputError(f"{_flag(name)} {number}: must be a finite number")
            if isinstance(number, int) and not -(2**63) <= number < 2**63:
                raise InputError(f"{_flag(name)} {number}: must be a number of at most 64 bits")


def _with_copyable_example(text: str) -> str:
    """The help `text` whose last paragraph, "Example: rloop ...", is not wrapped but broken as a shell reads it."""
    before, _, example = inspect.cleandoc(text).partition("Example: ")
    lines = textwrap.wrap(example, EXAMPLE_WIDTH, break_long_words=False, break_on_hyphens=False)
    return f"{before}\b\nExample:\n  " + " \\\n    ".join(lines)


def _options(parameters: Any, hints: dict[str, Any], groups: dict[str, Any]) -> list[inspect.Parameter]:
    options = []
    for name, parameter in parameters.items():
        if name in groups:
            types = get_type_hints(groups[name], include_extras=True)
            options += [_option(f.name, types[f.name], _default(f)) for f in dataclasses.fields(groups[name])]
        else:
            options.append(_option(name, hints[name], parameter.default))
    debug = typer.Option("--debug", help="show the whole traceback of an error")
    return [*options, _keyword("debug", Annotated[bool, debug], False)]


def _option(name: str, hint: Any, default: Any) -> inspect.Parameter:
    """One keyword parameter whose string annotation became Typer's help text; -/_ are the same in its flag."""
    text = ""
    if get_origin(hint) is Annotated:
        hint, text = get_args(hint)[:2]
    flag = _flag(name)
    declarations = [f"{flag}/--no-{flag[2:]}"] if hint is bool else [flag]
    return _keyword(name, Annotated[hint, typer.Option(*declarations, help=text)], default)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-").strip("-")


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


def _fail(error: Exception | str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    typer.echo(f"rloop: {error}", err=True)
    raise typer.Exit(code)


for _stage in STAGES:
    app.command(_stage)(command(load(_stage).run))


def main() -> None:
    """Run the command line. An interruption by the keyboard ends it with code 130, a closed pipe quietly."""
    prepare_libraries()
    app(sys.argv[1:] or ["--help"])


def prepare_libraries() -> None:
    """Set what the libraries read when they come in; what the user has set stays."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin cost several times as much on a busy core
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # hides a line on NUMA binding
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what it warns of is checked here, and said in one line
