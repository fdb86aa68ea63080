"""Lets a model process an empty batch: the shard of a rank that gets none of the samples of a small last batch."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dlopt.basics.errors import UserError


class _OneSample:
    """Hooks around a forward pass, which replace an empty batch by one sample of zeros, and drop its outputs.

    The graph of the outputs stays, so that the backward pass reaches all parameters, with gradients of zero, and all
    collectives.
    """

    def __init__(self) -> None:
        self.replaced = False

    def before(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        self.replaced = len(inputs[0]) == 0
        if not self.replaced:
            return None
        if model.training and any(isinstance(m, _BatchNorm) for m in model.modules()):
            raise UserError(
                "data.batch_size: the last batch has too few samples for all processes, and the model fails for an "
                "empty batch; with batch norm, use larger batches, data.drop_last=true, or flatten(1) in place of view"
            )
        return (inputs[0].new_zeros(1, *inputs[0].shape[1:]),)

    def after(self, model: nn.Module, inputs: Any, outputs: Tensor) -> Tensor:
        return outputs[:0] if self.replaced else outputs


def accept_empty_batches(model: nn.Module) -> None:
    """Makes a model that fails for an empty batch return empty outputs.

    Synchronized batch norm would count the sample of zeros; training then raises `UserError`.
    """
    hooks = _OneSample()
    model.register_forward_pre_hook(hooks.before)
    model.register_forward_hook(hooks.after)
