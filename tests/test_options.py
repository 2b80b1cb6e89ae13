"""One declaration an option: what is read from it, and what is refused."""

import inspect
import math
from dataclasses import dataclass, field
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from rloop_cli.commands import command
from stages import STAGES, load
from stages.core.errors import InputError
from stages.core.options import (
    PATH,
    WITHOUT_EFFECT,
    Following,
    OptionGroup,
    above,
    at_least,
    at_most,
    below,
    declared,
    following,
    one_of,
)


@dataclass(frozen=True, kw_only=True)
class Some(OptionGroup):
    share: Annotated[float, "a share", above(0), at_most(1)] = 0.5
    kind: Annotated[str, "a kind", one_of("big", "small")] = "big"
    threads: Annotated[int, "how many at once", at_least(1), WITHOUT_EFFECT] = 1


@dataclass(frozen=True, kw_only=True)
class Whole(Some):
    out: Annotated[str, "where to", PATH]
    k: Annotated[list[int], "ks", below(9)] = field(default_factory=lambda: [1])
    from_: Annotated[str, "a start"] = ""


def test_options_stand_in_their_order_and_inherited_ones_after_them_with_help_bounds_and_defaults():
    options = declared(Whole)
    assert list(options) == ["out", "k", "from_", "share", "kind", "threads"]
    assert options["share"].help_with_rules == "a share (above 0, at most 1)"
    assert options["kind"].rules[0].choices == ("big", "small")
    assert options["k"].default == [1]
    assert options["from_"].flag == "--from"
    assert [name for name, option in options.items() if option.effect is not None] == ["out", "threads"]
    assert [name for name, option in options.items() if option.effect is PATH] == ["out"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"share": 0.0}, "--share 0.0: must be above 0"),
        ({"share": 1.5}, "--share 1.5: must be at most 1"),
        ({"share": math.nan}, "--share nan: must be a finite number"),
        ({"share": math.inf}, "--share inf: must be a finite number"),
        ({"kind": "wide"}, "--kind wide: must be one of big, small"),
        ({"threads": 0}, "--threads 0: must be at least 1"),
        ({"threads": 2**63}, "--threads 9223372036854775808: must be a number of at most 64 bits"),
    ],
)
def test_a_value_out_of_bounds_is_refused_in_the_flags_own_name(option, message):
    with pytest.raises(InputError) as refused:
        Some(**option)
    assert str(refused.value) == message


def test_each_item_of_a_list_is_checked():
    with pytest.raises(InputError, match=r"^--k 9: must be below 9$"):
        Whole(out="o", k=[1, 9])


def test_values_are_all_options_as_they_were_given():
    given = {"share": 0.5, "kind": "big", "threads": 3, "out": "o", "k": [2], "from": ""}
    assert Whole(out="o", threads=3, k=[2]).values == given


@dataclass(frozen=True, kw_only=True)
class Follows(OptionGroup):
    buffer: Annotated[int, "a buffer", at_least(0)] = following("512, at most most", lambda o: min(512, o.most))
    ks: Annotated[list[int], "ks", at_least(1)] = following("half of most", lambda o: [o.most // 2])
    most: Annotated[int, "most"] = 2048


def test_a_default_follows_its_option_and_what_was_typed_stays_and_is_checked():
    assert (Follows().buffer, Follows(most=48).buffer, Follows(most=48).ks) == (512, 48, [24])
    assert (Follows(most=48, buffer=512).buffer, Follows(ks=[3]).ks) == (512, [3])
    with pytest.raises(InputError, match="--buffer -1: must be at least 0"):
        Follows(buffer=-1)
    with pytest.raises(InputError, match="--ks 0: must be at least 1"):
        Follows(most=1)


def test_the_command_line_shows_how_a_default_follows_and_leaves_it_to_the_group():
    taken = []

    def stage(options: Follows) -> None:
        """Take options. Example: rloop stage"""
        taken.append(options)

    app = typer.Typer()
    app.command()(command(stage))
    for words in ([], ["--most", "48"], ["--buffer", "7", "--ks", "2", "--ks", "3"]):
        assert CliRunner().invoke(app, words).exit_code == 0
    assert taken == [Follows(), Follows(most=48), Follows(buffer=7, ks=[2, 3])]
    assert "[default: (512, at most most)]" in CliRunner().invoke(app, ["--help"], terminal_width=120).output


@pytest.mark.parametrize("stage", STAGES)
def test_every_default_of_every_stage_keeps_its_own_rules(stage):
    for option in declared(load(stage).Options).values():
        if option.default is not inspect.Parameter.empty and not isinstance(option.default, Following):
            option.check(option.default)
