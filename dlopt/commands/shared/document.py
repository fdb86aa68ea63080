"""`--json`: prints one JSON document on stdout, for scripts and agents, in place of tables; also for an error.

Keys and values are documented in docs/howto/json.md.
"""

import contextlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from dlopt.basics.errors import (
    DONE,
    INTERRUPTED,
    FileError,
    ReportedError,
    RunError,
    UserError,
    disk_failure,
    refused_path,
)
from dlopt.basics.interruption import leave_closed_terminal, print_line, signals_deferred
from dlopt.basics.plain_values import without_nan
from dlopt.basics.secrets import redact, redacted
from dlopt.machine.world import current

FORMAT = 1
"""Version of the documents: it changes if a key changes its meaning or disappears. New keys may be added."""


_waiting: list[tuple[TextIO, int]] = []
"""stdout of a command with --json until its document is printed: the stream, and a copy of the descriptor."""


@contextlib.contextmanager
def document_only() -> Iterator[None]:
    """Redirects stdout of the block, and of every process that it starts, to stderr, except for one document."""
    sys.stdout.flush()
    kept = os.dup(1)
    _waiting.append((sys.stdout, kept))
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _waiting.clear()
        os.dup2(kept, 1)
        os.close(kept)


def print_document(content: Mapping[str, Any]) -> None:
    """Prints a document of plain values, in full precision: null for NaN and infinity, references for secrets."""
    text = json.dumps(without_nan(redacted({"format": FORMAT, **content})), indent=2, allow_nan=False)
    if not _waiting:
        print(text, flush=True)
        return
    with signals_deferred():
        stream, descriptor = _waiting.pop()
        os.dup2(descriptor, 1)
        try:
            print(text, file=stream, flush=True)
        except BrokenPipeError:  # the reader is gone: the exit code is still the command's
            leave_closed_terminal()
        os.dup2(2, 1)


def show_result(content: Mapping[str, Any]) -> None:
    """Prints the document of a command that has done its work; without --json, what it has printed is its result."""
    if _waiting:
        print_document({**content, "exit_code": DONE})


def end_document(code: int, error: BaseException | None = None) -> None:
    """Prints the document of a command that has ended without one: of its error, or of its exit code alone."""
    with contextlib.suppress(UserError):  # of the launcher's variables
        if not _waiting or ((world := current()) is not None and not world.is_main):
            return
    if error is None:
        print_document({"exit_code": code})
        return
    log = None
    if _kind(error, code) == "internal" and not isinstance(error, ReportedError):
        print_line(frames := redact("".join(traceback.format_exception(error))))
        with tempfile.NamedTemporaryFile("w", prefix="dlopt-", suffix=".log", delete=False) as file:
            file.write(frames)
        log = file.name
    print_document({"error": error_entry(error, code, log)})


def error_entry(error: BaseException, code: int, log: str | None) -> dict[str, Any]:
    """Describes an error. `log`: the file with its traceback."""
    cause = (error.__cause__ if isinstance(error, ReportedError) else None) or error
    first, *others = [_entry(each, code) for each in getattr(cause, "parts", ()) or [cause]]
    return {**first, "others": others, "log": log, "exit_code": code}


def _entry(error: BaseException, code: int) -> dict[str, Any]:
    kind, known = _kind(error, code), error if isinstance(error, UserError) else UserError()
    key, value = known.place
    message = f"{type(error).__name__}: {error}" if kind == "internal" else str(error) or kind
    names = {"allowed": [*known.allowed], "suggestions": [*known.suggestions]}
    return {"kind": kind, "key": key, "value": value, "message": message, **names}


def _kind(error: BaseException, code: int) -> str:
    if isinstance(error, UserError):
        return error.kind
    if isinstance(error, KeyboardInterrupt) or code == INTERRUPTED:
        return "interrupted"
    if isinstance(error, OSError) and refused_path(error):
        return FileError.kind
    return "failed" if isinstance(error, RunError | ReportedError) or disk_failure(error) else "internal"
