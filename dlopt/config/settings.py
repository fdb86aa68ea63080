"""The keys that belong to the run and not to one component. `conf/train.yaml` holds their values and explains them."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from dlopt.ranges import Count, Natural, Positive, Seed

Decay = Annotated[float, Interval(gt=0, lt=1)]
Toggle = bool | Literal["auto"]


Figure = Literal["top5_accuracy", "macro_f1", "calibration_error", "class_accuracy", "r2", "mae"]


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    every_epochs: Count
    figures: list[Figure]
    tta: Literal["none", "flip", "shift_flip", "ten_crop", "multi_scale_ten_crop"]
    average: Literal["probabilities", "logits"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    every_epochs: Count | None
    every_steps: Count | None
    keep: Count
    at_restarts: bool
    asynchronous: bool
    sharded: Toggle


@dataclass(frozen=True, kw_only=True)
class Recovery:
    attempts: Count
    lr_factor: Decay


@dataclass(frozen=True, kw_only=True)
class Published:
    """A figure of a paper: the test error in %, for runs whose config has the values of `when` (dotted keys)."""

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
    resume: str | None
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
    ema: Decay | None
    check: Literal["auto", "step"]
    on_divergence: Literal["stop", "skip", "rollback"]
    recovery: Recovery
    on_out_of_memory: Literal["stop", "halve"]
    norm_statistics: Literal["running", "exact"]
    monitor: str
    evaluate: Evaluate
    checkpoint: Checkpoint
    tracking: list[Literal["tensorboard", "mlflow", "wandb"]]
    diagnostics: list[Literal["gradients", "activations", "curvature"]]
    diagnostics_every: Count
    profile: bool
    profile_steps: tuple[Natural, Count]
    log_every_steps: Count | None
    published: list[Published]
