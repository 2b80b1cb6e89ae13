"""Is everything there that no stage makes: problems, policies, templates, what the launcher reads."""

import difflib
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from rloop_cli.check.calls import Call, maker
from stages.core.drawing import templates
from stages.core.errors import InputError
from stages.core.grading import rewards

READ_BY_LAUNCHERS = (".yaml", ".yml", ".json", ".sh", ".py")
_FILE = re.compile(r".*\.[a-z]+(\.gz)?")


def faults(calls: Sequence[Call]) -> Iterator[str]:
    """A line for each file that is named, is not there, and is made by no stage."""
    missing: dict[str, str] = {}
    for call in calls:
        for flag, path in ((flag, path) for flag, paths in call.paths.items() for path in paths):
            if not _is_name(flag, path) and not Path(path).exists() and maker(calls, path) is None:
                missing.setdefault(path, call.origin(flag, path))
        for word in call.launch if call.stage else ():
            if Path(word).suffix in READ_BY_LAUNCHERS and not Path(word).is_file():
                yield f"{call.origin('', shlex.join(call.launch))}: {word}: no such file"
        yield from _template_faults(call)
        yield from _reward_faults(call)
    made = [str(path) for call in calls for path in call.made]
    for path, origin in missing.items():
        near = difflib.get_close_matches(path, made, 1)
        meant = f" (the nearest that one makes is {near[0]})" if near else ""
        yield f"{origin}: {path} is not there, and no stage makes it{meant}"


def _is_name(flag: str, path: str) -> bool:
    """Whether it is no path but stdin, or may be the name of a policy or data set of the hub."""
    return path == "-" or (
        flag in ("--policy", "--decontaminate") and path.count("/") < 2 and not _FILE.fullmatch(path)
    )


def _reward_faults(call: Call) -> Iterator[str]:
    for reward in getattr(call.options, "reward", []):
        try:
            rewards.read(rewards.RewardOptions(reward=[reward]))
        except InputError as error:
            yield f"{call.origin('--reward', reward)}: {error}"


def _template_faults(call: Call) -> Iterator[str]:
    name = getattr(call.options, "template", "chat")  # which only a tokenizer has
    try:
        if name != "chat":
            templates.load(name)
    except InputError as error:
        yield f"{call.origin('--template')}: {error}"
