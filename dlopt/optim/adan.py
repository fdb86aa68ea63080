"""Adan."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.optim.common import RealOptimizer, buffers, count_steps, gradients
from dlopt.ranges import Fraction, NonNegative, Positive


class Adan(RealOptimizer):
    """Adaptive Nesterov momentum (Xie et al. 2022, algorithm 1).

    m, v and n average the gradient g, its change d since the previous update, and (g + beta2 * d)^2;
    theta <- (theta - lr * (m^ + beta2 * v^) / (sqrt(n^) + eps)) / (1 + lr * weight_decay). The averages start at zero
    and are corrected for it, as in the authors' code. `betas` are the decays: 1 - beta in the paper's notation. The
    paper's restarts are not included. (pytorch-optimizer's Adan, AdaBelief and AdEMAMix count the updates of a whole
    group: the first update of a parameter without an earlier gradient comes out too short.)
    """

    normalizes_entries: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.001,
        betas: tuple[Fraction, Fraction, Fraction] = (0.98, 0.92, 0.99),
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.02,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, (beta1, beta2, beta3) = float(group["lr"]), group["betas"]
        grads, counts = gradients(params), count_steps(self, params)
        averages, changes = buffers(self, params, "exp_avg"), buffers(self, params, "exp_avg_diff")
        squares, previous = buffers(self, params, "exp_avg_sq"), buffers(self, params, "previous_grad")
        for old, grad, count in zip(previous, grads, counts, strict=True):
            if count == 1:
                old.copy_(grad)  # no change at the first gradient
        difference = torch._foreach_sub(grads, previous)
        torch._foreach_lerp_(averages, grads, 1 - beta1)
        torch._foreach_lerp_(changes, difference, 1 - beta2)
        torch._foreach_mul_(difference, beta2)
        torch._foreach_add_(difference, grads)
        torch._foreach_mul_(squares, beta3)
        torch._foreach_addcmul_(squares, difference, difference, 1 - beta3)
        for old, grad in zip(previous, grads, strict=True):
            old.copy_(grad)  # FSDP's tensors have no foreach copy
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, [math.sqrt(1 - beta3**t) for t in counts])
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(averages, [1 - beta1**t for t in counts])
        torch._foreach_add_(updates, torch._foreach_mul(changes, [beta2 / (1 - beta2**t) for t in counts]))
        torch._foreach_div_(updates, denominators)
        torch._foreach_add_(params, updates, alpha=-lr)
        torch._foreach_div_(params, 1 + lr * group["weight_decay"])
