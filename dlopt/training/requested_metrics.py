"""The additional metrics that a run requests, by `evaluate.metrics` or by monitoring: checked against its task."""

from collections.abc import Mapping

from dlopt.basics.errors import UserError
from dlopt.config.overrides import key_of
from dlopt.config.rules import check_direction
from dlopt.config.run_config import RunConfig
from dlopt.config.settings_rules import MONITORS
from dlopt.data.samples import Dataset
from dlopt.metrics.declaration import Declaration
from dlopt.metrics.declared import DECLARED, REQUESTABLE, named
from dlopt.metrics.measures import MEASURES
from dlopt.metrics.names import Metric, column_of, lower_is_better, set_of, without_set
from dlopt.tasks.task import Task
from dlopt.training.stopping import Target


def requested_metrics(run_config: RunConfig, dataset: Dataset, name: str = "") -> list[Declaration]:
    """Returns the metrics of `evaluate.metrics` and the monitored metrics that not every evaluation has.

    `name`: of the validation set of `dataset`, if it has one. Raises `UserError` for a metric that this run cannot
    compute.
    """
    _check_target(run_config, dataset.task)
    sets, monitors = run_config.validation, run_config.monitors.items()
    _check_classes({key: without_set(each, sets) for key, each in monitors if set_of(each, sets) == name}, dataset)
    return tested_metrics(run_config, dataset.task)


def tested_metrics(run_config: RunConfig, task: Task) -> list[Declaration]:
    """As `requested_metrics`, without a validation set: what is validated is tested, too."""
    monitors = {key: without_set(monitor, run_config.validation) for key, monitor in run_config.monitors.items()}
    user_metrics = [_val(name) for name in run_config.own_metrics]
    if monitors["monitor"] == "auto" and not any(monitor in user_metrics for monitor in monitors.values()):
        check_direction(task.monitor, run_config.settings.monitor_mode)
    names = [name for name in run_config.settings.evaluate.metrics if name in REQUESTABLE]
    requested = {name: f"evaluate.metrics={name}" for name in names}
    of_loss = [_val(name) for name in task.loss_metrics(0.0)]
    always = [] if task.accuracy is None else [_val(task.accuracy)]
    always += [_val(name) for each in task.computed(()) for name in each.names]
    logged = ["auto", "val_loss", *of_loss, *user_metrics, *always]
    for key, monitor in monitors.items():
        if monitor in logged or (key, monitor) == ("stopping.monitor", "train_loss"):
            continue
        metric = monitored_name(monitor)
        if metric is None:
            others = dict.fromkeys([*of_loss, *always, *(_val(each.name) for each in task.metrics if each.needs)])
            raise UserError(f"{key}={monitor}: a {task.name} task allows {', '.join(['auto', 'val_loss', *others])}")
        requested.setdefault(metric, f"{key}={monitor}")
    _check_names(requested, task)
    return named(list(requested), task.metrics)


def monitored_name(monitor: str) -> str | None:
    """Returns the name, without the split, of a monitored metric that not every run has; None if every run has it."""
    if monitor in MONITORS:
        return None
    metric = Metric.of(monitor)
    if metric is None or metric.column != monitor or metric.split != "val":
        return monitor  # which no run has
    declared = DECLARED.get(metric.base)
    is_by_class = declared is not None and declared.by_class and declared.name == metric.base
    return metric.base if is_by_class else metric.name


def check_objective(setting: str, key: str, run_config: RunConfig, dataset: Dataset) -> None:
    """Raises `UserError` for a key of summary.json that the run of `dataset`, as it is read, will not write."""
    task, sets, measure = dataset.task, run_config.validation, MEASURES.get(key)
    is_other = measure is None or measure.is_state or measure.of_training or measure.of_line or measure.of_row
    if not is_other or run_config.user_observers:  # an observer may write any key
        return
    metric = Metric.of(without_set(column_of(key), sets))
    names = ["loss", task.accuracy or "loss", *task.loss_metrics(0.0), *run_config.own_metrics]
    names += [name for each in task.computed(tested_metrics(run_config, task)) for name in each.names]
    if dataset.val is None and not run_config.data_settings.val_split and not set_of(column_of(key), sets):
        names = []
    if metric is None or key == metric.column or (monitored_name(metric.column) or metric.name) not in names:
        allowed = ", ".join(Metric("val", name).best for name in dict.fromkeys(names)) or "none without validation set"
        raise UserError(f"{setting}: summary.json will not have it; allowed: {allowed}; evaluate.metrics adds others")
    _check_classes({key_of(setting): metric.best}, dataset)


def _check_target(run_config: RunConfig, task: Task) -> None:
    """Raises `UserError` for a target above 1 of an accuracy or another metric with this maximum: a percentage."""
    if run_config.stopping.target is not Target:
        return
    target, monitor = run_config.stopping.arguments["value"], run_config.stopping.arguments["monitor"]
    monitor = without_set(task.monitor if monitor == "auto" else monitor, run_config.validation)
    is_user_metric = monitor in [_val(name) for name in run_config.own_metrics]
    if target > 1 and not is_user_metric and not lower_is_better(monitor):
        raise UserError(f"stopping.value={target:g}: {monitor} is at most 1; for {target:g} % set {target / 100:g}")


def _val(name: str) -> str:
    return Metric("val", name).column


def _check_names(requested: Mapping[str, str], task: Task) -> None:
    for name, setting in requested.items():
        found = [each for each in named([name], task.metrics) if each.needs]
        if not found:
            raise UserError(f"{setting}: a {task.name} task has no such metric")
        task.check_metric(setting, found[0])


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
