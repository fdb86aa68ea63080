"""Items of map-style datasets of the user."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from dlopt.basics.errors import UserError
from dlopt.data.samples import Content, Samples


class Items(Samples):
    """A map-style `torch.utils.data.Dataset`, read one item at a time. Raises `UserError` if it is none, or empty."""

    def __init__(self, dataset: Any, key: str) -> None:
        self.dataset = dataset
        self._name = name_of(dataset, key)

    def place(self, index: int) -> str:
        return f"item {int(self.rows_of(torch.tensor(index)))}"

    def content(self) -> Content | None:
        """Reads 16 evenly spaced items, twice: they may be augmented at random."""
        some = torch.from_numpy(np.unique(np.linspace(0, len(self) - 1, 16, dtype=np.int64)))
        items = self.fetch(some)
        return Content.of_array(items) if torch.equal(items, self.fetch(some)) else None


def name_of(dataset: Any, key: str) -> str:
    """Returns the name of the dataset at `key` of the config, for messages. Raises `UserError` if it has no items."""
    name = f"{key} ({type(dataset).__module__}.{type(dataset).__qualname__})"
    if any(isinstance(each, DataLoader) for each in (dataset if isinstance(dataset, list | tuple) else [dataset])):
        raise UserError(f"{name}: takes no DataLoader; give its .dataset: data.batch_size and sampler draw the batches")
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise UserError(f"{name}: has no __getitem__ and __len__; expected a map-style torch Dataset")
    if len(dataset) == 0:
        raise UserError(f"{name}: is empty")
    return name


def read_item(dataset: Any, index: int, name: str) -> Any:
    """Returns an item as the dataset has it. Raises `UserError`."""
    try:
        return dataset[index]
    except UserError:
        raise
    except Exception as error:  # user code may raise anything; name the sample
        raise UserError(f"{name}[{index}]: {type(error).__name__}: {error}") from error
