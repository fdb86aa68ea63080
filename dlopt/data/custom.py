"""User-defined datasets."""

from typing import Any

import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Count
from dlopt.data.checks import label_warnings
from dlopt.data.images import size_pair
from dlopt.data.samples import Dataset, Samples, Wrapped


def custom(
    *, train: Any, val: Any, test: Any, classes: Count | list[str] | None, image_size: int | tuple[int, int] | None
) -> Dataset:
    """Wraps map-style `torch.utils.data.Dataset` objects; see `Wrapped` for the items they may return.

    Args:
        classes: number or names of the classes; None: inferred from the training labels. Floating-point labels mean
            regression and need None; or, with K classes, several labels per sample: float [K], 0 or 1.

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
        _check_labels(f"data.{key}", split, splits["train"], names)
    warnings = splits["train"].warnings()
    if names is not None:
        targets = torch.cat([split.targets for split in splits.values()])
        counts = targets.sum(0).long() if targets.ndim == 2 else torch.bincount(targets, minlength=len(names))
        # Integers are classes by definition.
        found = dict(zip(names, counts.tolist(), strict=True))
        warnings += label_warnings("the label", found, may_be_values=False)
    source = f"{sum(map(len, splits.values())):,} items"
    return Dataset(splits["train"], splits.get("val"), splits.get("test"), names, notes=warnings, source=source)


def _class_names(train: Samples, classes: int | list[str] | None) -> tuple[str, ...] | None:
    if train.targets.is_floating_point():
        if classes is None:
            return None
        names = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(classes)
        if not _are_flags(train.targets, len(names)):
            raise UserError(
                f"data.classes={classes}: the labels are floating-point values, but not {len(names)} zeros and ones "
                "per sample; use data.classes=null for regression"
            )
        return names
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


def _are_flags(targets: Tensor, count: int) -> bool:
    """Returns whether targets are [N, count] zeros and ones."""
    return targets.ndim == 2 and targets.shape[1] == count and bool(((targets == 0) | (targets == 1)).all())


def _check_labels(key: str, split: Samples, train: Samples, names: tuple[str, ...] | None) -> None:
    if split.targets.is_floating_point() != train.targets.is_floating_point():
        raise UserError(f"{key}: labels must have the same type as data.train's (class numbers, or float values)")
    if names is not None and split.targets.is_floating_point():
        if not _are_flags(split.targets, len(names)):
            raise UserError(f"{key}: labels must be {len(names)} zeros and ones per sample, as those of data.train")
    elif names is not None:
        low, high = int(split.targets.min()), int(split.targets.max())
        if low < 0 or high >= len(names):
            raise UserError(
                f"{key}: has labels from {low} to {high}; with {len(names)} classes 0 to {len(names) - 1} are allowed"
            )
    elif not bool(split.targets.isfinite().all()):
        raise UserError(f"{key}: has labels that are not finite")
