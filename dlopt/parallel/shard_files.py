"""Sharded checkpoint files: all ranks write their shards to one folder, and a single process can read it.

The format is torch.distributed.checkpoint's: `__RANK_0.distcp` holds a rank's shards, `.metadata` their positions.
"""

import io
import math
import os
import pickle
import shutil
import stat
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, distributed

from dlopt.errors import RunError
from dlopt.files import disk_in_use, reason, sha256, sync_folder
from dlopt.plain import read_regular

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


# -- reading


@dataclass(frozen=True)
class _Chunk:
    """A part of a tensor: where it is in the tensor, and in which bytes of which file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class _Layout:
    """A tensor as the metadata describes it."""

    dtype: torch.dtype
    size: tuple[int, ...]
    chunks: list[_Chunk]


def read(folder: Path, files: Collection[str]) -> dict[str, Tensor]:
    """Reads the full tensors to the CPU, in one process.

    The files may be a stranger's: nothing in them is executed. torch's own reader is not used, because it unpickles
    entries that are not tensors without restrictions. Reads only `files`, regular files of this folder, and allocates
    no more memory for tensors than these files have bytes. Raises any error as it is.
    """
    sizes = {name: _regular_size(folder, name) for name in files}
    if METADATA not in sizes:
        raise ValueError(f"there is no file {METADATA}")
    tensors = {}
    for name, layout in _read_layouts(read_regular(folder / METADATA, sizes[METADATA]), sizes).items():
        tensors[name] = torch.zeros(layout.size, dtype=layout.dtype)
        for chunk in layout.chunks:
            part = tensors[name]
            for axis, (offset, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                part = part.narrow(axis, offset, length)
            part.copy_(_read_chunk(folder / chunk.file, chunk, layout.dtype))
    return tensors


def _regular_size(folder: Path, name: str) -> int:
    """Returns the size of a regular file in the folder. Refuses links, which may lead out of it."""
    if os.path.basename(name) != name:
        raise ValueError(f"{name!r} is not a file name")
    status = (folder / name).lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{name!r} is not a regular file")
    return status.st_size


def _read_chunk(path: Path, chunk: _Chunk, dtype: torch.dtype) -> Tensor:
    with path.open("rb") as file:
        file.seek(chunk.start)
        content = io.BytesIO(file.read(chunk.length))
    with zipfile.ZipFile(content) as archive:  # torch does not compress; a few bytes could inflate to terabytes
        if sum(record.file_size for record in archive.infolist()) > chunk.length:
            raise ValueError(f"{path.name} is compressed")
    content.seek(0)
    tensor = torch.load(content, map_location="cpu", weights_only=True)
    if type(tensor) is not Tensor or tensor.layout != torch.strided:
        raise ValueError(f"{path.name} contains something that is not a plain tensor")
    if tensor.dtype != dtype or tuple(tensor.shape) != chunk.sizes:
        raise ValueError(f"{path.name} contains a tensor of another type or shape than {METADATA} says")
    return tensor


def _read_layouts(content: bytes, sizes: Mapping[str, int]) -> dict[str, _Layout]:
    """Parses `.metadata` and checks every part of it against the `sizes` of the files."""
    metadata = _fields(_Unpickler(io.BytesIO(content)).load(), "Metadata")
    entries: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]] = {}
    for index, info in _dict(metadata, "storage_data").items():
        where, place = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
        file, start, length = place.get("relative_path"), place.get("offset"), place.get("length")
        if not isinstance(file, str) or file not in sizes or file == METADATA:
            raise ValueError(f"there is no file {file}")
        if not _is_natural(start) or not _is_natural(length) or start + length > sizes[file]:
            raise ValueError(f"bytes outside {file}")
        if place.get("transform_descriptors"):
            raise ValueError(f"{file} is transformed")
        entries[str(where.get("fqn")), _size(where.get("offset"))] = file, start, length
    if sum(length for _, _, length in entries.values()) > sum(sizes.values()):
        raise ValueError("the tensors overlap in their files")
    layouts = {}
    for name, entry in _dict(metadata, "state_dict_metadata").items():
        layouts[name] = _read_layout(name, _fields(entry, "TensorStorageMetadata"), entries)
    return layouts


def _read_layout(
    name: str, entry: Mapping[str, Any], entries: Mapping[tuple[str, tuple[int, ...]], tuple[str, int, int]]
) -> _Layout:
    properties = _state(entry.get("properties"), "TensorProperties")
    dtype = properties[0] if isinstance(properties, tuple) and properties else None
    size, parts, chunks = _size(entry.get("size")), entry.get("chunks"), []
    if not isinstance(dtype, torch.dtype) or not isinstance(parts, list):
        raise ValueError(f"{name} has an invalid type or invalid shards")
    for part in parts:
        fields = _fields(part, "ChunkStorageMetadata")
        offsets, lengths = _size(fields.get("offsets")), _size(fields.get("sizes"))
        is_inside = len(offsets) == len(lengths) == len(size) and all(
            offset + length <= total for offset, length, total in zip(offsets, lengths, size, strict=True)
        )
        if not is_inside:
            raise ValueError(f"{name} has a shard outside the tensor")
        if 0 in lengths:  # of a rank without a shard
            continue
        if (name, offsets) not in entries:
            raise ValueError(f"{name} has a shard that is in no file")
        file, start, length = entries[name, offsets]
        if math.prod(lengths) * dtype.itemsize > length:
            raise ValueError(f"{name} is larger than its file {file}")
        chunks.append(_Chunk(offsets, lengths, file, start, length))
    has_duplicates = len({chunk.offsets for chunk in chunks}) != len(chunks)
    if has_duplicates or sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        raise ValueError(f"the shards of {name} do not add up to the tensor")
    return _Layout(dtype, size, chunks)


class _Record:
    """Replaces a class or function that `.metadata` names: holds the pickled values, and runs nothing."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _state(value: Any, kind: str) -> Any:
    """Returns the pickled state of a record of this kind. Raises ValueError for anything else."""
    if not isinstance(value, _Record) or type(value).__name__ != kind:
        raise ValueError(f"{METADATA} has a {type(value).__name__} in place of a {kind}")
    return value.state


def _fields(value: Any, kind: str) -> Mapping[str, Any]:
    state = _state(value, kind)
    if not isinstance(state, dict):
        raise ValueError(f"{METADATA} has an invalid {kind}")
    return state


def _dict(fields: Mapping[str, Any], name: str) -> dict[Any, Any]:
    value = fields.get(name)
    if not isinstance(value, dict):
        raise ValueError(f"{METADATA} has no {name}")
    return value


def _size(value: Any) -> tuple[int, ...]:
    _state(value, "Size")
    if len(value.arguments) != 1 or not isinstance(value.arguments[0], tuple):
        raise ValueError(f"{METADATA} has an invalid Size")
    if not all(map(_is_natural, value.arguments[0])):
        raise ValueError(f"{METADATA} has an invalid Size")
    size: tuple[int, ...] = value.arguments[0]
    return size


def _is_natural(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**63


_LAYOUT = "torch.distributed.checkpoint"
_ALLOWED_GLOBALS = {
    *((f"{_LAYOUT}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((f"{_LAYOUT}.metadata", f"{kind}StorageMetadata") for kind in ("Tensor", "Chunk")),
    (f"{_LAYOUT}.metadata", "TensorProperties"),
    (f"{_LAYOUT}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("builtins", "getattr"),  # Python 3.11.2 pickles the member of an enum as getattr(enum, name)
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Unpickler(pickle._Unpickler):
    """Reads the values with which torch.distributed.checkpoint describes tensors.

    Data types are torch's; all classes and functions are replaced by new subclasses of `_Record`: a pickle can call
    what it names, and set attributes of it. The base class is in Python: the one in C allocates as much memory as a
    file requests.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) not in _ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in {METADATA}")
        return type(name, (_Record,), {})
