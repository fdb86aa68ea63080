"""Lion and Signum: steps by the sign of a momentum."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.optim.common import RealOptimizer, buffers, gradients, make_cautious
from dlopt.ranges import Fraction, NonNegative, Positive


class Lion(RealOptimizer):
    """Evolved sign momentum (Chen et al. 2023, algorithm 2), with decoupled weight decay.

    theta <- theta - lr * (sign(beta1 * m + (1 - beta1) * g) + weight_decay * theta); m <- beta2 * m + (1 - beta2) * g.
    `cautious` moves no weight against its gradient (C-Lion, see `dlopt.optim.common.make_cautious`).
    """

    normalizes_entries: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.0001,
        betas: tuple[Fraction, Fraction] = (0.9, 0.99),
        weight_decay: NonNegative = 0.01,
        cautious: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "cautious": cautious})

    @property
    def elementwise(self) -> bool:
        return not any(group["cautious"] for group in self.param_groups)  # which counts entries of the whole tensor

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, (beta1, beta2), decay = float(group["lr"]), group["betas"], group["weight_decay"]
        grads, averages = gradients(params), buffers(self, params, "exp_avg")
        updates = torch._foreach_lerp(averages, grads, 1 - beta1)
        torch._foreach_sign_(updates)
        if group["cautious"]:
            make_cautious(updates, grads)
        if decay:
            torch._foreach_mul_(params, 1 - lr * decay)
        torch._foreach_add_(params, updates, alpha=-lr)
        torch._foreach_lerp_(averages, grads, 1 - beta2)  # after the update, which uses the old average


class Signum(RealOptimizer):
    """SGD with the sign of the momentum (Bernstein et al. 2018, algorithm 2), with decoupled weight decay.

    m <- momentum * m + (1 - momentum) * g; theta <- theta - lr * (sign(m) + weight_decay * theta). momentum = 0 is
    signSGD (algorithm 1).
    """

    elementwise: ClassVar[bool] = True
    normalizes_entries: ClassVar[bool] = True

    def __init__(
        self, params: ParamsT, *, lr: Positive = 0.0001, momentum: Fraction = 0.9, weight_decay: NonNegative = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, grads = float(group["lr"]), gradients(params)
        averages = buffers(self, params, "momentum_buffer")
        torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, torch._foreach_sign(averages), alpha=-lr)
