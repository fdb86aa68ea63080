"""Checkpoints are whole or absent: temporary file, fsync, rename, fsync of the folder; a SHA-256 stands beside each.

`last.pt` is the newest, `step-N.pt` are those before it, `best.pt` the one of the best evaluation.
"""

import contextlib
import hashlib
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO

import torch

from dlopt.errors import RunError, UserError

FORMAT = 1
KEYS = {"format", "model", "optimizer", "schedule", "ema", "rng", "progress", "config", "normalize"}

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoint folder of one run.

    `writes`: false for a process that leaves writing to another. `asynchronous`: `save` copies the state and returns;
    a thread writes it, one after the other, and what goes wrong there is raised by the next call.
    """

    def __init__(self, folder: Path, keep: int = 2, *, writes: bool = True, asynchronous: bool = False) -> None:
        self.folder = folder
        self.writes = writes
        self.asynchronous = asynchronous
        self.keep = keep
        self.last = folder / "last.pt"
        self.best = folder / "best.pt"
        self._step_of_last: int | None = None  # None: last.pt is absent, or not whole
        self._taken_over = False
        self._writing: Thread | None = None
        self._failure: RunError | None = None

    def save(self, state: dict[str, Any], *, best: bool, landmark: str | None = None) -> None:
        """Writes `state` as last.pt, and as best.pt when it is the best so far. Raises `RunError` when it cannot.

        The file that was last.pt stays as step-N.pt while it is among the `keep` newest; a `landmark` stays for good.
        """
        if not self.writes:
            return
        if not self.asynchronous:
            self._save(state, best, landmark)
            return
        self.settle()
        # A daemon: only who is told to stop at once does not wait for it, and then the checkpoint before counts.
        self._writing = Thread(
            target=self._save_behind, args=(_copied(state), best, landmark), name="checkpoint", daemon=True
        )
        self._writing.start()

    def settle(self) -> None:
        """Waits until everything is on the disk. Raises `RunError` when that failed."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _save_behind(self, state: dict[str, Any], best: bool, landmark: str | None) -> None:
        try:
            self._save(state, best, landmark)
        except RunError as error:
            self._failure = error
        except Exception as error:  # it must not be lost with the thread
            self._failure = RunError(
                f"the checkpoint {self.last} could not be written: {type(error).__name__}: {error}"
            )

    def _save(self, state: dict[str, Any], best: bool, landmark: str | None) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_over()
            self._retire_last()
            target = self.last if landmark is None else self.folder / f"{landmark}.pt"
            write(target, lambda file: torch.save({"format": FORMAT, **state}, file))
            if landmark is not None:  # whoever goes on from last.pt does not pass this point again
                _copy(target, self.last)
            self._step_of_last = state["progress"]["step"]
            if best:
                _copy(self.last, self.best)
            self._forget_oldest()
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise RunError(f"the checkpoint {self.last} could not be written: {_reason(error)}") from error

    def load_newest(self) -> dict[str, Any] | None:
        """The newest whole checkpoint; None when there is no file at all. Raises `RunError` when none is whole."""
        self.settle()
        candidates = [self.last, *reversed(self._earlier())]
        damaged = []
        for path in candidates:
            if not path.exists() and not path.is_symlink():
                continue
            try:
                return load(path)
            except UserError as error:
                damaged.append(path)
                log.warning("%s; trying the one before it", error)
        if damaged:
            raise RunError(
                f"none of the checkpoints in {self.folder} is whole ({', '.join(p.name for p in damaged)}); "
                "start again in a new folder"
            )
        return None

    def has_best(self) -> bool:
        self.settle()
        return self.best.exists()

    def restore_best(self, state: dict[str, Any]) -> None:
        """Makes `state`, which a run goes on from and which is its best so far, best.pt where it is not.

        A run killed between the two files of a save leaves a last.pt that speaks of a best.pt still to be written.
        """
        if not self.writes:
            return
        self.settle()
        with contextlib.suppress(UserError):
            if load(self.best)["progress"]["step"] == state["progress"]["step"]:
                return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(self.best, lambda file: torch.save(state, file))
        except (OSError, RuntimeError) as error:
            raise RunError(f"the checkpoint {self.best} could not be written: {_reason(error)}") from error

    def _take_over(self) -> None:
        """Before the first save: what a killed process left half done goes, and its last.pt counts if it is whole."""
        if self._taken_over:
            return
        self._taken_over = True
        for path in (*self.folder.glob(".*.tmp"), *self.folder.glob("*.sha256")):
            if path.suffix == ".tmp" or not path.with_suffix("").exists():
                path.unlink(missing_ok=True)
        with contextlib.suppress(UserError):
            self._step_of_last = load(self.last)["progress"]["step"]

    def _earlier(self) -> list[Path]:
        """Kept checkpoints before last.pt, oldest first, by number: step 10 is newer than step 9."""
        found = [(int(m[1]), p) for p in self.folder.glob("step-*.pt") if (m := re.fullmatch(r"step-(\d+)", p.stem))]
        return [path for _, path in sorted(found)]

    def _retire_last(self) -> None:
        if self.keep > 1 and self._step_of_last is not None:
            _copy(self.last, self.folder / f"step-{self._step_of_last}.pt")

    def _forget_oldest(self) -> None:
        earlier = self._earlier()
        for path in earlier[: max(len(earlier) - (self.keep - 1), 0)]:
            path.unlink(missing_ok=True)
            _digest_file(path).unlink(missing_ok=True)


def _copied(state: Any) -> Any:
    """The state as it is now, in the host's memory, whatever the training does to its tensors afterwards."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        copied = {key: _copied(value) for key, value in state.items()}
        return OrderedDict(copied) if isinstance(state, OrderedDict) else copied
    if isinstance(state, list | tuple):
        return type(state)(map(_copied, state))
    return state


def load(path: Path) -> dict[str, Any]:
    """Reads one checkpoint, on the CPU, without unpickling code. Raises `UserError` naming what is wrong with it."""
    if path.is_dir():
        raise UserError(f"checkpoint={path}: this is a folder; name a file such as {path}/checkpoints/last.pt")
    if not path.is_file():
        raise UserError(f"checkpoint={path}: there is no such file")
    try:
        digest = _sha256(path)
        recorded = _recorded_digests(path)
    except OSError as error:
        raise UserError(f"checkpoint={path}: it cannot be read: {_reason(error)}") from None
    if not recorded:
        raise UserError(f"checkpoint={path}: its checksum {_digest_file(path).name} is missing or empty")
    if digest not in recorded:
        raise UserError(f"checkpoint={path}: the file is damaged: its SHA-256 is not the recorded one")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"checkpoint={path}: this is no dlopt checkpoint: {_reason(error)}") from None
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"checkpoint={path}: this file holds no run; take its weights with init_from={path}")
    form = state["format"]
    if type(form) is not int:
        raise UserError(f"checkpoint={path}: this is no dlopt checkpoint: its format is {form!r}, not a number")
    if form > FORMAT:
        raise UserError(f"checkpoint={path}: written by a newer dlopt (format {form}; this reads {FORMAT})")
    missing = sorted(KEYS - state.keys())
    if missing:
        raise UserError(f"checkpoint={path}: {', '.join(missing)} missing; take its weights with init_from={path}")
    return state


def is_whole(path: Path) -> bool:
    """Whether the file is there and is the one whose checksum was recorded."""
    try:
        return _sha256(path) in _recorded_digests(path)
    except OSError:
        return False


def load_weights(path: Path) -> dict[str, Any]:
    """The weights in a checkpoint (its average where it has one) or in a file of weights alone. Raises `UserError`."""
    if not path.is_file():
        raise UserError(f"init_from={path}: there is no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"init_from={path}: this file holds no weights: {_reason(error)}") from None
    if isinstance(state, dict) and "format" in state:
        state = load(path)  # with its checksum
        state = state["ema"] or state["model"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"init_from={path}: this file holds no weights by name")
    return state


def write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Writes a file and its checksum so that a crash at any moment leaves a file that matches its checksum.

    Two files cannot be renamed at once: the checksum file names the new digest beside the old one before the rename,
    and the new one alone after it. A reader takes either.
    """
    with _temporary(path) as temporary:
        with temporary.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        _publish(temporary, path, _sha256(temporary))


def _copy(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`: a hard link where the file system has them."""
    with _temporary(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            with source.open("rb") as read, temporary.open("wb") as file:
                while block := read.read(1 << 20):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
        digests = _recorded_digests(source)
        _publish(temporary, target, digests[0] if len(digests) == 1 else _sha256(source))


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A path beside `path` to be renamed to it. It is gone afterwards: also after an error, and where the renaming of
    one link to another of the same file did nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _publish(temporary: Path, path: Path, digest: str) -> None:
    before = _recorded_digests(path) if path.exists() else []
    _write_digests(path, [digest, *(each for each in before if each != digest)])
    os.replace(temporary, path)
    _sync_folder(path.parent)
    if before:
        _write_digests(path, [digest])


def _write_digests(path: Path, digests: list[str]) -> None:
    target = _digest_file(path)
    with _temporary(target) as temporary:
        with temporary.open("w") as file:
            file.writelines(f"{digest}  {path.name}\n" for digest in digests)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    _sync_folder(path.parent)


def _recorded_digests(path: Path) -> list[str]:
    try:
        lines = _digest_file(path).read_text().splitlines()
    except (FileNotFoundError, UnicodeDecodeError):
        return []
    return [line.split()[0] for line in lines if line.strip()]


def _digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """In one line. What torch says of a file that it could not finish hides why it could not."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return str(error).strip().split("\n")[0] or type(error).__name__
