"""Calls reward functions from files of the user's, in a worker process of their own, under bounds.

Each file is run anew from the bytes that the parent knows by their digest, so a file that changes while a run goes on
fails instead of rewarding by two rules. Only the rewards come back: what a function prints goes nowhere.

Run as `python -m stages.core.grading.rewards.worker DESCRIPTOR PARENT FUNCTIONS` by grading.rewards only.
"""

import hashlib
import inspect
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from stages.core.grading import bounds
from stages.core.grading.bounds import Bounds, Deadline

IMPORT_S = 60.0  # of CPU time, to run a file: it may import large libraries
MAX_REWARD = 1e9  # so that no square of a reward overflows
GIVEN = ("prompt", "completion", "completion_ids")  # keys of a problem that are no columns, as in TRL

Function = Callable[..., Any]
Reply = dict[str, Any]  # {"rewards": [...]}, or {"verdict", "fault", "raised"}


class Unfit(Exception):
    """What a function may not do, such as to return too few rewards."""


def main() -> None:
    """Serve the parent; the third argument is a list of (name, path, function, digest of the file)."""
    pipe = bounds.connected()
    bounded = Bounds()
    functions: dict[str, Function | Reply] = {}
    paths: dict[str, str] = {}
    for name, path, function, digest in json.loads(sys.argv[3]):
        paths[name] = path
        functions[name] = bounded(partial(_load, path, function, digest), partial(_failed, path, IMPORT_S), IMPORT_S)
    bounded.limit_memory()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    def work(call: dict[str, Any], names: list[str]) -> Iterator[bytes]:
        for name in names:
            reply = function = functions[name]
            if callable(function):
                deadline_s = bounds.DEADLINE_S * len(call.get("completions", "."))
                reply = bounded(partial(_answer, function, call), partial(_failed, paths[name], deadline_s), deadline_s)
            yield json.dumps(reply).encode()

    bounds.serve(pipe, work)


def _load(path: str, function: str, digest: str) -> Function:
    source = Path(path).read_bytes()
    if hashlib.sha256(source).hexdigest() != digest:
        raise Unfit("the file has changed since the run began")
    directory = str(Path(path).parent)
    if directory not in sys.path:
        sys.path.append(directory)  # for what lies beside the file; at the end, where it hides no library
    module = ModuleType(f"rloop_reward_{digest[:16]}")
    module.__file__ = path
    sys.modules[module.__name__] = module
    exec(compile(source, path, "exec"), module.__dict__)
    member = getattr(module, function, None)
    if inspect.iscoroutinefunction(member):
        raise Unfit(f"{function} is a coroutine: write it as a plain function")
    if not callable(member):
        own = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise Unfit(f"there is no function {function} in it, only {', '.join(own) or 'none at all'}")
    return member


def _answer(function: Function, call: dict[str, Any]) -> Reply:
    """The rewards of a group or, for a call without completions, whether the function takes what it will be given."""
    if "completions" not in call:
        _check_signature(function, call["always"], call["sometimes"])
        return {"rewards": []}
    num = len(call["completions"])
    columns = {name: [value] * num for name, value in call["problem"].items() if name not in GIVEN}
    given = {name: call[name] for name in ("completions", "completion_ids")}
    return {"rewards": _checked(function(prompts=[call["prompt"]] * num, **given, **columns), num)}


def _check_signature(function: Function, always: list[str], sometimes: list[str]) -> None:
    """Raise Unfit unless `function` can be called with the columns that all problems have, and with all there are."""
    given = ["prompts", "completions", "completion_ids"]
    try:
        signature = inspect.signature(function)
    except ValueError:  # of C code
        return
    for names in (always, always + sometimes):
        columns = [name for name in names if name not in GIVEN]
        try:
            signature.bind(**dict.fromkeys([*given, *columns]))
        except TypeError as error:
            raise Unfit(
                f"{error}: it is called with {', '.join([*given, *columns])}, so let it take **columns, and name only "
                "keys that every problem has"
            ) from None


def _checked(value: Any, num: int) -> list[float | None]:
    """What a function returned, as floats."""
    if isinstance(value, str | bytes | dict) or not hasattr(value, "__iter__"):
        raise Unfit(f"it returned {_shown(value)}, not a list of {num} numbers")
    values = list(value)
    if len(values) != num:
        raise Unfit(f"it returned {len(values)} values for {num} completions")
    return [None if value is None else _number(value) for value in values]


def _number(value: Any) -> float:
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise Unfit(f"it returned {_shown(value)} as a reward: return a number, or None if it does not apply")
    number = float(value)
    if not math.isfinite(number) or abs(number) > MAX_REWARD:
        raise Unfit(f"it returned {number:g} as a reward: return a number of at most {MAX_REWARD:g}, or None")
    return number


def _shown(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {value!r:.40}"


def _failed(path: str, deadline_s: float, error: BaseException) -> Any:
    """What is said of an error; the line is the last one in the user's file that led to it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    traceback.clear_frames(error.__traceback__)  # which may hold all the memory there is
    where = f" (line {lines[-1]})" if lines else ""
    if isinstance(error, Deadline):
        return {
            "verdict": "timeout",
            "fault": f"it took more than {deadline_s:g} s of CPU time{where}",
            "raised": False,
        }
    if isinstance(error, Unfit):
        return {"verdict": "error", "fault": str(error), "raised": False}
    if isinstance(error, MemoryError):
        return {"verdict": "error", "fault": f"it ran out of memory{where}", "raised": True}
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return {"verdict": "error", "fault": f"it raised {said:.200}{where}", "raised": True}


if __name__ == "__main__":
    main()
