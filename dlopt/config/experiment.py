"""The checked experiment: one component per config group, the keys that a group's choices share, the run's settings.

`conf/train.yaml` holds the default of each setting and explains it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from dlopt.config.schema import Component
from dlopt.data.splits import DataSettings
from dlopt.parameters import Grouping
from dlopt.ranges import Count, Natural, OpenFraction, Positive, Seed
from dlopt.schedules import Warmup

Toggle = bool | Literal["auto"]
ExtraMetric = Literal["top5_accuracy", "macro_f1", "calibration_error", "class_accuracy", "r2", "mae"]


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    every_epochs: Count
    test: bool
    metrics: list[ExtraMetric]
    tta: Literal["none", "flip", "shift_flip", "ten_crop", "multi_scale_ten_crop"]
    average: Literal["probabilities", "logits"]


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    every_epochs: Count | None
    every_steps: Count | None
    keep: Count
    at_restarts: bool
    asynchronous: bool
    sharded: Toggle


@dataclass(frozen=True, kw_only=True)
class RecoverySettings:
    attempts: Count
    lr_factor: OpenFraction


@dataclass(frozen=True, kw_only=True)
class Published:
    """A paper's test error in %, for runs whose config has the values of `when` (by dotted key)."""

    error: Positive
    when: dict[str, bool | int | float | str | list[int] | None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    name: str
    seed: Seed
    init_seed: Seed
    order_seed: Seed
    augmentation_seed: Seed
    dry_run: bool
    resume: Literal["auto"] | str | None
    init_from: str | None
    allow_packages: list[str]
    epochs: Count
    steps: Count | None
    max_time: Positive | None
    schedule_epochs: Positive | None
    device: Literal["auto", "cpu", "cuda", "mps"]
    precision: Literal["fp32", "tf32", "bf16", "fp16", "fp64", "auto"]
    compile: Toggle
    cuda_graphs: Toggle
    channels_last: Toggle
    threads: Count | Literal["auto"]
    deterministic: bool
    accumulate: Count
    scale_lr: Literal["none", "linear", "sqrt"]
    scale_lr_reference: Count
    decay_norm_and_bias: bool
    ema: OpenFraction | None
    ema_warmup: bool = False  # in configs that were saved before this key existed
    check: Literal["auto", "step"]
    on_divergence: Literal["stop", "skip", "rollback"]
    recovery: RecoverySettings
    on_out_of_memory: Literal["stop", "halve"]
    norm_statistics: Literal["running", "exact"]
    monitor: str
    evaluate: EvaluateSettings
    checkpoint: CheckpointSettings
    tracking: list[Literal["tensorboard", "mlflow", "wandb"]]
    diagnostics: list[Literal["gradients", "activations", "curvature"]]
    diagnostics_every: Count
    profile: bool
    profile_steps: tuple[Natural, Count]
    log_every_steps: Count | None
    published: list[Published]


@dataclass(frozen=True)
class Group:
    """What all choices of a config group share.

    `runtime`: arguments known only at run time. `common`: dataclass of keys that every choice has; a callable whose
    signature names such a key receives its value.
    """

    runtime: tuple[str, ...] = ()
    common: type | None = None

    @property
    def common_names(self) -> tuple[str, ...]:
        return () if self.common is None else tuple(each.name for each in fields(self.common))


GROUPS: Mapping[str, Group] = {
    "data": Group((), DataSettings),
    "normalize": Group(("input_shape",)),
    "sampler": Group(("targets", "samples", "batch_size", "seed")),
    "augmentation": Group(("input_shape", "classes", "train")),
    "model": Group(("input_shape", "classes", "vocabulary")),
    "init": Group(("model", "generator", "inputs", "growth")),
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
    config: Mapping[str, Any] = field(repr=False)  # as saved: resolved, except for values from environment variables
    auto_lr: bool = False  # optimizer.lr=auto: a learning-rate range test runs first
