"""Prompts from chat templates, in a forked child whose time and memory are bounded.

A chat template is a program: `'a' * 10**10` and `10 ** 10**8` run in C, where no alarm in this process could end them,
and loops within loops go on for years. Time is the CPU's, so that a busy machine refuses no template.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from stages.core.errors import InputError, in_one_line
from stages.core.grading.bounds import Bounds, Deadline

MAX_RENDER_S = 10  # seconds of CPU time that a chat template may take over one problem; a usual one takes 0.1 ms
MAX_PROMPT_CHARS = 10**7


def render_in_child(render: Callable[[Any], str], inputs: Sequence[tuple[str, Any]]) -> Iterator[str]:
    """The prompt of each of `inputs`, which are (what messages begin with, what is rendered); InputError without one.

    Forked, since the child holds the tokenizer as it is here.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_render_into, args=(sender, render, [each for _, each in inputs]), daemon=True)
    child.start()
    sender.close()
    try:
        for origin, _ in inputs:
            try:
                state, text = receiver.recv_bytes().decode().split(" ", 1)
            except EOFError:
                raise InputError(f"{origin}: the policy's chat template {_cause_of_death(child)}") from None
            if state == "failed":
                raise InputError(f"{origin}: the policy's chat template {text}")
            yield text
    finally:
        child.kill()
        child.join()


def _render_into(sender: Connection, render: Callable[[Any], str], inputs: Sequence[Any]) -> None:
    """The child: send the prompt of each input, or why there is none."""
    bounded = Bounds()
    bounded.limit_memory()
    for each in inputs:
        sender.send_bytes(bounded(partial(_message, render, each), _fault, MAX_RENDER_S))


def _message(render: Callable[[Any], str], each: Any) -> bytes:
    prompt = render(each)
    if len(prompt) > MAX_PROMPT_CHARS:
        raise ValueError(f"it makes a prompt of {len(prompt)} characters")
    return b"prompt " + prompt.encode()


def _fault(error: BaseException) -> bytes:
    """Why there is no prompt; a template may raise anything."""
    fault = _TOO_LONG if isinstance(error, Deadline) else f"fails: {in_one_line(error)}"
    return f"failed {fault}".encode(errors="replace")


_TOO_LONG = "takes too long over one problem: does it end?"


def _cause_of_death(child: Any) -> str:
    child.join()
    if child.exitcode == -signal.SIGXCPU:
        return _TOO_LONG
    return f"ended the process that rendered it (exit code {child.exitcode})"
