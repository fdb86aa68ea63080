"""Gradient clipping, applied to the reduced gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dlopt.basics.ranges import NonNegative, Positive
from dlopt.models.order import output_layer
from dlopt.optim.parameters import real_views
from dlopt.parallel.shards import local, plain_norm, unit_norm

Norm = Callable[[Sequence[Tensor]], Tensor]
"""Computes the 2-norm of tensors taken as one vector (scalar tensor), over all processes that have shards of them."""

Clip = Callable[[Sequence[nn.Parameter], Norm], Tensor | None]
"""Clips the gradients in place; returns their global 2-norm before clipping if it was computed, else None."""


def gradient_norm(parameters: Sequence[nn.Parameter], norm: Norm = plain_norm) -> Tensor:
    """Computes the 2-norm of all gradients taken as one vector (scalar tensor, no host synchronization)."""
    return norm([p.grad for p in parameters if p.grad is not None])


class Unclipped:
    """No clipping."""

    def __call__(self, parameters: Sequence[nn.Parameter], norm: Norm = plain_norm) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class ByNorm:
    """Scales the gradient by min(1, max_norm / norm) (Pascanu, Mikolov & Bengio 2013, algorithm 1)."""

    max_norm: Positive

    @torch.no_grad()
    def __call__(self, parameters: Sequence[nn.Parameter], norm: Norm = plain_norm) -> Tensor:
        total = gradient_norm(parameters, norm)
        self.scale(parameters, total)
        return total

    @torch.no_grad()
    def scale(self, parameters: Sequence[nn.Parameter], total: Tensor) -> None:
        """Clips gradients whose norm is known to be `total`."""
        # Always multiplies, like torch's clip_grad_norm_: a branch would make the host wait for the norm.
        factor = (self.max_norm / (total + 1e-6)).clamp(max=1.0)
        if gradients := _local_gradients(parameters):
            torch._foreach_mul_(gradients, factor)


@dataclass(frozen=True, kw_only=True)
class ByValue:
    """Clamps every entry to [-max_value, max_value]; for complex entries, the real and the imaginary part."""

    max_value: Positive

    @torch.no_grad()
    def __call__(self, parameters: Sequence[nn.Parameter], norm: Norm = plain_norm) -> None:
        if gradients := real_views(_local_gradients(parameters)):
            torch._foreach_clamp_min_(gradients, -self.max_value)
            torch._foreach_clamp_max_(gradients, self.max_value)


class Adaptive:
    """Scales each unit's gradient to at most `clipping` times its weight norm (AGC; Brock et al. 2021, eq. 3).

    A unit is one output of a linear or convolutional layer (one row of the weight); a bias or gain is a single unit, as
    in the authors' code. As in the paper, the final layer is not clipped: see `output_layer`. `uses`: the order of
    execution, or None for that of registration.
    """

    def __init__(
        self, model: nn.Module, *, clipping: Positive, eps: NonNegative, uses: Sequence[str] | None = None
    ) -> None:
        self.clipping = clipping
        self.eps = eps
        final = output_layer(model, uses)
        self.exempt = set() if final is None else set(final.parameters(recurse=final is not model))

    @torch.no_grad()
    def __call__(self, parameters: Sequence[nn.Parameter], norm: Norm = plain_norm) -> None:
        for parameter in parameters:
            if parameter.grad is None or parameter in self.exempt:
                continue
            limit = unit_norm(parameter).clamp_(min=self.eps).mul_(self.clipping)
            norms = unit_norm(parameter.grad)
            tiny = torch.finfo(norms.dtype).tiny  # avoids 0 / 0; a larger value would shrink short gradients
            local(parameter.grad).mul_((limit / norms.clamp(min=tiny)).clamp_(max=1.0))


def _local_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [local(p.grad) for p in parameters if p.grad is not None]
