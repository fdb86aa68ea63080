"""Adafactor."""

from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Le
from torch.optim.optimizer import ParamsT

from dlopt.ranges import NonNegative, Positive


class Adafactor(torch.optim.Adafactor):
    """Adam without momentum and with a factored second moment (Shazeer & Stern 2018, algorithm 4): torch's class.

    The second moment of a matrix is the product of the averages of its rows and of its columns over their mean; of a
    kernel [out, in, height, width] this holds for each [height, width]; a vector has its own (algorithm 5). Its decay
    is 1 - t^beta2_decay. theta <- theta - max(eps[1], RMS(theta)) * min(lr, 1 / sqrt(t)) * u / max(1, RMS(u) / d):
    relative steps, which d clips. eps[0]^2 bounds the second moment from below, where the paper adds it to g^2. The
    weight decay is decoupled. torch's own default for eps[0], machine epsilon, is far from the paper's 1e-15: it also
    bounds the mean of the averages, and changes the second moment of gradients below 3e-4 in float32.
    """

    evaluations: ClassVar[str] = "once"
    elementwise: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.01,
        beta2_decay: Annotated[float, Le(0)] = -0.8,
        eps: tuple[Positive, NonNegative] = (1e-15, 0.001),
        d: Annotated[float, Ge(1)] = 1.0,
        weight_decay: NonNegative = 0.0,
    ) -> None:
        super().__init__(params, lr, beta2_decay, eps, d, weight_decay)
