"""An option is declared once: `steps: Annotated[int, "training steps", at_least(1)] = 200`.

A stage's `run`, and the dataclasses it takes, declare each option with its type, its help, its bounds or choices, its
default, and whether it can change a result. From that one declaration come the command line with its help
(`rloop_cli.app`), the check (`checked`, `OptionGroup`), and what identities and manifests name (`core.provenance`).
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Annotated, Any, ParamSpec, TypeVar, cast, get_args, get_origin, get_type_hints

from stages.core.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")
MAX_INT = 2**63  # no option means a number beyond 64 bits, which would end as a traceback further down


@dataclass(frozen=True)
class Rule:
    """What a value must be: `text` completes "must be ..." and is shown in the help; `choices` are for completion."""

    text: str
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


class Effect(Enum):
    """What an option's value can change of an output. Without a mark it decides what the result is."""

    ROUNDING = auto()  # the result up to the rounding of floats: micro-batches, memory and sequences of the engine
    WITHOUT_EFFECT = auto()  # nothing: what is shown, how often something is saved
    PATH = auto()  # where something is read or written: what lies there counts, by its digest


ROUNDING, WITHOUT_EFFECT, PATH = Effect


@dataclass(frozen=True)
class Following:
    """A default that follows other options: `of` gives it from the group, `text` says in the help how."""

    text: str
    of: Callable[[Any], Any]


def following(text: str, of: Callable[[Any], Any]) -> Any:
    """The default of an option that follows others, so that only what was typed is ever refused.

    `overlong_buffer: Annotated[int, "..."] = following("512, at most max_tokens", lambda o: min(512, o.max_tokens))`
    """
    return Following(text, of)


def at_least(low: float) -> Rule:
    """`low` or more."""
    return Rule(f"at least {low}", lambda value: value >= low)


def above(low: float) -> Rule:
    """More than `low`."""
    return Rule(f"above {low}", lambda value: value > low)


def at_most(high: float) -> Rule:
    """`high` or less."""
    return Rule(f"at most {high}", lambda value: value <= high)


def below(high: float) -> Rule:
    """Less than `high`."""
    return Rule(f"below {high}", lambda value: value < high)


def one_of(*choices: str) -> Rule:
    """One of these texts."""
    return Rule(f"one of {', '.join(choices)}", lambda value: value in choices, choices)


@dataclass(frozen=True)
class Option:
    """One option as it was declared; `default` is inspect.Parameter.empty if there is none, or a `Following`."""

    name: str
    type: Any
    help: str
    default: Any
    rules: tuple[Rule, ...] = ()
    effect: Effect | None = None

    @property
    def flag(self) -> str:
        """Its name on the command line, such as "--max-tokens"."""
        return flag(self.name)

    @property
    def help_with_rules(self) -> str:
        """The help and, in brackets, what the value must be."""
        rules = ", ".join(rule.text for rule in self.rules)
        return f"{self.help} ({rules})" if rules else self.help

    def check(self, value: Any) -> None:
        """Raise InputError "--steps 0: must be at least 1" for a value, or one of a list, that breaks a rule."""
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, float) and not math.isfinite(item):
                raise InputError(f"{self.flag} {item}: must be a finite number")
            if isinstance(item, int) and not -MAX_INT <= item < MAX_INT:
                raise InputError(f"{self.flag} {item}: must be a number of at most 64 bits")
            for rule in self.rules if item is not None else ():
                if not rule.holds(item):
                    raise InputError(f"{self.flag} {item}: must be {rule.text}")


def flag(name: str) -> str:
    """ "--max-tokens" of "max_tokens", "--from" of "from_"."""
    return "--" + name.replace("_", "-").strip("-")


def declared(owner: Any) -> dict[str, Option]:
    """The options of a dataclass or of a stage's `run`, whose dataclasses are spread into theirs, by name."""
    hints = get_type_hints(owner, include_extras=True)
    options: dict[str, Option] = {}
    for name, default in _defaults(owner):
        if dataclasses.is_dataclass(hints[name]):
            options |= declared(hints[name])
        else:
            options[name] = _option(name, hints[name], default)
    return options


def groups(run: Callable[..., Any]) -> dict[str, Any]:
    """The dataclasses that `run` takes, by the names of its parameters."""
    hints = get_type_hints(run)
    return {name: hints[name] for name, _ in _defaults(run) if dataclasses.is_dataclass(hints[name])}


def values(run: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of `run` with its value; `given` are its arguments, such as its locals() at the start.

    `run` may be the function itself or what `checked` made of it. An underscore that ends a name ("from_") is left out.
    """
    by_name: dict[str, Any] = {}
    for name, _ in _defaults(inspect.unwrap(run)):
        value = given[name]
        by_name |= dataclasses.asdict(value) if isinstance(value, OptionGroup) else {name.rstrip("_"): value}
    return by_name


def checked(run: Callable[P, R]) -> Callable[P, R]:
    """`run` with its options checked first: an InputError for the first that breaks a rule."""

    @functools.wraps(run)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = inspect.signature(run).bind(*args, **kwargs)
        bound.apply_defaults()
        options = declared(run)
        for name, value in bound.arguments.items():
            if name in options:
                options[name].check(value)
        return run(*args, **kwargs)

    return call


@dataclass(frozen=True, kw_only=True)
class OptionGroup:
    """Base class of a stage's group of options: making one with a value that breaks a rule is an InputError."""

    def __post_init__(self) -> None:
        """Fill in defaults that follow others, check each option. A derived class then checks rules between them."""
        options = declared(type(self))
        for name, option in sorted(options.items(), key=lambda item: isinstance(item[1].default, Following)):
            if isinstance(value := getattr(self, name), Following):
                object.__setattr__(self, name, value.of(self))
            option.check(getattr(self, name))

    @property
    def values(self) -> dict[str, Any]:
        """Every option by name, as manifests and identities have it: an underscore that ends a name is left out."""
        return {name.rstrip("_"): value for name, value in dataclasses.asdict(self).items()}


def _defaults(owner: Any) -> Iterator[tuple[str, Any]]:
    if not dataclasses.is_dataclass(owner):
        yield from ((name, parameter.default) for name, parameter in inspect.signature(owner).parameters.items())
        return
    kinds = [*enumerate(inspect.getmro(cast(type, owner)))]
    depth = {name: i for i, kind in reversed(kinds) for name in getattr(kind, "__annotations__", ())}
    for field in sorted(dataclasses.fields(owner), key=lambda field: depth[field.name]):  # inherited ones last
        if field.default_factory is not dataclasses.MISSING:
            yield field.name, field.default_factory()
        else:
            yield field.name, inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


def _option(name: str, hint: Any, default: Any) -> Option:
    if get_origin(hint) is not Annotated:
        return Option(name, hint, "", default)
    kind, text, *extras = get_args(hint)
    rules = tuple(extra for extra in extras if isinstance(extra, Rule))
    effect = next((extra for extra in extras if isinstance(extra, Effect)), None)
    return Option(name, kind, text, default, rules, effect)
