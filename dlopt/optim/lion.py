"""Lion."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.optim.common import ForeachOptimizer, buffers, gradients
from dlopt.ranges import Fraction, NonNegative, Positive


class Lion(ForeachOptimizer):
    """Evolved sign momentum (Chen et al. 2023, algorithm 2), with decoupled weight decay.

    theta <- theta - lr * (sign(beta1 * m + (1 - beta1) * g) + weight_decay * theta); m <- beta2 * m + (1 - beta2) * g.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.0001,
        betas: tuple[Fraction, Fraction] = (0.9, 0.99),
        weight_decay: NonNegative = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, (beta1, beta2), decay = float(group["lr"]), group["betas"], group["weight_decay"]
        grads, averages = gradients(params), buffers(self, params, "exp_avg")
        updates = torch._foreach_lerp(averages, grads, 1 - beta1)
        torch._foreach_sign_(updates)
        if decay:
            torch._foreach_mul_(params, 1 - lr * decay)
        torch._foreach_add_(params, updates, alpha=-lr)
        torch._foreach_lerp_(averages, grads, 1 - beta2)  # after the update, which uses the old average
