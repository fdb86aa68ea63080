"""The keys that every data set has. Imports no torch: the roles of keys are looked up without it."""

from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Literal

from annotated_types import Interval

from dlopt.basics.ranges import Count, Fraction, Natural, PositiveFraction, Seed
from dlopt.basics.roles import Role

SPLITS = ("train", "val", "test")

BatchSize = Annotated[int, Interval(ge=1, le=1 << 24)]  # larger values are almost certainly typos
ImageSize = Annotated[int, Interval(ge=1, le=1 << 14)]  # pixels


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
    group: Annotated[str | None, Role.IDENTITY] = None
    order: Annotated[str | None, Role.IDENTITY] = None
    label_noise: Annotated[Fraction, Role.IDENTITY] = 0.0
    standardize_target: Annotated[bool, Role.IDENTITY] = False
    image_size: Annotated[ImageSize | tuple[ImageSize, ImageSize] | None, Role.IDENTITY] = None
    memory: Annotated[bool | Literal["auto"], Role.PLACE]
    workers: Annotated[Natural | Literal["auto"], Role.PLACE]
    statistics_samples: Annotated[Count | None, Role.IDENTITY] = 5000
    drop_last: Annotated[bool, Role.IDENTITY]


REQUIRED = [each.name for each in fields(DataSettings) if each.default is MISSING]
