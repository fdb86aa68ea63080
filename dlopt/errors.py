"""Exit codes, and the two exceptions that end a command with a message instead of a traceback."""

DONE, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 75


class UserError(Exception):
    """The configuration or the input is wrong: one message, exit code 2, nothing left behind.

    The message names the key, its value, what is wrong and what is allowed.
    """

    def _render_traceback_(self) -> list[str]:
        """What IPython and notebooks show in place of the frames, which are not what the user got wrong."""
        return [f"dlopt: {self}"]


class NewerError(UserError):
    """The input was written by a newer dlopt, in a format that this one does not know: whole, but not readable here."""


class RunError(Exception):
    """A run that had begun could not go on (a loss that is not finite, a full disk): one message, exit code 1."""
