"""Caches results of slow scans in the user's cache folder. The files may be deleted at any time."""

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dlopt.basics.files import write_atomically
from dlopt.basics.locks import locked

FileState = tuple[int, int, int, int]
"""Inode, size, and the times of the last change of content and of metadata: equal if a file is unchanged."""

_DIGEST = 32  # bytes of SHA-256 before the arrays, to detect damaged files


def cache_file(kind: str, *keys: str) -> Path:
    """Returns the file for `keys` (a folder, the format's version, ...) in $XDG_CACHE_HOME/dlopt or ~/.cache/dlopt.

    For a user without a home, it can neither be written nor read.
    """
    name = hashlib.sha256("\0".join((kind, *keys)).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    home = os.path.expanduser("~/.cache")
    folder = os.environ.get("XDG_CACHE_HOME") or (home if os.path.isabs(home) else os.devnull)
    return Path(folder, "dlopt", f"{kind}-{name}.npz")


def load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Loads the arrays in `path`; None if the file is missing or damaged."""
    try:
        data = path.read_bytes()
        if hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
            return None
        with np.load(io.BytesIO(data[_DIGEST:]), allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError):
        return None


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes `path` atomically. A folder that cannot be written is ignored: there is no cache then."""
    buffer = io.BytesIO()
    named: dict[str, Any] = dict(arrays)
    np.savez(buffer, **named)  # no allow_pickle: NumPy 1.26 would take it for the name of an array
    data = buffer.getvalue()
    save(path, hashlib.sha256(data).digest() + data)


def save(path: Path, data: bytes) -> bool:
    """Writes `data` to `path` atomically; returns whether that succeeded."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError:
        return False
    return True


def file_state(path: bytes | str | Path) -> FileState:
    """Returns the state of a file or folder. Raises OSError."""
    stat = os.stat(path)
    # ctime too: copying tools can set mtime back.
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Locks `path` against other processes; no lock if the cache folder cannot be written."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Ranks of a run and jobs of a sweep start at the same time: one of them computes the result, and the others
            # wait for it and read it.
            stack.enter_context(locked(path.with_suffix(".lock")))
        yield
