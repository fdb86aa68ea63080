"""The keys that every dataset has: how it is split, brought to one size, and cut into batches."""

from dataclasses import dataclass
from typing import Literal

from dlopt.ranges import Count, Natural, PositiveShare, Seed, Share


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Checked against `conf/data/_common.yaml`, where the defaults and the meaning of each key stand."""

    batch_size: Count | Literal["full"]
    val_split: Share
    subset: Count | PositiveShare | None
    split_seed: Seed
    image_size: Count | tuple[Count, Count] | None
    memory: Literal["auto"] | bool
    workers: Natural | Literal["auto"]
    statistics_samples: Count | None
    drop_last: bool
