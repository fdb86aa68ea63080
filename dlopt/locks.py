"""File locks that the kernel releases when the process ends, also over NFS (POSIX record locks)."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits for the lock and holds it in the block. A forked child does not inherit it."""
    with path.open("a+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def hold(path: Path) -> IO[str]:
    """Takes the lock and holds it until the returned file is closed or the process ends.

    Do not open the file again in this process: closing any handle of it releases the lock.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file is not writable.
    """
    file = path.open("a+")
    if not _is_locked(file):
        file.close()
        raise BlockingIOError(f"{path}: another process holds this lock")
    return file


@contextlib.contextmanager
def taken(path: Path) -> Iterator[bool]:
    """Tries to take the lock for the block; yields whether that succeeded, False if the file is missing."""
    try:
        file = path.open("r+")
    except OSError:
        yield False
        return
    with file:
        yield _is_locked(file)


def is_held(path: Path) -> bool:
    """Returns whether another process holds the lock; False if the file is missing or not writable."""
    try:
        file = path.open("r+")
    except OSError:
        return False
    with file:
        return not _is_locked(file)


def _is_locked(file: IO[str]) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
