"""Tensors of the samples that a loss of the user's own reads beside the targets, by name (`Samples.further`)."""

import inspect
from collections.abc import Mapping

from torch import Tensor, nn

from dlopt.augment.mixing import CutMix, Mixup
from dlopt.augment.operation import image_shape, leaves
from dlopt.augment.pipeline import Pipeline
from dlopt.basics.errors import UserError
from dlopt.config.schema import Component
from dlopt.data.samples import Samples
from dlopt.training.builders.phases import WholeModel

WEIGHT = "weight"  # of the samples, see `dlopt.training.builders.sample_weights`
_MODES = ("single", "ddp", "fsdp")  # whose processes compute the loss of whole samples
_MIXING = (Mixup, CutMix)


def names_of(loss: nn.Module) -> tuple[str, ...]:
    """Returns the tensors that a loss reads: the keyword-only arguments of `forward` without a default."""
    try:
        parameters = inspect.signature(loss.forward).parameters.values()
    except (TypeError, ValueError):  # no function, or without a signature
        return ()
    return tuple(each.name for each in parameters if each.kind is each.KEYWORD_ONLY and each.default is each.empty)


def require_further(component: Component, loss: nn.Module, sets: Mapping[str, Samples | None]) -> None:
    """Raises `UserError` if one of the `sets`, by name, lacks a tensor that the loss `component` reads."""
    for name in names_of(loss):
        if name == WEIGHT:
            raise UserError(f"{component.choice}: reads {WEIGHT}, by which dlopt multiplies the loss; use another name")
        for which, samples in sets.items():
            if samples is None:
                continue
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
    if names and (found := obstacle(model, ", ".join(names))) is not None:
        raise UserError(f"{reader(model)}, but {found}")
    return {name: model.dataset.train.further[name] for name in names}


def reader(model: WholeModel) -> str:
    """Names the loss and what it reads, for messages."""
    return f"{model.run_config.loss.choice}: reads {', '.join(names_of(model.loss))}"


def obstacle(model: WholeModel, what: str) -> str | None:
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
