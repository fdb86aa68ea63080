"""Items of map-style datasets of the user."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from dlopt.basics.errors import UserError
from dlopt.data.checks import sampled
from dlopt.data.images.decoding import from_pil
from dlopt.data.samples import Content, Samples


class Items(Samples):
    """A map-style `torch.utils.data.Dataset`, read one item at a time. Raises `UserError` if it is none, or empty."""

    def __init__(self, dataset: Any, key: str) -> None:
        self.dataset = dataset
        self._name = f"{key} ({type(dataset).__module__}.{type(dataset).__qualname__})"  # for messages
        if isinstance(dataset, str):
            raise UserError(
                f"{key}={dataset}: names no dataset; a file has {key.rpartition('.')[2]}: {{_target_: {dataset}}}"
            )
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise UserError(f"{self._name}: has no __getitem__ and __len__; expected a map-style torch Dataset")
        if len(dataset) == 0:
            raise UserError(f"{self._name}: is empty")

    def item(self, index: int) -> Any:
        """Returns an item as the dataset has it. Raises `UserError`."""
        try:
            return self.dataset[index]
        except UserError:
            raise
        except Exception as error:  # user code may raise anything; name the sample
            raise UserError(f"{self._name}[{index}]: {type(error).__name__}: {error}") from error

    def pixels(self, image: Any, place: str) -> Tensor | None:
        """Returns the pixels of an image of PIL, uint8 [C, H, W]; None for another value. Raises `UserError`."""
        if not (hasattr(image, "tobytes") and hasattr(image, "mode")):  # avoids importing PIL
            return None
        try:
            return from_pil(image)
        except ValueError as error:
            raise UserError(f"{self._name}{place}: {error}") from None

    def place(self, index: int) -> str:
        return f"item {int(self.rows_of(torch.tensor(index)))}"

    def content(self) -> Content | None:
        """Reads 16 evenly spaced items, twice: they may be augmented at random."""
        some = torch.from_numpy(sampled(len(self), 16))
        items = self.fetch(some)
        return Content.of_array(items) if torch.equal(items, self.fetch(some)) else None


def without_loaders(train: Any, val: Any, test: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the datasets of a training, validation and test set, and what is lost of a DataLoader, a line for each.

    `train` may be a pair of DataLoaders, of training and validation. Raises `UserError` if there is another one.
    """
    if isinstance(train, list | tuple) and train and all(isinstance(each, DataLoader) for each in train):
        if len(train) > 2 or (len(train) == 2 and val is not None):
            raise UserError(
                f"data.train: is {len(train)} DataLoaders; must be one, or (with data.val=null) train and val"
            )
        train, val = (*train, val)[:2]
    splits = {"train": train, "val": val, "test": test}
    loaders = {key: each for key, each in splits.items() if isinstance(each, DataLoader)}
    datasets = {key: each.dataset if key in loaders else each for key, each in splits.items() if each is not None}
    return datasets, tuple(_lost(f"data.{key}", loader) for key, loader in loaders.items())


def _lost(key: str, loader: DataLoader[Any]) -> str:
    """Says that only the dataset of a DataLoader is used, and what draws the batches in its place."""
    drawn = "" if loader.batch_size is None else f"batch_size={loader.batch_size}, "
    collate, function = "", loader.collate_fn
    if function is not default_collate:
        name = getattr(function, "__qualname__", type(function).__qualname__)
        collate = f", collate_fn {name}, which is not called"
    return (
        f"{key}: of the DataLoader only its dataset is used; data.batch_size, sampler and data.workers replace its "
        f"{drawn}{type(loader.sampler).__name__}, num_workers={loader.num_workers}{collate}"
    )
