"""The keys that every data set has. Imports no torch: the roles of keys are looked up without it."""

from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Literal

from annotated_types import Interval

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Count, Fraction, Natural, PositiveFraction, Seed
from dlopt.basics.roles import Role

SPLITS = ("train", "val", "test")

BatchSize = Annotated[int, Interval(ge=1, le=1 << 24)]  # larger values are almost certainly typos
ImageSize = Annotated[int, Interval(ge=1, le=1 << 14)]  # pixels
Folds = Annotated[int, Interval(ge=2, le=1 << 24)]


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Schema of `conf/data/_common.yaml` and the files that it includes, which have the defaults and document each key.

    Keys with a default here mean nothing for some data sets, whose files do not have them.
    """

    batch_size: Annotated[BatchSize | Literal["full"], Role.IDENTITY]
    val_split: Annotated[Fraction, Role.IDENTITY] = 0.1
    test_split: Annotated[Fraction, Role.IDENTITY] = 0.0
    subset: Annotated[Count | PositiveFraction | None, Role.IDENTITY]
    split_seed: Annotated[Seed, Role.SEED]
    folds: Annotated[Folds | None, Role.IDENTITY] = None
    fold: Annotated[Natural | None, Role.SEED] = None
    group: Annotated[str | None, Role.IDENTITY] = None
    order: Annotated[str | None, Role.IDENTITY] = None
    weight: Annotated[str | None, Role.IDENTITY] = None
    label_noise: Annotated[Fraction, Role.IDENTITY] = 0.0
    standardize_target: Annotated[bool, Role.IDENTITY] = False
    image_size: Annotated[ImageSize | tuple[ImageSize, ImageSize] | None, Role.IDENTITY] = None
    memory: Annotated[bool | Literal["auto"], Role.PLACE]
    workers: Annotated[Natural | Literal["auto"], Role.PLACE]
    statistics_samples: Annotated[Count | None, Role.IDENTITY] = 5000
    drop_last: Annotated[bool, Role.IDENTITY]

    def __post_init__(self) -> None:
        refuse_folds(self.folds, self.fold, self.order)


def refuse_folds(folds: int | None, fold: int | None, order: str | None) -> None:
    """Raises `UserError` for folds that do not fit each other, or an order."""
    if folds is None and fold is not None:
        raise UserError(f"data.fold={fold}: is a part of data.folds, which is null; use for example data.folds=5")
    if folds is None:
        return
    if fold is None or fold >= folds:
        value = "null" if fold is None else fold
        raise UserError(f"data.fold={value}: data.folds={folds} needs one of 0 to {folds - 1}, or several with -m")
    if order is not None:
        later = "would train on what comes after the validation set"
        raise UserError(f"data.folds={folds}: data.order={order} {later}; use one of them")


REQUIRED = [each.name for each in fields(DataSettings) if each.default is MISSING]
