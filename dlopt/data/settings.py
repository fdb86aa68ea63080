"""The keys that every dataset has: how it is split, brought to one size, and cut into batches."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from dlopt.ranges import Count, Natural, PositiveShare, Seed, Share

BatchSize = Annotated[int, Interval(ge=1, le=1 << 24)]  # more is a slip of the pen


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Checked against `conf/data/_common.yaml`, where the defaults and the meaning of each key stand."""

    batch_size: BatchSize | Literal["full"]
    val_split: Share
    subset: Count | PositiveShare | None
    split_seed: Seed
    image_size: Count | tuple[Count, Count] | None
    memory: Literal["auto"] | bool
    workers: Natural | Literal["auto"]
    statistics_samples: Count | None
    drop_last: bool
