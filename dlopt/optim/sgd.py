"""Variants of SGD with momentum."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.optim.common import ForeachOptimizer, buffers, gradients, move
from dlopt.ranges import Fraction, NonNegative, Positive


class SGDW(ForeachOptimizer):
    """SGD with momentum as an average of gradients and decoupled weight decay (after Loshchilov & Hutter 2019).

    delta <- momentum * delta + (1 - momentum) * gradient, from delta = 0;
    theta <- theta - lr * delta - lr * weight_decay * theta.

    momentum = 0 is plain SGD. Steps are (1 - momentum) times those of torch's heavy ball with the same lr.

    The paper's algorithm 1 has the learning rate inside the momentum, with the schedule's factor eta:
    m <- momentum * m + eta * alpha * gradient; theta <- theta - m - eta * lambda * theta.
    There, a changed rate affects new gradients only. At a constant rate, eta = 1, the updates are those of this class
    with alpha = lr * (1 - momentum) and lambda = lr * weight_decay.
    """

    def __init__(
        self, params: ParamsT, *, lr: Positive = 0.1, momentum: Fraction = 0.9, weight_decay: NonNegative = 0.0005
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        delta = gradients(params)
        if group["momentum"]:
            averages = buffers(self, params, "momentum_buffer")
            torch._foreach_lerp_(averages, delta, 1 - group["momentum"])
            delta = averages
        move(group, params, delta)


class LARS(ForeachOptimizer):
    """SGD with momentum and a learning rate per tensor, from the norms of weights and gradient (You et al. 2017,
    algorithm 1).

    local = trust_coefficient * |w| / (|g| + weight_decay * |w|);
    v <- momentum * v + lr * local * (g + weight_decay * w); w <- w - v.

    The learning rate is inside v, as in the paper: a changed lr affects new gradients only. `decoupled_weight_decay`
    removes the decay from both: w <- w - v - lr * weight_decay * w. Vectors (biases, norms) have local = 1 unless
    `adapt_vectors`: their norms mean little, and a bias that starts at zero would stay near zero for long.
    """

    elementwise: ClassVar[bool] = False
    moves_at_zero_lr: ClassVar[bool] = True  # by the momentum

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 1.0,
        momentum: Fraction = 0.9,
        weight_decay: NonNegative = 0.0005,
        decoupled_weight_decay: bool = False,
        trust_coefficient: Positive = 0.001,
        adapt_vectors: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        defaults |= {"decoupled_weight_decay": decoupled_weight_decay, "trust_coefficient": trust_coefficient}
        super().__init__(params, {**defaults, "adapt_vectors": adapt_vectors})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        adapted = [p for p in params if p.ndim > 1 or group["adapt_vectors"]]
        others = [p for p in params if p.ndim <= 1 and not group["adapt_vectors"]]
        for tensors, adapt in ((adapted, True), (others, False)):
            if tensors:
                self._update_tensors(group, tensors, adapt)

    def _update_tensors(self, group: dict[str, Any], params: list[Tensor], adapt: bool) -> None:
        lr, momentum, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
        grads, velocities = gradients(params), buffers(self, params, "momentum_buffer")
        coupled = 0.0 if group["decoupled_weight_decay"] else decay
        torch._foreach_mul_(velocities, momentum)
        if adapt:
            weights, norms = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(grads))
            denominators = torch.add(norms, weights, alpha=coupled).clamp_min_(1e-30)  # zero only if the update is zero
            scaled = (weights / denominators).mul_(lr * group["trust_coefficient"])
            rates = list(torch.where(weights > 0, scaled, lr).unbind())
            torch._foreach_addcmul_(velocities, grads, rates)
            if coupled:
                torch._foreach_addcmul_(velocities, params, rates, coupled)
        else:
            torch._foreach_add_(velocities, grads, alpha=lr)
            if coupled:
                torch._foreach_add_(velocities, params, alpha=lr * coupled)
        if decay and not coupled:
            torch._foreach_mul_(params, 1 - lr * decay)
        torch._foreach_sub_(params, velocities)
