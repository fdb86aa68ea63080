"""The teacher of loss=distillation, by the hash of its checkpoint. Imports no torch."""

import functools
import os
from pathlib import Path
from typing import Any

from dlopt.basics.errors import FileError, UserError
from dlopt.basics.files import sha256
from dlopt.config.saved import checkpoint_file

PATH, HASH = "teacher", "teacher_sha256"
_LOSS = "dlopt.losses.Distillation"


def identify_teacher(config: dict[str, Any], later: tuple[str, ...] = ()) -> None:
    """Sets `loss.teacher_sha256` in a config.

    A resumed run, a job of a sweep and every rank then detect that the file at `loss.teacher` has changed.
    A teacher whose name begins with one of `later` is not trained yet, and gets none. Raises `UserError` if there is no
    such checkpoint, or another one than that of the config.
    """
    loss = config.get("loss")
    if not isinstance(loss, dict) or loss.get("_target_") != _LOSS or HASH not in loss:
        return
    if isinstance(loss[PATH], str) and not loss[PATH].startswith(later):
        _, loss[HASH] = teacher_file(loss[PATH], loss[HASH])


def teacher_file(path: str, expected: str | None) -> tuple[Path, str]:
    """Returns the checkpoint at a path, of a run folder the best one, and its SHA-256.

    Raises `UserError` if there is none, or if it is not the `expected` one.
    """
    key, file = f"loss.{PATH}={path}", checkpoint_file(Path(os.path.expanduser(path)), f"loss.{PATH}")
    if not file.is_file():
        raise FileError(f"{key}: no such run folder or checkpoint; train the teacher first")
    try:
        status = os.stat(file)
        found = _digest(file.absolute(), status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise UserError(f"{key}: cannot be read ({error.strerror})") from None
    if expected not in (None, found):
        raise UserError(
            f"{key}: its checkpoint has the SHA-256 {found[:12]}..., not {str(expected)[:12]}... of loss.{HASH}; leave "
            "out that key to learn from this teacher"
        )
    return file, found


@functools.lru_cache(maxsize=64)
def _digest(path: Path, time: int, size: int) -> str:
    """Hashes a file once for all jobs of a sweep."""
    return sha256(path)
