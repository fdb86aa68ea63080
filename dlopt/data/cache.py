"""Files that spare a second look at large folders, in the user's cache folder. Losing them costs time only."""

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from dlopt.locks import locked

_DIGEST = 32  # bytes of SHA-256 before the arrays: a damaged file is no cache


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/dlopt, else ~/.cache/dlopt."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dlopt"


def cache_file(kind: str, *parts: str) -> Path:
    """Where what is known under `parts` (a folder, a version of the format ...) is kept."""
    name = hashlib.sha256("\0".join((kind, *parts)).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache_folder() / f"{kind}-{name}.npz"


def load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays in `path`; None where there are none, or where the file is not as it was written."""
    try:
        data = path.read_bytes()
        if hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
            return None
        with np.load(io.BytesIO(data[_DIGEST:]), allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError):
        return None


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes `path` as a whole or not at all. Where nothing can be written there is no cache, and that is all."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    data = buffer.getvalue()
    save(path, hashlib.sha256(data).digest() + data)


def save(path: Path, data: bytes) -> bool:
    """Whether `path` now holds `data`."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
            return True
        except OSError:
            os.unlink(temporary)
    return False


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Of several processes one at a time; where the cache folder cannot be written, all at once."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(path.with_suffix(".lock")))
        yield
