"""Checks combinations of settings. Each message names the key, its value, and which key to change."""

import os
from typing import Any

import torch

from dlopt.adapt import none as no_adapters
from dlopt.basics.errors import UserError
from dlopt.config.overrides import value_of
from dlopt.config.run_config import RunConfig
from dlopt.config.schema import Component, dotted_name
from dlopt.config.settings_rules import check_monitor, shown_accumulate
from dlopt.data.generated import drawn
from dlopt.init import default
from dlopt.losses import Distillation
from dlopt.metrics.names import Direction, Metric, known_direction, without_set
from dlopt.optim import Prodigy
from dlopt.optim.traits import is_schedule_free
from dlopt.tasks.user import UserTask

_PER_CORE = 64  # threads and data workers per core; larger values are almost certainly typos
PROCESSES_PER_CORE = 16  # training processes per core, each of which imports torch


def check_combinations(run_config: RunConfig) -> None:
    """Checks the config as far as possible before data are read, after `check_settings`. Raises `UserError`."""
    settings = run_config.settings
    _check_monitors(run_config)
    if run_config.auto_lr and settings.scale_lr != "none":
        raise UserError(
            f"scale_lr={settings.scale_lr}: optimizer.lr=auto already chooses the learning rate for this batch size; "
            "set scale_lr=none, or set optimizer.lr to a number"
        )
    if settings.scale_lr != "none" and _learning_rate(run_config.optimizer) is None:
        raise UserError(
            f"scale_lr={settings.scale_lr}: {run_config.optimizer.choice} has no learning rate to scale; set "
            "optimizer.lr to a number, or scale_lr=none"
        )
    if settings.ema is not None and is_schedule_free(run_config.optimizer.target):
        raise UserError(
            f"ema={settings.ema}: {run_config.optimizer.target.__name__} evaluates an average of its own; use ema=null "
            "or another optimizer"
        )
    _check_device(run_config)
    _check_precision(run_config)
    size = run_config.data_settings.batch_size
    if isinstance(size, int) and settings.micro_batches > size:
        raise UserError(
            f"accumulate={shown_accumulate(settings)}: more micro-batches than samples in a batch "
            f"(data.batch_size={size})"
        )
    if settings.batch_growth is not None:
        _check_growth(run_config)
    if run_config.model.arguments.get("pretrained") and run_config.init.target is not default:
        raise UserError(
            f"{run_config.init.choice}: would overwrite the pretrained weights; "
            "use init=default or model.pretrained=false"
        )
    if run_config.init.takes("growth") and run_config.adapt.target is not no_adapters:
        raise UserError(
            f"{run_config.init.choice}: sets learning rates of the model's own weights, which "
            f"{run_config.adapt.choice} freezes; use another init, or adapt=none"
        )
    if run_config.decay_settings.width != "none" and not run_config.init.takes("growth"):
        raise UserError(
            f"decay.width={run_config.decay_settings.width}: {run_config.init.choice} has no width to refer to; use "
            "decay.width=none, or init=mup"
        )
    if getattr(run_config.loss.target, "predicts_pixels", False):
        _check_pixels(run_config)
    if run_config.loss.target is Distillation:
        _check_distillation(run_config)
    if run_config.task.is_a(UserTask):
        _check_own_task(run_config)
    elif run_config.data.target is drawn:
        raise UserError("data=drawn: has no samples; it is for a task that draws them: task=mine.Task")


def _check_growth(run_config: RunConfig) -> None:
    """Refuses what needs the same number of micro-batches in every update."""
    mode, growth = run_config.parallel, f"accumulate={shown_accumulate(run_config.settings)}"
    if run_config.data_settings.batch_size == "full":
        raise UserError(f"{growth}: data.batch_size=full cannot grow; set a number of samples")
    if value_of(mode.choice) == "pipeline":
        raise UserError(
            f"{growth}: {mode.choice} has the same micro-batches in every update; use a number, or parallel=ddp or fsdp"
        )
    if mode.arguments.get("static_graph"):
        raise UserError(
            f"parallel.static_graph=true: not supported with {growth}, where only the last backward averages "
            "gradients; set parallel.static_graph=false"
        )


def _check_own_task(run_config: RunConfig) -> None:
    """Refuses what needs outputs and targets, and what splits a model or a batch that the loss couples."""
    settings, mode, task = run_config.settings, run_config.parallel, run_config.task
    name = f"task={dotted_name(task.target)}"
    if value_of(mode.choice) not in ("single", "ddp", "fsdp"):
        raise UserError(f"{mode.choice}: splits tensors, which {name} does not know; use parallel=ddp or parallel=fsdp")
    if settings.norm_statistics != "running":
        raise UserError(f"norm_statistics={settings.norm_statistics}: {name} calls the model itself; use running")
    if run_config.user_metrics:
        functions = ",".join(run_config.user_metrics)
        raise UserError(
            f"evaluate.metrics=[{functions}]: {name} has no outputs to measure; return it from its evaluate"
        )
    if hasattr(run_config.sampler.target, "observe"):
        raise UserError(
            f"{run_config.sampler.choice}: needs losses of single samples, which {name} has not; use sampler=random"
        )
    if not getattr(task.target, "couples_batch", False):
        return
    reason = f"the loss of {name} couples the samples of a batch (couples_batch)"
    if settings.batch_growth is not None or settings.micro_batches > 1:
        raise UserError(f"accumulate={shown_accumulate(settings)}: {reason}; use accumulate=1")
    if settings.on_out_of_memory == "halve":
        raise UserError(f"on_out_of_memory=halve: {reason}; use on_out_of_memory=stop")
    if value_of(mode.choice) != "single":
        raise UserError(f"{mode.choice}: {reason}; use parallel=single")


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


def _learning_rate(optimizer: Component) -> Any:
    """Returns the argument lr (for SAM, of its base optimizer); None if there is none."""
    base = optimizer.arguments.get("base")
    lr = optimizer.arguments.get("lr")
    return _learning_rate(base) if lr is None and isinstance(base, Component) else lr


def _check_pixels(run_config: RunConfig) -> None:
    model = run_config.model
    if not getattr(model.target, "reconstructs", False):
        raise UserError("loss=pixel_cross_entropy: the targets must be the pixels of images; use model=autoencoder")
    if model.arguments.get("output") == "sigmoid":
        raise UserError("model.output=sigmoid: loss=pixel_cross_entropy applies a sigmoid; use model.output=identity")


def _check_distillation(run_config: RunConfig) -> None:
    """Refuses what computes the loss without the teacher, and modes in which a rank has no whole samples or outputs."""
    settings, mode = run_config.settings, run_config.parallel
    if value_of(mode.choice) not in ("single", "ddp", "fsdp"):
        raise UserError(
            f"{mode.choice}: loss=distillation needs whole samples and outputs on every rank; use parallel=ddp or "
            "parallel=fsdp"
        )
    if hasattr(run_config.sampler.target, "observe"):
        raise UserError(
            f"{run_config.sampler.choice}: needs losses of single samples, which loss=distillation has not; use "
            "sampler=random"
        )
    if names := [name for name in settings.diagnostics if name != "activations"]:
        raise UserError(
            f"diagnostics=[{','.join(names)}]: computed without the teacher of loss=distillation; use "
            "diagnostics=[activations] or []"
        )


def _check_device(run_config: RunConfig) -> None:
    settings = run_config.settings
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: no CUDA device is available; use device=cpu or device=auto")
    if settings.device == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps: no Apple GPU is available; use device=cpu or device=auto")
    on_cpu = settings.device == "cpu" or (settings.device == "auto" and not torch.accelerator.is_available())
    if on_cpu and settings.precision in ("fp16", "tf32"):
        raise UserError(
            f"precision={settings.precision}: not supported on a CPU; use precision=bf16 or fp32, or device=cuda"
        )
    if settings.device == "mps" and settings.precision in ("fp64", "tf32", "bf16_pure"):
        raise UserError(
            f"precision={settings.precision}: not supported on an Apple GPU; use precision=fp32, bf16 or fp16"
        )
    cores = os.cpu_count() or 1
    for key, number, per_core in (
        ("threads", settings.threads, _PER_CORE),
        ("data.workers", run_config.data_settings.workers, _PER_CORE),
        ("parallel.processes", run_config.parallel.arguments.get("processes"), PROCESSES_PER_CORE),
    ):
        if isinstance(number, int) and number > per_core * cores:
            raise UserError(f"{key}={number}: this machine has {cores} cores; at most {per_core * cores}")


def _check_precision(run_config: RunConfig) -> None:
    """Refuses what bf16 weights do not resolve."""
    settings, key = run_config.settings, "precision=bf16_pure"
    if settings.precision != "bf16_pure":
        return
    if settings.ema is not None:
        raise UserError(
            f"ema={settings.ema}: the average moves by less than the weights of {key} resolve; "
            "use precision=bf16 or ema=null"
        )
    if is_schedule_free(run_config.optimizer.target):
        raise UserError(
            f"{key}: {run_config.optimizer.target.__name__} evaluates an average, which moves by less than bf16 "
            "weights resolve; use precision=bf16 or another optimizer"
        )
    if run_config.optimizer.is_a(Prodigy):
        raise UserError(
            f"{key}: Prodigy estimates its learning rate from the distance to the initial weights, which is at first "
            "less than bf16 resolves; use precision=bf16 or another optimizer"
        )
    if "curvature" in settings.diagnostics:
        raise UserError(f"diagnostics=[curvature]: {key} does not resolve second derivatives; use precision=bf16")
