"""Items of map-style datasets of the user."""

from typing import Any

from torch.utils.data import DataLoader

from dlopt.basics.errors import UserError


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


def read_item(dataset: Any, index: int, name: str, size: tuple[int, int] | None = None) -> Any:
    """Returns an item as the dataset has it; `size`: of images that it can decode at a size. Raises `UserError`."""
    try:
        return dataset.read_resized(index, size) if size and hasattr(dataset, "read_resized") else dataset[index]
    except UserError:
        raise
    except Exception as error:  # user code may raise anything; name the sample
        raise UserError(f"{name}[{index}]: {type(error).__name__}: {error}") from error
