"""Tensors that are sharded over processes, as the files of one folder: written by all at once, read by any.

torch.distributed.checkpoint lays them out: `__RANK_0.distcp` holds a process's shards, `.metadata` their places.
"""

import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from dlopt.errors import RunError
from dlopt.files import reason, sha256, sync_folder

T = TypeVar("T")

Files = dict[str, str]
"""Names of files in a folder, and their SHA-256."""

METADATA = ".metadata"


class ShardWriter:
    """Writes on all processes together, over a process group of its own: a thread can write while the training
    communicates.

    `minutes`: how long processes wait for each other.
    """

    def __init__(self, rank: int, *, minutes: float) -> None:
        self.rank = rank
        self.minutes = minutes
        self._group: Any = None

    def join(self) -> None:
        """Makes the group: before the first `write`, in the thread in which the training runs, on all processes."""
        if self._group is None:
            self._group = distributed.new_group(backend="gloo", timeout=timedelta(minutes=self.minutes))

    def write(self, parent: Path, name: str, tensors: Mapping[str, Tensor]) -> tuple[str, Files]:
        """Writes DTensors, of which every process has its part, to a new folder in `parent`.

        Returns its name (`name`, with a number where that is taken) and its files, on all processes. The folder is
        whole or absent: everything is on the disk before it gets its name. Raises `RunError` naming the rank that
        could not write.
        """
        [name, *_] = self._on_all(lambda: _make(parent, name) if self.rank == 0 else "")
        temporary = _temporary(parent, name)
        try:
            self._write(temporary, tensors)
            files = self._on_all(lambda: self._own_files(temporary))
            self._on_all(lambda: _publish(parent, name, files) if self.rank == 0 else None)
        except RunError:  # which all processes have been told
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return name, {each: digest for own in files for each, (digest, _) in own.items()}

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

    def _own_files(self, folder: Path) -> dict[str, tuple[str, int]]:
        """Of what this process has written: SHA-256 and size."""
        paths = sorted(folder.glob(f"__{self.rank}_*.distcp"))
        if self.rank == 0:
            paths.append(folder / METADATA)
        return {path.name: (sha256(path), path.stat().st_size) for path in paths}

    def _on_all(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives on each process. Raises `RunError` on all where it fails on one."""
        own: tuple[T | None, str | None]
        try:
            own = work(), None
        except (OSError, RuntimeError, RunError) as error:
            own = None, reason(error)
        gathered: list[Any] = [None] * distributed.get_world_size(self._group)
        distributed.all_gather_object(gathered, own, group=self._group)
        for rank, (_, failure) in enumerate(gathered):
            if failure is not None:
                raise RunError(f"rank {rank}: {failure}")
        return [value for value, _ in gathered]


def _temporary(parent: Path, name: str) -> Path:
    return parent / f".{name}.tmp"


def _make(parent: Path, name: str) -> str:
    """Makes an empty temporary folder for one of this name, or of this name with a number if that is taken."""
    parent.mkdir(parents=True, exist_ok=True)
    free = next(each for each in chain([name], (f"{name}-{n}" for n in count(1))) if not (parent / each).exists())
    shutil.rmtree(_temporary(parent, free), ignore_errors=True)
    _temporary(parent, free).mkdir()
    return free


def _publish(parent: Path, name: str, files: list[dict[str, tuple[str, int]]]) -> None:
    temporary = _temporary(parent, name)
    for rank, own in enumerate(files):
        for each, (_, size) in own.items():
            path = temporary / each
            if not path.is_file() or path.stat().st_size != size:
                raise RunError(
                    f"what rank {rank} has written to {path.name} is not there: the run folder has to lie on a file "
                    "system that all processes share; or set checkpoint.sharded=false"
                )
    sync_folder(temporary)
    os.replace(temporary, parent / name)
    sync_folder(parent)


def read(folder: Path) -> dict[str, Tensor]:
    """The whole tensors, on the CPU, in one process and without unpickling code. Raises whatever goes wrong."""
    from torch.distributed import checkpoint

    class Reader(checkpoint.FileSystemReader):
        """Torch's lets a pickle do what it likes."""

        def read_metadata(self, *_: Any, **__: Any) -> Any:
            return metadata

    with (folder / METADATA).open("rb") as file:
        metadata = _Unpickler(file).load()
    names = {each.name for each in folder.iterdir()}
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
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is meant
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
_HARMLESS = {
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
    """Knows the classes with which torch.distributed.checkpoint describes tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)
