"""Which values of a metric, and which evaluation of a run, are better: the only place that answers it.

dlopt knows the direction of its own metrics. That of a user's metric (`evaluate.metrics`) is never guessed from its
name: the run that monitors it sets `monitor_mode`, and its saved config keeps it.
"""

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeGuard

from dlopt.basics.errors import UserError

Mode = Literal["min", "max"]
Modes = Mapping[str, Mode]
"""Directions of users' metrics by their names without the split: brier_score."""
NONE: Modes = MappingProxyType({})

_ACCURACIES = ("accuracy", "token_accuracy", "top5_accuracy", "class_accuracy", "worst_class_accuracy")
_HIGHER = (*_ACCURACIES, "macro_f1", "micro_f1", "mean_average_precision", "r2")
_ERRORS = tuple(name.replace("accuracy", "error") for name in _ACCURACIES)  # of comparisons: 1 - accuracy
_LOWER = ("loss", *_ERRORS, "calibration_error", "mae", "bits_per_byte", "perplexity")
EVALUATED = (*_HIGHER, *_LOWER)
"""Names, without the split, of the metrics that dlopt computes in an evaluation."""
_MONITORS = ("monitor", "stopping.monitor", "schedule.monitor")
_SPLITS = ("val_", "train_", "test_", "evaluated_train_")


def base_name(metric: str) -> str:
    """Returns the name without split and class: macro_f1 for best_val_macro_f1; unchanged if it has no split."""
    name = metric.removeprefix("best_").partition("/")[0]  # a class may be named "loss" (val_class_accuracy/loss)
    return next((name.removeprefix(split) for split in _SPLITS if name.startswith(split)), metric)


def known_mode(metric: str) -> Mode | None:
    """Returns the direction of a metric of dlopt; None: it is a user's metric.

    Every name without a split is dlopt's: costs (seconds, parameters), gaps and what comparisons measure are better
    when smaller, except for throughput and `decay_correlation`.
    """
    name = base_name(metric)
    if name in _HIGHER:
        return "max"
    if name in _LOWER:
        return "min"
    if name != metric:
        return None
    return "max" if name.endswith("_per_second") or name == "decay_correlation" else "min"


def mode_of(metric: str, modes: Modes = NONE) -> Mode | None:
    """Returns the direction of a metric; None: it is a user's metric that `modes` does not name."""
    return known_mode(metric) or modes.get(base_name(metric))


def lower_is_better(metric: str, modes: Modes = NONE) -> bool:
    """Returns whether a smaller value of the metric (`val_loss`, `best_val_macro_f1`, `seconds`) is a better one.

    Raises `UserError` if its direction is unknown.
    """
    mode = mode_of(metric, modes)
    if mode is None:
        raise UserError(
            f"{metric}: whether smaller or larger values of your own metric are better is unknown; set "
            f"monitor=val_{base_name(metric)} monitor_mode=min (or max)"
        )
    return mode == "min"


def resolve_monitor(monitor: str, metrics: Mapping[str, Any]) -> str:
    """Returns the name of the monitored metric: `auto` is val_accuracy, or val_loss where there is none."""
    if monitor != "auto":
        return monitor
    return "val_accuracy" if metrics.get("val_accuracy") is not None else "val_loss"


def selection_key(metrics: Mapping[str, Any], monitor: str, modes: Modes = NONE) -> tuple[float, float]:
    """Returns a sort key of evaluations: the best one is the first of those with the smallest key.

    The key is the monitored metric as a loss (accuracies and the like are negated), then val_loss: small validation
    sets have many equal accuracies, between which the loss decides. Missing and non-finite values are infinite. Raises
    `UserError` if the direction of the metric is unknown.
    """
    value = metrics.get(monitor)
    if value is not None and not lower_is_better(monitor, modes):
        value = -value
    return finite(value), finite(metrics.get("val_loss"))


def finite(value: float | None) -> float:
    """Returns a loss; infinity if it is missing or non-finite."""
    return float(value) if value is not None and math.isfinite(value) else math.inf


def monitored_modes(config: Mapping[str, Any]) -> dict[str, Mode]:
    """Returns the directions of the user's metrics that a run monitors. `config`: its values by dotted key."""
    modes: dict[str, Mode] = {}
    run_mode = config["monitor_mode"] if "monitor_mode" in config else former_mode(config)
    for key in _MONITORS:
        metric, mode = config.get(key, "auto"), run_mode
        if key == "schedule.monitor" and config.get("schedule.mode") != "auto":
            mode = config.get("schedule.mode")
        if mode in ("min", "max") and _is_own(metric):
            modes.setdefault(base_name(metric), mode)
    return modes


def common_modes(configs: Iterable[Mapping[str, Any]]) -> dict[str, Mode]:
    """Returns the directions on which all runs agree that monitor the metric. `configs`: see `monitored_modes`."""
    found: dict[str, set[Mode]] = {}
    for config in configs:
        for name, mode in monitored_modes(config).items():
            found.setdefault(name, set()).add(mode)
    return {name: next(iter(modes)) for name, modes in found.items() if len(modes) == 1}


_FORMER = ("accuracy", "f1", "r2", "kappa", "score", "auc", "precision", "recall", "iou", "dice", "correlation")


def former_mode(config: Mapping[str, Any]) -> Mode | None:
    """Returns the `monitor_mode` of an older config without this key: the last word of the name decided.

    `config`: its values by dotted key.
    """
    own = [str(config[key]) for key in _MONITORS if _is_own(config.get(key))]
    if not own:
        return None
    return "max" if own[0].endswith(tuple(f"_{word}" for word in _FORMER)) else "min"


def _is_own(metric: Any) -> TypeGuard[str]:
    return isinstance(metric, str) and metric != "auto" and known_mode(metric) is None
