"""The checked config of a run: one component per group, the keys that a group's choices share, the run's settings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from dlopt.basics.errors import UserError
from dlopt.basics.secrets import forget
from dlopt.config.schema import Component, dotted_name, first_lines_of_data
from dlopt.config.settings import GROUPS as RUNTIME
from dlopt.config.settings import Settings as Settings
from dlopt.config.validation_sets import Use
from dlopt.data.settings import SPLITS, DataSettings
from dlopt.data.tables.columns import FeatureColumns
from dlopt.metrics.declaration import Direction
from dlopt.metrics.names import known_direction, without_set
from dlopt.optim.parameters import Grouping
from dlopt.schedules import Factor, Horizon, Warmup
from dlopt.schedules.decay import DecaySettings


@dataclass(frozen=True)
class ConfigGroup:
    """What all choices of a config group share.

    `runtime`: arguments known only at run time. `common`: dataclass of keys that every choice has; a callable whose
    signature names such a key receives its value.
    """

    runtime: tuple[str, ...]
    common: type | None

    @property
    def common_names(self) -> tuple[str, ...]:
        return () if self.common is None else tuple(each.name for each in fields(self.common))


# Of the groups in `settings`, which imports no torch.
_COMMON = {"data": DataSettings, "optimizer": Grouping, "schedule": Warmup, "decay": DecaySettings}
GROUPS: Mapping[str, ConfigGroup] = {name: ConfigGroup(runtime, _COMMON.get(name)) for name, runtime in RUNTIME.items()}


@dataclass(frozen=True)
class ValidationSet:
    """The data of `validation.NAME`. `use`: the split; None for the first one that exists of val, test and train."""

    data: Component
    use: Use | None


@dataclass(frozen=True)
class RunConfig:
    settings: Settings
    data: Component
    data_settings: DataSettings
    normalize: Component
    sampler: Component
    augmentation: Component
    model: Component
    init: Component
    adapt: Component
    loss: Component
    optimizer: Component
    grouping: Grouping
    schedule: Component
    warmup: Warmup
    decay: Component
    decay_settings: DecaySettings
    clip: Component
    stopping: Component
    task: Component
    parallel: Component
    config: Mapping[str, Any] = field(repr=False)  # as saved: resolved, except for values from environment variables
    user_metrics: Mapping[str, Callable[..., Any]] = field(default_factory=dict)  # of evaluate.metrics, by name
    user_observers: Sequence[Component] = ()
    validation: Mapping[str, ValidationSet] = field(default_factory=dict)  # by name
    auto_lr: bool = False  # optimizer.lr=auto: a learning-rate range test runs first

    def with_steps(self, steps: int) -> "RunConfig":
        """Returns the config with this number of updates."""
        return replace(self, settings=replace(self.settings, steps=steps), config={**self.config, "steps": steps})

    @property
    def directions(self) -> Mapping[str, Direction]:
        """Directions of the values that a task of the user's own evaluates, by name."""
        return getattr(self.task.target, "values", {})

    @property
    def monitors(self) -> dict[str, str]:
        """The monitored metrics by key."""
        parts = {"stopping.monitor": self.stopping.arguments, "schedule.monitor": self.schedule.arguments}
        followed = {key: arguments["monitor"] for key, arguments in parts.items() if "monitor" in arguments}
        return {"monitor": self.settings.monitor, **followed}

    @property
    def own_metrics(self) -> Sequence[str]:
        """Names of the user's own metrics: functions of `evaluate.metrics`, and the values of their task."""
        return [*self.user_metrics, *self.directions]

    def build_schedule(self, horizon: Horizon) -> Factor:
        """Builds the schedule for a run of this length, without its warmup."""
        direction = self.direction_of(self.schedule.arguments.get("monitor", "auto"))
        factor: Factor = self.schedule.build(horizon=horizon, monitor_mode=direction)
        return factor

    def direction_of(self, monitor: str) -> Direction | None:
        """Returns `monitor_mode`, or the direction of a metric of dlopt on a named validation set."""
        metric = without_set(monitor, self.validation)
        known = None if metric == monitor else known_direction(metric)
        return known or self.settings.monitor_mode

    def read_data(self, *, saved_tokenizer: str | None = None, saved_columns: FeatureColumns | None = None) -> Any:
        """Returns the `Dataset`, before the settings of all datasets are applied. Raises `UserError`.

        `saved_tokenizer`: of a checkpoint; None for the config's. `saved_columns`: of the table, or of the scale of the
        targets, of a checkpoint; None to learn what the columns are.
        """
        return self._read(self.data, self.data_settings, saved_tokenizer, saved_columns)

    def read_validation_set(self, name: str, saved_tokenizer: str | None, saved_columns: FeatureColumns | None) -> Any:
        """Returns the `Dataset` of `validation.NAME`, of which no part is split off. Raises `UserError`.

        `saved_tokenizer`, `saved_columns`: of the training data.
        """
        whole: dict[str, Any] = {"test_split": 0.0, "val_split": 0.0, "subset": None, "label_noise": 0.0}
        settings = replace(self.data_settings, **whole, group=None, order=None, weight=None)
        return self._read(self.validation[name].data, settings, saved_tokenizer, saved_columns)

    def _read(
        self, data: Component, settings: DataSettings, tokenizer: str | None, columns: FeatureColumns | None
    ) -> Any:
        from dlopt.data.normalization import standardized
        from dlopt.data.samples import Dataset, Samples
        from dlopt.data.splits import with_test_set

        dataset = data.build(**vars(settings), saved_tokenizer=tokenizer, saved_columns=columns)
        if not isinstance(dataset, Dataset):
            found = f"{data.choice}: returns {type(dataset).__name__}; must return a dlopt Dataset"
            if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
                begin = first_lines_of_data(dotted_name(data.target), is_dataset=True)
                found += f", or, for a dataset of torch, {begin}"
            raise UserError(found)
        for name in SPLITS:
            if not isinstance(samples := getattr(dataset, name), Samples | None):
                raise UserError(
                    f"{data.choice}: its {name} set is of type {type(samples).__name__}; must be dlopt.extend.Samples"
                )
        forget(dataset.classes or ())
        is_split = data.takes("test_split") or data.arguments.get("split_column") is not None
        if settings.test_split > 0 and not is_split:
            root = data.arguments.get("root")
            source = data.choice if root is None else f"{data.key}.root={root}"
            dataset = with_test_set(dataset, settings.test_split, source)
        return standardized(dataset, columns, is_enabled=settings.standardize_target)
