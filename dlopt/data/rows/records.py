"""Datasets of the user whose items are dicts or tuples of tensors, for tasks of the user's own."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.data.rows.items import Items
from dlopt.data.samples import Samples
from dlopt.tasks.layout import Layout


class Records(Items):
    """A map-style `torch.utils.data.Dataset` of records: its samples are their bytes, and there are no labels.

    Args:
        dataset: its items are dicts or tuples of tensors, arrays, images of PIL and numbers. All have the same entries,
            of the same types and shapes.
        key: of the config, for messages.

    Raises:
        UserError: an item has another form.
    """

    def __init__(self, dataset: Any, key: str) -> None:
        super().__init__(dataset, key)
        item = self.item(0)
        self.layout = Layout.of(self._tensors(item, 0), "dict" if isinstance(item, Mapping) else "tuple")
        Samples.__init__(self, torch.zeros(len(dataset)), (self.layout.bytes,))

    @property
    def nbytes(self) -> int:
        return len(self) * self.layout.bytes

    def read(self, rows: Tensor) -> Tensor:
        found = [self._row(row) for row in rows.tolist()]
        return torch.stack(found) if found else torch.empty((0, *self.shape), dtype=torch.uint8)

    def _row(self, index: int) -> Tensor:
        values = self._tensors(self.item(index), index)
        found = Layout.of(values, self.layout.kind)
        if {*found.entries} != {*self.layout.entries}:
            raise UserError(
                f"{self._name}[{index}]: has {found}; the first item has {self.layout}; all must have the same "
                "entries, types and shapes"
            )
        return self.layout.pack(values)

    def _tensors(self, item: Any, index: int) -> dict[str, Tensor]:
        if not isinstance(item, Mapping | tuple):
            raise UserError(f"{self._name}[{index}]: is of type {type(item).__name__}; expected a dict or a tuple")
        if not item:
            raise UserError(f"{self._name}[{index}]: is empty")
        named: Mapping[Any, Any] = item if isinstance(item, Mapping) else dict(enumerate(item))
        return {str(name): self._tensor(name, value, index) for name, value in named.items()}

    def _tensor(self, name: Any, value: Any, index: int) -> Tensor:
        if (pixels := self.pixels(value, f"[{index}]: {name}")) is not None:
            return pixels
        try:
            if isinstance(value, float):
                return torch.tensor(value, dtype=torch.float64)
            tensor = torch.as_tensor(np.array(value) if isinstance(value, np.ndarray) else value)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(
                f"{self._name}[{index}]: {name} is of type {type(value).__name__}; must be a tensor, an array, a PIL "
                "image or a number"
            ) from None
        return tensor.detach().cpu()


def are_records(dataset: Any) -> bool:
    """Returns whether the items of a map-style dataset are records: dicts or tuples, but no pairs (input, label)."""
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")) or len(dataset) == 0:
        return False
    try:
        with torch.random.fork_rng(devices=()):  # a transform may draw numbers, on which the run depends
            item = dataset[0]
    except Exception:  # reported by whoever reads it
        return False
    is_pair = isinstance(item, Sequence) and len(item) == 2 and not isinstance(item[0], Mapping | tuple | list)
    return isinstance(item, Mapping | tuple) and not is_pair
