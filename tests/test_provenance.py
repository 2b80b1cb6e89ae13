"""What decides an output: each stage's options with effect and no others, what was read, and versions."""

import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import orjson
import pytest

from stages import STAGES, load
from stages.core import outputs, provenance
from stages.core.errors import InputError
from stages.core.options import ROUNDING, WITHOUT_EFFECT, Following, OptionGroup, declared
from stages.core.provenance import Identity, Inputs, identify, is_done, manifest_of


def options_with(kind, **changed):
    """The options of a stage at their defaults, or empty, but for `changed`; rules between them are not asked."""
    made = object.__new__(kind)
    for name, option in declared(kind).items():
        default = "" if option.default is inspect.Parameter.empty else option.default
        object.__setattr__(made, name, changed.get(name, default))
    for name, value in vars(made).items():
        if isinstance(value, Following):
            object.__setattr__(made, name, value.of(made))
    return made


def another(option):
    """A value that keeps the option's rules and is not its default."""
    if isinstance(option.default, Following):
        return [1] if option.type == list[int] else 1
    choices = [choice for rule in option.rules for choice in rule.choices]
    if choices:
        return next(choice for choice in choices if choice != option.default)
    if isinstance(option.default, bool):
        return not option.default
    if isinstance(option.default, list):
        return [*option.default, 1 if option.type == list[int] else "more"]
    if isinstance(option.default, int | float):
        tries = (option.default + 1, option.default - 1, option.default / 2, option.default / 2 + 0.25)
        return next(value for value in tries if value != option.default and all(r.holds(value) for r in option.rules))
    return Path("elsewhere") if option.type in (Path, Path | None) else "elsewhere"


OPTIONS = [(stage, name) for stage in STAGES for name in declared(load(stage).Options)]
NOTHING = Inputs({}, {})


@pytest.mark.parametrize(("stage", "name"), OPTIONS)
def test_an_option_with_effect_changes_what_an_output_is_and_no_other_option_does(stage, name):
    kind = load(stage).Options
    option = declared(kind)[name]
    usual = identify(stage, options_with(kind), NOTHING)
    other = identify(stage, options_with(kind, **{name: another(option)}), NOTHING)
    assert bool(other.differences(usual.record)) == (option.effect is None)
    if option.effect is None:
        changed = {change.partition(" was ")[0] for change in other.differences(usual.record)}
        followers = {name for name, option in declared(kind).items() if isinstance(option.default, Following)}
        assert name.rstrip("_") in changed and changed - {name.rstrip("_")} <= followers


ENGINE = ("memory_fraction", "max_sequences", "tensor_parallel", "compile")
UPDATE = ("tokens_per_microbatch", "gradient_checkpointing", "attn_implementation", "compile_layers")


def with_effect(effect):
    return {(stage, name) for stage, name in OPTIONS if declared(load(stage).Options)[name].effect is effect}


def test_options_that_only_round_or_have_no_effect_are_few_and_known():
    assert with_effect(ROUNDING) == {
        *((stage, name) for stage in ("rl", "sample", "eval") for name in ENGINE),
        *((stage, name) for stage in ("rl", "rft") for name in UPDATE),
        ("rl", "exact"),
    }
    assert with_effect(WITHOUT_EFFECT) == {
        *(("rl", name) for name in ("save_every", "keep_state", "alarm_grad_norm", "mismatch_bound", "tracker")),
        *(("rl", name) for name in ("restart_if_changed", "valid", "valid_every", "valid_samples")),
        *(("filter", name) for name in ("dry_run", "accept_edited")),
        *(("report", name) for name in ("table", "tsv", "watch")),
        ("rft", "restart_if_changed"),
        ("rft", "warn_below"),
    }


def test_what_was_read_and_what_decides_rewards_and_samples_count_too():
    identity = Identity("rl", {"lr": 0.1}, Inputs({"policy": "abc"}, {}), {"sympy": "1.13"})
    others = [
        Identity("rl", {"lr": 0.1}, Inputs({"policy": "xyz"}, {}), {"sympy": "1.13"}),
        Identity("rl", {"lr": 0.1}, Inputs({"policy": "abc"}, {}), {"sympy": "1.14"}),
    ]
    assert others[0].differences(identity.record) == ["the content of policy has changed"]
    assert others[1].differences(identity.record) == ["sympy was 1.13, is now 1.14"]
    assert identity.differences(provenance.manifest(identity, {}, 1.0)) == []
    assert identity.differences(identity.record | {"versions": {"sympy": "1.13", "torch": "1"}}) == []


@dataclass(frozen=True, kw_only=True)
class Rounded(OptionGroup):
    lr: Annotated[float, "learning rate"] = 0.1
    memory: Annotated[float, "share of a GPU's memory", ROUNDING] = 0.9
    shown: Annotated[bool, "what is shown", WITHOUT_EFFECT] = False


def test_what_only_rounds_is_told_apart_from_what_decides_and_from_what_has_no_effect():
    packages = {"python": "3.12.3", "torch": "2.11", "sympy": "1.14"}
    before = identify("rl", Rounded(), NOTHING, packages, {"processes": 8})
    rounded = identify("rl", Rounded(memory=0.6), NOTHING, packages | {"torch": "2.13"}, {"processes": 4})
    assert rounded.differences(before.record) == []
    assert rounded.roundings(before.record) == [
        "memory was 0.9, is now 0.6",
        "processes was 8, is now 4",
        "torch was 2.11, is now 2.13",
    ]
    shown = identify("rl", Rounded(shown=True), NOTHING, packages, {"processes": 8})
    assert (shown.differences(before.record), shown.roundings(before.record)) == ([], [])
    other = identify("rl", Rounded(lr=0.2), NOTHING, packages | {"sympy": "1.13"}, {"processes": 8})
    assert other.differences(before.record) == ["lr was 0.1, is now 0.2", "sympy was 1.14, is now 1.13"]
    assert other.roundings(before.record) == []


def test_a_finished_output_of_the_same_identity_is_done_and_any_other_is_named(tmp_path, capsys):
    out, record = tmp_path / "out", tmp_path / "out.manifest.json"

    def done(stage="rl", **options):
        return is_done(out, record, lambda: identify(stage, Rounded(**options), NOTHING))

    assert not done()
    outputs.write_json(record, provenance.manifest(identify("rl", Rounded(), NOTHING), {}, 1.0))
    assert not done(), "a manifest alone is no output"
    out.touch()
    assert done()
    assert capsys.readouterr().err == f"rloop: {out} is done: the same options and inputs made it\n"
    assert done(memory=0.5, shown=True)
    assert capsys.readouterr().err.endswith("made it (up to rounding: memory was 0.9, is now 0.5)\n")
    with pytest.raises(
        InputError, match=r"is another output: lr was 0.1, is now 0.2: name another --out, or remove it"
    ):
        done(lr=0.2)
    with pytest.raises(InputError, match="out already holds something"):
        done("rft")


def test_another_output_is_moved_aside_and_named_where_the_user_asked_for_that(tmp_path, capsys):
    outputs.write_json(tmp_path / "out/manifest.json", identify("rl", Rounded(), NOTHING).record)

    def done(stage="rl", **options):
        record = tmp_path / "out/manifest.json"
        return is_done(tmp_path / "out", record, lambda: identify(stage, Rounded(**options), NOTHING), True)

    assert done()
    with pytest.raises(InputError, match="out already holds something"):
        done("rft")
    assert not done(lr=0.2) and not (tmp_path / "out").exists()
    (moved,) = tmp_path.glob("out.before-*")
    assert (moved / "manifest.json").is_file()
    said = capsys.readouterr().err
    assert f"is made anew, for lr was 0.1, is now 0.2; what was there is now {moved}" in said


def test_the_digest_of_a_directory_follows_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    first = provenance.digest(tmp_path)
    assert provenance.digest(tmp_path) == first
    (tmp_path / "b").rename(tmp_path / "c")
    second = provenance.digest(tmp_path)
    (tmp_path / "c").write_text("3")
    assert len({first, second, provenance.digest(tmp_path)}) == 3
    assert provenance.digest(tmp_path / "missing") == ""


def test_an_output_that_is_made_again_has_the_same_digest_whatever_its_records_say_of_time(tmp_path):
    (tmp_path / "model.safetensors").write_text("weights")
    first = provenance.digest(tmp_path)
    for name in ("manifest.json", "metrics.json", "log.tsv"):
        (tmp_path / name).write_text("17.3 s")
    assert provenance.digest(tmp_path) == first


def test_a_manifest_says_what_ran_on_what(tmp_path):
    made = provenance.manifest(Identity("filter", {"seed": 0}, Inputs({"a": "12"}, {}), {}), {"examples": 3}, 1.0)
    outputs.write_json(tmp_path / "manifest.json", made)
    back = orjson.loads((tmp_path / "manifest.json").read_bytes())
    assert (back["stage"], back["parameters"], back["inputs"]) == ("filter", {"seed": 0}, {"a": "12"})
    assert back["counts"] == {"examples": 3}
    assert back["versions"]["python"] == sys.version.split()[0]


def test_the_manifest_of_an_output_is_found_within_it_also_from_there_and_beside_a_file(tmp_path, monkeypatch):
    (tmp_path / "rl/state").mkdir(parents=True)
    for path, name in (
        ("manifest.json", "rl"),
        ("rl/state/run.json", "going on"),
        ("examples.manifest.json", "chosen"),
    ):
        outputs.write_json(tmp_path / path, {"stage": name})
    monkeypatch.chdir(tmp_path)
    found = [manifest_of(Path(path)).get("stage") for path in (".", "rl", "examples.jsonl", "nothing")]
    assert found == ["rl", "going on", "chosen", None]
