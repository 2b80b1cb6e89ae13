"""The exceptions that the command line shows as one line: exit code 2 for the user's, 1 for a run gone wrong."""

import textwrap


class InputError(ValueError):
    """A mistake in the input: the message names the file (and line), what is wrong, and the remedy."""


class CollapseError(RuntimeError):
    """A run that can't go on, such as weights that only give non-finite gradients; what it saved is in place."""


def in_one_line(error: BaseException) -> str:
    """What another library's error says, on one line and not at length: "ZeroDivisionError: division by zero"."""
    name = type(error).__name__
    return textwrap.shorten(f"{name}: {error}" if str(error) else name, 240, placeholder=" ...")
