"""The checked experiment: every group's component, the keys that a group's choices share, and the run's settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dlopt.config.schema import Component
from dlopt.config.settings import Settings
from dlopt.data.splits import DataSettings
from dlopt.parameters import Grouping
from dlopt.schedules import Warmup


@dataclass(frozen=True)
class Group:
    """What the choices of one group have in common: arguments known only at run time, and keys that each of them has.

    A callable that names a common key in its signature is handed its value.
    """

    runtime: tuple[str, ...] = ()
    common: type | None = None


GROUPS: Mapping[str, Group] = {
    "data": Group((), DataSettings),
    "normalize": Group(("input_shape",)),
    "sampler": Group(("targets", "samples", "batch_size", "seed")),
    "augmentation": Group(("input_shape", "classes", "train")),
    "model": Group(("input_shape", "classes")),
    "init": Group(("model", "generator", "inputs")),
    "loss": Group(("classes",)),
    "optimizer": Group(("params",), Grouping),
    "schedule": Group(("horizon",), Warmup),
    "clip": Group(("model",)),
    "stopping": Group(("model", "norm")),
    "parallel": Group(("device", "accumulate", "batch_size", "precision", "threads")),
}


@dataclass(frozen=True)
class Experiment:
    settings: Settings
    data: Component
    data_settings: DataSettings
    normalize: Component
    sampler: Component
    augmentation: Component
    model: Component
    init: Component
    loss: Component
    optimizer: Component
    grouping: Grouping
    schedule: Component
    warmup: Warmup
    clip: Component
    stopping: Component
    parallel: Component
    config: Mapping[str, Any] = field(repr=False)  # as it is saved: resolved, but for what the environment gave
    auto_lr: bool = False  # optimizer.lr=auto: the learning rate is still to be found
