"""MARS."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.optim.adam import adam_updates
from dlopt.optim.common import RealOptimizer, buffers, count_steps, gradients
from dlopt.ranges import Fraction, NonNegative, Positive


class MARS(RealOptimizer):
    """AdamW on gradients with reduced variance (MARS-AdamW, Yuan et al. 2024, algorithm 2).

    c = g + gamma * beta1 / (1 - beta1) * (g - g_previous), scaled down to norm 1 where it is longer, replaces the
    gradient in AdamW. This is the approximate version: g_previous is the gradient of the previous batch, not that of
    the previous weights on this batch. The norm is taken per tensor, as in the authors' code. In contrast to it, MARS
    also updates kernels and vectors, as in the algorithm, and the first gradient counts as unchanged.
    """

    elementwise: ClassVar[bool] = False
    normalizes_entries: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.003,
        betas: tuple[Fraction, Fraction] = (0.95, 0.99),
        gamma: NonNegative = 0.025,
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "gamma": gamma, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        grads, counts = gradients(params), count_steps(self, params)
        averages, squares = buffers(self, params, "exp_avg"), buffers(self, params, "exp_avg_sq")
        previous = buffers(self, params, "previous_grad")
        for old, grad, count in zip(previous, grads, counts, strict=True):
            if count == 1:
                old.copy_(grad)
        corrected = torch._foreach_sub(grads, previous)
        torch._foreach_mul_(corrected, group["gamma"] * beta1 / (1 - beta1))
        torch._foreach_add_(corrected, grads)
        norms = torch._foreach_norm(corrected)
        torch._foreach_clamp_min_(norms, 1.0)
        torch._foreach_div_(corrected, norms)
        torch._foreach_copy_(previous, grads)
        torch._foreach_lerp_(averages, corrected, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, corrected, corrected, 1 - beta2)
        updates = adam_updates(averages, squares, counts, (beta1, beta2), group["eps"])
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, updates, alpha=-lr)
