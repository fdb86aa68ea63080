"""Names of metrics (columns, tags, keys), their direction, and the order of evaluations. No other module defines them.

dlopt knows the direction of its own metrics. It never guesses the direction of a user's metric (`evaluate.metrics`)
from the name: the run that monitors the metric sets `monitor_mode`, and its saved config keeps it.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeGuard

from dlopt.basics.errors import UserError
from dlopt.metrics.declaration import Direction as Direction
from dlopt.metrics.declared import DECLARED
from dlopt.metrics.measures import MEASURES

Goal = Literal["maximize", "minimize"]
"""What a search does with a metric, in the words of Optuna."""
Directions = Mapping[str, Direction]
"""Directions of users' metrics by their names without the split: kappa."""
NONE: Directions = MappingProxyType({})

_DIRECTIONS: Mapping[str, Direction] = {
    **{name: each.direction for name, each in DECLARED.items()},
    # Of comparisons: 1 - accuracy.
    **{name.replace("accuracy", "error"): "min" for name in DECLARED if "accuracy" in name},
}
EVALUATED = tuple(_DIRECTIONS)
"""Names, without the split, of the metrics that dlopt computes in an evaluation."""
_MONITORS = ("monitor", "stopping.monitor", "schedule.monitor")

# -- spelling

Split = Literal["train", "val", "test", "evaluated_train"]
"""Samples of a metric, and how it is measured: `train` during the updates, the others in evaluation mode."""
SPLITS: Mapping[Split, str] = {
    "test": "test", "val": "validation, which chose the epoch: optimistic",
    "evaluated_train": "training, which chose the weights: optimistic",
}  # fmt: skip
"""The splits that can be tested, in words."""
FINAL_TAGS = ("best/", "test/")
"""Prefixes of the tags that are written at the end of a run."""
_BEST = "best_"
_SPELLED = re.compile(rf"(?:{_BEST})?(?P<split>train|val|test|evaluated_train)_(?P<name>.*)", re.DOTALL)


@dataclass(frozen=True)
class Metric:
    """A metric of a split. `name`: without the split: loss, macro_f1, class_accuracy/8."""

    split: Split
    name: str

    @classmethod
    def of(cls, key: str) -> "Metric | None":
        """Parses a `column` or a key `best`; None if it has no split (seconds, gap, best_epoch)."""
        match = _SPELLED.fullmatch(key)
        return None if match is None else cls(match["split"], match["name"])  # type: ignore[arg-type]

    @property
    def column(self) -> str:
        """The key in metrics.jsonl, and of a test in summary.json: val_loss, test_loss."""
        return f"{self.split}_{self.name}"

    @property
    def best(self) -> str:
        """The key of the best evaluation in summary.json: best_val_loss."""
        return best_key(self.column)

    @property
    def tag(self) -> str:
        """The tag in TensorBoard: val/loss."""
        return f"{self.split}/{self.name}"

    @property
    def best_tag(self) -> str:
        """The tag of the best evaluation in TensorBoard: best/val_loss."""
        return f"best/{self.column}"

    @property
    def base(self) -> str:
        """The name without the class: class_accuracy. A class may be named "loss" (class_accuracy/loss)."""
        return self.name.partition("/")[0]

    @property
    def class_name(self) -> str | None:
        """The class: 8 of class_accuracy/8; None if the metric is of all classes."""
        _, has_class, name = self.name.partition("/")
        return name if has_class else None

    def on_set(self, name: str) -> "Metric":
        """Returns this metric of a validation set with a name: val_NAME_loss."""
        return Metric(self.split, f"{name}_{self.name}")


VAL_LOSS, VAL_ACCURACY = Metric("val", "loss"), Metric("val", "accuracy")


def on_set(name: str, values: Mapping[str, float]) -> dict[str, float]:
    """Returns metrics of a validation set with a name by its columns: val_NAME_loss for val_loss."""
    metrics = ((Metric.of(column), value) for column, value in values.items())
    return {metric.on_set(name).column: value for metric, value in metrics if metric is not None}


def validation_sets(config: Mapping[str, Any]) -> list[str]:
    """Returns the names of the validation sets of a run. `config`: its values by dotted key."""
    return [*dict.fromkeys(key.split(".")[1] for key in config if key.startswith("validation."))]


def set_of(column: str, sets: Iterable[str]) -> str:
    """Returns the name of the validation set in a column: shifted of val_shifted_loss; "" if it has none."""
    return next((name for name in sets if column.startswith(Metric("val", f"{name}_").column)), "")


def without_set(column: str, sets: Iterable[str]) -> str:
    """Returns the column without the name of a validation set: val_loss for val_shifted_loss; others are unchanged."""
    name = set_of(column, sets)
    return Metric("val", column.removeprefix(Metric("val", f"{name}_").column)).column if name else column


def tag_of(column: str) -> str:
    """Returns the tag of a column in TensorBoard: val/loss, throughput/utilization. Other keys are unchanged."""
    metric = Metric.of(column)
    if metric is not None and metric.column == column:
        return metric.tag
    return MEASURES[column].tag if column in MEASURES else column


def by_column(split: Split, values: Mapping[str, float]) -> dict[str, float]:
    """Returns values by column instead of by name."""
    return {Metric(split, name).column: value for name, value in values.items()}


def best_key(column: str) -> str:
    """Returns the key in summary.json of the best value of a column: best_val_loss for val_loss."""
    return f"{_BEST}{column}"


def column_of(key: str) -> str:
    """Returns the column of a key of summary.json: val_loss for best_val_loss. Other keys are unchanged."""
    return key.removeprefix(_BEST)


def split_of(column: str) -> Split | None:
    """Returns the split of a column; None if it has none (seconds), or is a key `best_...` of summary.json."""
    metric = Metric.of(column)
    return metric.split if metric is not None and metric.column == column else None


def final_metrics(summary: Mapping[str, Any]) -> dict[str, Metric]:
    """Returns the metrics of the best evaluation and of the test in summary.json, by their keys."""
    final = {}
    for key in summary:
        metric = Metric.of(key)
        if metric is not None and (metric.split, key) in (("val", metric.best), ("test", metric.column)):
            final[key] = metric
    return final


def in_words(metric: str) -> str:
    """Returns a column, or another key, in words: validation accuracy for val_accuracy."""
    words = metric.replace("_", " ").replace("lr", "learning rate")
    return words.replace("val ", "validation ").replace("train ", "training ")


def base_name(metric: str) -> str:
    """Returns the name without split and class: macro_f1 for best_val_macro_f1; unchanged if it has no split."""
    parsed = Metric.of(metric)
    return metric if parsed is None else parsed.base


# -- direction


def known_direction(metric: str) -> Direction | None:
    """Returns the direction of a metric of dlopt; None if it is a user's metric.

    Every name without a split is dlopt's: smaller values are better (costs, gaps, what comparisons measure) unless the
    measure is declared otherwise.
    """
    name = base_name(metric)
    if name in _DIRECTIONS:
        return _DIRECTIONS[name]
    if name != metric:
        return None
    return MEASURES[name].direction if name in MEASURES else "min"


def direction_of(metric: str, directions: Directions = NONE) -> Direction | None:
    """Returns the direction of a metric; None if it is a user's metric that `directions` does not name."""
    return known_direction(metric) or directions.get(base_name(metric))


def lower_is_better(metric: str, directions: Directions = NONE) -> bool:
    """Returns whether a smaller value of the metric (`val_loss`, `best_val_macro_f1`, `seconds`) is a better one.

    Raises `UserError` if its direction is unknown.
    """
    direction = direction_of(metric, directions)
    if direction is None:
        raise UserError(
            f"{metric}: whether smaller or larger values of your own metric are better is unknown; set "
            f"monitor={Metric('val', base_name(metric)).column} monitor_mode=min (or max)"
        )
    return direction == "min"


def resolve_monitor(monitor: str, metrics: Mapping[str, Any]) -> str:
    """Returns the name of the monitored metric: `auto` is val_accuracy, or val_loss where there is none."""
    if monitor != "auto":
        return monitor
    return VAL_LOSS.column if metrics.get(VAL_ACCURACY.column) is None else VAL_ACCURACY.column


def selection_key(metrics: Mapping[str, Any], monitor: str, directions: Directions = NONE) -> tuple[float, float]:
    """Returns a sort key of evaluations: the best evaluation is the first with the smallest key.

    The key is the monitored metric as a loss (accuracies and the like are negated), then val_loss: small validation
    sets have many equal accuracies, between which the loss decides. Missing and non-finite values are infinite. Raises
    `UserError` if the direction of the metric is unknown.
    """
    value = metrics.get(monitor)
    if value is not None and not lower_is_better(monitor, directions):
        value = -value
    return finite(value), finite(metrics.get(VAL_LOSS.column))


def finite(value: float | None) -> float:
    """Returns a loss; infinity if it is missing or non-finite."""
    return float(value) if value is not None and math.isfinite(value) else math.inf


def monitored_directions(config: Mapping[str, Any]) -> dict[str, Direction]:
    """Returns the directions of the user's metrics that a run monitors, and of all metrics on named validation sets.

    `config`: its values by dotted key.
    """
    directions: dict[str, Direction] = {
        key.removeprefix("directions."): direction for key, direction in config.items() if key.startswith("directions.")
    }
    sets = validation_sets(config)
    on_sets = {f"{each}_{name}": known for each in sets for name, known in {**_DIRECTIONS, **directions}.items()}
    directions |= on_sets
    run_direction = config.get("monitor_mode")
    for key in _MONITORS:
        metric, direction = config.get(key, "auto"), run_direction
        if key == "schedule.monitor" and config.get("schedule.mode") != "auto":
            direction = config.get("schedule.mode")
        if direction in ("min", "max") and _is_user_metric(metric):
            directions.setdefault(base_name(metric), direction)
    return directions


def common_directions(configs: Iterable[Mapping[str, Any]]) -> dict[str, Direction]:
    """Returns the directions on which all runs agree that monitor the metric. `configs`: see `monitored_directions`."""
    found: dict[str, set[Direction]] = {}
    for config in configs:
        for name, direction in monitored_directions(config).items():
            found.setdefault(name, set()).add(direction)
    return {name: next(iter(directions)) for name, directions in found.items() if len(directions) == 1}


def _is_user_metric(metric: Any) -> TypeGuard[str]:
    return isinstance(metric, str) and metric != "auto" and known_direction(metric) is None
