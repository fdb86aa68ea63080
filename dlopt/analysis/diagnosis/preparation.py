"""A training made ready to be looked at, without a run folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dlopt.analysis.diagnosis.layers import layer_parameters
from dlopt.config.experiment import Experiment
from dlopt.config.schema import Component
from dlopt.parallel.mode import Mode
from dlopt.training.build import Workload, build_workload, load_weights
from dlopt.training.trainer import Trainer, dry_run

_SMALL = 2_000_000  # multiply-accumulates: some 50 microseconds of one core


def prepare(
    experiment: Experiment, folder: Path, state: Mapping[str, Any] | None = None, *, parallel: Mode | None = None
) -> tuple[Workload, Trainer]:
    """Data, model and optimizer as `dlopt train` would begin with them, or as a checkpoint's `state` left them.

    Nothing is written: `folder` only stands where a run folder would. `parallel`: see `build_workload`.
    """
    workload = build_workload(experiment, None if state is None else state["normalize"], parallel=parallel)
    trainer = dry_run(workload, folder, state)
    if state is not None:
        workload.module.load_state_dict(state["model"])
        trainer.load_optimizer(state["optimizer"])
        trainer.step.schedule.load_state_dict(state["schedule"])
        for name in ("epoch", "position", "step"):
            setattr(trainer.progress, name, state["progress"][name])
    elif experiment.settings.init_from is not None:
        load_weights(workload.module, Path(experiment.settings.init_from))
    return workload, trainer


def spare_threads(workload: Workload, trainer: Trainer) -> None:
    """Sets one thread where the layers are small: others would wait for each other longer than they work.

    The measure is the multiply-accumulates of a batch in the mean layer with weights, so that the figures of a model
    do not depend on the moment. A number of threads that was typed is left alone.
    """
    from torch.utils.flop_counter import FlopCounterMode

    if workload.experiment.settings.threads != "auto" or workload.device.type != "cpu":
        return
    inputs, _ = next(iter(trainer.batches.epoch(trainer.progress.epoch, 0, 0)))
    was_training = workload.module.training
    workload.module.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        workload.precision.autocast(workload.module)(inputs[:1])
    workload.module.train(was_training)
    if counter.get_total_flops() / 2 * len(inputs) < _SMALL * len(layer_parameters(workload.module)):
        torch.set_num_threads(1)


def has_skips(model: Component) -> bool:
    """Whether the model, by its name and keys, has skip connections."""
    name = model.target.__name__
    return bool(model.arguments.get("residual", any(part in name for part in ("ResNet", "ViT", "ResidualMLP"))))
