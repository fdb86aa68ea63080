from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from dlopt.optim.common import Closure, buffers, chunks, evaluate, gradients
from dlopt.ranges import NonNegative, Positive, Share


class SGDW(torch.optim.Optimizer):
    """SGD with the averaging form of momentum and decoupled weight decay (Loshchilov & Hutter 2019, algorithm 1).

    delta <- momentum * delta + (1 - momentum) * gradient, from delta = 0;
    theta <- theta - lr * delta - lr * weight_decay * theta.

    momentum = 0 is plain SGD. A step is (1 - momentum) times as long as with torch's heavy ball of the same lr.
    """

    evaluations: ClassVar[str] = "once"

    def __init__(
        self, params: ParamsT, *, lr: Positive = 0.1, momentum: Share = 0.9, weight_decay: NonNegative = 0.0005
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        loss = evaluate(closure)
        for group in self.param_groups:
            lr, momentum, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
            for params in chunks(group["params"]):
                delta = gradients(params)
                if momentum:
                    averages = buffers(self, params, "momentum_buffer")
                    torch._foreach_lerp_(averages, delta, 1 - momentum)
                    delta = averages
                if decay:
                    torch._foreach_mul_(params, 1 - lr * decay)
                torch._foreach_add_(params, delta, alpha=-lr)
        return loss
