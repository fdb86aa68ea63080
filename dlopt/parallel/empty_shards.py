"""Lets a model process an empty batch: the shard of a rank that gets none of the samples of a small last batch."""

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dlopt.basics.errors import UserError


class _OneSample:
    """Hooks that replace an empty batch by one sample of zeros, and drop its outputs.

    The graph stays: backward reaches all collectives, and all parameters with zero gradients.
    """

    def __init__(self, batch_size: int | Literal["full"]) -> None:
        self.batch_size = batch_size
        self.replaced = False

    def before(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        self.replaced = len(inputs[0]) == 0
        if not self.replaced:
            return None
        if model.training and any(isinstance(m, _BatchNorm) for m in model.modules()):
            raise UserError(
                f"data.batch_size={self.batch_size}: a (micro-)batch is too small for all processes, and the model, "
                "which has batch norm, fails on an empty shard; use larger batches, or data.drop_last=true"
            )
        return (inputs[0].new_zeros(1, *inputs[0].shape[1:]),)

    def after(self, model: nn.Module, inputs: Any, outputs: Tensor) -> Tensor:
        return outputs[:0] if self.replaced else outputs


def accept_empty_batches(model: nn.Module, batch_size: int | Literal["full"]) -> None:
    """Makes a model that fails for an empty batch return empty outputs.

    Synchronized batch norm would count the sample of zeros; training then raises `UserError`, which names `batch_size`.
    """
    hooks = _OneSample(batch_size)
    model.register_forward_pre_hook(hooks.before)
    model.register_forward_hook(hooks.after)
