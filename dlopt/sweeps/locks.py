"""Locks that go with the process that holds them, also over NFS: whether a sweep is alive, and whose turn it is."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits for the lock; a POSIX record lock, which a killed process gives up."""
    with path.open("a+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def hold(path: Path) -> IO[str]:
    """Holds the lock until the returned file is closed or the process ends. The file must not be opened again here:
    closing any file of it gives the lock up."""
    file = path.open("a+")
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


@contextlib.contextmanager
def taken(path: Path) -> Iterator[bool]:
    """Takes the lock of another process if that is dead; yields whether it was. False where there is no such file."""
    try:
        file = path.open("r+")
    except OSError:
        yield False
        return
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def is_held(path: Path) -> bool:
    """Whether another process holds it."""
    with taken(path) as was_free:
        return path.exists() and not was_free


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
