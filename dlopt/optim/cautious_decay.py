"""Cautious weight decay, for any optimizer whose decay is decoupled: `make_decay_cautious`."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dlopt.basics.mixin import mix_in
from dlopt.optim.common import Closure, without_hooks


class CautiousDecay(Optimizer):
    """Mixed into the class of an optimizer: decays only entries that the update moves towards zero, or not at all.

    theta <- theta - lr * (u + weight_decay * [u * theta >= 0] * theta), entry by entry, with u the update of the
    optimizer without decay (Chen et al. 2025, arXiv 2510.12402, algorithm 1). lr * u is measured: the change of the
    weights in a step without decay. This holds for all optimizers alike, also for one whose own decay has another form
    to second order (Adan). Where an update changes nothing, as SOAP's first one does, all entries decay.
    """

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        decays = [group["weight_decay"] for group in self.param_groups]
        before = [
            [(p, p.clone()) for p in group["params"] if p.requires_grad] if isinstance(decay, Tensor) or decay else []
            for group, decay in zip(self.param_groups, decays, strict=True)
        ]
        try:
            for group in self.param_groups:
                group["weight_decay"] = 0.0
            loss = without_hooks(super().step)(closure)
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay
        overflow = getattr(self, "found_inf", None)  # of a gradient scaler: a fused kernel has left the weights alone
        for group, weights in zip(self.param_groups, before, strict=True):
            rate = group["lr"] * group["weight_decay"]  # a tensor in a CUDA graph, which reads no value on the host
            for p, old in weights:
                if p.grad is None:
                    continue
                decays_entry = (old - p) * old >= 0
                if overflow is not None:
                    decays_entry &= overflow == 0
                p.sub_(old.mul_(decays_entry).mul_(rate))
        return loss


def make_decay_cautious(optimizer: Optimizer) -> None:
    """Makes the weight decay of an optimizer cautious, in place."""
    # In place: schedule and gradient scaler refer to this optimizer, and its class stays a torch.optim.Optimizer.
    mix_in(CautiousDecay, optimizer)
    optimizer._patch_step_function()  # hooks of a step, which torch adds to each class
