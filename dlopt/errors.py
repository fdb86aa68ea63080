"""Exit codes, the exceptions that end a command with a message instead of a traceback, and a line for such messages."""

import os
import shlex
import shutil
import sys
from pathlib import Path

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


def install(what: str) -> str:
    """Returns the command that installs `what` (dlopt[export]) here; the pip on the PATH may be another one's."""
    beside, found = Path(sys.executable).with_name("pip"), shutil.which("pip")
    if found is not None and Path(found).absolute() == beside:
        program = "pip"
    elif beside.exists():
        program = shlex.quote(min(os.path.relpath(beside), str(beside), key=len))
    else:
        program = f"{shlex.quote(sys.executable)} -m pip"
    return f"{program} install {shlex.quote(what)}"
