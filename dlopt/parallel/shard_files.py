"""Sharded checkpoint files: all ranks write their shards to one folder, and a single process can read it.

`rank-N.safetensors` has the shards of rank N. Its header has their offsets in the full tensors, as in
torch.distributed.checkpoint, whose `HuggingFaceStorageReader` also reads these folders.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from dlopt.basics.errors import RunError
from dlopt.basics.files import disk_in_use, reason, sha256, sync_folder, synced
from dlopt.parallel.shards import as_bytes, local

T = TypeVar("T")

Files = dict[str, str]
"""SHA-256 by file name."""

_POSITIONS = "DCP_SHARDING_INFO"  # in the header's metadata: JSON of {name: {saved_offsets, full_shape, complex}}
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass
class ShardWriter:
    """Writes shards on all ranks together.

    With a process group of its own: collectives of training and of a thread that writes an asynchronous checkpoint
    could pair up in the wrong order on one group. `minutes`: timeout of its collectives.
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
        """Writes DTensors to a new folder in `parent`, which is then complete or absent.

        Returns, on all ranks, the folder's name (`name`, with a number appended if it exists) and its files. Raises
        `RunError` on all ranks, naming the rank that could not write.
        """
        # Each phase ends with a collective. 1. Rank 0 creates a temporary folder. 2. All ranks write and sync their
        # files into it. 3. Rank 0 checks that it sees all of them and renames the folder. A crash leaves the temporary
        # folder, which the next write removes.
        [name, *_] = self._on_all(lambda: _make_temporary(parent, name) if self.rank == 0 else "")
        path = _temporary(parent, name) / f"rank-{self.rank}.safetensors"
        try:
            files = self._on_all(lambda: _write(path, tensors))
            self._on_all(lambda: _publish(parent, name, files) if self.rank == 0 else None)
        except RunError:  # raised on all ranks
            if self.rank == 0:
                shutil.rmtree(path.parent, ignore_errors=True)
            raise
        return name, {file.name: file.digest for file in files}

    def _on_all(self, work: Callable[[], T]) -> list[T]:
        """Returns the results of `work` on all ranks. Raises `RunError` on all ranks if it fails on one."""
        # Errors travel with the results: a rank that raised before the collective would leave the others waiting.
        outcome: tuple[T | None, str | None]
        failed: BaseException | None = None
        try:
            outcome = work(), None
        except BaseException as error:
            outcome, failed = (None, reason(error)), error
        gathered: list[Any] = [None] * distributed.get_world_size(self._group)
        distributed.all_gather_object(gathered, outcome, group=self._group)
        if failed is not None and not isinstance(failed, Exception):
            raise failed  # KeyboardInterrupt or SystemExit
        for rank, (_, failure) in enumerate(gathered):
            if failure is not None:
                raise RunError(f"rank {rank}: {failure}")
        return [value for value, _ in gathered]


@dataclass(frozen=True)
class _File:
    """A file that a rank has written."""

    name: str
    size: int
    digest: str


def _temporary(parent: Path, name: str) -> Path:
    return parent / f".{name}.tmp"


def _make_temporary(parent: Path, name: str) -> str:
    """Creates an empty temporary folder for `name`, or for the first free `name-N`, and returns the free name."""
    parent.mkdir(parents=True, exist_ok=True)
    free = next(n for n in chain([name], (f"{name}-{i}" for i in count(1))) if not (parent / n).exists())
    shutil.rmtree(_temporary(parent, free), ignore_errors=True)
    _temporary(parent, free).mkdir()
    return free


def _publish(parent: Path, name: str, files: list[_File]) -> None:
    """Checks that all files are visible here, then gives the folder its name."""
    temporary = _temporary(parent, name)
    for rank, file in enumerate(files):
        path = temporary / file.name
        if not path.is_file() or path.stat().st_size != file.size:
            raise RunError(
                f"rank 0 does not see {file.name}, which rank {rank} has written: put the run folder on a file "
                "system that all processes share, or set checkpoint.sharded=false"
            )
    # For a power failure: the files are synced already; their directory entries must be on disk before the rename, and
    # the rename before the checkpoint that refers to it.
    sync_folder(temporary)
    os.replace(temporary, parent / name)
    sync_folder(parent)


# -- one file


@dataclass(frozen=True)
class _Shard:
    """A box of a tensor. A complex tensor is stored as a real one with a last dimension of 2."""

    values: Tensor
    offsets: Sequence[int]
    full_shape: Sequence[int]
    is_complex: bool


def _write(path: Path, tensors: Mapping[str, Tensor]) -> _File:
    """Writes this rank's shards of DTensors, and syncs the file.

    Not by safetensors' `save_file`, which needs all tensors on the CPU at the same time, and refuses tied weights.
    """
    shards = {}
    for number, name in enumerate(sorted(tensors)):
        if (shard := _local_shard(name, tensors[name], number)) is not None:
            shards[name] = shard
    # The largest elements first: each tensor is then aligned to its elements, as readers that map the file require.
    shards = dict(sorted(shards.items(), key=lambda item: -item[1].values.itemsize))
    positions, header, end = {}, {}, 0
    for name, shard in shards.items():
        start, end = end, end + shard.values.nbytes
        shape = list(shard.values.shape)
        header[name] = {"dtype": _CODES[shard.values.dtype], "shape": shape, "data_offsets": [start, end]}
        positions[name] = {
            "saved_offsets": shard.offsets, "full_shape": shard.full_shape, "complex": shard.is_complex
        }  # fmt: skip
    metadata = {"format": "pt", _POSITIONS: json.dumps(positions)}
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    path.parent.mkdir(parents=True, exist_ok=True)  # missing if it is on a file system that rank 0 does not share
    with synced(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shard in shards.values():  # copied to the CPU one at a time
            file.write(as_bytes(shard.values.cpu()).numpy().data)
    return _File(path.name, path.stat().st_size, sha256(path))


def _local_shard(name: str, tensor: Any, number: int) -> _Shard | None:
    """Returns the shard that this rank writes; None for an empty one, and for one that another replica's rank writes.

    Replicas take turns with `number`, the position of the tensor among all.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements
    if any(type(placement) not in (Shard, Replicate) for placement in placements):  # the shard is not a box
        raise RunError(f"{name}: placements={placements} cannot be saved")
    values, coordinates = local(tensor), mesh.get_coordinate()
    if coordinates is None:
        return None
    for axis, placement in enumerate(placements):
        if placement.is_replicate():
            if coordinates[axis] != number % mesh.size(axis):
                return None
        elif values.numel() == 0 and coordinates[axis] != 0:  # an empty tensor is written once
            return None
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    if values.is_complex():
        return _Shard(torch.view_as_real(values.resolve_conj()), (*offsets, 0), (*tensor.shape, 2), True)
    if values.dtype not in _CODES:
        raise RunError(f"{name}: dtype={values.dtype} cannot be saved")
    return _Shard(values, offsets, tensor.shape, False)


# -- reading


@dataclass(frozen=True)
class _StoredShard:
    """A shard as the header of its file describes it. `content`: the open file."""

    content: Any
    region: tuple[slice, ...]
    elements: int
    kind: tuple[str, tuple[int, ...], bool]
    """Data type, full shape and whether it is complex: equal for all shards of a tensor."""


def read(folder: Path, files: Iterable[str]) -> dict[str, Tensor]:
    """Reads the full tensors to the CPU, in one process. Raises any error as it is.

    `files`: names of regular files in the folder. They need not be trusted: before memory is allocated, safetensors
    checks that the tensors of a file cover its bytes, and `_merge` that the shards form one tensor.
    """
    from safetensors import safe_open

    shards: dict[str, list[_StoredShard]] = {}
    with ExitStack() as stack:
        for file in files:
            try:
                content = stack.enter_context(safe_open(folder / file, framework="pt"))
                positions = json.loads((content.metadata() or {}).get(_POSITIONS, "{}"))
                for name in content.keys():  # noqa: SIM118 (not a mapping)
                    shards.setdefault(name, []).append(_describe(content, name, positions))
            except Exception as error:  # the errors of safetensors do not name the file
                raise ValueError(f"{file}: {reason(error)}") from error
        return {name: _merge(name, parts) for name, parts in shards.items()}


def _describe(content: Any, name: str, positions: Any) -> _StoredShard:
    dtype, shape = content.get_slice(name).get_dtype(), content.get_slice(name).get_shape()
    position: Any = positions.get(name) if isinstance(positions, dict) else None
    if not isinstance(position, dict):
        position = {}
    offsets, full_shape = position.get("saved_offsets"), position.get("full_shape")
    if not _are_naturals(offsets, len(shape)) or not _are_naturals(full_shape, len(shape)):
        raise ValueError(f"the position of {name!r} is missing or invalid")
    if dtype not in _DTYPES:
        raise ValueError(f"{name!r} has the unsupported data type {dtype}")
    region = tuple(slice(offset, offset + size) for offset, size in zip(offsets, shape, strict=True))
    return _StoredShard(content, region, math.prod(shape), (dtype, tuple(full_shape), position.get("complex") is True))


def _are_naturals(values: Any, count: int) -> bool:
    is_list = isinstance(values, list) and len(values) == count
    return is_list and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _merge(name: str, shards: list[_StoredShard]) -> Tensor:
    """Returns the full tensor. Raises ValueError unless the shards cover every element exactly once."""
    [kind, *others] = {shard.kind for shard in shards}
    if others:
        raise ValueError(f"the shards of {name!r} differ in their data types or full shapes")
    dtype, size, is_complex = kind
    adds_up = math.prod(size) == sum(shard.elements for shard in shards)
    if adds_up:  # the number of elements is right: if none occurs twice, none is missing
        is_covered = torch.zeros(size, dtype=torch.bool)
        for shard in shards:
            is_covered[shard.region] = True
        adds_up = bool(is_covered.all())
        del is_covered
    if not adds_up:
        raise ValueError(f"the shards of {name!r} do not add up to the tensor")
    tensor = torch.empty(size, dtype=_DTYPES[dtype])
    for shard in shards:
        tensor[shard.region] = shard.content.get_tensor(name)
    return torch.view_as_complex(tensor) if is_complex else tensor
