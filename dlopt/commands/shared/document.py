"""`--json`: prints one JSON document on stdout, for scripts and agents, in place of tables; also for an error.

Keys and values are documented in docs/howto/json.md.
"""

import contextlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from dlopt.basics.errors import INTERRUPTED, USER_ERROR, ReportedError, RunError, UserError
from dlopt.basics.interruption import leave_closed_terminal, print_line, signals_deferred
from dlopt.basics.plain_values import without_nan
from dlopt.basics.secrets import redact, redacted
from dlopt.machine.world import current

FORMAT = 1
"""Version of the documents: it changes if a key changes its meaning or disappears. New keys may be added."""


@dataclass
class _Door:
    """stdout of a command with --json, which only its document passes: the stream, and a copy of the descriptor."""

    stream: TextIO
    descriptor: int
    is_used: bool = False


_door: _Door | None = None


@contextlib.contextmanager
def document_only() -> Iterator[None]:
    """Redirects stdout of the block, and of every process that it starts, to stderr, except for one document."""
    global _door
    sys.stdout.flush()
    _door = _Door(sys.stdout, os.dup(1))
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(_door.descriptor, 1)
        os.close(_door.descriptor)
        _door = None


def print_document(content: Mapping[str, Any]) -> None:
    """Prints a document of plain values, in full precision: null for NaN and infinity, references for secrets."""
    text = json.dumps(without_nan(redacted({"format": FORMAT, **content})), indent=2, allow_nan=False)
    if _door is None:
        print(text, flush=True)
        return
    with signals_deferred():
        sys.stdout.flush()
        os.dup2(_door.descriptor, 1)
        try:
            print(text, file=_door.stream, flush=True)
        except BrokenPipeError:  # the reader is gone: the exit code is still the command's
            leave_closed_terminal()
        finally:
            _door.is_used = True
            os.dup2(2, 1)


def end_document(code: int, error: BaseException | None = None) -> None:
    """Prints the document of a command that has ended without one: of its error, or of its exit code alone."""
    world = None
    with contextlib.suppress(UserError):
        world = current()
    if _door is None or _door.is_used or (world is not None and not world.is_main):
        return
    is_crash = error is not None and not isinstance(error, ReportedError) and _kind(error, code) == "internal"
    log = _crash_log(error) if error is not None and is_crash else None
    print_document({"exit_code": code} if error is None else {"error": error_entry(error, code, log=log)})


def error_entry(error: BaseException, code: int, *, log: str | None = None) -> dict[str, Any]:
    """Describes an error. `log`: the file with its traceback."""
    if isinstance(error, ReportedError) and error.__cause__ is not None:
        error = error.__cause__
    parts: Sequence[BaseException] = (isinstance(error, UserError) and error.parts) or [error]
    first, *others = [_entry(each, code) for each in parts]
    return {**first, "others": others, "log": log, "exit_code": code}


def _entry(error: BaseException, code: int) -> dict[str, Any]:
    kind, known = _kind(error, code), error if isinstance(error, UserError) else UserError()
    message = f"{type(error).__name__}: {error}" if kind == "internal" else str(error) or kind
    names = {"allowed": [*known.allowed], "suggestions": [*known.suggestions]}
    return {"kind": kind, **dict(zip(("key", "value"), known.place, strict=True)), "message": message, **names}


def _kind(error: BaseException, code: int) -> str:
    if isinstance(error, UserError):
        return error.kind
    if isinstance(error, KeyboardInterrupt) or code == INTERRUPTED:
        return "interrupted"
    if code == USER_ERROR:
        return "file" if isinstance(error, OSError) else "input"
    return "failed" if isinstance(error, RunError | ReportedError | OSError) else "internal"


def _crash_log(error: BaseException) -> str:
    """Writes the traceback of a bug to stderr and to a file; returns the path."""
    frames = redact("".join(traceback.format_exception(error)))
    print_line(frames)
    with tempfile.NamedTemporaryFile("w", prefix="dlopt-", suffix=".log", delete=False) as file:
        file.write(frames)
    return file.name
