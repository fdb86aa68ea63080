"""Sources of samples: memory, image files, or a user-defined `torch.utils.data.Dataset`.

A `Samples` object returns batches by index and holds all targets, whether it indexes a tensor or decodes files.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, Self, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.basics.random import generator
from dlopt.basics.ranges import Count, Natural
from dlopt.data.checks import column_warnings, rounding_warnings, sampled
from dlopt.data.images.decoding import Boxes, Size, decode, decode_boxes, from_pil, header_size, orientation
from dlopt.data.images.resampling import resize, resize_box
from dlopt.data.rows.items import name_of, read_item
from dlopt.data.tables.columns import FeatureColumns
from dlopt.data.texts.tokenizer import Tokenizer
from dlopt.data.texts.windows import Windows
from dlopt.tasks import kinds
from dlopt.tasks.layout import Layout
from dlopt.tasks.task import Task
from dlopt.tasks.text import NextToken

_HEADERS_CHECKED = 256  # images whose size is checked in advance; the others are checked when decoded
_LABELS_CHECKED = 64  # items whose labels are compared with the dataset's attribute


class Samples(Protocol):
    """Inputs and targets by index.

    `targets`: int64 [N] class indices; float32 [N, K], 0 or 1, of samples with several labels; or float32 [N] or [N, K]
    for regression.
    `shape`: of one input, (C, H, W) for images or (F,) for vectors.
    """

    @property
    def targets(self) -> Tensor: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def fetch(self, indices: Tensor) -> Tensor:
        """Returns inputs [B, *shape] for int64 `indices` [B]: uint8 0..255 for images, else float32."""
        ...

    def select(self, indices: Tensor) -> "Samples":
        """Returns the samples at `indices`, in that order."""
        ...


class Reader(Protocol):
    """Reads samples on request, in worker processes."""

    def fetch(self, requests: Tensor) -> Tensor:
        """Returns an input for each row of `requests`: an index, or what else the reader needs."""
        ...


def whole_images(samples: Samples) -> "Files | Wrapped | None":
    """Returns the samples if `image_size` makes `fetch` cut off a part of the images; otherwise None.

    `fetch` then returns the centre of the images at one size, `fetch_boxes` any box of them.
    """
    if isinstance(samples, Files | Wrapped) and samples.image_size is not None and len(samples.shape) == 3:
        return samples
    return None


def at_size(samples: "Files | Wrapped", size: tuple[int, int]) -> "Files | Wrapped":
    """Returns the same images, of which `fetch` returns the centre at another size."""
    resized = copy(samples)
    resized.image_size, resized.shape = size, (samples.shape[0], *size)
    return resized


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
        if self.tokenizer is None or not isinstance(samples, Windows) or not isinstance(task, NextToken):
            return task
        return replace(task, bytes_per_token=self.tokenizer.bytes_per_token(samples))

    @cached_property
    def _white(self) -> float:
        return white(self.train)


def white(samples: Samples) -> float:
    """Returns the value of a white pixel: 255; 1 for floating-point images whose values are not in 0..255.

    Tells the values of floating-point images by 16 of them: negative ones, or none above 1.
    """
    if len(samples.shape) != 3 or isinstance(samples, Files):
        return 255.0
    return white_of(samples.fetch(torch.linspace(0, len(samples) - 1, min(16, len(samples))).long()))


def white_of(images: Tensor) -> float:
    """Returns `white` for a set that contains these images."""
    return 255.0 if images.dtype == torch.uint8 or (images.min() >= 0 and images.max() > 1) else 1.0


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


class InMemory:
    """Samples in one tensor [N, *shape]; `origin`: where they have been read."""

    def __init__(self, inputs: Tensor, targets: Tensor, origin: "ImageList | Lines | None" = None) -> None:
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} inputs but {len(targets)} targets")
        self.inputs = inputs
        self.targets = targets
        self.origin = origin

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.inputs.shape[1:])

    def __len__(self) -> int:
        return len(self.targets)

    def fetch(self, indices: Tensor) -> Tensor:
        return self.inputs.index_select(0, indices)

    def select(self, indices: Tensor) -> "InMemory":
        origin = None if self.origin is None else self.origin.select(indices)
        return InMemory(self.inputs.index_select(0, indices), self.targets.index_select(0, indices), origin)

    def place(self, index: int) -> str:
        """Names the file or the row of a sample; "" if it has none."""
        return "" if self.origin is None else self.origin.place(index)


@dataclass
class ImageList:
    """Paths of image files with their targets.

    `paths` [N] is one array of bytes: changing reference counts would copy a list of a million strings into every
    worker, page by page. Paths may be relative to `folder`, which keeps the array small.
    """

    paths: np.ndarray
    targets: Tensor
    folder: str = ""

    def __len__(self) -> int:
        return len(self.targets)

    def path(self, index: int) -> str:
        return os.path.join(self.folder, os.fsdecode(bytes(self.paths[index])))

    def place(self, index: int) -> str:
        return self.path(index)

    def select(self, indices: Tensor) -> Self:
        selected = copy(self)
        selected.paths, selected.targets = self.paths[indices.numpy()], self.targets.index_select(0, indices)
        return selected


class Files(ImageList):
    """Image files, decoded when fetched.

    `image_size` None: no resizing; all images must have the size of the first.
    `channels`: 1 (grey) or 3 (RGB).
    `paths`: absolute, or relative to `folder`.
    `digests`: int64 [N, 2], of the content of each file; None if not computed (see `dlopt.data.identity`).
    """

    digests: Tensor | None = None

    def __init__(
        self,
        paths: "Sequence[str] | np.ndarray",
        targets: Tensor,
        image_size: tuple[int, int] | None,
        channels: int,
        folder: str = "",
    ) -> None:
        array = paths if isinstance(paths, np.ndarray) else np.array([os.fsencode(path) for path in paths])
        super().__init__(array, targets, folder)
        self.image_size = image_size
        self.channels = channels
        self.shape: tuple[int, ...] = (channels, *(self._native_size() if image_size is None else image_size))

    def fetch(self, indices: Tensor) -> Tensor:
        result = torch.empty((len(indices), *self.shape), dtype=torch.uint8)
        for row, index in zip(result, indices.tolist(), strict=True):
            path = self.path(index)
            with _naming_the_key():
                image = decode(path, self.image_size, self.channels)
            if image.shape != row.shape:
                raise self._mismatch(path, (image.shape[1], image.shape[2]))
            row.copy_(image)
        return result

    def select(self, indices: Tensor) -> Self:
        selected = super().select(indices)
        selected.digests = None if self.digests is None else self.digests[indices]
        return selected

    def fetch_boxes(self, indices: Tensor, boxes: Boxes, size: tuple[int, int]) -> Tensor:
        """Returns a box of each image at `indices` [B], resized to [B, C, *size]."""
        result = torch.empty((len(indices), self.channels, *size), dtype=torch.uint8)
        with _naming_the_key():
            images = decode_boxes([self.path(index) for index in indices.tolist()], boxes, size, self.channels)
            for row, image in zip(result, images, strict=True):
                row.copy_(image)
        return result

    def _native_size(self) -> tuple[int, int]:
        with _naming_the_key():
            self.shape = (self.channels, *header_size(self.path(0)))
        for index in np.unique(np.linspace(0, len(self) - 1, _HEADERS_CHECKED, dtype=np.int64)).tolist():
            path = self.path(index)
            with _naming_the_key():
                size = header_size(path)
            if size != self.shape[1:]:
                raise self._mismatch(path, size)
        return self.shape[1], self.shape[2]

    def _mismatch(self, path: str, size: tuple[int, int]) -> UserError:
        (height, width), (_, expected_height, expected_width) = size, self.shape
        return UserError(
            f"data.image_size=null: the images have different sizes ({path} is {height}x{width}, others are "
            f"{expected_height}x{expected_width}, height x width); give one, for example data.image_size=224"
        )


@contextmanager
def _naming_the_key() -> Iterator[None]:
    """Adds the key that skips unreadable images to a `UserError` about one."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; to skip unreadable images, set data.on_error=skip") from error


_CHANNELS = (1, 3, 4)  # of grey images, colour images, and colour images with transparency


def channels_first(image: np.ndarray, where: str) -> np.ndarray:
    """Returns an image [H, W, C] or [C, H, W] as [C, H, W]; C is the dimension of 1, 3 or 4 numbers.

    Raises `UserError`, which starts with `where`, if both or none of them may be the channels.
    """
    is_first, is_last = (image.shape[axis] in _CHANNELS for axis in (0, 2))
    if is_first == is_last:
        shape = "x".join(map(str, image.shape))
        raise UserError(
            f"{where}: the uint8 array {shape} may be [height, width, channels] or [channels, height, width]: "
            f"{'both' if is_first else 'neither'} the first and the last dimension {'are' if is_first else 'is'} 1, 3 "
            "or 4; return a torch tensor [channels, height, width], or store encoded images (PNG)"
        )
    return image if is_first else image.transpose(2, 0, 1)


class Wrapped:
    """Wraps a map-style `torch.utils.data.Dataset` whose items are pairs (input, label).

    Inputs: a PIL image, a uint8 array [H, W], [H, W, C] or [C, H, W] (see `channels_first`), or a
    tensor [F], [H, W] or [C, H, W]; uint8 inputs are
    images 0..255, all others become float32. Labels: an integer class, or floating-point values (regression).
    Labels are read from the attribute `targets` or `labels` if it matches an item of each class (at most 64 items);
    otherwise every item is read once.

    `indices`: of the samples in the dataset, int64 [N]. `digests`: as in `Files`.

    Raises:
        UserError: not a map-style dataset, empty, or an item has another form.
    """

    digests: Tensor | None = None

    def __init__(self, dataset: Any, image_size: tuple[int, int] | None, key: str) -> None:
        self.dataset = dataset
        self.image_size = image_size
        self._name = name_of(dataset, key)
        self.indices = torch.arange(len(dataset))
        self.target_warnings: tuple[str, ...] = ()
        self.rotated = 0  # images of PIL that were read, whose EXIF orientation the dataset has not applied
        first, label = self._item(0)
        self.shape, self._dtype = tuple(first.shape), first.dtype
        self.targets = self._targets(label)

    def __len__(self) -> int:
        return len(self.indices)

    def fetch(self, indices: Tensor) -> Tensor:
        inputs = [self._item(index)[0] for index in self.indices[indices].tolist()]
        for index, item in zip(indices.tolist(), inputs, strict=True):
            if tuple(item.shape) != self.shape:
                raise UserError(
                    f"{self._name}[{index}]: has shape {tuple(item.shape)}, the first item has {self.shape}; "
                    "all inputs must have one shape (data.image_size resizes images)"
                )
            if item.dtype != self._dtype:
                raise UserError(
                    f"{self._name}[{index}]: has the type {item.dtype}, the first item {self._dtype}; images 0..255 "
                    "(uint8) and numbers must not be mixed"
                )
        return torch.stack(inputs) if inputs else self._item(0)[0].new_empty((0, *self.shape))

    def fetch_boxes(self, indices: Tensor, boxes: Boxes, size: tuple[int, int]) -> Tensor:
        """See `Files.fetch_boxes`."""
        images = [self._item(index, resized=False)[0] for index in self.indices[indices].tolist()]
        heights, widths = (torch.tensor([image.shape[axis] for image in images]) for axis in (1, 2))
        edges = boxes(heights, widths).tolist()
        results = [resize_box(image, box, size) for image, box in zip(images, edges, strict=True)]
        return torch.stack(results) if results else self.fetch(indices).new_empty((0, self.shape[0], *size))

    def select(self, indices: Tensor) -> "Wrapped":
        selected = copy(self)
        selected.indices = self.indices[indices]
        selected.targets = self.targets[indices]
        selected.digests = None if self.digests is None else self.digests[indices]
        return selected

    def place(self, index: int) -> str:
        """Names the row of a table, or an item of a dataset of the user."""
        return str(getattr(self.dataset, "row_place", "item {}".format)(int(self.indices[index])))

    def warnings(self) -> tuple[str, ...]:
        """Returns what looks wrong in vectors: features that count the items, or that float32 rounds. Reads a few."""
        if len(self.shape) != 1 or len(self) == 0:
            return self.target_warnings
        values = [_as_tensor(self._pair(index)[0]) for index in sampled(len(self)).tolist()]
        if any(tuple(value.shape) != self.shape for value in values):  # reported where a batch is read
            return self.target_warnings
        columns = ((str(i + 1), column) for i, column in enumerate(torch.stack(values).double().numpy().T))
        return (*column_warnings(columns, "leave it out", "feature"), *self.target_warnings)

    def _item(self, index: int, *, resized: bool = True) -> tuple[Tensor, Any]:
        # Image files in tables and archives are decoded at their size, as those in folders.
        item = self._pair(index, self.image_size if resized else None)
        value = self._input(item[0], index)
        if resized and self.image_size is not None and value.dim() == 3:
            value = resize(value, self.image_size)
        return value.contiguous(), item[1]

    def _pair(self, index: int, size: Size = None) -> Sequence[Any]:
        """Returns an item, see `read_item`. Raises `UserError`."""
        item = read_item(self.dataset, index, self._name, size)
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise UserError(f"{self._name}[{index}]: is {described(item)}; expected a pair (input, label)")
        return item

    def _input(self, value: Any, index: int) -> Tensor:
        if hasattr(value, "tobytes") and hasattr(value, "mode"):  # a PIL image; avoids importing PIL
            self.rotated += orientation(value) > 1
            try:
                value = from_pil(value)
            except ValueError as error:
                raise UserError(f"{self._name}[{index}]: {error}") from None
        elif isinstance(value, np.ndarray):
            if value.dtype == np.uint8 and value.ndim == 3:
                value = channels_first(value, f"{self._name}[{index}]")
            value = _as_tensor(value)
        if not isinstance(value, Tensor) or not 1 <= value.dim() <= 3 or value.is_complex():
            raise UserError(
                f"{self._name}[{index}]: the input is {described(value)}; expected a PIL image, an array, or a tensor "
                "[F], [H, W] or [C, H, W]"
            )
        value = value.detach().cpu()
        if value.dim() == 2:
            value = value.unsqueeze(0)
        if value.dtype != torch.uint8 or value.dim() == 1:
            value = value.to(torch.float32)
        return value

    def _targets(self, first: Any) -> Tensor:
        for attribute in ("targets", "labels"):
            values = getattr(self.dataset, attribute, None)
            if isinstance(values, list | tuple | np.ndarray | Tensor) and len(values) == len(self):
                targets = self._as_targets(list(values) if isinstance(values, tuple) else values)
                # One item of each class: a `target_transform` changes the labels of the items only.
                indices = np.unique(targets.numpy(), return_index=True, axis=0)[1]
                indices = indices[np.linspace(0, len(indices) - 1, min(len(indices), _LABELS_CHECKED), dtype=np.int64)]
                labels = self._as_targets([first, *(self._item(index)[1] for index in indices.tolist())])
                if targets.dtype == labels.dtype and torch.equal(targets[[0, *indices.tolist()]], labels):
                    return targets
        return self._as_targets([self._item(index)[1] for index in range(len(self))])

    def _as_targets(self, values: Any) -> Tensor:
        try:
            if isinstance(values, list) and isinstance(values[0], Tensor | np.ndarray):
                values = torch.stack([torch.as_tensor(value) for value in values])
            targets = torch.as_tensor(values).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{self._name}: labels must be class numbers or float values ({error})") from error
        if targets.is_floating_point():
            columns = targets.double().reshape(len(targets), -1).numpy().T
            self.target_warnings = rounding_warnings(("the label", each) for each in columns) or self.target_warnings
            return targets.to(torch.float32)
        if targets.dim() == 2 and targets.shape[1] == 1:
            targets = targets.squeeze(1)
        if targets.dim() != 1 or targets.is_complex():
            raise UserError(
                f"{self._name}: class labels must be one integer per sample, got {described(targets[0])}; several "
                "labels per sample must be float zeros and ones, with data.classes"
            )
        return targets.to(torch.int64)


def _as_tensor(value: Tensor | np.ndarray) -> Tensor:
    tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
    return tensor.detach().cpu()


def described(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"a {type(value).__name__} of shape {tuple(value.shape)} and type {value.dtype}"
    return f"of type {type(value).__name__}"
