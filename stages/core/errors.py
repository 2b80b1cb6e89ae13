"""The exceptions that the command line shows as one line: exit code 2 for the user's, 1 for a run gone wrong."""


class InputError(ValueError):
    """A mistake in the input: the message names the file (and line), what is wrong, and the remedy."""


class CollapseError(RuntimeError):
    """A run that can't go on, such as weights that only give non-finite gradients; what it saved is in place."""
