"""Checkpoints, whole or absent: temporary file, fsync, rename, fsync of the folder; each with its SHA-256 beside it.

`last.pt` is the newest, `step-N.pt` are those before it, `best.pt` is the one of the best evaluation.
"""

import contextlib
import logging
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from dlopt.errors import NewerError, RunError, UserError
from dlopt.files import digest_file, link, reason, recorded_digests, sha256, write
from dlopt.parallel.rendezvous import caused_by_peer
from dlopt.parallel.shard_files import ShardWriter
from dlopt.training import sharded

FORMAT = 1  # of a whole and of a sharded file, which has the key "shards" in addition
KEYS = {"format", "model", "optimizer", "schedule", "ema", "rng", "progress", "config", "normalize"}

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoint folder of one run.

    `writes`: false for a process that leaves writing to another. `asynchronous`: `save` copies the state and returns;
    a thread writes one checkpoint after the other, and the next call raises its failure. `shards`: every process writes
    its shards of the state's tensors; then all of them call `save`.
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
        self.folder = folder
        self.writes = writes
        self.shards = shards
        self.asynchronous = asynchronous
        self.keep = keep
        self.last = folder / "last.pt"
        self.best = folder / "best.pt"
        self._step_of_last: int | None = None  # None: last.pt is absent, or not whole
        self._taken_over = False
        self._writing: Thread | None = None
        self._failure: Exception | None = None

    def save(self, state: dict[str, Any], *, best: bool, snapshot: str | None = None) -> None:
        """Writes `state` as last.pt, and as best.pt when it is the best so far. Raises `RunError` when it cannot.

        The file that was last.pt stays as step-N.pt while it is among the `keep` newest; a `snapshot` stays for good.
        """
        if self.shards is not None:
            self.shards.join()
        elif not self.writes:
            return
        self.wait()
        if not self.asynchronous:
            self._save(state, best, snapshot)
            return
        # A daemon: a process that is stopped at once does not wait for it, and then the checkpoint before counts.
        arguments = (_copied(state), best, snapshot)
        self._writing = Thread(target=self._save_in_thread, args=arguments, name="checkpoint", daemon=True)
        self._writing.start()

    def wait(self) -> None:
        """Waits until everything is on the disk. Raises `RunError` when that failed."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _save_in_thread(self, state: dict[str, Any], best: bool, snapshot: str | None) -> None:
        try:
            self._save(state, best, snapshot)
        except Exception as error:  # it must not be lost with the thread
            if not isinstance(error, RunError) and not caused_by_peer(error):
                error = _unwritten(self.last, f"{type(error).__name__}: {error}")
            self._failure = error

    def _save(self, state: dict[str, Any], best: bool, snapshot: str | None) -> None:
        try:
            if self.writes:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._take_over()
            if self.shards is not None:
                state = sharded.write(self.folder, state, self.shards)
            state = {"format": FORMAT, **state}
            if not self.writes:
                return
            if self.keep > 1 and self._step_of_last is not None:
                link(self.last, self.folder / f"step-{self._step_of_last}.pt")
            target = self.last if snapshot is None else self.folder / f"{snapshot}.pt"
            write(target, lambda file: torch.save(state, file))
            if snapshot is not None:  # a run resumed from last.pt does not pass this point again
                link(target, self.last)
            self._step_of_last = state["progress"]["step"]
            if best:
                link(self.last, self.best)
            self._forget_oldest()
        except (OSError, RuntimeError, RunError) as error:  # torch reports a full disk as a RuntimeError
            if caused_by_peer(error):
                raise
            raise _unwritten(self.last, reason(error)) from error

    def load_newest(self) -> dict[str, Any] | None:
        """The newest whole checkpoint; None when there is no file at all. Raises `RunError` when none is whole."""
        self.wait()
        damaged = []
        for path in (self.last, *reversed(self._earlier())):
            if not path.exists() and not path.is_symlink():
                continue
            try:
                return load(path)
            except NewerError:  # resuming from an older one would undo what the newer dlopt has done
                raise
            except UserError as error:
                damaged.append(path.name)
                log.warning("%s; trying the one before it", error)
        if damaged:
            raise RunError(
                f"none of the checkpoints in {self.folder} is whole ({', '.join(damaged)}); start again in a new folder"
            )
        return None

    def has_best(self) -> bool:
        self.wait()
        return self.best.exists()

    def restore_best(self, state: dict[str, Any]) -> None:
        """Writes best.pt again from `state`, the best so far, from which a run resumes, unless best.pt holds it.

        A run killed between the two files of a save leaves a last.pt whose best.pt is still to be written.
        """
        if not self.writes:
            return
        self.wait()
        with contextlib.suppress(UserError):
            if load(self.best)["progress"]["step"] == state["progress"]["step"]:
                return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(self.best, lambda file: torch.save(state, file))
        except (OSError, RuntimeError) as error:
            raise _unwritten(self.best, reason(error)) from error

    def _take_over(self) -> None:
        """Before the first save: removes what a killed process left unfinished; counts its last.pt if it is whole."""
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
        steps = [(int(m[1]), p) for p in self.folder.glob("step-*.pt") if (m := re.fullmatch(r"step-(\d+)", p.stem))]
        return [path for _, path in sorted(steps)]

    def _forget_oldest(self) -> None:
        earlier = self._earlier()
        for path in earlier[: max(len(earlier) - (self.keep - 1), 0)]:
            path.unlink(missing_ok=True)
            digest_file(path).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            sharded.remove_unused(self.folder)


def _unwritten(path: Path, why: str) -> RunError:
    return RunError(f"the checkpoint {path} could not be written: {why}")


def _copied(state: Any) -> Any:
    """Copies the state into the host's memory: the training goes on to change its tensors."""
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
        raise UserError(f"checkpoint={path}: no such file")
    try:
        digest = sha256(path)
        recorded = recorded_digests(path)
    except OSError as error:
        raise UserError(f"checkpoint={path}: it cannot be read: {reason(error)}") from None
    if not recorded:
        raise UserError(f"checkpoint={path}: its checksum {digest_file(path).name} is missing or empty")
    if digest not in recorded:
        raise UserError(f"checkpoint={path}: the file is damaged: its SHA-256 is not the recorded one")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"checkpoint={path}: this is no dlopt checkpoint: {reason(error)}") from None
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"checkpoint={path}: this file holds no run; take its weights with init_from={path}")
    form = state["format"]
    if type(form) is not int:
        raise UserError(f"checkpoint={path}: this is no dlopt checkpoint: its format is {form!r}, not a number")
    if form > FORMAT:
        raise NewerError(f"checkpoint={path}: written by a newer dlopt (format {form}; this reads {FORMAT})")
    missing = sorted(KEYS - state.keys())
    if missing:
        raise UserError(f"checkpoint={path}: {', '.join(missing)} missing; take its weights with init_from={path}")
    if not sharded.is_sharded(state):
        return state
    try:
        damage = sharded.damage(path, state)
        if damage is None:
            return sharded.joined(path, state)
    except Exception as error:
        damage = f"its shards cannot be read: {reason(error)}"
    raise UserError(f"checkpoint={path}: {damage}")


def is_intact(path: Path) -> bool:
    """Whether the file, with its shards, is there and is the one whose checksum was recorded."""
    try:
        return sha256(path) in recorded_digests(path) and sharded.damage(path, sharded.opened(path)) is None
    except OSError:
        return False


def load_weights(path: Path) -> dict[str, Any]:
    """The weights in a checkpoint (its average where it has one) or in a file of weights alone. Raises `UserError`."""
    if not path.is_file():
        raise UserError(f"init_from={path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"init_from={path}: this file holds no weights: {reason(error)}") from None
    if isinstance(state, dict) and "format" in state:
        state = load(path)  # with its checksum
        state = state["ema"] or state["model"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"init_from={path}: this file holds no weights by name")
    return state
