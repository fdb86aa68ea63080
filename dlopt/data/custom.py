"""User-defined datasets."""

from typing import Any

from dlopt.data.images import size_pair
from dlopt.data.samples import Dataset, Samples, Wrapped
from dlopt.errors import UserError
from dlopt.ranges import Count


def custom(
    *, train: Any, val: Any, test: Any, classes: Count | list[str] | None, image_size: int | tuple[int, int] | None
) -> Dataset:
    """Wraps map-style `torch.utils.data.Dataset` objects; see `Wrapped` for the items they may return.

    Args:
        classes: number or names of the classes; None: inferred from the training labels. Floating-point labels mean
            regression and need None.

    Raises:
        UserError: an item is not a usable pair, or labels do not match the classes.
    """
    size = size_pair(image_size)
    if train is None:
        raise UserError("data.train=null: a dataset is required; set data.train._target_")
    datasets = {"train": train, "val": val, "test": test}
    splits = {key: Wrapped(data, size, f"data.{key}") for key, data in datasets.items() if data is not None}
    names = _class_names(splits["train"], classes)
    for key, split in splits.items():
        _check_labels(f"data.{key}", split, names)
    return Dataset(splits["train"], splits.get("val"), splits.get("test"), names)


def _class_names(train: Samples, classes: int | list[str] | None) -> tuple[str, ...] | None:
    if train.targets.is_floating_point():
        if classes is not None:
            raise UserError(f"data.classes={classes}: the labels are floating-point values; use data.classes=null")
        return None
    if isinstance(classes, list):
        return tuple(classes)
    if classes is None:
        classes = int(train.targets.max()) + 1
        labels = train.targets.unique().tolist()
        if labels != list(range(classes)):
            wrong = next(label for label in range(classes) if label not in labels) if labels[0] >= 0 else labels[0]
            raise UserError(
                f"data.train: labels must be 0 to {classes - 1} without a gap, "
                f"{'has' if wrong < 0 else 'lacks'} {wrong}; set data.classes=N to allow classes without samples"
            )
    return tuple(str(label) for label in range(classes))


def _check_labels(key: str, split: Samples, names: tuple[str, ...] | None) -> None:
    if split.targets.is_floating_point() != (names is None):
        raise UserError(f"{key}: labels must have the same type as data.train's (class numbers, or float values)")
    if names is not None:
        low, high = int(split.targets.min()), int(split.targets.max())
        if low < 0 or high >= len(names):
            raise UserError(
                f"{key}: has labels from {low} to {high}; with {len(names)} classes 0 to {len(names) - 1} are allowed"
            )
    elif not bool(split.targets.isfinite().all()):
        raise UserError(f"{key}: has labels that are not finite")
