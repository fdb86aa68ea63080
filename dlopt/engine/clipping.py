"""Gradient clipping: pure functions of the reduced gradients, applied inside the step's closure."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dlopt.ranges import NonNegative, Positive

Clip = Callable[[Sequence[nn.Parameter]], Tensor | None]
"""Clips the gradients in place; returns the global 2-norm before clipping where it was computed anyway."""


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients taken as one vector (scalar tensor, no host synchronization)."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


class Unclipped:
    def __call__(self, parameters: Sequence[nn.Parameter]) -> None:
        return None


class ByNorm:
    """Scales the gradient by min(1, max_norm / norm) (Pascanu, Mikolov & Bengio 2013, algorithm 1)."""

    def __init__(self, *, max_norm: Positive) -> None:
        self.max_norm = max_norm

    def __call__(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        norm = gradient_norm(parameters)
        torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        return norm


class ByValue:
    """Clamps every entry to [-max_value, max_value]."""

    def __init__(self, *, max_value: Positive) -> None:
        self.max_value = max_value

    def __call__(self, parameters: Sequence[nn.Parameter]) -> None:
        torch.nn.utils.clip_grad_value_(parameters, self.max_value)


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
    def __call__(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.grad is None or parameter in self.exempt:
                continue
            limit = _unit_norm(parameter).clamp_(min=self.eps).mul_(self.clipping)
            norm = _unit_norm(parameter.grad)
            parameter.grad.mul_((limit / norm.clamp(min=1e-6)).clamp_(max=1.0))


def _unit_norm(tensor: Tensor) -> Tensor:
    if tensor.ndim <= 1:
        return torch.linalg.vector_norm(tensor)
    return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), keepdim=True)
