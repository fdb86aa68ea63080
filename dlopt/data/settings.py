"""The keys that every data set has. Imports no torch: the roles of keys are looked up without it."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from dlopt.ranges import Count, Fraction, Natural, PositiveFraction, Seed
from dlopt.roles import Role

BatchSize = Annotated[int, Interval(ge=1, le=1 << 24)]  # larger values are almost certainly typos
ImageSize = Annotated[int, Interval(ge=1, le=1 << 14)]  # pixels


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Schema of `conf/data/_common.yaml`, which has the defaults and documents each key."""

    batch_size: Annotated[BatchSize | Literal["full"], Role.IDENTITY]
    val_split: Annotated[Fraction, Role.IDENTITY]
    subset: Annotated[Count | PositiveFraction | None, Role.IDENTITY]
    split_seed: Annotated[Seed, Role.SEED]
    label_noise: Annotated[Fraction, Role.IDENTITY]
    image_size: Annotated[ImageSize | tuple[ImageSize, ImageSize] | None, Role.IDENTITY]
    memory: Annotated[Literal["auto"] | bool, Role.PLACE]
    workers: Annotated[Natural | Literal["auto"], Role.PLACE]
    statistics_samples: Annotated[Count | None, Role.IDENTITY]
    drop_last: Annotated[bool, Role.IDENTITY]
