"""ADOPT."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.optim.common import RealOptimizer, buffers, count_steps, gradients
from dlopt.ranges import Fraction, NonNegative, Positive


class ADOPT(RealOptimizer):
    """Adam that converges with any beta2 (Taniguchi et al. 2024, algorithm 2), with decoupled weight decay.

    The gradient is divided by the second moment of the gradients before it, and the momentum averages the result:
    m <- beta1 * m + (1 - beta1) * clip(g / max(sqrt(v), eps), t^(1/4)); theta <- theta - lr * m;
    v <- beta2 * v + (1 - beta2) * g^2. The first gradient of a parameter only initializes v = g^2; t counts the
    updates after it. (pytorch-optimizer's ADOPT clips at (t + 1)^(1/4) and has one count for all parameters.)
    """

    normalizes_entries: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.001,
        betas: tuple[Fraction, Fraction] = (0.9, 0.9999),
        eps: Positive = 1e-6,
        weight_decay: NonNegative = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        counts = count_steps(self, params)
        for p, count in zip(params, counts, strict=True):
            if count == 1:
                assert p.grad is not None
                self.state[p]["exp_avg_sq"] = p.grad.square()
        started = [(p, count - 1) for p, count in zip(params, counts, strict=True) if count > 1]
        if started:
            self._update_started(group, [p for p, _ in started], [t**0.25 for _, t in started])

    def _update_started(self, group: dict[str, Any], params: list[Tensor], limits: list[float]) -> None:
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        grads, averages = gradients(params), buffers(self, params, "exp_avg")
        squares = buffers(self, params, "exp_avg_sq")
        roots = torch._foreach_sqrt(squares)
        torch._foreach_clamp_min_(roots, group["eps"])
        normalized = torch._foreach_div(grads, roots)
        torch._foreach_clamp_max_(normalized, limits)
        torch._foreach_clamp_min_(normalized, [-limit for limit in limits])
        torch._foreach_lerp_(averages, normalized, 1 - beta1)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, averages, alpha=-lr)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
