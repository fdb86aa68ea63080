"""Prodigy."""

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.basics.ranges import NonNegative, OpenFraction, Positive
from dlopt.optim.common import Closure, RealOptimizer, buffers, chunks, gradients, loss_of
from dlopt.optim.traits import ELEMENTWISE, OptimizerTraits


class Prodigy(RealOptimizer):
    """Adam that estimates its own learning rate (Mishchenko & Defazio 2023, algorithm 4), with decoupled weight decay.

    d, the estimated distance from the initial weights x0 to a minimum, is the learning rate. It starts at `d0` and only
    grows: r <- sqrt(beta2) r + (1 - sqrt(beta2)) lr d^2 <g, x0 - x>; s <- sqrt(beta2) s + (1 - sqrt(beta2)) lr d^2 g;
    d <- max(d, d_coef * r / |s|_1). Adam's moments average d * g; x <- x - lr * d * (m / (sqrt(v) + d * eps) +
    weight_decay * x), without bias correction, with the d before its update. All groups share d.

    `lr` is a factor of d, 1 in the paper, which the schedule reduces. `safeguard_warmup` leaves lr out of s, as the
    authors advise for a schedule with warmup, in which d would otherwise grow too far. Where the schedule has lr = 0,
    the averages go on, as in algorithm 4; the authors' code pauses them. Reads d on the host once per update.
    (pytorch-optimizer accumulates r in float32.)
    """

    traits: ClassVar[OptimizerTraits] = replace(ELEMENTWISE, scope="model", separable=False)

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 1.0,
        betas: tuple[OpenFraction, OpenFraction] = (0.9, 0.999),
        eps: Positive = 1e-8,
        weight_decay: NonNegative = 0.0,
        d0: Positive = 1e-6,
        d_coef: Positive = 1.0,
        safeguard_warmup: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "d0": d0, "d_coef": d_coef}
        # d and r are in the groups, which a checkpoint holds; the values of the first group count
        super().__init__(params, {**defaults, "safeguard_warmup": safeguard_warmup, "d": d0, "r": 0.0})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        loss = loss_of(closure)
        parts = [(group, params) for group in self.param_groups for params in chunks(group["params"])]
        if not parts:
            return loss
        first = self.param_groups[0]
        d = first["d"]
        terms, norms = zip(*(self._accumulate(group, params, d) for group, params in parts), strict=True)
        device = terms[0].device
        # d is one number for the whole model: all groups and chunks contribute before the first parameter moves. This
        # is the only time that the host waits for the device.
        inner, norm = torch.stack([torch.stack([t.to(device) for t in each]).sum() for each in (terms, norms)]).tolist()
        r = math.sqrt(first["betas"][1]) * first["r"] + inner
        for group, params in parts:
            self._move(group, params, d)
        for group in self.param_groups:
            group["r"], group["d"] = r, max(d, first["d_coef"] * r / norm) if norm > 0 else d
        return loss

    def _accumulate(self, group: dict[str, Any], params: list[Tensor], d: float) -> tuple[Tensor, Tensor]:
        """Updates s and the moments; returns what these parameters add to r, and their part of |s|_1.

        r and s have the factor 1 / d0^2, which cancels and keeps float32 away from underflow.
        """
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        decay, scale = math.sqrt(beta2), (d / group["d0"]) ** 2
        grads, sums = gradients(params), buffers(self, params, "s")
        averages, squares = buffers(self, params, "exp_avg"), buffers(self, params, "exp_avg_sq")
        for p in params:
            if "x0" not in self.state[p]:
                self.state[p]["x0"] = p.clone()
        moved = torch._foreach_sub(buffers(self, params, "x0"), params)
        torch._foreach_mul_(moved, grads)
        inner = torch.stack([product.sum() for product in moved]).sum() * ((1 - decay) * lr * scale)
        torch._foreach_mul_(sums, decay)
        torch._foreach_add_(sums, grads, alpha=(1 - decay) * (1.0 if group["safeguard_warmup"] else lr) * scale)
        torch._foreach_mul_(averages, beta1)
        torch._foreach_add_(averages, grads, alpha=(1 - beta1) * d)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, (1 - beta2) * d * d)
        return inner, torch.stack(torch._foreach_norm(sums, 1)).sum()

    def _move(self, group: dict[str, Any], params: list[Tensor], d: float) -> None:
        rate = float(group["lr"]) * d
        roots = torch._foreach_sqrt(buffers(self, params, "exp_avg_sq"))
        torch._foreach_add_(roots, d * group["eps"])
        torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
        torch._foreach_addcdiv_(params, buffers(self, params, "exp_avg"), roots, -rate)
