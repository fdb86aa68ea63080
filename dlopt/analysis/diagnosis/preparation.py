"""A training made ready to be looked at, without a run folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlopt.build.setup import Setup, load_weights, set_up
from dlopt.build.training import unseen
from dlopt.config.experiment import Experiment
from dlopt.config.schema import Component
from dlopt.engine.loop import Training


def prepare(
    experiment: Experiment, folder: Path, state: Mapping[str, Any] | None = None, *, parallel: Any = None
) -> tuple[Setup, Training]:
    """Data, model and optimizer as `dlopt train` would begin with them, or as a checkpoint's `state` left them.

    Nothing is written: `folder` only stands where a run folder would. `parallel`: see `set_up`.
    """
    setup = set_up(experiment, None if state is None else state["normalize"], parallel=parallel)
    training = unseen(setup, folder, state)
    if state is not None:
        setup.module.load_state_dict(state["model"])
        training.update.closure.optimizer.load_state_dict(state["optimizer"])
        training.update.schedule.load_state_dict(state["schedule"])
        for name in ("epoch", "position", "step"):
            setattr(training.progress, name, state["progress"][name])
    elif experiment.settings.init_from is not None:
        load_weights(setup.module, Path(experiment.settings.init_from))
    return setup, training


def has_skips(model: Component) -> bool:
    """Whether the model, by its name and keys, has skip connections."""
    name = model.target.__name__
    return bool(model.arguments.get("residual", any(part in name for part in ("ResNet", "ViT", "ResidualMLP"))))
