from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from dlopt.optim.common import Closure, buffers, chunks, evaluate, gradients
from dlopt.ranges import Fraction, NonNegative, Positive


class Lion(torch.optim.Optimizer):
    """Evolved sign momentum (Chen et al. 2023, algorithm 2), with decoupled weight decay.

    theta <- theta - lr * (sign(beta1 * m + (1 - beta1) * g) + weight_decay * theta); m <- beta2 * m + (1 - beta2) * g.
    """

    evaluations: ClassVar[str] = "once"

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.0001,
        betas: tuple[Fraction, Fraction] = (0.9, 0.99),
        weight_decay: NonNegative = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        loss = evaluate(closure)
        for group in self.param_groups:
            lr, (beta1, beta2), decay = float(group["lr"]), group["betas"], group["weight_decay"]
            for params in chunks(group["params"]):
                grads, averages = gradients(params), buffers(self, params, "exp_avg")
                updates = torch._foreach_lerp(averages, grads, 1 - beta1)
                torch._foreach_sign_(updates)
                if decay:
                    torch._foreach_mul_(params, 1 - lr * decay)
                torch._foreach_add_(params, updates, alpha=-lr)
                torch._foreach_lerp_(averages, grads, 1 - beta2)
        return loss
