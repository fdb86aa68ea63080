"""Builds a trainer for diagnosis, without a run folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dlopt.analysis.diagnosis.layers import layer_parameters
from dlopt.analysis.diagnosis.measuring import ClippedNorm
from dlopt.config.experiment import Experiment
from dlopt.config.schema import Component
from dlopt.models.layers import evaluation_mode
from dlopt.parallel.mode import Mode
from dlopt.training.build import Workload, build_workload, load_weights
from dlopt.training.trainer import Trainer, dry_run

_SMALL = 2_000_000  # multiply-accumulates: some 50 microseconds of one core


def prepare(
    experiment: Experiment, folder: Path, state: Mapping[str, Any] | None = None, *, parallel: Mode | None = None
) -> tuple[Workload, Trainer]:
    """Builds data, model and optimizer as `dlopt train` does, or restores them from a checkpoint's `state`.

    Writes nothing; `folder` is a placeholder for the run folder. `parallel`: see `build_workload`.
    """
    workload = build_workload(experiment, None if state is None else state["normalize"], parallel=parallel)
    if state is not None and experiment.auto_lr:
        workload = workload.with_lr(state["progress"]["found_lr"])
    trainer = dry_run(workload, folder, state, observers=[ClippedNorm()])
    if state is not None:
        workload.module.load_state_dict(state["model"])
        trainer.load_optimizer(state["optimizer"])
        trainer.step.schedule.load_state_dict(state["schedule"])
        for name in ("epoch", "position", "step"):
            setattr(trainer.progress, name, state["progress"][name])
    elif experiment.settings.init_from is not None:
        load_weights(workload.module, Path(experiment.settings.init_from))
    return workload, trainer


def limit_threads(workload: Workload, trainer: Trainer) -> None:
    """Limits torch to one thread for small layers, where synchronizing threads costs more than it saves.

    Decides by the multiply-accumulates per batch and weight layer, not by a timing, so that results are reproducible.
    Does nothing unless threads=auto.
    """
    from torch.utils.flop_counter import FlopCounterMode

    if workload.experiment.settings.threads != "auto" or workload.device.type != "cpu":
        return
    inputs, _ = next(iter(trainer.batches.epoch(trainer.progress.epoch, 0, 0)))
    with evaluation_mode(workload.module), torch.no_grad(), FlopCounterMode(display=False) as counter:
        workload.precision.autocast(workload.module)(inputs[:1])
    if counter.get_total_flops() / 2 * len(inputs) < _SMALL * len(layer_parameters(workload.module)):
        torch.set_num_threads(1)


def has_skips(model: Component) -> bool:
    """Returns whether the model has skip connections, by its class name and keys."""
    name = model.target.__name__
    return bool(model.arguments.get("residual", any(word in name for word in ("ResNet", "ViT", "GPT", "ResidualMLP"))))
