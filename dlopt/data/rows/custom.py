"""User-defined datasets."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Count
from dlopt.data.checks import label_warnings, listed
from dlopt.data.images.decoding import size_pair
from dlopt.data.rows.items import without_loaders
from dlopt.data.rows.records import Records, are_records
from dlopt.data.rows.rows import class_counts
from dlopt.data.rows.wrapped import Wrapped
from dlopt.data.samples import Dataset, Samples


def custom(
    *,
    train: Any,
    val: Any,
    test: Any,
    classes: Count | list[str] | None,
    image_size: int | tuple[int, int] | None,
    sequences: bool = False,  # runs from before this key have none
) -> Dataset:
    """Wraps map-style `torch.utils.data.Dataset` objects; see `Wrapped` for the items they may return, or `Records`.

    Args:
        classes: number or names of the classes; None to infer them from the training labels. Floating-point labels mean
            regression and need None; or, with K classes, several labels per sample: float [K], 0 or 1.
        sequences: inputs [C, L] are sequences with C channels, not images [H, W].

    Raises:
        UserError: an item is not a usable pair, or labels do not match the classes.
    """
    size = size_pair(image_size)
    if train is None:
        raise UserError("data.train=null: a dataset is required; set data.train._target_")
    datasets, lost = without_loaders(train, val, test)
    if are_records(datasets["train"]):
        if sequences:
            raise UserError("data.sequences=true: the items are no pairs (input, label); a task reads them as they are")
        return _of_records(datasets, lost)
    if sequences and size is not None:
        raise UserError(f"data.image_size={list(size)}: data.sequences=true has no images; use data.image_size=null")
    splits = {key: Wrapped(data, size, f"data.{key}", sequences=sequences) for key, data in datasets.items()}
    names = _class_names(splits["train"], classes)
    numbers = {key: _class_numbers(f"data.{key}", data) for key, data in datasets.items()}
    if (own := numbers["train"]) is not None and isinstance(classes, list):
        _refuse_other_order(classes, own)
    for key, split in splits.items():
        _renumber(f"data.{key}", split, numbers[key], own)
    for key, split in splits.items():
        _check_labels(f"data.{key}", split, splits["train"], names)
    warnings = (*lost, *splits["train"].warnings())
    if names is not None:
        counts = class_counts(torch.cat([split.targets for split in splits.values()]), len(names))
        # Integers are classes by definition.
        found = dict(zip(names, counts.tolist(), strict=True))
        warnings += label_warnings("the label", found, may_be_values=False)
    source = f"{sum(map(len, splits.values())):,} items"
    return Dataset(splits["train"], splits.get("val"), splits.get("test"), names, notes=warnings, source=source)


def _of_records(datasets: Mapping[str, Any], lost: tuple[str, ...]) -> Dataset:
    splits = {key: Records(data, f"data.{key}") for key, data in datasets.items()}
    train = splits["train"]
    for key, split in splits.items():
        if split.layout != train.layout:
            raise UserError(f"data.{key}: its items have {split.layout}; those of data.train have {train.layout}")
    source = f"{sum(map(len, splits.values())):,} items"
    return Dataset(train, splits.get("val"), splits.get("test"), None, notes=lost, source=source, layout=train.layout)


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


def _class_numbers(key: str, dataset: Any) -> Mapping[str, int] | None:
    """Returns the numbers of the classes by name, as datasets of torchvision have them; None for others.

    Looks into a `Subset` and a `ConcatDataset`. Raises `UserError` if the parts of one have different numbers.
    """
    if isinstance(parts := getattr(dataset, "datasets", None), list | tuple):
        found = [_class_numbers(key, part) for part in parts]
        for each in found[1:]:
            if each != found[0] and each is not None and found[0] is not None:
                raise UserError(
                    f"{key}: its parts number the classes differently: {_shown(found[0])}, and {_shown(each)}"
                )
        return found[0] if found else None
    numbers = getattr(dataset, "class_to_idx", None)
    if isinstance(numbers, Mapping) and getattr(dataset, "target_transform", None) is None:
        return numbers if all(isinstance(number, int) for number in numbers.values()) else None
    part = getattr(dataset, "dataset", None) if numbers is None else None
    return None if part is None else _class_numbers(key, part)


def _shown(numbers: Mapping[str, int]) -> str:
    return listed([f"{name}={number}" for name, number in numbers.items()])


def _refuse_other_order(classes: list[str], numbers: Mapping[str, int]) -> None:
    """Raises `UserError` if config and dataset have the same names in different orders."""
    names = sorted(numbers, key=lambda name: numbers[name])
    if {*classes} == {*names} and classes != names:
        raise UserError(f"data.classes={classes}: data.train has the classes in another order: {names}")


def _renumber(key: str, split: Wrapped, numbers: Mapping[str, int] | None, train: Mapping[str, int] | None) -> None:
    """Gives the classes of a split the numbers of the classes of the same name in the training set.

    Without a folder of a class, all classes after it have other numbers. Raises `UserError` for names that train lacks.
    """
    if numbers is None or train is None or numbers == train or split.targets.is_floating_point():
        return
    names = {number: name for name, number in numbers.items()}
    present = [(label, names[label]) for label in split.targets.unique().tolist() if label in names]
    if unknown := [name for _, name in present if name not in train]:
        raise UserError(f"{key}: has classes that data.train lacks: {', '.join(unknown)}")
    targets = split.targets.clone()
    for label, name in present:
        targets[split.targets == label] = train[name]
    split.targets = targets


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
