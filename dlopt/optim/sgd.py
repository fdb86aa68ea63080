"""Variants of SGD: with momentum, with a rate per tensor, and by the signs of the gradient or of a momentum."""

from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Gt
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.basics.ranges import Fraction, NonNegative, OpenFraction, Positive
from dlopt.optim.common import ForeachOptimizer, RealOptimizer, buffers, gradients, make_cautious, move, signs
from dlopt.optim.traits import AS_ADAMW, ELEMENTWISE, OptimizerTraits, is_decoupled


class SGDW(ForeachOptimizer):
    """SGD with momentum as an average of gradients and decoupled weight decay (after Loshchilov & Hutter 2019).

    delta <- momentum * delta + (1 - momentum) * gradient, from delta = 0;
    theta <- theta - lr * delta - lr * weight_decay * theta.

    momentum = 0 is plain SGD. Steps are (1 - momentum) times the steps of torch's heavy ball with the same lr.

    The paper's algorithm 1 has the learning rate inside the momentum, with the schedule's factor eta:
    m <- momentum * m + eta * alpha * gradient; theta <- theta - m - eta * lambda * theta.
    There, a changed rate affects new gradients only. At a constant rate, eta = 1, the updates are those of this class
    with alpha = lr * (1 - momentum) and lambda = lr * weight_decay.
    """

    traits: ClassVar[OptimizerTraits] = replace(ELEMENTWISE, decoupled_decay=True, capturable=True)

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

    @property
    def traits(self) -> OptimizerTraits:
        # The momentum moves weights at a rate of zero.
        return OptimizerTraits(scope="tensor", separable=True, decoupled_decay=is_decoupled(self.param_groups))

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
            # A tensor of zeros has no scale: a rate of zero would keep it at zero forever.
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


class Lion(RealOptimizer):
    """Evolved sign momentum (Chen et al. 2023, algorithm 2), with decoupled weight decay.

    theta <- theta - lr * (sign(beta1 * m + (1 - beta1) * g) + weight_decay * theta); m <- beta2 * m + (1 - beta2) * g.
    `cautious` moves no weight against its gradient (C-Lion, see `dlopt.optim.common.make_cautious`).
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.0001,
        betas: tuple[Fraction, Fraction] = (0.9, 0.99),
        weight_decay: NonNegative = 0.01,
        cautious: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "cautious": cautious})

    @property
    def traits(self) -> OptimizerTraits:
        cautious = any(group["cautious"] for group in self.param_groups)  # counts entries of the whole tensor
        return replace(AS_ADAMW, scope="tensor" if cautious else "element", capturable=True)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        grads, averages = gradients(params), buffers(self, params, "exp_avg")
        # torch 2.11 has neither function as a foreach function of DTensors
        updates = [signs(average.lerp(grad, 1 - beta1)) for average, grad in zip(averages, grads, strict=True)]
        if group["cautious"]:
            make_cautious(updates, grads)
        move(group, params, updates)
        torch._foreach_lerp_(averages, grads, 1 - beta2)  # after the update, which uses the old average


class Signum(RealOptimizer):
    """SGD with the sign of the momentum (Bernstein et al. 2018, algorithm 2), with decoupled weight decay.

    m <- momentum * m + (1 - momentum) * g; theta <- theta - lr * (sign(m) + weight_decay * theta). momentum = 0 is
    signSGD (algorithm 1).
    """

    traits: ClassVar[OptimizerTraits] = replace(AS_ADAMW, capturable=True)

    def __init__(
        self, params: ParamsT, *, lr: Positive = 0.0001, momentum: Fraction = 0.9, weight_decay: NonNegative = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        averages = buffers(self, params, "momentum_buffer")
        torch._foreach_lerp_(averages, gradients(params), 1 - group["momentum"])
        move(group, params, [signs(average) for average in averages])  # as in Lion


Etas = tuple[OpenFraction, Annotated[float, Gt(1)]]


class Rprop(RealOptimizer):
    """Resilient propagation in its textbook form, Rprop- of Igel & Huesken 2003: each weight has its own step size and
    always moves by it against the sign of its gradient.

    The step size starts at lr. It is multiplied by etas[1] if the sign is the same as before and by etas[0] if it has
    changed, and is clipped to `step_sizes`. torch's Rprop (iRprop-) skips the step after a change of sign and sets that
    gradient to zero.
    """

    # lr is the first step size only.
    traits: ClassVar[OptimizerTraits] = OptimizerTraits(scope="element", separable=True)

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.001,
        etas: Etas = (0.5, 1.2),
        step_sizes: tuple[Positive, Positive] = (1e-6, 50.0),
    ) -> None:
        super().__init__(params, {"lr": lr, "etas": etas, "step_sizes": step_sizes})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        (shrink, grow), (min_size, max_size) = group["etas"], group["step_sizes"]
        for p, previous in zip(params, buffers(self, params, "prev"), strict=True):
            state, grad = self.state[p], p.grad
            assert grad is not None
            if "step_size" not in state:
                state["step_size"] = torch.full_like(p, float(group["lr"]))
            size = state["step_size"]
            product = previous.mul_(grad)  # > 0: same sign as before; in place, since `previous` is overwritten below
            size.copy_(torch.where(product > 0, size * grow, torch.where(product < 0, size * shrink, size)))
            size.clamp_(min_size, max_size)
            p.addcmul_(signs(grad), size, value=-1)
            previous.copy_(grad)
