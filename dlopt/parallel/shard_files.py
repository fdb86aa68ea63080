"""Sharded checkpoint files: all ranks write their shards to one folder, and a single process can read it.

The format is torch.distributed.checkpoint's: `__RANK_0.distcp` holds a rank's shards, `.metadata` their positions.
"""

import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from dlopt.errors import RunError
from dlopt.files import disk_in_use, reason, sha256, sync_folder

T = TypeVar("T")

Files = dict[str, str]
"""SHA-256 by file name."""

METADATA = ".metadata"


@dataclass
class ShardWriter:
    """Writes shards on all ranks together.

    It uses a process group of its own: with asynchronous checkpoints a thread writes while training communicates, and
    collectives of two threads on one group could pair up in the wrong order. `minutes`: timeout of its collectives.
    """

    rank: int
    minutes: float
    _group: Any = field(default=None, init=False)

    def join(self) -> None:
        """Creates the group. All ranks call this in the training thread, before the first `write`."""
        if self._group is None:
            self._group = distributed.new_group(backend="gloo", timeout=timedelta(minutes=self.minutes))

    @disk_in_use()
    def write(self, parent: Path, name: str, tensors: Mapping[str, Tensor]) -> tuple[str, Files]:
        """Writes DTensors to a new folder in `parent`.

        Returns, on all ranks, the folder's name (`name`, with a number appended if it exists) and its files. The folder
        is complete or absent. Raises `RunError` on all ranks, naming the rank that could not write.
        """
        # Each phase ends with a collective, so no rank starts the next one before all have finished:
        # 1. rank 0 creates a temporary folder; 2. all ranks write and sync their files into it; 3. rank 0 checks that
        # it sees all of them and renames the folder. A crash leaves a temporary folder, which the next write removes.
        [name, *_] = self._on_all(lambda: _make_temporary(parent, name) if self.rank == 0 else "")
        temporary = _temporary(parent, name)
        try:
            self._write(temporary, tensors)
            files = self._on_all(lambda: self._local_files(temporary))
            self._on_all(lambda: _publish(parent, name, files) if self.rank == 0 else None)
        except RunError:  # raised on all ranks
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return name, {file: digest for rank_files in files for file, (digest, _) in rank_files.items()}

    def _write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        from torch.distributed import checkpoint

        failures: Mapping[int, tuple[BaseException, object]] = {}
        try:
            checkpoint.save(
                dict(tensors),
                storage_writer=checkpoint.FileSystemWriter(folder),
                planner=checkpoint.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=self._group,
            )
        except checkpoint.api.CheckpointException as error:  # no subclass of Exception
            failures = error.failures
        for rank, (failure, _) in sorted(failures.items()):
            if rank == self.rank and not isinstance(failure, Exception):
                raise failure  # KeyboardInterrupt or SystemExit
            raise RunError(f"rank {rank}: {reason(failure)}")

    def _local_files(self, folder: Path) -> dict[str, tuple[str, int]]:
        """Returns SHA-256 and size of each file that this rank has written."""
        paths = sorted(folder.glob(f"__{self.rank}_*.distcp"))
        if self.rank == 0:
            paths.append(folder / METADATA)
        return {path.name: (sha256(path), path.stat().st_size) for path in paths}

    def _on_all(self, work: Callable[[], T]) -> list[T]:
        """Returns the results of `work` on all ranks. Raises `RunError` on all ranks if it fails on one."""
        # Errors travel through the same collective as results: a rank that raised before it would leave the others
        # waiting until the timeout.
        outcome: tuple[T | None, str | None]
        try:
            outcome = work(), None
        except (OSError, RuntimeError, RunError) as error:
            outcome = None, reason(error)
        gathered: list[Any] = [None] * distributed.get_world_size(self._group)
        distributed.all_gather_object(gathered, outcome, group=self._group)
        for rank, (_, failure) in enumerate(gathered):
            if failure is not None:
                raise RunError(f"rank {rank}: {failure}")
        return [value for value, _ in gathered]


def _temporary(parent: Path, name: str) -> Path:
    return parent / f".{name}.tmp"


def _make_temporary(parent: Path, name: str) -> str:
    """Creates an empty temporary folder for `name`, or for the first free `name-N`, and returns the free name."""
    parent.mkdir(parents=True, exist_ok=True)
    free = next(n for n in chain([name], (f"{name}-{i}" for i in count(1))) if not (parent / n).exists())
    shutil.rmtree(_temporary(parent, free), ignore_errors=True)
    _temporary(parent, free).mkdir()
    return free


def _publish(parent: Path, name: str, files: list[dict[str, tuple[str, int]]]) -> None:
    """Checks that all files are visible here, then gives the folder its name."""
    temporary = _temporary(parent, name)
    for rank, rank_files in enumerate(files):
        for file, (_, size) in rank_files.items():
            path = temporary / file
            if not path.is_file() or path.stat().st_size != size:
                raise RunError(
                    f"rank 0 does not see {path.name}, which rank {rank} has written: put the run folder on a file "
                    "system that all processes share, or set checkpoint.sharded=false"
                )
    # The order makes the folder complete or absent after a power failure. The files are synced already; their directory
    # entries must be on disk before the rename, and the rename before the checkpoint that refers to it.
    sync_folder(temporary)
    os.replace(temporary, parent / name)
    sync_folder(parent)


def read(folder: Path) -> dict[str, Tensor]:
    """Reads the full tensors to the CPU, in one process. Does not execute pickled code. Raises any error as it is."""
    from torch.distributed import checkpoint

    class Reader(checkpoint.FileSystemReader):
        # The base class would unpickle `.metadata` without restrictions.
        def read_metadata(self, *_: Any, **__: Any) -> Any:
            return metadata

    with (folder / METADATA).open("rb") as file:
        metadata = _Unpickler(file).load()
    # Only files of this folder, by exact name: the metadata could name a path outside it.
    names = {path.name for path in folder.iterdir()}
    for info in metadata.storage_data.values():
        if info.relative_path not in names:
            raise RuntimeError(f"there is no file {info.relative_path}")
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
    }
    failures: Mapping[int, tuple[BaseException, object]] = {}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # intended: one process reads
            checkpoint.load(
                tensors,
                storage_reader=Reader(folder),
                planner=checkpoint.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                no_dist=True,
            )
    except checkpoint.api.CheckpointException as error:
        failures = error.failures
    for failure, _ in failures.values():
        raise failure
    return tensors


_LAYOUT = "torch.distributed.checkpoint"
_ALLOWED_GLOBALS = {
    *((f"{_LAYOUT}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((f"{_LAYOUT}.metadata", f"{kind}StorageMetadata") for kind in ("Tensor", "Chunk", "Bytes")),
    (f"{_LAYOUT}.metadata", "TensorProperties"),
    (f"{_LAYOUT}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}


class _Unpickler(pickle.Unpickler):
    """Allows only the classes with which torch.distributed.checkpoint describes tensors."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _memory_format  # Python 3.11.2 pickles the member of an enum as getattr(enum, name)
        if (module, name) not in _ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in {METADATA}")
        return super().find_class(module, name)


def _memory_format(kind: object, name: str) -> Any:
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    if kind is not _MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"builtins.getattr of {kind} is not allowed in {METADATA}")
    return _MEM_FORMAT_ENCODING[name]
