"""Weight decay that changes between the replays of a CUDA graph: `capture_decay`."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dlopt.basics.mixin import mix_in
from dlopt.optim.common import Closure, without_hooks


class CapturedDecay(Optimizer):
    """Mixed into the class of an optimizer: applies a decoupled decay that is a tensor before the step.

    theta <- (1 - lr * weight_decay) * theta, and then a step without decay. torch's fused kernels and other steps take
    the decay as a number of the host, which a graph would repeat. The decay takes a pass over the weights of its own,
    and rounds a weight twice, where fused AdamW rounds it once.
    """

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        decayed = [group for group in self.param_groups if isinstance(group["weight_decay"], Tensor)]
        decays = [group["weight_decay"] for group in decayed]
        try:
            for group, decay in zip(decayed, decays, strict=True):
                params = [p for p in group["params"] if p.grad is not None]
                if params:
                    torch._foreach_mul_(params, 1 - group["lr"] * decay)
                group["weight_decay"] = 0.0
            return without_hooks(super().step)(closure)
        finally:
            for group, decay in zip(decayed, decays, strict=True):
                group["weight_decay"] = decay


def capture_decay(optimizer: Optimizer) -> None:
    """Makes the optimizer accept a tensor as weight_decay, in place."""
    mix_in(CapturedDecay, optimizer)
    optimizer._patch_step_function()  # hooks of a step, which torch adds to each class
