"""Append-only files of a run (metrics, events, train.log), whose write errors do not stop the training."""

import contextlib
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"
_CONTROL_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")  # colours and cursor movements


class AppendFile:
    """Appends complete records to a file and never raises.

    `write` only buffers; `flush` does the I/O. If the I/O fails (full disk, read-only folder), `warn` receives one
    message, partly written records are truncated, and the buffer is kept for the next `flush`. So the file is complete
    again once there is space. A buffer of more than `limit` bytes is dropped.
    """

    def __init__(self, path: Path, warn: Callable[[str], None], *, limit: int = 4 << 20) -> None:
        self.path = path
        self.pending = bytearray()
        self._warn: Callable[[str], None] | None = warn
        self._limit = limit
        self._file: int | None = None

    def write(self, record: bytes) -> None:
        self.pending += record

    def flush(self) -> None:
        if not self.pending:
            return
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            size = os.fstat(self._file).st_size
            written = 0
            try:
                while written < len(self.pending):
                    written += os.write(self._file, memoryview(self.pending)[written:])
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, size)
                raise
            self.pending = bytearray()
        except OSError as error:
            if len(self.pending) > self._limit:
                self.pending = bytearray()
            warn, self._warn = self._warn, None
            if warn is not None:
                warn(f"{self.path}: cannot be written ({error.strerror}); training continues without it")

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None


class _PlainTextHandler(logging.Handler):
    """Passes records on as plain text, without terminal control codes."""

    def __init__(self, write: Callable[[str], None], record_format: str | None, level: int) -> None:
        super().__init__(level)
        self.setFormatter(logging.Formatter(record_format))
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write(_CONTROL_CODES.sub("", self.format(record)))
        except Exception:
            self.handleError(record)


class TrainLog:
    """Writes dlopt's own lines and everything that reaches the root logger to `folder`/train.log.

    `show` displays a line on the console: warnings that no other handler shows, and once that the file cannot be
    written.
    """

    def __init__(self, folder: Path, show: Callable[[str], None]) -> None:
        self._file = AppendFile(folder / "train.log", show)
        file_handler = _PlainTextHandler(self._append, _FORMAT, logging.NOTSET)
        # Not a child of the root logger: dlopt's own lines are on the console already.
        self._logger = logging.Logger("dlopt")
        self._logger.addHandler(file_handler)
        root = logging.getLogger()
        self._handlers = [file_handler]
        if not root.handlers:  # the first handler on the root logger disables `logging.lastResort`: replace it
            self._handlers.append(_PlainTextHandler(show, None, logging.WARNING))
        for handler in self._handlers:
            root.addHandler(handler)

    def _append(self, text: str) -> None:
        self._file.write(text.encode(errors="backslashreplace") + b"\n")
        self._file.flush()

    def write(self, text: str) -> None:
        self._logger.info(text)

    def error(self, text: str, error: BaseException) -> None:
        """Writes `text` and the traceback of `error`."""
        self._logger.error(text, exc_info=error)

    def close(self) -> None:
        for handler in self._handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()
        self._file.close()
