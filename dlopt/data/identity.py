"""Identifies data by their content: what a checkpoint stores, and what a resumed run compares.

Names and places of files do not count: a moved folder with equal content is the same data.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlopt.data.rows.records import Records
from dlopt.data.rows.rows import RowDataset
from dlopt.data.samples import Dataset, Files, InMemory, Samples, Wrapped
from dlopt.data.settings import SPLITS
from dlopt.data.tables.table import TableRows
from dlopt.data.texts.windows import Shards, Windows

_WHOLE = 1 << 30  # bytes; larger contents are hashed in part
_MOST_FILES = 1 << 17  # more are neither measured nor read as a whole
_BLOCK = 1 << 20  # bytes, at least one sample
_BLOCKS = 128  # of a content that is hashed in part, evenly spaced
_ITEMS = 16  # of a dataset of the user, evenly spaced
_THREADS = 8  # hide the latency of a network file system
_NAMES = {"train": "training", "val": "validation", "test": "test"}
_TEXTS = {
    "targets": "the {name} set has other labels, or the same ones in another order",
    "content": "the {name} set has other inputs, or the same ones in another order",
}

Identity = Mapping[str, Any]
"""For each split `samples` or `tokens` (its size), `targets` and `content` (SHA-256)."""


def identify(dataset: Dataset, contents: Sequence[str] = SPLITS) -> Identity:
    """Identifies a dataset as read, before a subset or a validation set is taken from it.

    Keeps the digests of files and rows that are read as a whole, for `dlopt.data.equal_samples`.

    Hashes contents of up to 1 GiB (and 131,072 files) as a whole, larger ones at 128 evenly spaced places of 1 MiB. Of
    a dataset of the user: 16 evenly spaced items, if they are the same when they are read twice. Generated data have no
    hashes, because their config defines them; rounding may differ between processors.

    `contents`: the splits whose inputs are hashed.
    """
    splits = {name: getattr(dataset, name) for name in SPLITS}
    return {
        name: _identify(samples, has_hashes=not dataset.is_generated, has_content=name in contents)
        for name, samples in splits.items()
        if samples is not None
    }


def difference(saved: Identity | None, current: Identity | None) -> str | None:
    """Describes the first difference between two identities; None if there is none, or one of them is unknown."""
    if saved is None or current is None:
        return None
    named = [key for key in saved if key not in SPLITS and key in current]  # validation sets with a name
    for split in (*SPLITS, *named):
        old, new, name = saved.get(split), current.get(split), _NAMES.get(split, split)
        if old is None and new is None:
            continue
        if old is None or new is None:
            return f"they have {'a' if old is None else 'no'} {name} set"
        for size in ("samples", "tokens"):
            if old.get(size) != new.get(size):
                return f"the {name} set has {new.get(size, 0):,} {size}, not {old.get(size, 0):,}"
        for key, text in _TEXTS.items():
            if key in old and key in new and old[key] != new[key]:
                return text.format(name=name)
    return None


def _identify(samples: Samples, *, has_hashes: bool, has_content: bool) -> dict[str, Any]:
    if isinstance(samples, Windows):  # whose number depends on their length
        found: dict[str, Any] = {"tokens": len(samples.tokens)}
    else:
        found = {"samples": len(samples)}
        if has_hashes:
            found["targets"] = _hash(_bytes(samples.targets))
    if has_hashes and has_content and (content := _content(samples)) is not None:
        found["content"] = content.digest()
    return found


@dataclass(frozen=True)
class _Content:
    """`count` inputs of `size` bytes in total; `read(start, stop)` returns a range of them."""

    count: int
    size: int
    read: Callable[[int, int], bytes]

    def digest(self) -> str:
        length = max(1, int(_BLOCK * self.count / max(self.size, 1)))
        starts: Sequence[int] = range(0, self.count, length)
        if self.size > _WHOLE:
            starts = np.unique(np.linspace(0, max(self.count - length, 0), _BLOCKS, dtype=np.int64)).tolist()

        def block(start: int) -> bytes:
            return hashlib.sha256(self.read(start, min(start + length, self.count))).digest()

        with ThreadPoolExecutor(_THREADS) as pool:
            return _hash(b"".join(pool.map(block, starts)))


def _content(samples: Samples) -> _Content | None:
    """Returns the inputs as they are stored, before any of them is resized; None if they change with every reading."""
    match samples:
        case InMemory():
            return _of_array(samples.inputs)
        case Windows():
            return _of_array(samples.tokens)
        case Files():
            return _of_files(samples)
        case TableRows():
            return _Content(len(samples), samples.size, samples.read)
        case Wrapped() if isinstance(samples.dataset, RowDataset):
            table = samples.dataset.table
            rows = table.rows() if table.size <= _WHOLE else None
            if rows is not None:
                digests = np.frombuffer(b"".join(map(_digest, rows)), dtype=np.int64).reshape(-1, 2)
                samples.digests = torch.from_numpy(digests.copy())[samples.indices]  # writable, as torch expects
                if len(samples) < len(table):  # data.test_split
                    return _of_array(samples.digests)
            return _Content(len(table), table.size, table.read)
        case Wrapped() | Records():
            return _of_items(samples)
    return None


def _of_array(array: Tensor | np.ndarray | Shards) -> _Content:
    return _Content(len(array), array.nbytes, lambda start, stop: _bytes(array[start:stop]))


def _of_files(images: Files) -> _Content:
    count, images.digests = len(images), None
    # Measuring more could take minutes on a network file system: of these, 8 files are read at each place.
    size = sum(map(_size, map(images.path, range(count)))) if count <= _MOST_FILES else count * _BLOCK // 8
    if size <= _WHOLE and count <= _MOST_FILES:
        images.digests = torch.zeros(count, 2, dtype=torch.int64)
    return _Content(count, size, lambda start, stop: b"".join(_files(images, start, stop)))


def _files(images: Files, start: int, stop: int) -> Iterator[bytes]:
    for index in range(start, stop):
        data = _read(images.path(index))
        if images.digests is not None:
            images.digests.numpy()[index] = np.frombuffer(_digest(data), dtype=np.int64)
        yield len(data).to_bytes(8, "little")
        yield data


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _read(path: str) -> bytes:
    """Reads a regular file, without the file objects that cost more than reading a small image; b"" for all others."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # does not wait for a FIFO
    except OSError:  # reported where the image is decoded
        return b""
    try:
        status = os.fstat(descriptor)
        return os.read(descriptor, status.st_size) if stat.S_ISREG(status.st_mode) else b""
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _of_items(samples: Wrapped | Records) -> _Content | None:
    indices = torch.from_numpy(np.unique(np.linspace(0, len(samples) - 1, _ITEMS, dtype=np.int64)))
    items = samples.fetch(indices)
    if not torch.equal(items, samples.fetch(indices)):
        return None  # they are augmented at random
    return _of_array(items)


def _bytes(array: Tensor | np.ndarray) -> bytes:
    values = array.contiguous().numpy() if isinstance(array, Tensor) else array
    return values.tobytes()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
