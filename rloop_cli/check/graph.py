"""The commands that a graph would run with a params file: resolved by DVC, read by the command line as it would be.

A fault is one line that names the section and key of the params file, or the stage of dvc.yaml.
"""

import difflib
import re
import shlex
import shutil
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any, NamedTuple

import typer

from rloop_cli import commands
from rloop_cli.check.calls import Call
from rloop_cli.commands import app
from rloop_cli.launch import launcher
from stages import STAGES, load
from stages.core import options
from stages.core.errors import InputError
from stages.core.options import PATH, Following, OptionGroup

GRAPH, LOCK = Path("dvc.yaml"), Path("dvc.lock")
_REFERENCE = re.compile(r"\$\{([^}]+)\}")
_LOST = re.compile(r"Could not find '([^']+)'")


class Node(NamedTuple):
    """A stage of the graph: its command as a shell gets it, the files that it makes, where its options are from."""

    name: str
    command: str
    words: list[str]
    outs: list[str]
    origins: Mapping[str, str]


def read(params: Path) -> tuple[list[Call], list[str]]:
    """The calls of the graph in this directory with `params` in the place of params.yaml, and every fault of them.

    Raises InputError if one of the two files is missing or is no YAML.
    """
    nodes, faults = resolve(params)
    calls, locked = [], _locked()
    for node in nodes:
        number = next((number for number, word in enumerate(node.words) if word in STAGES), len(node.words))
        launch, (stage, *words) = node.words[:number], node.words[number:] or [""]
        origin, made, own = _origin(params, node), None, Faults()
        if stage:
            made, own = parse(stage, words)
        faults += [f"{origin(flag)}: {fault}" for flag, fault in own]
        paths = dict(_paths(made)) if made else {}
        stage = stage if made else ""  # what it makes counts as made all the same
        calls.append(Call(node.name, stage, made, paths, node.outs, launch, origin, is_stale(node, locked)))
    return calls, list(dict.fromkeys(faults))


def _locked() -> dict[str, Mapping[str, Any]]:
    """What DVC has made, by the stage's name: its `cmd` and `outs`."""
    return dict(_yaml(LOCK).get("stages") or {}) if LOCK.is_file() else {}


def is_stale(node: Node, locked: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether another command made what lies at the outs of `node`."""
    if locked.get(node.name, {}).get("cmd") == node.command:
        return False
    made = [PurePath(out["path"]) for stage in locked.values() for out in stage.get("outs", [])]
    return any(out.is_relative_to(own) or PurePath(own).is_relative_to(out) for out in made for own in node.outs)


def resolve(params: Path) -> tuple[list[Node], list[str]]:
    """The stages that DVC makes of dvc.yaml and `params`, and what it could not resolve.

    A stage that can't be resolved has no command, and makes whatever is below the directory that its outs are in.
    """
    from dvc.exceptions import DvcException

    given, graph, launch = _yaml(params), _yaml(GRAPH), launcher(params)
    nodes, faults, lost = [], [f"{params}: {fault}" for fault in _no_texts(given, graph)], dict[str, list[str]]()
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(params, Path(directory) / "params.yaml")
        try:
            definitions = _definitions(graph, directory)
        except DvcException as error:
            raise InputError(f"{GRAPH}: {' '.join(str(error).split())}") from None
        for name, definition in graph.get("stages", {}).items():
            members: dict[str, Any] = {}
            try:
                members = _members(definitions[name])
            except DvcException as error:
                lost.setdefault(str(error), []).append(name)
            for key, stage in members.items():
                origins = {**_origins(key, definition, given), launch: "launch"}
                nodes.append(node := Node(key, stage["cmd"], _words(stage["cmd"], launch), _outs(stage), origins))
                if stage["cmd"] and not node.words:
                    faults.append(f"{GRAPH}: {key}: a quotation is not closed in {textwrap.shorten(stage['cmd'], 80)}")
            if not members and given.get(_section(definition)) != {}:
                outs = [out.partition("${")[0] for out in _outs(definition.get("do", definition))]
                nodes.append(Node(name, "", [], outs, {}))
    return nodes, [*faults, *(f"{params}: {fault}" for fault in _missing(lost, given))]


def _definitions(graph: Mapping[str, Any], directory: str) -> dict[str, Any]:
    """DVC's definitions of the stages of a graph, with the params.yaml in `directory`."""
    from dvc.config import Config
    from dvc.fs import LocalFileSystem
    from dvc.parsing import DataResolver

    config = Config(".dvc") if Path(".dvc").is_dir() else {"parsing": {"bool": "boolean_optional", "list": "append"}}
    resolver: Any = DataResolver(SimpleNamespace(fs=LocalFileSystem(), config=config), directory, dict(graph))
    return dict(resolver.definitions)


def _members(definition: Any) -> dict[str, Any]:
    """What DVC makes of one definition: stages by their names, several of a foreach."""
    return dict((definition.resolve_all() if hasattr(definition, "resolve_all") else definition.resolve()) or {})


def _yaml(path: Path) -> dict[str, Any]:
    """A YAML file as DVC reads it, which is not quite as PyYAML does."""
    from dvc.exceptions import DvcException
    from dvc.utils.serialize import load_yaml

    if not path.is_file():
        raise InputError(f"{path}: no such file: rloop check works in the directory of dvc.yaml")
    try:
        loaded = load_yaml(path)
    except DvcException as error:
        mark, problem = (getattr(error.__cause__, name, None) for name in ("problem_mark", "problem"))
        raise InputError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {problem or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: no text in UTF-8 ({error.reason} at byte {error.start})") from None
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: expected sections, found {type(loaded).__name__}")
    return dict(loaded)


def _no_texts(given: Mapping[str, Any], graph: Mapping[str, Any]) -> Iterator[str]:
    """Keys of foreach sections that are no text: DVC makes nothing of them, and says nothing."""
    for stage in graph.get("stages", {}).values():
        section = _section(stage)
        own = given.get(section)
        for key in own if isinstance(own, dict) else ():
            if not isinstance(key, str):
                yield f'{section}.{key}: the key must be a text: write "{key}"'


def _section(definition: Mapping[str, Any]) -> str:
    """The section that a definition has a stage for each entry of; "" if it is a single stage."""
    return next(iter(_REFERENCE.findall(str(definition.get("foreach", "")))), "")


def _missing(lost: Mapping[str, list[str]], given: Mapping[str, Any]) -> Iterator[str]:
    """A line for each section that stages ask for in vain, and for each other error of DVC's."""
    sections: dict[str, list[str]] = {}
    for error, names in lost.items():
        if named := _LOST.search(error):
            sections.setdefault(named[1], []).extend(names)
        else:
            yield f"stage {', '.join(names)} of {GRAPH}: {' '.join(error.split())}"
    for section, names in sections.items():
        near = difflib.get_close_matches(section, map(str, given), 1)
        meant = f" (there is {near[0]})" if near else ""
        yield f"{section} is missing, which {GRAPH} asks for in {', '.join(names)}{meant}"


def _outs(stage: Mapping[str, Any]) -> list[str]:
    return [out if isinstance(out, str) else next(iter(out)) for out in stage.get("outs", [])]


def _words(command: str, launch: str) -> list[str]:
    """The words that a shell makes of a command, with the launcher itself for `rloop launch`; none if it could not."""
    try:
        return shlex.split(re.sub(r"^rloop launch\b", lambda _: launch, command))
    except ValueError:
        return []


def _origins(name: str, definition: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, str]:
    """Where the options of a stage are from, "rl.steps" by "--steps", and its values."""
    item = f"{_section(definition)}.{name.partition('@')[2]}"
    origins: dict[str, str] = {}
    for reference in _REFERENCE.findall(str(definition.get("do", definition)["cmd"])):
        path = re.sub(r"^item\b", item, reference)
        value: Any = given
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, dict):
            origins |= {options.flag(str(key)): f"{path}.{key}" for key in value}
            values = {key: one if isinstance(one, list) else [one] for key, one in value.items()}
            origins |= {one: f"{path}.{key}" for key, items in values.items() for one in items if isinstance(one, str)}
        elif value is not None:  # ${key} is none of the params file's
            origins[str(value)] = path
    return origins


def _origin(params: Path, node: Node) -> Callable[..., str]:
    """What a fault of an option begins with, by its flag and, if the graph's own command names it, its value."""

    def origin(flag: str, value: object = None) -> str:
        own = node.origins.get(str(value)) or node.origins.get(flag)
        return f"{params}: {own}" if own else f"{GRAPH}: {node.name}"

    return origin


Faults = list[tuple[str, str]]  # (flag, what is wrong with it)


def parse(stage: str, words: list[str]) -> tuple[OptionGroup | None, Faults]:
    """The options that the stage would be called with; None if that can't be said.

    What is refused is left out and the rest read again, so that each fault is found.
    """
    faults: Faults = []
    group = typer.main.get_group(app)
    above = group.make_context("rloop", [stage])
    while True:
        try:
            given = group.commands[stage].make_context(stage, list(words), parent=above).params
            break
        except typer.TyperException as error:
            flag = getattr(error, "option_name", None) or next(
                iter(getattr(getattr(error, "param", None), "opts", [])), ""
            )
            faults.append((flag, " ".join(error.format_message().split()).rstrip(".")))
            fewer = _without(words, flag)
            if len(fewer) == len(words):
                return None, faults
            words = fewer
    given.pop("debug", None)
    made, refused = _made(load(stage).Options, given)
    return made, faults + refused


def _without(words: list[str], flag: str) -> list[str]:
    """`words` less the option `flag` and its values."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word.replace("_", "-") in (flag, flag.replace("--", "--no-"))
        if not dropping:
            kept.append(word)
    return kept


def _made(group: type[OptionGroup], given: dict[str, Any]) -> tuple[OptionGroup | None, Faults]:
    """The options of a stage, None if they are refused, and why: each option's own fault, or the group's first."""
    faults = []
    for name, option in options.declared(group).items():
        try:
            if not isinstance(option.default, Following):
                option.check(given[name])
        except InputError as error:
            faults.append((option.flag, str(error)))
    if faults:
        return None, faults
    try:
        return commands.made(group, given), []
    except InputError as error:
        return None, [(str(error).split()[0].rstrip(":"), str(error))]


def _paths(made: OptionGroup) -> Iterator[tuple[str, list[str]]]:
    """The options that name what is read, by flag."""
    for name, option in options.declared(type(made)).items():
        value = getattr(made, name)
        paths = [str(item) for item in (value if isinstance(value, list) else [value]) if isinstance(item, str | Path)]
        if name not in ("out", "reward") and (option.effect is PATH or "Path" in str(option.type)) and any(paths):
            yield option.flag, list(filter(None, paths))
