"""The further metrics that a run requests, by `evaluate.metrics` or by monitoring one: checked against its task."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.config.rules import check_mode
from dlopt.config.run_config import RunConfig
from dlopt.config.settings_rules import MONITORS
from dlopt.config.user_parts import BUILT_IN
from dlopt.data.samples import Dataset
from dlopt.data.task import Task
from dlopt.losses import probabilities
from dlopt.metrics.classes import TOP, ClassMetrics
from dlopt.metrics.labels import LABEL_METRICS
from dlopt.metrics.names import Metric, lower_is_better
from dlopt.metrics.regression import RegressionMetrics
from dlopt.training.stopping import Target

_CLASS_METRICS = ("top5_accuracy", "macro_f1", "calibration_error", "class_accuracy")
_VALUE_METRICS = ("r2", "mae")
_METRICS_OF = {"classification": _CLASS_METRICS, "multi-label": LABEL_METRICS, "regression": _VALUE_METRICS}


def extra_metric(monitor: str) -> str | None:
    """Returns the entry of `evaluate.metrics` that the monitored metric requires; None if every run has the metric."""
    if monitor in MONITORS:
        return None
    metric = Metric.of(monitor)
    if metric is None or metric.column != monitor or metric.split != "val":
        return monitor  # which no run has
    is_of_classes = metric.base == "class_accuracy" or metric.name == "worst_class_accuracy"
    return "class_accuracy" if is_of_classes else metric.name


def extra_metrics(run_config: RunConfig, dataset: Dataset, loss: nn.Module) -> "Callable[[], ExtraMetrics] | None":
    """Returns a factory of accumulators for `evaluate.metrics` and the monitored metrics; None if there are none.

    Raises `UserError` for a metric that this run cannot compute.
    """
    _check_target(run_config, dataset.task)
    _check_classes(_monitors(run_config), dataset)
    origin = None if dataset.val is None else dataset.val.targets[:1]
    return accumulators(run_config, dataset.classes, dataset.task, loss, origin)


def accumulators(
    run_config: RunConfig, classes: Sequence[str] | None, task: Task, loss: nn.Module, origin: Tensor | None
) -> "Callable[[], ExtraMetrics] | None":
    """As `extra_metrics`, for any split: what is validated is tested, too. `origin`: see `RegressionMetrics`."""
    names = _requested(run_config, task)
    if not names or task.labels is not None:  # `LabelMetrics` are those of every evaluation
        return None
    if classes is None:
        return lambda: RegressionMetrics(names, task.outputs, origin)
    return lambda: ClassMetrics(names, classes, lambda outputs: probabilities(outputs, loss))


def _monitors(run_config: RunConfig) -> dict[str, str]:
    """Returns the monitored metrics by key."""
    monitors = {"monitor": run_config.settings.monitor}
    for key, component in (("stopping", run_config.stopping), ("schedule", run_config.schedule)):
        if "monitor" in component.arguments:
            monitors[f"{key}.monitor"] = component.arguments["monitor"]
    return monitors


def _requested(run_config: RunConfig, task: Task) -> list[str]:
    """Returns the names of dlopt's own metrics that not every run of the task has. Raises `UserError`."""
    monitors = _monitors(run_config)
    user_metrics = [_val(name) for name in run_config.user_metrics]
    if monitors["monitor"] == "auto" and not any(monitor in user_metrics for monitor in monitors.values()):
        check_mode(_auto(task), run_config.settings.monitor_mode)
    requested: dict[str, str] = {
        name: f"evaluate.metrics={name}" for name in run_config.settings.evaluate.metrics if name in BUILT_IN
    }
    of_loss = [_val(name) for name in task.loss_metrics(0.0)]
    logged = [
        "auto",
        "val_loss",
        *of_loss,
        *user_metrics,
        *([] if task.classes is None else [_val(task.accuracy)]),
    ]
    logged += [] if task.labels is None else [_val(name) for name in LABEL_METRICS]
    for key, monitor in monitors.items():
        if monitor in logged or (key, monitor) == ("stopping.monitor", "train_loss"):
            continue
        name = extra_metric(monitor)
        if name is None:
            of_task = (*_VALUE_METRICS,) if task.kind == "regression" else LABEL_METRICS if task.labels else ()
            others = "".join(f", {_val(each)}" for each in of_task)
            raise UserError(f"{key}={monitor}: a {task.shown_kind} task allows auto, val_loss{others}")
        requested.setdefault(name, f"{key}={monitor}")
    _check_names(requested, task)
    return list(requested)


def _check_target(run_config: RunConfig, task: Task) -> None:
    """Raises `UserError` for a target above 1 of an accuracy or another metric with this maximum: a percentage."""
    if run_config.stopping.target is not Target:
        return
    target, monitor = run_config.stopping.arguments["value"], run_config.stopping.arguments["monitor"]
    if monitor == "auto":
        monitor = _auto(task)
    is_user_metric = monitor in [_val(name) for name in run_config.user_metrics]
    if target > 1 and not is_user_metric and not lower_is_better(monitor):
        raise UserError(f"stopping.value={target:g}: {monitor} is at most 1; for {target:g} % set {target / 100:g}")


def _val(name: str) -> str:
    return Metric("val", name).column


def _auto(task: Task) -> str:
    return "val_accuracy" if task.kind == "classification" else "val_loss"


def _check_names(requested: Mapping[str, str], task: Task) -> None:
    available = _METRICS_OF.get(task.kind, ())
    for name, setting in requested.items():
        if name not in available:
            raise UserError(f"{setting}: a {task.shown_kind} task has no such metric")
        if name == "top5_accuracy" and task.outputs <= TOP:
            raise UserError(f"{setting}: needs more than {TOP} classes; the data have {task.outputs}")


def _check_classes(monitors: Mapping[str, str], dataset: Dataset) -> None:
    classes, val = dataset.classes, dataset.val
    for key, monitor in monitors.items():
        metric = Metric.of(monitor)
        name = None if metric is None else metric.class_name
        if name is None or classes is None:
            continue
        if name not in classes:
            shown = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
            raise UserError(f"{key}={monitor}: no class {name}; the classes are {shown}")
        if val is not None and not (val.targets == classes.index(name)).any():
            raise UserError(f"{key}={monitor}: the validation set has no sample of this class")


ExtraMetrics = ClassMetrics | RegressionMetrics
"""Accumulates further metrics, which are functions of sums over samples."""
