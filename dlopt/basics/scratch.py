"""Temporary folders. One that a killed process has left is removed when the next is created.

The process that uses a folder holds a lock on it, which the kernel releases when the process and those forked from it
have ended.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from multiprocessing import current_process
from multiprocessing.util import Finalize
from pathlib import Path

_PREFIX = "dlopt-scratch-"


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Yields a new temporary folder, and removes it at the end."""
    folder, descriptor = _create()
    try:
        yield folder
    finally:
        _end(folder, descriptor)


def own_multiprocessing_folder() -> None:
    """Lets multiprocessing put the sockets of this process and its children into a scratch folder.

    A killed process would leave those that it makes itself (/tmp/pymp-*). A forked process calls this again, because
    the folder of its parent may end before it.
    """
    global _owner
    if _owner != os.getpid():
        _owner = os.getpid()
        folder, descriptor = _create()
        current_process()._config["tempdir"] = str(folder)  # type: ignore[attr-defined]
        # Not `scratch`: a forked process drops its copy of the finalizer, which would end a context held by it.
        Finalize(None, _end, (folder, descriptor), exitpriority=-100)  # the last one, as multiprocessing's own


_owner: int | None = None


def _end(folder: Path, descriptor: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)


def _create() -> tuple[Path, int]:
    """Creates a folder and locks it; returns it with the descriptor that holds the lock."""
    remove_abandoned()
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        with contextlib.suppress(FileNotFoundError):  # another process has taken it for abandoned, and removed it
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                with contextlib.suppress(OSError):  # on a file system without locks, nothing is removed
                    fcntl.flock(descriptor, fcntl.LOCK_EX)  # waits for a process that is removing it
                if os.path.samestat(os.stat(folder), os.fstat(descriptor)):
                    return folder, descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)


def remove_abandoned() -> None:
    """Removes the scratch folders of this user that no process holds."""
    with contextlib.suppress(OSError):
        for name in os.listdir(tempfile.gettempdir()):
            if name.startswith(_PREFIX):
                with contextlib.suppress(OSError):
                    _remove(os.path.join(tempfile.gettempdir(), name))


def _remove(path: str) -> None:
    """Removes a scratch folder. Raises OSError if it is in use, or no folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid == os.geteuid():
            # Its process holds a lock until it ends, also if it is killed: this raises while it lives.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
    finally:
        os.close(descriptor)
