"""Image files as samples."""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch import Tensor

from dlopt.basics.cache import file_state
from dlopt.basics.errors import UserError
from dlopt.data.checks import sampled
from dlopt.data.images.decoding import Boxes, Stored, decode, decode_boxes, describe, header_size
from dlopt.data.samples import WHOLE, Content, Samples, digest_of

_HEADERS_CHECKED = 256  # images whose size is checked in advance; the others are checked when decoded
_MOST_FILES = 1 << 17  # more are neither measured nor read as a whole
_PLACE = 1 << 20  # bytes that are hashed at each place of a large content


@dataclass
class ImageList:
    """Paths of image files with their targets, and further tensors [N, ...] by name.

    `paths` [N] is one array of bytes: changing reference counts would copy a list of a million strings into every
    worker, page by page. Paths may be relative to `folder`, which keeps the array small.
    """

    paths: np.ndarray
    targets: Tensor
    folder: str = ""
    further: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, paths: Iterable[str], targets: Tensor, further: Mapping[str, Tensor] | None = None) -> Self:
        return cls(np.array([os.fsencode(path) for path in paths]), targets, further=further or {})

    def __len__(self) -> int:
        return len(self.targets)

    def path(self, index: int) -> str:
        return os.path.join(self.folder, os.fsdecode(bytes(self.paths[index])))

    place = path

    def select(self, indices: Tensor) -> Self:
        selected = copy(self)
        selected.paths, selected.targets = self.paths[indices.numpy()], self.targets.index_select(0, indices)
        selected.further = {name: each.index_select(0, indices) for name, each in self.further.items()}
        return selected


class Files(Samples):
    """Image files, decoded when fetched.

    `image_size` None: no resizing; all images must have the size of the first.
    `channels`: 1 (grey) or 3 (RGB).
    """

    dtype = torch.uint8

    def __init__(self, images: ImageList, image_size: tuple[int, int] | None, channels: int) -> None:
        self.origin: ImageList = images
        self.image_size = image_size
        self.channels = channels
        size = self._native_size() if image_size is None else image_size
        super().__init__(images.targets, (channels, *size), images.further)

    def path(self, index: int) -> str:
        return self.origin.path(index)

    def read(self, rows: Tensor) -> Tensor:
        result = torch.empty((len(rows), *self.shape), dtype=torch.uint8)
        for row, index in zip(result, rows.tolist(), strict=True):
            path = self.path(index)
            with _naming_the_key():
                image = decode(path, self.image_size, self.channels)
            if image.shape != row.shape:
                raise _mismatch(path, tuple(image.shape[1:]), self.shape[1:])
            row.copy_(image)
        return result

    def fetch_boxes(self, indices: Tensor, boxes: Boxes, size: tuple[int, int]) -> Tensor:
        result = torch.empty((len(indices), self.channels, *size), dtype=torch.uint8)
        with _naming_the_key():
            images = decode_boxes([self.path(index) for index in indices.tolist()], boxes, size, self.channels)
            for row, image in zip(result, images, strict=True):
                row.copy_(image)
        return result

    def select(self, indices: Tensor) -> Self:
        selected = super().select(indices)
        selected.rows = None
        return selected

    def white(self) -> float:
        return 255.0

    def stored(self, index: int) -> Stored:
        return describe(path := self.path(index), path)

    def content(self) -> Content:
        """Reads the files; more than 131,072 are neither measured nor read as a whole."""
        count, self.digests = len(self), None
        # Measuring more could take minutes on a network file system: of these, 8 files are read at each place.
        size = sum(map(_size, map(self.path, range(count)))) if count <= _MOST_FILES else count * _PLACE // 8
        if size <= WHOLE and count <= _MOST_FILES:
            self.digests = torch.zeros(count, 2, dtype=torch.int64)
        return Content(count, size, lambda start, stop: b"".join(self._contents(start, stop)))

    def _contents(self, start: int, stop: int) -> Iterator[bytes]:
        for index in range(start, stop):
            data = _read(self.path(index))
            if self.digests is not None:
                self.digests.numpy()[index] = np.frombuffer(digest_of(data), dtype=np.int64)
            yield len(data).to_bytes(8, "little")
            yield data

    def state(self) -> bytes:
        """Hashes the paths, sizes and times of the files, and the format to which they are decoded."""
        digest = hashlib.sha256(repr((self.image_size, self.channels)).encode())
        for index in range(len(self)):
            path = self.path(index)
            try:
                state = repr(file_state(path))
            except OSError:
                state = "-"  # decoding the file will report the error
            digest.update(os.fsencode(os.path.abspath(path)) + b"\0" + state.encode() + b"\0")
        return digest.digest()

    def _native_size(self) -> tuple[int, int]:
        with _naming_the_key():
            first = header_size(self.path(0))
        for path in map(self.path, sampled(len(self.origin), _HEADERS_CHECKED).tolist()):
            with _naming_the_key():
                size = header_size(path)
            if size != first:
                raise _mismatch(path, size, first)
        return first


def _mismatch(path: str, size: tuple[int, ...], expected: tuple[int, ...]) -> UserError:
    found, others = ("x".join(map(str, each)) for each in (size, expected))
    return UserError(
        f"data.image_size=null: the images have different sizes ({path} is {found}, others are {others}, height x "
        "width); give one, for example data.image_size=224"
    )


@contextmanager
def _naming_the_key() -> Iterator[None]:
    """Adds the key that skips unreadable images to a `UserError` about one."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; to skip unreadable images, set data.on_error=skip") from error


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
