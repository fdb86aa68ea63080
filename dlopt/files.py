"""Files that are whole or absent, whatever happens while they are written; each with its SHA-256 beside it."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


def write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Writes a file and its checksum so that a crash at any moment leaves a file that matches its checksum.

    Two files cannot be renamed at once: the checksum file names the new digest beside the old one before the rename,
    and the new one alone after it. A reader takes either.
    """
    with temporary_sibling(path) as temporary:
        with _synced(temporary) as file:
            fill(file)
        _publish(temporary, path, sha256(temporary))


def link(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`: a hard link where the file system has them."""
    with temporary_sibling(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            with source.open("rb") as read, _synced(temporary) as file:
                shutil.copyfileobj(read, file, 1 << 20)
        digests = recorded_digests(source)
        _publish(temporary, target, digests[0] if len(digests) == 1 else sha256(source))


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces `path` by `data`, durably: a reader, or a crash, sees the old file or the new one. Raises OSError."""
    with temporary_sibling(path) as temporary:
        with _synced(temporary) as file:
            file.write(data)
        os.replace(temporary, path)


@contextlib.contextmanager
def temporary_sibling(path: Path) -> Iterator[Path]:
    """Yields a path in the same folder, to be written and renamed to `path`; removes what is left of it afterwards."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _publish(temporary: Path, path: Path, digest: str) -> None:
    before = recorded_digests(path) if path.exists() else []
    write_digests(path, [digest, *(each for each in before if each != digest)])
    os.replace(temporary, path)
    sync_folder(path.parent)
    if before:
        write_digests(path, [digest])


def write_digests(path: Path, digests: list[str]) -> None:
    write_atomically(digest_file(path), "".join(f"{digest}  {path.name}\n" for digest in digests).encode())
    sync_folder(path.parent)


def recorded_digests(path: Path) -> list[str]:
    try:
        lines = digest_file(path).read_text().splitlines()
    except (FileNotFoundError, UnicodeDecodeError):
        return []
    return [line.split()[0] for line in lines if line.strip()]


def digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the object in a JSON file; None where there is no such file, or none that holds an object."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: BaseException) -> str:
    """In one line. What torch says of a file that it could not finish hides why it could not."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return str(error).strip().split("\n")[0] or type(error).__name__
