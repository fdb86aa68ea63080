"""Optimizers of lecture recipes, which set them by `optimizer._target_`."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.optim.common import RealOptimizer, buffers, count_steps, gradients
from dlopt.optim.traits import ADAPTIVE, OptimizerTraits
from dlopt.ranges import Fraction, NonNegative, Positive


class Adam(RealOptimizer):
    """Adam (Kingma & Ba 2015, algorithm 1), or Adam without the correction of its averages for their start at zero.

    m <- beta1 m + (1 - beta1) g; v <- beta2 v + (1 - beta2) g^2; theta <- theta - lr m^ / (sqrt(v^) + eps), where
    m^ = m / (1 - beta1^t) and v^ = v / (1 - beta2^t); without the correction m^ = m and v^ = v. Except for eps, the
    uncorrected update t is that of Adam times (1 - beta1^t) / sqrt(1 - beta2^t).
    """

    traits: ClassVar[OptimizerTraits] = ADAPTIVE

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.001,
        betas: tuple[Fraction, Fraction] = (0.9, 0.999),
        eps: NonNegative = 1e-8,
        bias_correction: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "bias_correction": bias_correction})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        (beta1, beta2), corrects = group["betas"], group["bias_correction"]
        grads, counts = gradients(params), count_steps(self, params)
        averages, squares = buffers(self, params, "exp_avg"), buffers(self, params, "exp_avg_sq")
        torch._foreach_lerp_(averages, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        for p, average, square, count in zip(params, averages, squares, counts, strict=True):
            of_average, of_square = (1 - beta1**count, 1 - beta2**count) if corrects else (1.0, 1.0)
            p.addcdiv_(average, (square / of_square).sqrt() + group["eps"], value=-float(group["lr"]) / of_average)
