"""Gradient clipping: pure functions of the reduced gradients, applied inside the step's closure."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from dlopt.parallel.shards import local, unit_norm
from dlopt.ranges import NonNegative, Positive

Norm = Callable[[Sequence[Tensor]], Tensor]
"""The 2-norm of tensors taken as one vector (scalar tensor), over all processes that have parts of the model."""

plain_norm: Norm = torch.nn.utils.get_total_norm


class Clip(Protocol):
    """Clips the gradients in place; returns their global 2-norm before clipping where it was computed anyway."""

    def __call__(self, parameters: Sequence[nn.Parameter], norm: Norm = plain_norm) -> Tensor | None: ...


def gradient_norm(parameters: Sequence[nn.Parameter], norm: Norm = plain_norm) -> Tensor:
    """The 2-norm of all gradients taken as one vector (scalar tensor, no host synchronization)."""
    return norm([p.grad for p in parameters if p.grad is not None])


class Unclipped:
    def __call__(self, parameters: Sequence[nn.Parameter], norm: Norm = plain_norm) -> None:
        return None


class ByNorm:
    """Scales the gradient by min(1, max_norm / norm) (Pascanu, Mikolov & Bengio 2013, algorithm 1)."""

    def __init__(self, *, max_norm: Positive) -> None:
        self.max_norm = max_norm

    @torch.no_grad()
    def __call__(self, parameters: Sequence[nn.Parameter], norm: Norm = plain_norm) -> Tensor:
        total = gradient_norm(parameters, norm)
        factor = (self.max_norm / (total + 1e-6)).clamp(max=1.0)
        if gradients := _own(parameters):
            torch._foreach_mul_(gradients, factor)
        return total


class ByValue:
    """Clamps every entry to [-max_value, max_value]."""

    def __init__(self, *, max_value: Positive) -> None:
        self.max_value = max_value

    @torch.no_grad()
    def __call__(self, parameters: Sequence[nn.Parameter], norm: Norm = plain_norm) -> None:
        if gradients := _own(parameters):
            torch._foreach_clamp_min_(gradients, -self.max_value)
            torch._foreach_clamp_max_(gradients, self.max_value)


class Adaptive:
    """Scales each unit's gradient to at most `clipping` times its weight norm (AGC; Brock et al. 2021, eq. 3).

    A unit is one output of a linear or convolutional layer (one row of the weight); a bias or gain is one unit as a
    whole, as in the authors' code. The final linear layer is left alone, as in the paper.
    """

    def __init__(self, model: nn.Module, *, clipping: Positive, eps: NonNegative) -> None:
        self.clipping = clipping
        self.eps = eps
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self.exempt = set(linears[-1].parameters()) if linears else set()

    @torch.no_grad()
    def __call__(self, parameters: Sequence[nn.Parameter], norm: Norm = plain_norm) -> None:
        for parameter in parameters:
            if parameter.grad is None or parameter in self.exempt:
                continue
            limit = unit_norm(parameter).clamp_(min=self.eps).mul_(self.clipping)
            norms = unit_norm(parameter.grad)
            local(parameter.grad).mul_((limit / norms.clamp(min=1e-6)).clamp_(max=1.0))


def _own(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """What this process has of the gradients."""
    return [local(p.grad) for p in parameters if p.grad is not None]
