"""Locks that end with the process that holds them, also over NFS (POSIX record locks)."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits for the lock and holds it within. A killed process releases it, and a forked child does not inherit it."""
    with path.open("a+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def hold(path: Path) -> IO[str]:
    """Takes the lock, or raises OSError, and holds it until the returned file is closed or the process ends.

    Do not open the file again in this process: closing any handle of it releases the lock.
    """
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


@contextlib.contextmanager
def taken(path: Path) -> Iterator[bool]:
    """Yields whether the lock was free and is now held within; False where there is no such file."""
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
    """Whether another process holds the lock."""
    with taken(path) as was_free:
        return path.exists() and not was_free
