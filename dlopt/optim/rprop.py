"""Rprop."""

from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Gt
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.optim.common import RealOptimizer, buffers
from dlopt.ranges import OpenFraction, Positive

Etas = tuple[OpenFraction, Annotated[float, Gt(1)]]


class Rprop(RealOptimizer):
    """Resilient propagation in its textbook form, Rprop- of Igel & Huesken 2003: each weight has its own step size and
    always moves by it against the sign of its gradient.

    The step size starts at lr. It is multiplied by etas[1] if the sign is the same as before and by etas[0] if it has
    changed, and is clipped to `step_sizes`. torch's Rprop (iRprop-) skips the step after a change of sign and sets that
    gradient to zero.
    """

    moves_at_zero_lr: ClassVar[bool] = True  # lr is the first step size only

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.001,
        etas: Etas = (0.5, 1.2),
        step_sizes: tuple[Positive, Positive] = (1e-6, 50.0),
    ) -> None:
        super().__init__(params, {"lr": lr, "etas": etas, "step_sizes": step_sizes})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        (shrink, grow), (min_size, max_size) = group["etas"], group["step_sizes"]
        for p, previous in zip(params, buffers(self, params, "prev"), strict=True):
            state, grad = self.state[p], p.grad
            assert grad is not None
            if "step_size" not in state:
                state["step_size"] = torch.full_like(p, float(group["lr"]))
            size = state["step_size"]
            product = previous.mul_(grad)  # > 0: same sign as before; in place, since `previous` is overwritten below
            size.copy_(torch.where(product > 0, size * grow, torch.where(product < 0, size * shrink, size)))
            size.clamp_(min_size, max_size)
            p.addcmul_(grad.sign(), size, value=-1)
            previous.copy_(grad)
