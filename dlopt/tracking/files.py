"""Writing files beside a training that must not stop for them."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path


class AppendFile:
    """Appends whole records to a file and never raises.

    `write` only remembers; `flush` does the I/O. When that fails (full disk, read-only folder) the user hears of it
    once through `complain`, what was half written is cut off again, and the records stay in memory for the next
    `flush`, so the file is complete again once there is room. Beyond `limit` bytes the waiting records are dropped.
    """

    def __init__(self, path: Path, complain: Callable[[str], None], *, limit: int = 4 << 20) -> None:
        self.path = path
        self.waiting = bytearray()
        self._complain = complain
        self._complained = False
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
            if not self._complained:
                self._complained = True
                self._complain(f"{self.path}: cannot be written ({error.strerror}); training goes on without it")

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None
