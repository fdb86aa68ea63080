"""Exit codes, exceptions that end a command with one line instead of a traceback, and phrases of such lines."""

import errno
import importlib.util
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

DONE, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 75
_PLACE = re.compile(r"([^\s=:]+)(?:=(\[.*?\]|\{.*?\}|[^\n]*?))?: ")  # key and value at the begin of a message
CHECKOUT = Path(__file__).parents[2]  # of the repository, unless dlopt is installed as a wheel


class UserError(Exception):
    """Wrong configuration or input: one message, exit code 2, no files left behind.

    The message gives the key, its value, what is wrong and what is allowed: "KEY=VALUE: ...", or "KEY: ...".

    Attributes:
        kind: of the error in a document (`--json`): unknown_key, unknown_choice, value, file, state; input for others.
        allowed: names and values that may be typed instead; () if they are not a list, or are many.
        suggestions: what to type instead.
        parts: the errors that this one joins.
    """

    code = USER_ERROR
    kind = "input"
    parts: Sequence["UserError"] = ()

    def __init__(
        self, message: str = "", kind: str = "", allowed: Sequence[str] = (), suggestions: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.kind, self.allowed, self.suggestions = kind or self.kind, allowed, suggestions

    @property
    def place(self) -> tuple[str | None, str | None]:
        """The key and the value with which the message begins; None for what it does not name."""
        match = _PLACE.match(str(self))
        key, value = (None, None) if match is None else match.groups()
        is_value = key is not None and value is None and self.kind in ("file", "state", "unknown_name")
        return (None, key) if is_value else (key, value)

    def _render_traceback_(self) -> list[str]:
        """IPython hook: shows the message only, because the stack frames do not help the user."""
        return [f"dlopt: {self}"]


class FileError(UserError):
    """A file or folder that is missing, damaged, or not what the command needs."""

    kind = "file"


class StateError(UserError):
    """A run or sweep that is active, has finished, or has another config: what was typed does not fit its state."""

    kind = "state"


class OtherVersionError(FileError):
    """An intact input in a format that only another version of dlopt reads."""


class RunError(Exception):
    """A failure of a running experiment (non-finite loss, full disk): one message, exit code 1."""

    code = FAILED


class ReportedError(Exception):
    """A failed or interrupted run that has printed and recorded why: only its exit code is left to pass on."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(reason)
        self.code = code


def refused_path(error: OSError) -> str | None:
    """Returns the message for a path that the system refuses; None for other errors.

    Examples: no access, a path that is too long, a folder where a file is expected.
    """
    codes = (errno.EACCES, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.ELOOP)
    is_refused = error.filename is not None and error.errno in codes
    return f"{error.filename}: {error.strerror}" if is_refused else None


def disk_failure(error: BaseException) -> str | None:
    """Returns the message for a file that a full, read-only or broken disk does not take; None for other errors."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
    is_of_disk = isinstance(error, OSError) and error.filename is not None and error.errno in codes
    return f"{error.filename}: {error.strerror}" if is_of_disk else None  # type: ignore[attr-defined]


def require_package(place: str, package: str, extra: str | None = None) -> None:
    """Raises `UserError` unless an optional package is installed, which is not imported.

    `place`: key=value or the command that needs it; `extra`: of dlopt, which installs it; None for the same name.
    """
    if not is_installed(package):
        raise UserError(f"{place}: {not_installed(package, extra)}")


def is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    # A folder of this name in the current folder, of logs (wandb), looks like a namespace package, without an origin.
    return spec is not None and spec.origin is not None


def not_installed(package: str, extra: str | None = None) -> str:
    return f"the package {package} is not installed; {install(f'dlopt[{extra or package}]')}"


def install(package: str) -> str:
    """Returns the command that installs `package` (dlopt[export]) into this environment.

    The pip on the PATH may belong to another environment.
    """
    own_pip, path_pip = Path(sys.executable).with_name("pip"), shutil.which("pip")
    if path_pip is not None and Path(path_pip).absolute() == own_pip:
        program = "pip"
    elif own_pip.exists():
        program = shlex.quote(min(os.path.relpath(own_pip), str(own_pip), key=len))
    else:
        program = f"{shlex.quote(sys.executable)} -m pip"
    if package.startswith("dlopt[") and (CHECKOUT / "pyproject.toml").is_file():  # the package is not from an index
        place = min(os.path.relpath(CHECKOUT), str(CHECKOUT), key=len)
        package = f"{place}{package.removeprefix('dlopt')}"
        return f"{program} install -e {shlex.quote(package)}"
    return f"{program} install {shlex.quote(package)}"
