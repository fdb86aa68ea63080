"""Files that a run appends to and that never stop it: metrics, events, train.log."""

import contextlib
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"
_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")  # colours and cursor movements


class AppendFile:
    """Appends whole records to a file and never raises.

    `write` only stores; `flush` does the I/O. When that fails (full disk, read-only folder), `complain` gets one
    message, a partly written record is cut off again, and the records stay in memory for the next `flush`, so the file
    is complete again once there is room. Beyond `limit` bytes the waiting records are dropped.
    """

    def __init__(self, path: Path, complain: Callable[[str], None], *, limit: int = 4 << 20) -> None:
        self.path = path
        self.waiting = bytearray()
        self._complain: Callable[[str], None] | None = complain
        self._limit = limit
        self._file: int | None = None

    def write(self, record: bytes) -> None:
        self.waiting += record

    def flush(self) -> None:
        if not self.waiting:
            return
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            before = os.fstat(self._file).st_size
            written = 0
            try:
                while written < len(self.waiting):
                    written += os.write(self._file, memoryview(self.waiting)[written:])
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, before)
                raise
            self.waiting = bytearray()
        except OSError as error:
            if len(self.waiting) > self._limit:
                self.waiting = bytearray()
            complain, self._complain = self._complain, None
            if complain is not None:
                complain(f"{self.path}: cannot be written ({error.strerror}); training goes on without it")

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None


class _Lines(logging.Handler):
    """Passes records on as plain text, without the terminal codes that some libraries use."""

    def __init__(self, write: Callable[[str], None], form: str | None, level: int) -> None:
        super().__init__(level)
        self.setFormatter(logging.Formatter(form))
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write(_CODES.sub("", self.format(record)))
        except Exception:
            self.handleError(record)


class TrainLog:
    """Writes everything that reaches the root logger to `folder`/train.log.

    `show` displays a line: warnings, where no other handler does, and once that the file cannot be written.
    """

    def __init__(self, folder: Path, show: Callable[[str], None]) -> None:
        self._file = AppendFile(folder / "train.log", show)
        handler = _Lines(self._append, _FORMAT, logging.NOTSET)
        # A logger outside the hierarchy: our own lines are already on the screen.
        self._own = logging.Logger("dlopt")
        self._own.addHandler(handler)
        root = logging.getLogger()
        self._handlers = [handler]
        if not root.handlers:  # a handler on the root logger switches off logging's last resort
            self._handlers.append(_Lines(show, None, logging.WARNING))
        for each in self._handlers:
            root.addHandler(each)

    def _append(self, text: str) -> None:
        self._file.write(text.encode(errors="backslashreplace") + b"\n")
        self._file.flush()

    def write(self, text: str) -> None:
        self._own.info(text)

    def error(self, text: str, error: BaseException) -> None:
        """`text` with the traceback of `error`."""
        self._own.error(text, exc_info=error)

    def close(self) -> None:
        for handler in self._handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()
        self._file.close()
