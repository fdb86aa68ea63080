"""Checks combinations of settings. Each message names the key, its value, and which key to change."""

import os
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch

from dlopt.adapt import none as no_adapters
from dlopt.config.experiment import Experiment, Settings
from dlopt.config.schema import Component
from dlopt.errors import UserError, did_you_mean, install
from dlopt.init import default
from dlopt.metric_names import HIGHER, LOWER, has_direction
from dlopt.optim.traits import is_schedule_free

_MAX_NAME = 100
_PER_CORE = 64  # threads and data workers per core; larger values are almost certainly typos
PROCESSES_PER_CORE = 16  # training processes per core, each of which imports torch
_MONITORS = ("auto", "val_loss", "val_accuracy")
_EXTRA = (
    "val_top5_accuracy", "val_macro_f1", "val_calibration_error", "val_worst_class_accuracy", "val_r2", "val_mae",
)  # fmt: skip
_CLASS = "val_class_accuracy/"


def check_combinations(experiment: Experiment) -> None:
    """Checks everything that is known before data are read. Raises `UserError`."""
    settings = experiment.settings
    _check_name(settings.name)
    for key, path in (("resume", settings.resume), ("init_from", settings.init_from)):
        if path == "":
            raise UserError(f"{key}=: the path of a checkpoint is needed, or {key}=null")
    if settings.dry_run and settings.resume is not None:
        raise UserError(f"dry_run=true: estimates a whole run, not the rest of one; leave out resume={settings.resume}")
    _check_tracking(settings.tracking)
    _check_monitor("monitor", settings.monitor, experiment.own_metrics)
    if "monitor" in experiment.stopping.arguments:
        _check_monitor("stopping.monitor", experiment.stopping.arguments["monitor"], experiment.own_metrics)
    if (monitor := experiment.schedule.arguments.get("monitor")) in [f"val_{name}" for name in experiment.own_metrics]:
        _check_monitor("schedule.monitor", monitor, experiment.own_metrics)
    _check_diagnostics(settings)
    _check_evaluation(settings)
    if experiment.auto_lr and settings.scale_lr != "none":
        raise UserError(
            f"scale_lr={settings.scale_lr}: optimizer.lr=auto already chooses the learning rate for this batch size; "
            "set scale_lr=none, or set optimizer.lr to a number"
        )
    if settings.scale_lr != "none" and _learning_rate(experiment.optimizer) is None:
        raise UserError(
            f"scale_lr={settings.scale_lr}: {experiment.optimizer.choice} has no learning rate to scale; set "
            "optimizer.lr to a number, or scale_lr=none"
        )
    if settings.ema is not None and is_schedule_free(experiment.optimizer.target):
        raise UserError(
            f"ema={settings.ema}: {experiment.optimizer.target.__name__} evaluates an average of its own; use ema=null "
            "or another optimizer"
        )
    _check_device(experiment)
    _check_precision(experiment)
    _check_compile(settings)
    _check_batch(experiment)
    if experiment.model.arguments.get("pretrained") and experiment.init.target is not default:
        raise UserError(
            f"{experiment.init.choice}: would overwrite the pretrained weights; "
            "use init=default or model.pretrained=false"
        )
    if experiment.init.takes("growth") and experiment.adapt.target is not no_adapters:
        raise UserError(
            f"{experiment.init.choice}: sets learning rates of the model's own weights, which "
            f"{experiment.adapt.choice} freezes; use another init, or adapt=none"
        )
    if getattr(experiment.loss.target, "predicts_pixels", False):
        _check_pixels(experiment)


def _learning_rate(optimizer: Component) -> Any:
    """Returns the argument lr, of SAM that of its base optimizer; None if there is none."""
    base = optimizer.arguments.get("base")
    lr = optimizer.arguments.get("lr")
    return _learning_rate(base) if lr is None and isinstance(base, Component) else lr


def _check_pixels(experiment: Experiment) -> None:
    model = experiment.model
    if not getattr(model.target, "reconstructs", False):
        raise UserError("loss=pixel_cross_entropy: the targets must be the pixels of images; use model=autoencoder")
    if model.arguments.get("output") == "sigmoid":
        raise UserError("model.output=sigmoid: loss=pixel_cross_entropy applies a sigmoid; use model.output=identity")


def _check_name(name: str) -> None:
    if not name.strip() or len(name.encode()) > _MAX_NAME:
        raise UserError(f"name={name}: a run's name must have between 1 and {_MAX_NAME} bytes")
    if name in (".", "..") or any(character in name for character in "/\\\0\n\r\t") or not name.isprintable():
        raise UserError(
            f"name={name!r}: a run's name must be a folder name: not . or .., no slashes, no control characters"
        )


def _check_tracking(sinks: list[Any]) -> None:
    for sink in sinks:
        if sink == "tensorboard":
            continue
        spec = find_spec(sink)
        # A folder `wandb` of logs in the current folder looks like a namespace package, which has no origin.
        if spec is None or spec.origin is None:
            shown = ",".join(sinks)
            raise UserError(f"tracking=[{shown}]: the package {sink} is not installed; {install(f'dlopt[{sink}]')}")


def _check_diagnostics(settings: Settings) -> None:
    if settings.diagnostics and not settings.tracking:
        shown = ",".join(settings.diagnostics)
        raise UserError(f"diagnostics=[{shown}]: requires a tracker; set tracking=[tensorboard]")
    first, last = settings.profile_steps
    if last < first + 2:
        raise UserError(
            f"profile_steps=[{first},{last}]: too short, since the first update profiles memory and the others time; "
            f"set at least [{first},{first + 2}]"
        )


def _check_evaluation(settings: Settings) -> None:
    every = settings.evaluate
    if every.every_steps is not None and every.every_epochs != 1:
        raise UserError(
            f"evaluate.every_steps={every.every_steps} and evaluate.every_epochs={every.every_epochs}: exclude each "
            "other; set evaluate.every_epochs=1 or evaluate.every_steps=null"
        )


def _check_monitor(key: str, monitor: str, own: Iterable[str] = ()) -> None:
    own = [f"val_{name}" for name in own]
    allowed = (*_MONITORS, *_EXTRA, *own)
    if monitor in own and not has_direction(monitor):
        higher, lower = (", ".join(f"_{word}" for word in words) for words in (HIGHER, LOWER))
        raise UserError(
            f"{key}={monitor}: whether a larger value is better must follow from the name of the function; let it end "
            f"in one of {higher} (larger) or {lower} (smaller)"
        )
    if monitor not in allowed and not monitor.startswith(_CLASS):
        raise UserError(
            f"{key}={monitor}: there is no validation metric of this name; {did_you_mean(monitor, allowed)}"
            f"allowed: {', '.join(allowed)}, {_CLASS}NAME"
        )


def extra_metric(monitor: str) -> str | None:
    """Returns the entry of `evaluate.metrics` that the monitored metric requires; None if every run has the metric."""
    if monitor in _MONITORS:
        return None
    name = monitor.removeprefix("val_")
    return "class_accuracy" if name == "worst_class_accuracy" or monitor.startswith(_CLASS) else name


def _check_device(experiment: Experiment) -> None:
    settings = experiment.settings
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
        ("data.workers", experiment.data_settings.workers, _PER_CORE),
        ("parallel.processes", experiment.parallel.arguments.get("processes"), PROCESSES_PER_CORE),
    ):
        if isinstance(number, int) and number > per_core * cores:
            raise UserError(f"{key}={number}: this machine has {cores} cores; at most {per_core * cores}")


def _check_precision(experiment: Experiment) -> None:
    """Refuses what bf16 weights do not resolve."""
    settings, key = experiment.settings, "precision=bf16_pure"
    if settings.precision != "bf16_pure":
        return
    if settings.ema is not None:
        raise UserError(
            f"ema={settings.ema}: the average moves by less than the weights of {key} resolve; "
            "use precision=bf16 or ema=null"
        )
    if is_schedule_free(experiment.optimizer.target):
        raise UserError(
            f"{key}: {experiment.optimizer.target.__name__} evaluates an average, which moves by less than bf16 "
            "weights resolve; use precision=bf16 or another optimizer"
        )
    if "curvature" in settings.diagnostics:
        raise UserError(f"diagnostics=[curvature]: {key} does not resolve second derivatives; use precision=bf16")


def _check_compile(settings: Settings) -> None:
    """Refuses what torch.compile and its CUDA graphs, in which each pass overwrites the previous, do not support."""
    if settings.activation_checkpointing != "none" and settings.compile not in (False, "auto"):
        raise UserError(
            f"activation_checkpointing={settings.activation_checkpointing}: not supported with "
            f"compile={str(settings.compile).lower()}, whose compiler decides what to recompute; use compile=false, or "
            "activation_checkpointing=none"
        )
    if settings.compile not in ("reduce-overhead", "max-autotune"):
        return
    advice = "use compile=max-autotune-no-cudagraphs"
    if settings.cuda_graphs is True:
        raise UserError(f"cuda_graphs=true: compile={settings.compile} records CUDA graphs of its own; {advice}")
    if settings.accumulate > 1:
        raise UserError(
            f"accumulate={settings.accumulate}: the CUDA graphs of compile={settings.compile} overwrite the gradients "
            f"of the previous micro-batch; {advice}"
        )


def _check_batch(experiment: Experiment) -> None:
    size = experiment.data_settings.batch_size
    accumulate = experiment.settings.accumulate
    if isinstance(size, int) and accumulate > size:
        raise UserError(f"accumulate={accumulate}: more micro-batches than samples in a batch (data.batch_size={size})")
