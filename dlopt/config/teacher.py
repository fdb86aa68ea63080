"""The teacher of loss=distillation, by the hash of its checkpoint. Imports no torch."""

import functools
import os
from pathlib import Path
from typing import Any

from dlopt.config.saved import checkpoint_file
from dlopt.errors import UserError
from dlopt.files import sha256

PATH, HASH = "teacher", "teacher_sha256"
_LOSS = "dlopt.losses.Distillation"


def identify_teacher(config: dict[str, Any]) -> None:
    """Sets `loss.teacher_sha256` in a config.

    A resumed run, a job of a sweep and every rank then detect that the file at `loss.teacher` has changed.
    Raises `UserError` if there is no such checkpoint, or another one than that of the config.
    """
    loss = config.get("loss")
    if not isinstance(loss, dict) or loss.get("_target_") != _LOSS or HASH not in loss:
        return
    path = loss[PATH]
    if not isinstance(path, str):
        return
    found = teacher_digest(path)
    if loss[HASH] not in (None, found):
        raise UserError(f"loss.{PATH}={path}: {changed(loss[HASH], found)}; leave out loss.{HASH}")
    loss[HASH] = found


def changed(expected: str, found: str) -> str:
    return f"its checkpoint has the SHA-256 {found[:12]}..., not {expected[:12]}... as that of this run"


def teacher_file(path: str) -> Path:
    """Returns the checkpoint of a run folder, the best one, or the checkpoint itself. Raises `UserError`."""
    where = Path(path).expanduser()
    try:
        file = checkpoint_file(where)
    except UserError:
        raise UserError(f"loss.{PATH}={path}: this folder contains neither best.pt nor last.pt") from None
    if not file.is_file():
        raise UserError(f"loss.{PATH}={path}: no such run folder or checkpoint; train the teacher first")
    return file


def teacher_digest(path: str) -> str:
    """Returns the SHA-256 of the teacher's checkpoint. Raises `UserError`."""
    file = teacher_file(path)
    try:
        status = os.stat(file)
        return _digest(file.absolute(), status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise UserError(f"loss.{PATH}={path}: cannot be read ({error.strerror})") from None


@functools.lru_cache(maxsize=64)
def _digest(path: Path, time: int, size: int) -> str:
    """Hashes a file once for all jobs of a sweep."""
    return sha256(path)
