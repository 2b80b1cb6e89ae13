"""One Typer app: registers each stage's `run` as a command, and turns a user's mistake into one line.

A stage's `run` holds plain annotations, `Annotated[int, "help text"] = 16`, so that no stage knows of the command
line; a parameter typed as a dataclass is spread into its fields, each an option of its own.
"""

import dataclasses
import inspect
import os
import traceback
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from stages import STAGES, load
from stages.core.errors import CollapseError, InputError

RUN_ERROR = 1
USER_ERROR = 2

app = typer.Typer(
    name="rloop",
    help="RLoop: short RL runs in a loop, each from a policy fine-tuned on what the last one found.",
    no_args_is_help=True,
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

    Raises typer.Exit: 2 for an InputError, 1 for a CollapseError. Any other exception passes on as a traceback, since
    it is our mistake.
    """
    hints = get_type_hints(run, include_extras=True)
    parameters = inspect.signature(run).parameters
    groups = {name: hints[name] for name in parameters if dataclasses.is_dataclass(hints[name])}

    def call(debug: bool, **options: Any) -> None:
        try:
            for name, group in groups.items():
                options[name] = group(**{field.name: options.pop(field.name) for field in dataclasses.fields(group)})
            run(**options)
        except InputError as error:
            _fail(error, USER_ERROR, debug)
        except CollapseError as error:
            _fail(error, RUN_ERROR, debug)

    call.__doc__ = run.__doc__
    call.__signature__ = inspect.Signature(_options(parameters, hints, groups))  # type: ignore[attr-defined]
    return call


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
    flag = "--" + name.replace("_", "-").strip("-")
    declarations = [f"{flag}/--no-{flag[2:]}"] if hint is bool else [flag]
    return _keyword(name, Annotated[hint, typer.Option(*declarations, help=text)], default)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


def _fail(error: Exception, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    typer.echo(f"rloop: {error}", err=True)
    raise typer.Exit(code)


for _stage in STAGES:
    app.command(_stage)(command(load(_stage).run))


def main() -> None:
    """Run the command line. An interruption by the keyboard ends it with code 130, a closed pipe quietly."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch comes in; hides a line on NUMA binding
    app()
