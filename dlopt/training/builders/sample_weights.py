"""Weights of the training samples in the loss: the tensor `weight` of the data (`Samples.further`)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.losses import Distillation, Weighted
from dlopt.models.layers import evaluation_mode
from dlopt.training.builders.further import WEIGHT, names_of, obstacle
from dlopt.training.builders.phases import WholeModel

if TYPE_CHECKING:
    from dlopt.training.builders.workload import Workload


def sample_weights(model: "Workload") -> Tensor | None:
    """Returns the weights of the training samples, float64 [N] of mean 1; None if there are none, or if all are equal.

    Raises `UserError` for a weight that is negative or not finite, and for what the weighted loss does not support.
    """
    samples = model.dataset.train
    if WEIGHT not in samples.further:
        return None
    weights = samples.further[WEIGHT].double()
    if weights.shape != (len(samples),):
        raise UserError(f"data.weight: has the shape {list(weights.shape)}; must have one number per sample")
    wrong = (~(weights.isfinite() & (weights >= 0))).nonzero()
    if len(wrong):
        index = int(wrong[0])
        place = samples.place(index) or f"training sample {index}"
        raise UserError(f"data.weight: {place} has the weight {weights[index]:g}; must be finite and not negative")
    if not weights.any():
        raise UserError("data.weight: all training samples have the weight 0; at least one must have more")
    if bool((weights == weights[0]).all()):
        return None
    if (found := _obstacle(model)) is not None:
        raise UserError(f"data.weight: {found}, or leave out data.weight")
    return weights / weights.mean()


def _obstacle(model: "Workload") -> str | None:
    """Returns what does not support weights, and what to use instead."""
    run_config, loss = model.run_config, model.loss
    if model.task.calls_model:
        return f"task={model.task.name} computes its own loss, without weights; use task=auto"
    if isinstance(loss, Distillation):
        return "loss=distillation has no weights; use loss=cross_entropy"
    if (found := obstacle(model, "weights")) is not None:
        return found
    is_own = not run_config.loss.target.__module__.startswith("dlopt.")
    if is_own and not _is_mean_of_samples(model):
        return f"{run_config.loss.choice} is no mean over independent samples; use loss=cross_entropy or loss=mse"
    return None


def _is_mean_of_samples(model: "Workload") -> bool:
    """Returns whether the loss of some samples is the mean of their losses as batches of one."""
    samples = model.dataset.train
    targets = samples.targets[:4].to(model.device)
    further = {name: samples.further[name][:4].to(model.device) for name in names_of(model.loss)}
    dtype = model.task.input_dtype(model.precision.dtype)
    try:
        with torch.no_grad(), torch.random.fork_rng([]), evaluation_mode(model.module):
            inputs = model.task.random_inputs((len(targets), *model.shape)).to(model.device, dtype)
            shape = model.placed.model(inputs).shape  # a loss of the user's own may need other outputs than the task
            outputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device)
            values = Weighted(model.loss).of_samples(outputs, targets, **further)
            return torch.allclose(values.mean(), model.loss(outputs, targets, **further), rtol=1e-3, atol=1e-5)
    except (RuntimeError, TypeError, ValueError):
        return False


def describe_weights(model: WholeModel) -> str | None:
    """Describes the weights of the training samples for the header; None without any."""
    weights = model.dataset.train.further.get(WEIGHT)
    if weights is None:
        return None
    values = f"mean {weights.double().mean():.3g}, {weights.min():.3g} to {weights.max():.3g}"
    if bool((weights == weights[0]).all()):
        return f"weights of the training samples: all {weights[0]:.3g}, which changes nothing"
    return f"weights of the training samples: {values}; validation and test are not weighted"
