"""Datasets of the user's own."""

from typing import Any

from dlopt.data.images import size_pair
from dlopt.data.samples import Dataset, Samples, Wrapped
from dlopt.errors import UserError
from dlopt.ranges import Count


def custom(
    *,
    train: Any,
    val: Any,
    test: Any,
    classes: Count | list[str] | None,
    image_size: int | tuple[int, int] | None,
) -> Dataset:
    """Map-style `torch.utils.data.Dataset` objects, see `Wrapped` for what their items may be.

    Args:
        classes: their number or names; None: as many as the training labels show. Floating-point labels mean
            regression and have none.

    Raises:
        UserError: an item is not a usable pair, or labels and classes do not agree.
    """
    size = size_pair(image_size)
    if train is None:
        raise UserError("data.train=null: a dataset is needed, given by its _target_")
    parts = {"train": Wrapped(train, size, "data.train")}
    parts |= {
        name: Wrapped(part, size, f"data.{name}") for name, part in (("val", val), ("test", test)) if part is not None
    }
    names = _class_names(parts["train"], classes)
    for name, part in parts.items():
        _check_labels(f"data.{name}", part, names)
    return Dataset(parts["train"], parts.get("val"), parts.get("test"), names)


def _class_names(train: Samples, classes: int | list[str] | None) -> tuple[str, ...] | None:
    if train.targets.is_floating_point():
        if classes is not None:
            raise UserError(f"data.classes={classes}: the labels are floating-point values; use data.classes=null")
        return None
    if isinstance(classes, list):
        return tuple(classes)
    if classes is None:
        classes = int(train.targets.max()) + 1
        seen = train.targets.unique().tolist()
        if seen != list(range(classes)):
            missing = next(label for label in range(classes) if label not in seen) if seen[0] >= 0 else seen[0]
            raise UserError(
                f"data.train: labels must be 0 to {classes - 1} without a gap, "
                f"{'has' if missing < 0 else 'lacks'} {missing}; data.classes=N allows classes without samples"
            )
    return tuple(str(label) for label in range(classes))


def _check_labels(key: str, part: Samples, names: tuple[str, ...] | None) -> None:
    if part.targets.is_floating_point() != (names is None):
        raise UserError(f"{key}: its labels are not of the kind of data.train's (class numbers, or float values)")
    if names is not None:
        low, high = int(part.targets.min()), int(part.targets.max())
        if low < 0 or high >= len(names):
            raise UserError(
                f"{key}: has labels from {low} to {high}; with {len(names)} classes 0 to {len(names) - 1} are allowed"
            )
    elif not bool(part.targets.isfinite().all()):
        raise UserError(f"{key}: has labels that are not finite")
