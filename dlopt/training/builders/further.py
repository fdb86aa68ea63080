"""Tensors of the samples that the loss reads beside the targets (`Samples.further`): weights, and those it names."""

import contextlib
import inspect
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dlopt.augment.mixing import CutMix, Mixup
from dlopt.augment.operation import image_shape, leaves
from dlopt.augment.pipeline import Pipeline
from dlopt.basics.errors import UserError
from dlopt.config.schema import Component
from dlopt.data.samples import Samples
from dlopt.losses import Distillation, Weighted
from dlopt.models.layers import evaluation_mode
from dlopt.training.builders.phases import WholeModel

WEIGHT = "weight"
_MODES = ("single", "ddp", "fsdp")  # whose processes compute the loss of whole samples
_MIXING = (Mixup, CutMix)


def names_of(loss: nn.Module) -> tuple[str, ...]:
    """Returns the tensors that a loss reads: the keyword-only arguments of `forward` without a default."""
    parameters: Iterable[inspect.Parameter] = ()
    with contextlib.suppress(TypeError, ValueError):  # no function, or one without a signature
        parameters = inspect.signature(loss.forward).parameters.values()
    return tuple(each.name for each in parameters if each.kind is each.KEYWORD_ONLY and each.default is each.empty)


def require_further(component: Component, loss: nn.Module, sets: Mapping[str, Samples | None]) -> None:
    """Raises `UserError` if one of the `sets`, by name, lacks a tensor that the loss `component` reads."""
    for name in names_of(loss):
        if name == WEIGHT:
            raise UserError(f"{component.choice}: reads {WEIGHT}, by which dlopt multiplies the loss; use another name")
        for which, samples in ((which, each) for which, each in sets.items() if each is not None):
            if name not in samples.further:
                found = ", ".join(samples.further) or "none"
                raise UserError(f"{component.choice}: reads {name}, which the {which} set lacks; it has: {found}")
            if (count := len(samples.further[name])) != len(samples):
                raise UserError(f"{component.choice}: reads {name}: {count} values for {len(samples)} {which} samples")


def named_tensors(model: WholeModel) -> dict[str, Tensor]:
    """Returns the tensors of the training samples that the loss reads.

    Raises `UserError` for what would not pass them to it.
    """
    names = names_of(model.loss)
    if names and (found := _not_passed(model, ", ".join(names))) is not None:
        raise UserError(f"{reader(model)}, but {found}")
    return {name: model.dataset.train.further[name] for name in names}


def reader(model: WholeModel) -> str:
    """Names the loss and what it reads, for messages."""
    return f"{model.run_config.loss.choice}: reads {', '.join(names_of(model.loss))}"


def _not_passed(model: WholeModel, what: str) -> str | None:
    """Says why `what`, tensors of the samples, does not reach the loss, and what to use instead; None if it does."""
    if model.parallel.name not in _MODES:
        return f"parallel={model.parallel.name} does not support it; use parallel={', '.join(_MODES)}"
    if isinstance(model.augment, Pipeline):
        image = image_shape(model.augment.output_shape)
        for each in (leaf for top in model.augment.operations for leaf in (top, *leaves(top, image))):
            if isinstance(each, _MIXING):
                return f"augmentation: {type(each).__name__} mixes samples of different {what}; use another one"
    if model.run_config.settings.diagnostics:
        return f"diagnostics measure the loss without {what}; use diagnostics=[]"
    return None


def sample_weights(model: WholeModel) -> Tensor | None:
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
    if (found := _unweighted(model)) is not None:
        raise UserError(f"data.weight: {found}, or leave out data.weight")
    return weights / weights.mean()


def _unweighted(model: WholeModel) -> str | None:
    """Returns what does not support weights, and what to use instead."""
    run_config, loss = model.run_config, model.loss
    if model.task.calls_model:
        return f"task={model.task.name} computes its own loss, without weights; use task=auto"
    if isinstance(loss, Distillation):
        return "loss=distillation has no weights; use loss=cross_entropy"
    if (found := _not_passed(model, "weights")) is not None:
        return found
    is_own = not run_config.loss.target.__module__.startswith("dlopt.")
    if is_own and not _is_mean_of_samples(model):
        return f"{run_config.loss.choice} is no mean over independent samples; use loss=cross_entropy or loss=mse"
    return None


def _is_mean_of_samples(model: WholeModel) -> bool:
    """Returns whether the loss of some samples is the mean of their losses as batches of one."""
    samples = model.dataset.train
    targets = samples.targets[:4].to(model.device)
    further = {name: samples.further[name][:4].to(model.device) for name in names_of(model.loss)}
    dtype = model.task.input_dtype(model.precision.dtype)
    try:
        with torch.no_grad(), torch.random.fork_rng([]), evaluation_mode(model.module):
            inputs = model.task.random_inputs((len(targets), *model.shape)).to(model.device, dtype)
            shape = model.module(inputs).shape  # a loss of the user's own may need other outputs than the task
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
