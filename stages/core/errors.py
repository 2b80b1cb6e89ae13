"""The one exception that means "the user can mend this"; the command line shows it as one line, exit code 2."""


class InputError(ValueError):
    """A mistake in the input: the message names the file (and line), what is wrong, and the remedy."""
