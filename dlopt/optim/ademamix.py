"""AdEMAMix."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.optim.adam import adam_updates
from dlopt.optim.common import RealOptimizer, buffers, count_steps, gradients
from dlopt.ranges import Count, Fraction, NonNegative, OpenFraction, Positive


class AdEMAMix(RealOptimizer):
    """AdamW with a second, slow average of gradients (Pagliardini et al. 2024, algorithm 1).

    theta <- theta - lr * ((m1^ + alpha * m2) / (sqrt(v^) + eps) + weight_decay * theta), where m2 decays by beta3 and
    is not corrected for its start at zero. Over the first `warmup` updates alpha grows linearly from 0 and beta3 from
    beta1, the latter linearly in its half-life (schedulers f_alpha and f_beta3). The paper sets `warmup` to the length
    of the run.
    """

    normalizes_entries: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.001,
        betas: tuple[Fraction, Fraction, OpenFraction] = (0.9, 0.999, 0.9999),
        alpha: NonNegative = 5.0,
        warmup: Count | None = None,
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "alpha": alpha, "warmup": warmup, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, (beta1, beta2, beta3) = float(group["lr"]), group["betas"]
        grads, counts = gradients(params), count_steps(self, params)
        fast, slow = buffers(self, params, "exp_avg"), buffers(self, params, "exp_avg_slow")
        squares = buffers(self, params, "exp_avg_sq")
        progress = [min(1.0, t / group["warmup"]) if group["warmup"] else 1.0 for t in counts]
        torch._foreach_lerp_(fast, grads, 1 - beta1)
        for average, grad, fraction in zip(slow, grads, progress, strict=True):
            average.lerp_(grad, 1 - _slow_decay(beta1, beta3, fraction))
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        # adam_updates divides all of its first argument by 1 - beta1^t
        weights = [group["alpha"] * fraction * (1 - beta1**t) for fraction, t in zip(progress, counts, strict=True)]
        mixed = torch._foreach_mul(slow, weights)
        torch._foreach_add_(mixed, fast)
        updates = adam_updates(list(mixed), squares, counts, (beta1, beta2), group["eps"])
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, updates, alpha=-lr)


def _slow_decay(beta1: float, beta3: float, progress: float) -> float:
    """Returns f_beta3 of the paper: the decay after the fraction `progress` of the warmup, from beta1 to beta3."""
    start, end = math.log(beta1) if beta1 else -math.inf, math.log(beta3)
    return min(beta3, math.exp(1 / ((1 - progress) / start + progress / end)))
