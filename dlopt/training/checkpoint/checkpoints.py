"""Checkpoints, written atomically: temporary file, fsync, rename, fsync of the folder. A second file has the SHA-256.

`last.pt` is the newest checkpoint, `step-N.pt` are earlier ones, `best.pt` has the best evaluation.
"""

import contextlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dlopt.basics.errors import FileError, OtherVersionError, RunError, UserError
from dlopt.basics.files import (
    digest_file,
    disk_in_use,
    link,
    reason,
    recorded_digests,
    refuse_compressed,
    sha256,
    write,
)
from dlopt.basics.folders import FORMAT, RunFolder, other_format
from dlopt.config.resuming import refuse_other_config
from dlopt.parallel.processes.rendezvous import caused_by_peer
from dlopt.parallel.shard_files import ShardWriter
from dlopt.training.checkpoint import content, sharded
from dlopt.training.checkpoint.content import KEYS, Checkpoint, with_length

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoint folder of a run.

    Args:
        keep: number of checkpoints to keep, including last.pt; best.pt and snapshots are kept in addition.
        writes: whether this process writes (rank 0).
        asynchronous: `save` copies the state and returns; a thread writes it. The next call raises its error.
        shards: every process writes its shards of the tensors; all processes must then call `save`.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        *,
        writes: bool = True,
        asynchronous: bool = False,
        shards: ShardWriter | None = None,
    ) -> None:
        self.folder, self.last, self.best = folder, folder / "last.pt", folder / "best.pt"
        self.keep, self.writes, self.asynchronous, self.shards = keep, writes, asynchronous, shards
        self._last_step: int | None = None  # of last.pt; None if missing or damaged
        self._folder_cleaned = False
        self._thread: Thread | None = None
        self._error: Exception | None = None

    @disk_in_use()
    def save(self, state: dict[str, Any], *, best: bool, snapshot: str | None = None) -> None:
        """Writes `state` as last.pt, and also as best.pt if `best`. Raises `RunError` on failure.

        The previous last.pt becomes step-N.pt and is deleted when it is no longer among the `keep` newest. A `snapshot`
        is also written under that name, and is never deleted.
        """
        if self.shards is not None:
            self.shards.join()
        elif not self.writes:
            return
        # One save at a time: of two, the older could end last and win. Raises the error of the previous save.
        self.wait()
        if not self.asynchronous:
            self._save(state, best, snapshot)
            return
        # Copied here, before the training changes the tensors. A daemon thread does not keep a process alive that must
        # exit at once; the previous checkpoint is then still complete.
        copied = tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)
        arguments = (copied, best, snapshot)
        self._thread = Thread(target=self._save_in_thread, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def refuse_moved(self) -> None:
        """Raises `RunError` if the folder of this process's run was removed or renamed."""
        RunFolder(self.folder.parent).refuse_moved()

    @disk_in_use()
    def wait(self) -> None:
        """Waits for an asynchronous save, and raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _save_in_thread(self, state: dict[str, Any], best: bool, snapshot: str | None) -> None:
        try:
            self._save(state, best, snapshot)
        except Exception as error:  # kept for the next call in the main thread
            if not isinstance(error, RunError) and not caused_by_peer(error):
                error = _write_error(self.last, f"{type(error).__name__}: {error}")
            self._error = error

    def _save(self, state: dict[str, Any], best: bool, snapshot: str | None) -> None:
        try:
            if self.writes:
                self.refuse_moved()
                self.folder.mkdir(parents=True, exist_ok=True)
                self._clean_folder()
            if self.shards is not None:
                state = sharded.write(self.folder, state, self.shards)
            state = {"format": FORMAT, **state}
            if not self.writes:
                return
            found = content.unreadable(state) or content.damage(state, whole=self.shards is None)
            if found is not None:
                raise RunError(found)
            # Safe in every crash: last.pt exists at all times, and is linked to step-N.pt before it is replaced. A
            # snapshot is written before last.pt, because a run resumed from last.pt would not write it.
            if self.keep > 1 and self._last_step is not None:
                link(self.last, self.folder / f"step-{self._last_step}.pt")
            target = self.last if snapshot is None else self.folder / f"{snapshot}.pt"
            write(target, lambda file: torch.save(state, file))
            if snapshot is not None:
                link(target, self.last)
            self._last_step = Checkpoint(state).step
            # After last.pt: a run that is killed in between resumes from last.pt and writes best.pt (`restore_best`).
            if best:
                link(self.last, self.best)
            # First the files, then the shards to which none refers: what a crash in between leaves, the next save
            # removes.
            earlier = self._earlier_checkpoints()
            for _, path in earlier[: max(len(earlier) - (self.keep - 1), 0)]:
                remove(path)
            with contextlib.suppress(OSError):
                sharded.remove_unused(self.folder)
        except (OSError, RuntimeError, RunError) as error:  # torch reports a full disk as a RuntimeError
            if caused_by_peer(error):
                raise
            raise _write_error(self.last, reason(error)) from error

    @disk_in_use()
    def load_newest(self) -> Checkpoint | None:
        """Loads the newest intact checkpoint; None if there is no file. Raises `RunError` if all are damaged."""
        self.wait()
        damaged = []
        for path in (self.last, *(path for _, path in reversed(self._earlier_checkpoints()))):
            if not path.exists() and not path.is_symlink():
                continue
            try:
                return load(path)
            except OtherVersionError:  # the previous checkpoint would discard the progress of that version
                raise
            except UserError as error:
                damaged.append(path.name)
                log.warning("%s; trying the previous checkpoint", error)
        if damaged:
            raise RunError(
                f"all checkpoints in {self.folder} are damaged ({', '.join(damaged)}); start again in a new folder"
            )
        return None

    @disk_in_use()
    def has_later(self, step: int) -> bool:
        """Returns whether an intact checkpoint is of a later update than `step`."""
        last = _outline(self.last)
        if last is not None and last.step > step and is_intact(self.last):
            return True
        return any(number > step and is_intact(path) for number, path in self._earlier_checkpoints())

    def has_best(self, epoch: float, run_id: str | None) -> bool:
        """Returns whether best.pt has this epoch and this run: a run may resume from a checkpoint before its best."""
        self.wait()
        best = _outline(self.best)
        if best is None:  # reported when it is loaded
            return self.best.exists()
        return best.evaluated_epoch == epoch and best.run_id == run_id

    def adopt(self, path: Path, run_id: str, name: Literal["best", "last"], **changed: Any) -> None:
        """Writes the checkpoint file `path` of another run, with its shards, as the best or last one of this run.

        `changed`: see `Checkpoint.with_run_id`.
        """
        state = sharded.load_without_shards(path)
        self.folder.mkdir(exist_ok=True)
        # The shards first: a crash after this line leaves shards to which no file refers, not a file without shards.
        sharded.copy(path, state, self.folder)
        state = Checkpoint(with_length(state, path)).with_run_id(run_id, **changed)
        self._write(self.folder / f"{name}.pt", state)

    @disk_in_use()
    def restore_best(self, state: Mapping[str, Any]) -> None:
        """Writes `state`, the best so far, to best.pt unless it is there: a killed save may leave only last.pt new."""
        if not self.writes:
            return
        self.wait()
        with contextlib.suppress(UserError):
            if load(self.best).step == Checkpoint(state).step:
                return
        self._write(self.best, state)

    def _write(self, path: Path, state: Mapping[str, Any]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(path, lambda file: torch.save(state, file))
        except (OSError, RuntimeError) as error:
            raise _write_error(path, reason(error)) from error

    def _clean_folder(self) -> None:
        """Before the first save: removes what a killed process left behind, and reads the step of its last.pt."""
        if self._folder_cleaned:
            return
        self._folder_cleaned = True
        for path in (*self.folder.glob(".*.tmp"), *self.folder.glob("*.sha256")):
            if path.suffix == ".tmp" or not path.with_suffix("").exists():
                path.unlink(missing_ok=True)
        with contextlib.suppress(UserError):
            self._last_step = load(self.last).step

    def _earlier_checkpoints(self) -> list[tuple[int, Path]]:
        """Returns N and step-N.pt, oldest first."""
        files = self.folder.glob("step-*.pt")
        return sorted((int(match[1]), path) for path in files if (match := re.fullmatch(r"step-(\d+)", path.stem)))


def _outline(path: Path) -> Checkpoint | None:
    """Returns a checkpoint without its shards; None if it is damaged."""
    state = sharded.load_without_shards(path)
    return Checkpoint(state) if content.damage(state, whole=False) is None else None


def removable(folder: Path) -> list[Path]:
    """Returns the step-N.pt in a folder of checkpoints, and the abandoned-*.pt of older versions; [] for a link."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    files = (path for path in folder.iterdir() if not path.is_symlink())
    return sorted(path for path in files if re.fullmatch(r"(step-\d+|abandoned-.+)\.pt", path.name))


def freed_bytes(path: Path) -> int:
    """Returns the bytes that removing a checkpoint and its shards frees: 0 for a file with another hard link."""
    return (path.stat().st_size if path.stat().st_nlink == 1 else 0) + sharded.size(path)


def remove(path: Path) -> None:
    """Removes a checkpoint and its checksum, not its shards: see `sharded.remove_unused`."""
    # The checksum last: `_clean_folder` removes one without a file; a file without one would count as damaged.
    path.unlink(missing_ok=True)
    digest_file(path).unlink(missing_ok=True)


def _write_error(path: Path, why: str) -> RunError:
    return RunError(f"the checkpoint {path} could not be written: {why}")


@disk_in_use()
def load(path: Path) -> Checkpoint:
    """Loads a checkpoint to the CPU, without unpickling code. Raises `UserError` that describes any damage."""
    if path.is_dir():
        raise FileError(f"checkpoint={path}: is a folder; set a file, such as {path}/checkpoints/last.pt")
    if not path.is_file():
        raise FileError(f"checkpoint={path}: no such file")
    try:
        digest, recorded = sha256(path), recorded_digests(path)
    except OSError as error:
        raise UserError(f"checkpoint={path}: cannot be read: {reason(error)}") from None
    if not recorded:
        raise UserError(
            f"checkpoint={path}: the checksum file {digest_file(path).name}, which dlopt writes beside it, is missing "
            f"or empty: copy it too; for weights of another tool: init_from={path} with the model and data"
        )
    if digest not in recorded:
        raise FileError(f"checkpoint={path}: the file is damaged: its SHA-256 differs from the recorded one")
    try:
        refuse_compressed(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"checkpoint={path}: not a dlopt checkpoint: {reason(error)}") from None
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"checkpoint={path}: not a dlopt checkpoint; load its weights with init_from={path}")
    if (other := other_format(state["format"], "format")) is not None:
        raise OtherVersionError(f"checkpoint={path}: {other}")
    if missing := sorted(KEYS - state.keys()):
        raise UserError(f"checkpoint={path}: {', '.join(missing)} missing; load its weights with init_from={path}")
    if sharded.is_sharded(state):
        try:
            damage = sharded.find_damage(path, state)
            if damage is None:
                state = sharded.load_shards(path, state)
        except Exception as error:
            damage = f"the shards cannot be read: {reason(error)}"
        if damage is not None:
            raise UserError(f"checkpoint={path}: {damage}")
    if (damage := content.damage(state)) is not None:
        raise FileError(f"checkpoint={path}: its content is damaged: {damage}")
    return Checkpoint(with_length(state, path))


def load_of_run(folder: RunFolder, config: Mapping[str, Any]) -> Checkpoint | None:
    """Loads the newest intact checkpoint of a run; None if there is no file.

    Raises `UserError` if its run or its config (`config`) differs; `RunError` if all are damaged.
    """
    path = folder.checkpoints
    checkpoint = Checkpoints(path).load_newest()
    if checkpoint is None:
        return None
    if (reason := foreign(path / "last.pt", checkpoint)) is not None:
        raise UserError(f"resume: {reason}; restore the checkpoints of this run, or use another folder")
    refuse_other_config(checkpoint.config, config, f"the checkpoint in {path}", folder.typed())
    return checkpoint


def foreign(path: Path, checkpoint: Checkpoint) -> str | None:
    """Describes a checkpoint file `path` that is not of its folder's run; None if it is, or is in no run folder."""
    expected, found = RunFolder(path.absolute().parent.parent).run_id(), checkpoint.run_id
    if expected is None or expected == found:
        return None
    return f"{path} is a checkpoint of another run ({found}) than its folder ({expected})"


def is_intact(path: Path) -> bool:
    """Returns whether the file and its shards exist and have the recorded checksums."""
    try:
        intact = sha256(path) in recorded_digests(path)
        return intact and sharded.find_damage(path, sharded.load_without_shards(path)) is None
    except OSError:
        return False
