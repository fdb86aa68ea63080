"""Map-style datasets of pairs (input, label)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.data.checks import column_warnings, rounding_warnings, sampled
from dlopt.data.images.decoding import Size, orientation
from dlopt.data.images.resampling import resize
from dlopt.data.rows.items import Items
from dlopt.data.samples import Samples

_LABELS_CHECKED = 64  # items whose labels are compared with the dataset's attribute
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


class Wrapped(Items):
    """Wraps a map-style `torch.utils.data.Dataset` whose items are pairs (input, label).

    Inputs: a PIL image, a uint8 array [H, W], [H, W, C] or [C, H, W] (see `channels_first`), or a
    tensor [F], [H, W] or [C, H, W]; uint8 inputs are
    images 0..255, all others become float32. With `sequences` arrays or tensors [C, L], which become float32.
    Labels: an integer class, or floating-point values (regression).
    Labels are read from the attribute `targets` or `labels` if it matches an item of each class (at most 64 items);
    otherwise every item is read once.

    Raises:
        UserError: not a map-style dataset, empty, or an item has another form.
    """

    target_warnings: tuple[str, ...] = ()
    _has_sequences = False

    def __init__(self, dataset: Any, image_size: tuple[int, int] | None, key: str, *, sequences: bool = False) -> None:
        super().__init__(dataset, key)
        self.image_size = image_size
        self._has_sequences = sequences
        first, label = self._item(0)
        self.dtype = first.dtype
        Samples.__init__(self, self._targets(label), tuple(first.shape))

    def read(self, rows: Tensor) -> Tensor:
        inputs = [self._item(row)[0] for row in rows.tolist()]
        for row, item in zip(rows.tolist(), inputs, strict=True):
            if tuple(item.shape) != self.shape:
                raise UserError(
                    f"{self._name}[{row}]: has shape {tuple(item.shape)}, the first item has {self.shape}; "
                    "all inputs must have one shape (data.image_size resizes images)"
                )
            if item.dtype != self.dtype:
                raise UserError(
                    f"{self._name}[{row}]: has the type {item.dtype}, the first item {self.dtype}; images 0..255 "
                    "(uint8) and numbers must not be mixed"
                )
        return torch.stack(inputs) if inputs else torch.empty((0, *self.shape), dtype=self.dtype)

    def whole(self, indices: Tensor) -> list[Tensor]:
        return [self._item(row, resized=False)[0] for row in self.rows_of(indices).tolist()]

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
        """Returns an item; `size`: of images that are decoded here. Raises `UserError`."""
        item = self.item(index)
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise UserError(f"{self._name}[{index}]: is {described(item)}; expected a pair (input, label)")
        return item

    def _input(self, value: Any, index: int) -> Tensor:
        if (pixels := self.pixels(value, f"[{index}]")) is not None:
            self.rotated += orientation(value) > 1
            value = pixels
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
        if self._has_sequences:
            if value.dim() != 2:
                shape = tuple(value.shape)
                raise UserError(f"data.sequences=true: {self._name}[{index}] has the shape {shape}, not [C, L]")
            return value.to(torch.float32)
        if value.dim() == 2:
            value = value.unsqueeze(0)
        if value.dtype != torch.uint8 or value.dim() == 1:
            value = value.to(torch.float32)
        return value

    def _targets(self, first: Any) -> Tensor:
        for attribute in ("targets", "labels"):
            values = getattr(self.dataset, attribute, None)
            if isinstance(values, list | tuple | np.ndarray | Tensor) and len(values) == len(self.dataset):
                targets = self._as_targets(list(values) if isinstance(values, tuple) else values)
                # One item of each class: a `target_transform` changes the labels of the items only.
                indices = np.unique(targets.numpy(), return_index=True, axis=0)[1]
                indices = indices[np.linspace(0, len(indices) - 1, min(len(indices), _LABELS_CHECKED), dtype=np.int64)]
                labels = self._as_targets([first, *(self._item(index)[1] for index in indices.tolist())])
                if targets.dtype == labels.dtype and torch.equal(targets[[0, *indices.tolist()]], labels):
                    return targets
        return self._as_targets([self._item(index)[1] for index in range(len(self.dataset))])

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
