"""What a source of samples can do, samples in memory, and the three splits of a dataset."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from threading import Lock
from typing import Any, Protocol, Self, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.basics.random import generator
from dlopt.basics.ranges import Count, Natural
from dlopt.data.images.decoding import Boxes, Stored
from dlopt.data.images.resampling import resize, resize_box
from dlopt.data.tables.columns import FeatureColumns
from dlopt.data.texts.tokenizer import Tokenizer
from dlopt.machine.memory import available_memory
from dlopt.tasks import kinds
from dlopt.tasks.layout import Layout
from dlopt.tasks.task import Task
from dlopt.tasks.text import NextToken

WHOLE = 1 << 30  # bytes; larger contents are hashed in part
_BLOCK = 1 << 20  # bytes, at least one sample
_BLOCKS = 128  # of a content that is hashed in part, evenly spaced
_THREADS = 8  # hide the latency of a network file system
_KINDS = {1: "vectors", 2: "sequences", 3: "images"}  # by the dimensions of an input


@dataclass(frozen=True)
class Content:
    """Inputs as they are stored: `count` of `size` bytes in total; `read(start, stop)` returns a range of them."""

    count: int
    size: int
    read: Callable[[int, int], bytes]

    @classmethod
    def of_array(cls, array: Any) -> "Content":
        """Returns the content of a tensor, or of what returns arrays for ranges."""
        return cls(len(array), array.nbytes, lambda start, stop: as_bytes(array[start:stop]))

    def digest(self) -> str:
        """Returns the SHA-256 of up to 1 GiB as a whole; of more, at 128 evenly spaced places of 1 MiB."""
        length = max(1, int(_BLOCK * self.count / max(self.size, 1)))
        starts: Sequence[int] = range(0, self.count, length)
        if self.size > WHOLE:
            starts = np.unique(np.linspace(0, max(self.count - length, 0), _BLOCKS, dtype=np.int64)).tolist()

        def block(start: int) -> bytes:
            return hashlib.sha256(self.read(start, min(start + length, self.count))).digest()

        with ThreadPoolExecutor(_THREADS) as pool:
            return hashlib.sha256(b"".join(pool.map(block, starts))).hexdigest()


def as_bytes(array: Tensor | np.ndarray) -> bytes:
    values = array.contiguous().numpy() if isinstance(array, Tensor) else array
    return values.tobytes()


def digest_of(data: bytes) -> bytes:
    """Returns 16 bytes that are equal for equal data."""
    return hashlib.blake2b(data, digest_size=16).digest()


class Samples:
    """Inputs and targets by index: the base of every kind of samples, and of those of a user's own.

    A kind has to implement `read`. What its inputs need beyond that has a default that is right for a store from which
    any inputs can be read, such as one large array; see each method.

    Args:
        targets: int64 [N] class indices; float32 [N, K], 0 or 1, of samples with several labels; or float32 [N] or
            [N, K] for regression.
        shape: of one input: (C, H, W) of images, (F,) of vectors, or (C, L) of sequences.
        further: other tensors [N, ...] of the samples, by name.

    Attributes:
        rows: places of the samples in the store, int64 [N]; None if they are all that it has, in its order.
        image_size: to which `fetch` resizes the images, and cuts off what is beyond; None for their own.
        digests: [N, ...], equal for equal inputs; None if they are not known. Equal samples of two splits are found by
            them.
        origin: what names the samples once they are in memory: has `place` and `select`; None if nothing does.
        dtype: of the inputs; None if reading them tells.
        rotated: images read so far whose EXIF orientation is not applied.
    """

    rows: Tensor | None = None
    image_size: tuple[int, int] | None = None
    digests: Tensor | None = None
    origin: Any = None
    dtype: torch.dtype | None = None
    rotated = 0
    is_loaded = False  # whether the inputs are in main memory
    uses_workers = True  # whether reading in several processes is faster
    is_encoded = True  # whether `fetch` works before `encode`

    def __init__(self, targets: Tensor, shape: tuple[int, ...], further: Mapping[str, Tensor] | None = None) -> None:
        targets = torch.as_tensor(targets)
        self.targets = targets if targets.is_floating_point() else targets.long()
        self.shape = tuple(shape)
        self.further: Mapping[str, Tensor] = {} if further is None else further

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, rows: Tensor) -> Tensor | np.ndarray:
        """Returns the inputs [B, ...] at int64 `rows` [B] of the store: uint8 0..255 for images, else float32."""
        raise NotImplementedError(f"{type(self).__name__}.read")

    # -- inputs

    def rows_of(self, indices: Tensor) -> Tensor:
        """Returns the places in the store of the samples at int64 `indices` [B]."""
        return indices if self.rows is None else self.rows[indices]

    def fetch(self, indices: Tensor) -> Tensor:
        """Returns inputs [B, *shape] for int64 `indices` [B]."""
        inputs = self._read(indices)
        if self.is_cut and self.image_size is not None:
            inputs = resize(inputs, self.image_size)
        if inputs.shape != (expected := (len(indices), *self.shape)):
            raise UserError(f"{type(self).__name__}.read: has returned {list(inputs.shape)}, not {list(expected)}")
        return inputs

    def fetch_range(self, start: int, stop: int) -> Tensor:
        """Returns inputs of consecutive samples."""
        return self.fetch(torch.arange(start, min(stop, len(self))))

    def whole(self, indices: Tensor) -> Sequence[Tensor]:
        """Returns images [C, H, W] at their own sizes."""
        return self._read(indices).unbind()

    def fetch_boxes(self, indices: Tensor, boxes: Boxes, size: tuple[int, int]) -> Tensor:
        """Returns a box of each image at `indices` [B], resized to [B, C, *size]."""
        images = self.whole(indices)
        heights, widths = (torch.tensor([image.shape[axis] for image in images]) for axis in (1, 2))
        edges = boxes(heights, widths).tolist()
        results = [resize_box(image, box, size) for image, box in zip(images, edges, strict=True)]
        return torch.stack(results) if results else self.fetch(indices).new_empty((0, self.shape[0], *size))

    def _read(self, indices: Tensor) -> Tensor:
        inputs = self.read(self.rows_of(indices))
        # A tensor has no negative strides, which a mirrored array has.
        return inputs if isinstance(inputs, Tensor) else torch.from_numpy(np.ascontiguousarray(inputs))

    @property
    def is_cut(self) -> bool:
        """Whether images have more than `fetch` returns of them. `fetch_boxes` returns any part."""
        return self.image_size is not None and len(self.shape) == 3

    # -- other samples

    def select(self, indices: Tensor) -> Self:
        """Returns the samples at `indices`, in that order."""
        selected = copy(self)
        selected.rows, selected.targets = self.rows_of(indices), self.targets.index_select(0, indices)
        selected.further = {name: each.index_select(0, indices) for name, each in self.further.items()}
        selected.digests = None if self.digests is None else self.digests.index_select(0, indices)
        selected.origin = None if self.origin is None else self.origin.select(indices)
        return selected

    def with_targets(self, targets: Tensor) -> Self:
        """Returns the same inputs with other targets."""
        changed = copy(self)
        changed.targets = targets
        return changed

    def resized(self, size: tuple[int, int]) -> "Samples":
        """Returns the same images at another size. Raises `UserError` if they are no images."""
        if len(self.shape) != 3:
            raise UserError(
                f"data.image_size={list(size)}: the samples are {self.kind}, not images; use data.image_size=null"
            )
        changed = copy(self)
        changed.image_size, changed.shape = size, (self.shape[0], *size)
        return changed

    def encode(
        self, dataset: "Dataset", val: "Samples | None", test: "Samples | None"
    ) -> "tuple[Dataset, Samples, Samples | None, Samples | None]":
        """Returns the dataset and its splits with features learned from these samples, the training set."""
        return dataset, self, val, test

    def encoded(self, columns: FeatureColumns | None) -> "Samples":
        """Returns the samples with the features of `columns`, those of a model. Raises `UserError`."""
        return self

    def loaded(self) -> "Samples | None":
        """Returns the samples in main memory; None if `fetch` has to read them."""
        return None

    def on(self, device: torch.device) -> Tensor:
        """Returns all inputs [N, *shape] on a device."""
        return self.fetch_range(0, len(self)).to(device)

    # -- facts

    @property
    def kind(self) -> str:
        """What the inputs are, for messages: images, vectors, sequences or text."""
        return _KINDS.get(len(self.shape), f"{len(self.shape)}-dimensional arrays")

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs in memory. Reads an image if their `dtype` is not known."""
        dtype = self.dtype
        if dtype is None and len(self.shape) == 3:
            with torch.random.fork_rng(devices=()):  # transforms of the user may draw numbers, on which the run depends
                dtype = self.fetch(torch.zeros(1, dtype=torch.int64)).dtype
        return len(self) * prod(self.shape) * (dtype or torch.float32).itemsize

    def size(self) -> dict[str, int]:
        """Returns how many samples there are, under the name of their unit."""
        return {"samples": len(self)}

    def content(self) -> Content | None:
        """Returns the inputs as they are stored, before they are resized; None if they change with every reading.

        Keeps the `digests` while the content is read, if it is read as a whole.
        """
        some = torch.from_numpy(np.unique(np.linspace(0, len(self) - 1, 16, dtype=np.int64)))
        if (once := as_bytes(self.fetch(some))) != as_bytes(self.fetch(some)):  # bytes: NaN equals itself
            return None
        width = len(once) // len(some)
        size = width * len(self)
        digests = torch.zeros(len(self), 2, dtype=torch.int64) if size <= WHOLE else None
        self.digests = digests

        alone = Lock()  # files and libraries may allow one reader at a time

        def read(start: int, stop: int) -> bytes:
            with alone:
                inputs = as_bytes(self.fetch_range(start, stop))
            if digests is not None:
                found = b"".join(digest_of(inputs[at : at + width]) for at in range(0, len(inputs), width))
                digests.numpy()[start:stop] = np.frombuffer(found, dtype=np.int64).reshape(-1, 2)
            return inputs

        return Content(len(self), size, read)

    def state(self) -> bytes | None:
        """Returns what changes when the stored inputs change, known without reading them; None if nothing is.

        The statistics of large sets are kept under it, for later runs.
        """
        return None

    def white(self) -> float:
        """Returns the value of a white pixel: 255; 1 for floating-point images whose values are not in 0..255.

        Tells the values of floating-point images by 16 of them: negative ones, or none above 1.
        """
        if len(self.shape) != 3:
            return 255.0
        return white_of(self.fetch(torch.linspace(0, len(self) - 1, min(16, len(self))).long()))

    def place(self, index: int) -> str:
        """Names the file or the row of a sample; "" if it has none."""
        return "" if self.origin is None else self.origin.place(index)

    def stored(self, index: int) -> Stored | None:
        """Returns how an image file is stored; None if it is no file, or missing. Raises `UserError`."""
        return None

    def predicted(self) -> np.ndarray:
        """Returns the tokens that a model of a text predicts: all but the first of each sample."""
        return self.fetch_range(0, len(self))[:, 1:].numpy().reshape(-1)


class InMemory(Samples):
    """Samples in one tensor [N, *shape]; `origin`: where they have been read."""

    is_loaded = True
    uses_workers = False

    def __init__(
        self, inputs: Tensor, targets: Tensor, origin: Any = None, further: Mapping[str, Tensor] | None = None
    ) -> None:
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} inputs but {len(targets)} targets")
        super().__init__(targets, tuple(inputs.shape[1:]), further)
        self.inputs = self.digests = inputs
        self.dtype = inputs.dtype
        self.origin = origin

    def read(self, rows: Tensor) -> Tensor:
        return self.inputs.index_select(0, rows)

    def fetch_range(self, start: int, stop: int) -> Tensor:
        return self.inputs[start:stop]

    def select(self, indices: Tensor) -> Self:
        selected = super().select(indices)
        assert selected.digests is not None
        selected.rows, selected.inputs = None, selected.digests
        return selected

    def resized(self, size: tuple[int, int]) -> Samples:
        """Resizes all images. Raises `UserError` if they do not fit in memory."""
        needed = super().resized(size).nbytes
        if needed > available_memory():
            raise UserError(
                f"data.image_size={list(size)}: {len(self):,} images of this size need {needed / 2**30:,.1f} GiB, "
                "more than the free memory; use a smaller data.image_size, or data.subset"
            )
        inputs = torch.cat([resize(chunk, size) for chunk in self.inputs.split(1024)])
        return InMemory(inputs, self.targets, self.origin, self.further)

    def loaded(self) -> Samples:
        return self

    def content(self) -> Content:
        return Content.of_array(self.inputs)


class Reader(Protocol):
    """Reads samples on request, in worker processes."""

    def fetch(self, requests: Tensor) -> Tensor:
        """Returns an input for each row of `requests`: an index, or what else the reader needs."""
        ...


def white_of(images: Tensor) -> float:
    """Returns the `Samples.white` of a set that contains these images."""
    if images.dtype == torch.uint8 or not images.numel():
        return 255.0
    return 255.0 if images.min() >= 0 and images.max() > 1 else 1.0


@dataclass
class Dataset:
    """The three `SPLITS` of a dataset; `classes` has the names of the labels, None if they are numbers.

    `in_memory`: keep the samples on the training device as one tensor (decided by `prepare`).
    `source`: what was read, as the user counts it (40 images of 2 classes); empty for built-in data.
    `notes`: lines to show the user, on what was left out and what looks wrong; see `dlopt.data.checks`.
    `facts`: describe the data, for environment.json.
    `is_generated`: the config defines the data.
    `identity`: see `dlopt.data.identity`; None if not computed.
    `tokenizer`: of a text that is not read byte by byte.
    `unlabelled`: the task of data without labels, or the task that a model sets; None for the task of the labels.
    `layout`: of samples of several tensors, which only a task of the user's own reads; None for (input, label).
    `columns`: of the table whose rows are the samples, if they are features.
    """

    train: Samples
    val: Samples | None
    test: Samples | None
    classes: tuple[str, ...] | None
    in_memory: bool = False
    notes: tuple[str, ...] = ()
    unlabelled: Task | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    is_generated: bool = False
    identity: Mapping[str, Any] | None = None
    source: str = ""
    layout: Layout | None = None
    columns: FeatureColumns | None = None

    @property
    def task(self) -> Task:
        """What a model learns from the data."""
        if self.unlabelled is not None:
            return replace(self.unlabelled, white=self._white)
        return kinds.of_labels(None if self.classes is None else len(self.classes), self.train.targets, self._white)

    @property
    def has_several_labels(self) -> bool:
        """Whether a sample may have several of the classes, or none: its target is float32 [K], 0 or 1."""
        return self.classes is not None and self.train.targets.is_floating_point()

    def task_on(self, samples: Samples) -> Task:
        """Returns the task with the bytes per token of `samples`, a split: the texts of splits differ."""
        task = self.task
        if self.tokenizer is None or not isinstance(task, NextToken):
            return task
        return replace(task, bytes_per_token=self.tokenizer.bytes_per_token(samples.predicted()))

    @cached_property
    def _white(self) -> float:
        return self.train.white()


class SplitKeys(TypedDict):
    """Config keys of every generated dataset: the sizes of its splits (0 omits a split), and the seed."""

    train_size: Count
    val_size: Natural
    test_size: Natural
    seed: int


def generated(
    draw: "Callable[[int, torch.Generator], InMemory]",
    classes: tuple[str, ...] | None = None,
    **keys: Unpack[SplitKeys],
) -> Dataset:
    """Builds a dataset of splits drawn by `draw(size, generator)`. The size of one does not change the others."""
    train, val, test = (generator("cpu", keys["seed"], split) for split in range(3))
    return Dataset(
        draw(keys["train_size"], train),
        draw(keys["val_size"], val) if keys["val_size"] else None,
        draw(keys["test_size"], test) if keys["test_size"] else None,
        classes,
        is_generated=True,
    )


@dataclass(frozen=True)
class Lines:
    """Places of samples in a file: the `numbers` [N] of its lines or rows (`unit`)."""

    numbers: Tensor
    unit: str

    def place(self, index: int) -> str:
        return f"{self.unit} {self.numbers[index]}"

    def select(self, indices: Tensor) -> "Lines":
        return Lines(self.numbers[indices], self.unit)
