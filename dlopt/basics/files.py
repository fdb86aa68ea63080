"""Crash-safe files: written atomically, checkpoints with their SHA-256 in a checksum file; texts without secrets."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import stat
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from dlopt.basics.plain_values import load_json, open_regular, read_regular, without_nan
from dlopt.basics.secrets import redact, redacted

_ABANDONED = 3600.0  # seconds
_MAX_LINES = 1 << 30  # bytes of a file whose lines are read as they come
_in_use = 0


@contextlib.contextmanager
def disk_in_use() -> Iterator[None]:
    """Marks the time in which the main thread reads or writes files: a slow disk is no reason to call it hung."""
    global _in_use
    counts = threading.current_thread() is threading.main_thread()
    _in_use += counts
    try:
        yield
    finally:
        _in_use -= counts


def is_disk_in_use() -> bool:
    return _in_use > 0


@disk_in_use()
def write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Writes a file and its checksum; after a crash at any moment the file on disk matches its checksum.

    Two files cannot be renamed in one step. Before the rename, the checksum file therefore lists the new digest and the
    old one; after it, only the new one. A reader accepts any of the listed digests.
    """
    with temporary_sibling(path) as temporary:
        with synced(temporary) as file:
            fill(file)
        _publish(temporary, path, sha256(temporary))


@disk_in_use()
def link(source: Path, target: Path) -> None:
    """Makes `target` a hard link to `source`, or a copy if the file system has no hard links."""
    with temporary_sibling(target) as temporary:
        # A link needs no sync: the contents of the source have been on disk since it was written. A copy needs one.
        try:
            os.link(source, temporary)
        except OSError:
            with open_regular(source) as read, synced(temporary) as file:
                shutil.copyfileobj(read, file, 1 << 20)
        digests = recorded_digests(source)
        _publish(temporary, target, digests[0] if len(digests) == 1 else sha256(source))


@disk_in_use()
def write_atomically(path: Path, data: bytes | str) -> None:
    """Replaces the contents of `path`: after a crash the file is the old one or the new one. Raises OSError.

    A text is redacted (see `dlopt.basics.secrets`), bytes are written as they are. The error names `path`.
    """
    if isinstance(data, str):
        data = redact(data).encode("utf-8", "surrogateescape")
    try:
        with temporary_sibling(path) as temporary:
            # Synced before the rename: otherwise a power failure could leave the new name with incomplete contents.
            with synced(temporary) as file:
                file.write(data)
            os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # not the temporary one, or none
        del error.filename2  # None would be part of the message: "... -> None"
        raise


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Replaces the contents of `path` by `value`, redacted, as JSON; NaN and Inf become null. Raises OSError."""
    write_atomically(path, json.dumps(without_nan(redacted(value)), indent=indent, allow_nan=False) + "\n")


def write_yaml(path: Path, value: Any) -> None:
    """Replaces the contents of `path` by `value`, redacted, as YAML. Raises OSError."""
    write_atomically(path, yaml.safe_dump(redacted(value), sort_keys=False, allow_unicode=True))


@contextlib.contextmanager
def temporary_sibling(path: Path) -> Iterator[Path]:
    """Yields a path in the same folder to write and rename to `path`; removes it afterwards if it still exists.

    Every writer has its own temporary path: two processes may write the same file at once, and the later rename wins.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}.tmp")
    _remove_abandoned(path)
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    """Removes what killed processes have left of `path`; after an hour, since a process elsewhere may still write."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - temporary.stat().st_mtime > _ABANDONED:
                temporary.unlink()


@contextlib.contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """Opens a new file; its contents are on disk at the end of the block."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    with path.open("xb") as file:  # fails for an existing link, so never writes through it
        yield file
        file.flush()
        os.fsync(file.fileno())


def _publish(temporary: Path, path: Path, digest: str) -> None:
    # The checksum file lists both digests while the file is replaced: after a crash at any line below, it contains the
    # digest of whichever file is at `path`.
    old_digests = recorded_digests(path) if path.exists() else []
    write_digests(path, [digest, *(old for old in old_digests if old != digest)])
    os.replace(temporary, path)
    # Before the old digest is removed: if a power failure undid the rename, the old file would be left without it.
    sync_folder(path.parent)
    if old_digests:
        write_digests(path, [digest])


def write_digests(path: Path, digests: list[str]) -> None:
    """Writes the checksum file of `path`, in the format of `sha256sum`."""
    write_atomically(digest_file(path), "".join(f"{digest}  {path.name}\n" for digest in digests).encode())
    sync_folder(path.parent)


def recorded_digests(path: Path) -> list[str]:
    """Reads the digests in the checksum file of `path`; [] if there is none, or another kind of file."""
    try:
        lines = read_regular(digest_file(path)).decode().splitlines()
    except (FileNotFoundError, ValueError):  # UnicodeDecodeError is a ValueError
        return []
    return [line.split()[0] for line in lines if line.strip()]


def digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a regular file. Raises OSError."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error), str(path)) from None


def open_to_append(path: Path) -> int:
    """Opens a file, created if missing, for appending; returns its descriptor. Raises OSError; waits for no pipe."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY, 0o666)


class NewLines:
    """Reads the lines that another process appends to a file."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0

    def read(self) -> bytes:
        """Returns the complete lines added since the last call; all, if the file has become shorter.

        Raises OSError, and ValueError for a file that is not regular or has more than 1 GB.
        """
        with open_regular(self._path, _MAX_LINES) as file:
            if os.fstat(file.fileno()).st_size < self._position:
                self._position = 0
            file.seek(self._position)
            complete, newline, _ = file.read().rpartition(b"\n")
        self._position += len(complete + newline)
        return complete


def read_json(path: Path, limit: int = 1_000_000) -> dict[str, Any] | None:
    """Reads a JSON object; None if the file is missing, not regular or over `limit` bytes, or has anything else."""
    try:
        value = load_json(path, limit)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def is_at(path: Path, file: os.stat_result) -> bool:
    """Returns whether the file is still the one at `path`; true if that is unknown, as on a server that is down."""
    try:
        return os.path.samestat(os.stat(path), file)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def refuse_special(path: Path | str) -> None:
    """Raises OSError for a pipe, a device or a socket: reading one may wait forever, or never end."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "is a pipe, a device or a socket, not a file", str(path))


def refuse_compressed(path: Path) -> None:
    """Raises ValueError for a zip file with compressed entries: torch writes none, and they may expand to any size."""
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("has compressed entries, which torch.save does not write")


def sync_folder(folder: Path) -> None:
    """Makes renames in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: BaseException) -> str:
    """Returns the cause of an I/O error in one line: torch replaces the OSError of a failed write by its own error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return str(error).strip().split("\n")[0] or type(error).__name__
