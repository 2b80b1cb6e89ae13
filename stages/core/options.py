"""An option is declared once: `steps: Annotated[int, "training steps", at_least(1)] = 200`.

A stage's `Options`, an `OptionGroup`, declare each option with its type, its help, its bounds or choices, its default,
and what its value can change of an output. From that one declaration come the command line with its help
(`rloop_cli.commands`), the check when a group is made, and what identities and manifests name (`core.provenance`).
"""

import dataclasses
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from stages.core.errors import InputError

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


def declared(group: type["OptionGroup"]) -> dict[str, Option]:
    """The options of a group by name: its own in their order, then inherited ones."""
    hints = get_type_hints(group, include_extras=True)
    kinds = [*enumerate(inspect.getmro(group))]
    depth = {name: i for i, kind in reversed(kinds) for name in getattr(kind, "__annotations__", ())}
    fields = sorted(dataclasses.fields(group), key=lambda field: depth[field.name])
    return {field.name: _option(field.name, hints[field.name], _default(field)) for field in fields}


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


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


def _option(name: str, hint: Any, default: Any) -> Option:
    if get_origin(hint) is not Annotated:
        return Option(name, hint, "", default)
    kind, text, *extras = get_args(hint)
    rules = tuple(extra for extra in extras if isinstance(extra, Rule))
    effect = next((extra for extra in extras if isinstance(extra, Effect)), None)
    return Option(name, kind, text, default, rules, effect)
