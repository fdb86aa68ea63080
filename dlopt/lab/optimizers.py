"""Optimizers of lecture recipes, which set them by `optimizer._target_`."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.extend import Fraction, NonNegative, Positive
from dlopt.optim.adam import adam_updates, moments
from dlopt.optim.common import RealOptimizer, count_steps, gradients
from dlopt.optim.traits import ADAPTIVE, OptimizerTraits


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
        averages, squares = moments(self, params, gradients(params), group["betas"])
        updates = adam_updates(
            averages, squares, count_steps(self, params), group["betas"], group["eps"],
            bias_correction=group["bias_correction"],
        )  # fmt: skip
        torch._foreach_add_(params, updates, alpha=-float(group["lr"]))
