"""File locks that the kernel releases when the process ends, also over NFS (POSIX record locks)."""

import contextlib
import fcntl
import os
import struct
import sys
from _thread import get_ident
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from weakref import WeakValueDictionary

from dlopt.basics.errors import UserError
from dlopt.basics.files import is_at

# Files of the locks that are held, by process (a fork copies the dict) and path. The kernel's locks do not exclude a
# second thread, and opening and closing the file again would release them.
_held: WeakValueDictionary[tuple[int, str], IO[str]] = WeakValueDictionary()

# Process -> (thread, name) of the call that holds the global state: a forked child does not hold it.
_calls: dict[int, tuple[int, str]] = {}


@contextlib.contextmanager
def global_state_held(call: str, *, may_be_nested: bool = False) -> Iterator[None]:
    """Holds the process-wide state in the block: random generators, torch's flags, streams and signals.

    `may_be_nested`: within another call of the same thread, whose state the block leaves as it was. Raises `UserError`
    if another call holds it.
    """
    process, own = os.getpid(), (get_ident(), call)
    holder = _calls.setdefault(process, own)  # atomic
    if holder is not own:
        if not (may_be_nested and holder[0] == own[0]):
            raise UserError(
                f"{call}: {holder[1]} is running in this process, whose random numbers, torch flags and streams they "
                "would share; call it afterwards or in another process (dlopt.sweep runs several jobs at once)"
            )
        yield
        return
    try:
        yield
    finally:
        _calls.pop(process, None)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits for the lock and holds it in the block. A forked child does not inherit it. Raises OSError."""
    with _open(path, os.O_CREAT) as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def shared(path: Path) -> Iterator[None]:
    """Waits for the lock and holds it in the block together with others that share it. Raises OSError."""
    with _open(path, os.O_CREAT) as file:
        fcntl.lockf(file, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Waits for the lock of a folder and holds it in the block, where the file system has such locks (not over NFS).

    It needs no file of its own, and opening files in the folder does not release it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def hold(path: Path) -> IO[str]:
    """Takes the lock and holds it until the returned file is closed or the process ends.

    Raises:
        BlockingIOError: another process, or this one, holds the lock.
        OSError: the file is not writable.
    """
    if not _is_held_here(path):
        file = _open(path, os.O_CREAT)
        if _is_locked(file):
            _held[_key(path)] = file
            return file
        file.close()
    raise BlockingIOError(f"{path}: a process holds this lock")


def lost(path: Path) -> str | None:
    """Returns where the file of a lock of this process is now, if no longer at `path`; "" if it was removed.

    None if it is still there, or this process does not hold the lock.
    """
    for (process, _), file in list(_held.items()):
        if process != os.getpid() or file.name != str(path) or file.closed:
            continue
        if not is_at(path, os.fstat(file.fileno())):
            try:
                place = os.readlink(f"/proc/self/fd/{file.fileno()}")
            except OSError:  # not Linux
                return ""
            return "" if place.endswith(" (deleted)") else place
    return None


def is_held_by_parent(path: Path) -> bool:
    """Returns whether this process is a fork of one that held the lock: it has the files of that process, not its lock.

    The forked process may hold the lock itself.
    """
    if _is_held_here(path):
        return False
    return any(
        process != os.getpid() and file.name == str(path) and not file.closed
        for (process, _), file in list(_held.items())
    )


@contextlib.contextmanager
def taken(path: Path) -> Iterator[bool | None]:
    """Tries to take the lock for the block; yields whether that succeeded, None if the file is missing or read-only."""
    if _is_held_here(path):
        yield False
        return
    try:
        file = _open(path)
    except OSError:
        yield None
        return
    with file:
        yield _is_locked(file)


def is_held(path: Path) -> bool:
    """Returns whether a process holds the lock; False if the file is missing or not readable."""
    if _is_held_here(path):
        return True
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO of that name would block
    except OSError:
        return False
    try:
        return _conflicts(descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _open(path: Path, flags: int = 0) -> IO[str]:
    """Opens a lock file for reading and appending. Raises OSError, and `UserError` for a pipe, a socket or a folder."""
    is_loop = path.is_symlink() and not path.exists()  # O_CREAT would create the file that it leads to
    if is_loop or path.is_fifo() or path.is_socket() or path.is_dir():
        raise UserError(f"{path}: is not a regular file; remove it")
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | flags, 0o666)
    return open(path, "a+", opener=lambda *_: descriptor)  # with its name, which `lost` compares


def _conflicts(descriptor: int) -> bool:
    """Asks the kernel for a lock that excludes a shared one: F_GETLK of fcntl(2) with its struct flock. Raises OSError.

    Trying the lock instead would hold it for an instant, in which a run that starts is refused.
    """
    layout, place = ("qqihh", 3) if sys.platform == "darwin" else ("hhqqi4x", 0)
    fields = [0] * 5  # the whole file, from its start
    fields[place] = fcntl.F_RDLCK
    answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(layout, *fields))
    kind: int = struct.unpack(layout, answer)[place]
    return kind != fcntl.F_UNLCK


def _key(path: Path) -> tuple[int, str]:
    return os.getpid(), os.path.realpath(path)


def _is_held_here(path: Path) -> bool:
    file = _held.get(_key(path))
    return file is not None and not file.closed


def _is_locked(file: IO[str]) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
