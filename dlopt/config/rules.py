"""Combinations that cannot work, in one place. Each message names the key, its value, and which key to change."""

import os
import re
from typing import TYPE_CHECKING

from dlopt.errors import UserError

if TYPE_CHECKING:
    from dlopt.config.experiment import Experiment

_MAX_NAME = 100
_MONITORS = re.compile(r"auto|val_\w+")


def check_combinations(experiment: "Experiment") -> None:
    """Everything that can be known before data are read. Raises `UserError`."""
    settings = experiment.settings
    _check_name(settings.name)
    _check_monitor("monitor", settings.monitor)
    if "monitor" in experiment.stopping.arguments:
        _check_monitor("stopping.monitor", experiment.stopping.arguments["monitor"])
    _check_device(experiment)
    _check_batch(experiment)


def _check_name(name: str) -> None:
    if not name.strip() or name in (".", "..") or len(name.encode()) > _MAX_NAME:
        raise UserError(f"name={name}: a run's name has between 1 and {_MAX_NAME} bytes")
    if any(character in name for character in "/\\\0\n\r\t") or not name.isprintable():
        raise UserError(f"name={name!r}: a run's name is one folder name: no slashes, no control characters")


def _check_monitor(key: str, monitor: str) -> None:
    if not _MONITORS.fullmatch(monitor):
        raise UserError(f"{key}={monitor}: only validation figures are monitored: auto, val_loss, val_accuracy")


def _check_device(experiment: "Experiment") -> None:
    import torch

    settings = experiment.settings
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: there is no CUDA device here; use device=cpu or device=auto")
    if settings.device == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps: there is no Apple GPU here; use device=cpu or device=auto")
    on_cpu = settings.device == "cpu" or (settings.device == "auto" and not torch.accelerator.is_available())
    if on_cpu and settings.precision in ("fp16", "tf32"):
        raise UserError(f"precision={settings.precision}: not on a CPU; use precision=bf16 or fp32, or device=cuda")
    on_mps = settings.device == "mps"
    if on_mps and settings.precision in ("fp64", "tf32"):
        raise UserError(f"precision={settings.precision}: not on an Apple GPU; use precision=fp32, bf16 or fp16")
    cores = os.cpu_count() or 1
    if isinstance(settings.threads, int) and settings.threads > 64 * cores:
        raise UserError(f"threads={settings.threads}: this machine has {cores} cores; use threads=auto")


def _check_batch(experiment: "Experiment") -> None:
    size = experiment.data_settings.batch_size
    accumulate = experiment.settings.accumulate
    if isinstance(size, int) and accumulate > size:
        raise UserError(f"accumulate={accumulate}: a batch of data.batch_size={size} has fewer samples to cut")
