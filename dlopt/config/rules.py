"""Checks settings that depend on each other, or on the machine. `conflicts` has those that exclude each other."""

import os

import torch

from dlopt.basics.errors import UserError
from dlopt.config.parameters import as_typed
from dlopt.config.run_config import RunConfig
from dlopt.config.settings_rules import check_monitor
from dlopt.metrics.names import VAL_LOSS, Direction, Metric, known_direction, set_of, without_set

_PER_CORE = 64  # threads and data workers per core; larger values are almost certainly typos
PROCESSES_PER_CORE = 16  # training processes per core, each of which imports torch


def check_combinations(run_config: RunConfig) -> None:
    """Checks the config as far as possible before data are read, after `refuse_conflicts`. Raises `UserError`."""
    settings, size = run_config.settings, run_config.data_settings.batch_size
    _check_monitors(run_config)
    _check_device(run_config)
    if isinstance(size, int) and settings.micro_batches > size:
        raise UserError(
            f"accumulate={as_typed(settings.accumulate)}: more micro-batches than samples in a batch "
            f"(data.batch_size={size})"
        )


def _check_monitors(run_config: RunConfig) -> None:
    """Checks the monitored metrics and their directions; with monitor=auto, the task knows which one it is."""
    settings, user_metrics = run_config.settings, [Metric("val", name).column for name in run_config.own_metrics]
    direction, plateau, sets = settings.monitor_mode, run_config.schedule.arguments, run_config.validation
    monitors = {"monitor": settings.monitor}
    if "monitor" in run_config.stopping.arguments:
        monitor = monitors["stopping.monitor"] = run_config.stopping.arguments["monitor"]
        if monitor != "train_loss" or "value" not in run_config.stopping.arguments:  # stopping=target: debug=overfit
            check_monitor("stopping.monitor", monitor, run_config.own_metrics, direction, sets)
    if "monitor" in plateau:
        metric, of_plateau = plateau["monitor"], plateau.get("mode", "auto")
        known = known_direction(without_set(metric, sets)) or (direction if metric in monitors.values() else None)
        if of_plateau != "auto" and known not in (None, of_plateau):
            raise UserError(
                f"schedule.mode={of_plateau}: {metric} is better when {_BETTER[known]}; set schedule.mode=auto"
            )
        if of_plateau == "auto":
            monitors["schedule.monitor"] = metric
        if of_plateau == "auto" and without_set(metric, sets) in user_metrics:
            check_monitor("schedule.monitor", metric, run_config.own_metrics, direction, sets)
    if direction is None:
        return
    metrics = [without_set(monitor, sets) for monitor in monitors.values()]
    described = dict.fromkeys(metric for metric in metrics if metric in user_metrics)
    if len(described) > 1:
        raise UserError(
            f"monitor_mode={direction}: cannot hold for {' and '.join(described)}, which are two metrics of your own; "
            "monitor one of them"
        )
    if not described and settings.monitor != "auto":
        check_direction(without_set(settings.monitor, sets), direction)


_BETTER = {"min": "smaller", "max": "larger"}


def check_direction(monitor: str, direction: Direction | None) -> None:
    """Raises `UserError` if `monitor_mode` contradicts the direction of a metric of dlopt."""
    known = known_direction(monitor)
    if known is not None and direction not in (None, known):
        raise UserError(
            f"monitor_mode={direction}: {monitor} is better when {_BETTER[known]}; set monitor_mode=null, which is for "
            "metrics of your own"
        )


def require_validation_set(run_config: RunConfig) -> None:
    """Raises `UserError` for a setting that needs a validation set, in a run without any."""
    settings = run_config.settings
    for key, value, unused in (
        ("monitor", settings.monitor, "auto"),
        ("monitor_mode", settings.monitor_mode, None),
        ("evaluate.metrics", [*settings.evaluate.metrics], []),
        ("evaluate.samples", settings.evaluate.samples, None),
    ):
        if value != unused:
            raise _without_validation_set(f"{key}={as_typed(value)}", f"{key}={as_typed(unused)}")
    for component, other in ((run_config.stopping, "stopping=none"), (run_config.schedule, "schedule=cosine")):
        if "monitor" in component.arguments:
            raise _without_validation_set(component.choice, other)


def _without_validation_set(setting: str, other: str) -> UserError:
    return UserError(f"{setting}: needs a validation set; set data.val_split=0.1 or {other}")


def require_named_monitors(run_config: RunConfig) -> None:
    """Raises `UserError` for a monitor of the validation set without a name, if all sets of the run have names."""
    for key, monitor in run_config.monitors.items():
        if not set_of(monitor, run_config.validation) and monitor != "train_loss":
            allowed = ", ".join(VAL_LOSS.on_set(name).column for name in run_config.validation)
            raise UserError(
                f"{key}={monitor}: the data have no validation set without a name; set {key} to a metric of one that "
                f"has a name: {allowed}, ..."
            )


def _check_device(run_config: RunConfig) -> None:
    settings = run_config.settings
    if settings.dry_run is True:  # rehearses a run of other machines, too
        return
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: no CUDA device is available; use device=cpu or device=auto")
    if settings.device == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps: no Apple GPU is available; use device=cpu or device=auto")
    cores = os.cpu_count() or 1
    for key, number, per_core in (
        ("threads", settings.threads, _PER_CORE),
        ("data.workers", run_config.data_settings.workers, _PER_CORE),
        ("parallel.processes", run_config.parallel.arguments.get("processes"), PROCESSES_PER_CORE),
    ):
        if isinstance(number, int) and number > per_core * cores:
            raise UserError(f"{key}={number}: this machine has {cores} cores; at most {per_core * cores}")
