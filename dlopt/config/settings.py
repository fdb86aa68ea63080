"""The keys of a run that belong to no group, with their types and roles. `conf/train.yaml` explains each.

Imports no torch: the roles of keys are looked up without it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_type_hints

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Condition, Count, Duration, Natural, OpenFraction, Positive, Seed
from dlopt.basics.roles import Role
from dlopt.metrics.declaration import Direction
from dlopt.metrics.declared import REQUESTABLE
from dlopt.tracking.sinks import Sink

GROUPS: Mapping[str, tuple[str, ...]] = {
    "data": ("saved_tokenizer", "saved_columns"),
    "normalize": ("input_shape",),
    "sampler": ("targets", "samples", "batch_size", "seed"),
    "augmentation": ("input_shape", "classes", "train"),
    "model": ("input_shape", "classes", "vocabulary"),
    "init": ("model", "generator", "inputs", "growth"),
    "adapt": ("model", "generator"),
    "loss": ("classes", "class_counts", "labels", "label_fractions"),
    "optimizer": ("params",),
    "schedule": ("horizon", "monitor_mode"),
    "decay": ("horizon",),
    "clip": ("model", "uses"),
    "stopping": ("model", "norm", "monitor_mode"),
    "task": (),
    "parallel": ("device", "accumulate", "batch_size", "precision", "threads"),
}
"""The groups that every run has a choice of, with the arguments of choices that are known only at run time.

All other keys are `Settings`.
"""

AUTO_TASK = "dlopt.tasks.kinds.auto"
"""The callable of task=auto: the data, the loss or the model say what the task is. Any other computes its own loss."""

Toggle = bool | Literal["auto"]
Compile = Toggle | Literal["blocks", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
Recomputation = Literal["none", "blocks", "all"]
if TYPE_CHECKING:
    RequestedMetric = str
else:
    RequestedMetric = Literal[REQUESTABLE]  # for lists of what a key takes
Diagnostic = Literal["gradients", "activations", "curvature"]
Tta = Literal["none", "flip", "shift_flip", "ten_crop", "multi_scale_ten_crop"]
DryRun = bool | Literal["timed"]
_is_url = re.compile(r"https?://[^\s/]").match
Url = Annotated[str, Condition(lambda url: None if _is_url(url) else "must be a URL: https://...")]


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    every_epochs: Annotated[Count, Role.PROTOCOL]
    test: Annotated[bool, Role.PROTOCOL]
    metrics: Annotated[list[RequestedMetric | str], Role.PROTOCOL]  # str: see `dlopt.config.user_parts`
    tta: Annotated[Tta, Role.PROTOCOL]
    average: Annotated[Literal["probabilities", "logits"], Role.PROTOCOL]
    every_steps: Annotated[Count | None, Role.PROTOCOL]
    samples: Annotated[Count | None, Role.PROTOCOL]
    train_accuracy: Annotated[Toggle, Role.PROTOCOL]


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    every_epochs: Annotated[Count | None, Role.WATCH]
    every_steps: Annotated[Count | None, Role.WATCH]
    keep: Annotated[Count, Role.WATCH]
    at_restarts: Annotated[bool, Role.WATCH]
    asynchronous: Annotated[bool, Role.WATCH]
    sharded: Annotated[Toggle, Role.WATCH]


@dataclass(frozen=True, kw_only=True)
class RecoverySettings:
    attempts: Annotated[Count, Role.WATCH]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A paper's test error in %, for runs whose config has the values of `when` (by dotted key)."""

    error: Positive
    when: dict[str, bool | int | float | str | list[int] | None]


@dataclass(frozen=True, kw_only=True)
class Growth:
    """A batch that grows from data.batch_size, in `micro_batches[0]` micro-batches, by more of the same size.

    `micro_batches[i]` holds from the milestone i - 1 on, which is in one of three units.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    micro_batches: list[Count]
    steps: list[Count] | None = None
    epochs: list[Positive] | None = None
    samples: list[Count] | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    name: Annotated[str, Role.PLACE]
    run_id: Annotated[str | None, Role.COMMAND] = None  # no key to type: see `RunFolder.run_id`
    # Of the values of a task of the user's own, which declares them: no key to type.
    directions: Annotated[dict[str, Direction] | None, Role.COMMAND] = None
    tags: Annotated[list[str], Role.WATCH]
    note: Annotated[str | None, Role.WATCH]
    seed: Annotated[Seed, Role.SEED]
    init_seed: Annotated[Seed, Role.SEED]
    order_seed: Annotated[Seed, Role.SEED]
    augmentation_seed: Annotated[Seed, Role.SEED]
    dry_run: Annotated[DryRun, Role.COMMAND]
    notify: Annotated[Url | None, Role.COMMAND] = None
    resume: Annotated[Literal["auto"] | str | None, Role.COMMAND]
    init_from: Annotated[str | None, Role.IDENTITY]
    allow_packages: Annotated[list[str], Role.COMMAND]
    epochs: Annotated[Count | Duration, Role.LENGTH]
    steps: Annotated[Count | None, Role.LENGTH]
    max_time: Annotated[Positive | None, Role.WATCH]
    schedule_epochs: Annotated[Positive | None, Role.LENGTH]
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], Role.PLACE]
    precision: Annotated[Literal["fp32", "tf32", "bf16", "bf16_pure", "fp16", "fp64", "auto"], Role.IDENTITY]
    compile: Annotated[Compile, Role.PLACE]
    cuda_graphs: Annotated[Toggle, Role.PLACE]
    activation_checkpointing: Annotated[Recomputation, Role.PLACE]
    channels_last: Annotated[Toggle, Role.PLACE]
    threads: Annotated[Count | Literal["auto"], Role.PLACE]
    deterministic: Annotated[bool, Role.IDENTITY]
    accumulate: Annotated[Count | Growth, Role.IDENTITY]
    scale_lr: Annotated[Literal["none", "linear", "sqrt"], Role.IDENTITY]
    scale_lr_reference: Annotated[Count, Role.IDENTITY]
    decay_norm_and_bias: Annotated[bool, Role.IDENTITY]
    ema: Annotated[OpenFraction | Literal["tail"] | None, Role.IDENTITY]
    ema_warmup: Annotated[bool, Role.IDENTITY]
    check: Annotated[Literal["auto", "step"], Role.WATCH]
    on_divergence: Annotated[Literal["stop", "skip"], Role.WATCH]
    recovery: RecoverySettings
    on_out_of_memory: Annotated[Literal["stop", "halve"], Role.WATCH]
    norm_statistics: Annotated[Literal["running", "exact"], Role.PROTOCOL]
    monitor: Annotated[str, Role.PROTOCOL]
    monitor_mode: Annotated[Direction | None, Role.PROTOCOL]
    validation: Annotated[dict[str, dict[str, Any]] | None, Role.PROTOCOL] = None  # see `dlopt.config.validation_sets`
    evaluate: EvaluateSettings
    checkpoint: CheckpointSettings
    tracking: Annotated[list[Sink], Role.WATCH]
    diagnostics: Annotated[list[Diagnostic], Role.WATCH]
    diagnostics_every: Annotated[Count, Role.WATCH]
    profile: Annotated[bool, Role.WATCH]
    profile_steps: Annotated[tuple[Natural, Count], Role.WATCH]
    log_every_steps: Annotated[Count | None, Role.WATCH]
    published: Annotated[list[Published], Role.WATCH]
    observers: Annotated[list[dict[str, Any]], Role.WATCH]  # see `RunConfig.user_observers`

    @property
    def budget(self) -> float | None:
        """Seconds of epochs=5min, from which a run counts its updates when it begins; None once `steps` has them."""
        return self.epochs.seconds if isinstance(self.epochs, Duration) and self.steps is None else None

    @property
    def whole_epochs(self) -> int:
        """The epochs of a run without `steps`. Raises `UserError` if they are not known yet."""
        if isinstance(self.epochs, Duration):
            raise UserError(f"epochs={self.epochs}: only a run counts its updates; set a number of epochs, or steps")
        return self.epochs

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a batch of data.batch_size samples."""
        return self.accumulate if isinstance(self.accumulate, int) else self.accumulate.micro_batches[0]

    @property
    def batch_growth(self) -> Growth | None:
        """The growth of the batch; None if all updates have the same."""
        return None if isinstance(self.accumulate, int) else self.accumulate


SWITCHES = tuple(name for name, hint in get_type_hints(Settings).items() if hint in (bool, DryRun))
"""The keys of which a flag without a value sets true."""
