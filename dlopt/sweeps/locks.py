"""The lock of Optuna's journal."""

import contextlib
import fcntl
import os
from pathlib import Path
from typing import IO


class JournalLock:
    """For Optuna's journal. Its own locks are files, which a killed process leaves behind: others then wait 30 s."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._path = journal.with_name(f"{journal.name}.lock")
        self._file: IO[str] | None = None

    def acquire(self) -> bool:
        self._file = self._path.open("a+")
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        self._mend()
        return True

    def release(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None

    def _mend(self) -> None:
        """Cuts off what a process that was killed while it wrote has left of its last line."""
        with contextlib.suppress(FileNotFoundError), self._journal.open("rb+") as journal:
            size = journal.seek(0, os.SEEK_END)
            if size == 0:
                return
            journal.seek(size - 1)
            if journal.read(1) == b"\n":
                return
            start = max(size - (1 << 20), 0)
            journal.seek(start)
            journal.truncate(start + journal.read().rfind(b"\n") + 1)
