"""Lion, Signum and Rprop: steps by the sign of the gradient or of a momentum."""

from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Gt
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.optim.common import RealOptimizer, buffers, gradients, make_cautious, move
from dlopt.ranges import Fraction, NonNegative, OpenFraction, Positive


class Lion(RealOptimizer):
    """Evolved sign momentum (Chen et al. 2023, algorithm 2), with decoupled weight decay.

    theta <- theta - lr * (sign(beta1 * m + (1 - beta1) * g) + weight_decay * theta); m <- beta2 * m + (1 - beta2) * g.
    `cautious` moves no weight against its gradient (C-Lion, see `dlopt.optim.common.make_cautious`).
    """

    normalizes_entries: ClassVar[bool] = True

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
    def elementwise(self) -> bool:
        return not any(group["cautious"] for group in self.param_groups)  # which counts entries of the whole tensor

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        grads, averages = gradients(params), buffers(self, params, "exp_avg")
        updates = torch._foreach_lerp(averages, grads, 1 - beta1)
        torch._foreach_sign_(updates)
        if group["cautious"]:
            make_cautious(updates, grads)
        move(group, params, updates)
        torch._foreach_lerp_(averages, grads, 1 - beta2)  # after the update, which uses the old average


class Signum(RealOptimizer):
    """SGD with the sign of the momentum (Bernstein et al. 2018, algorithm 2), with decoupled weight decay.

    m <- momentum * m + (1 - momentum) * g; theta <- theta - lr * (sign(m) + weight_decay * theta). momentum = 0 is
    signSGD (algorithm 1).
    """

    elementwise: ClassVar[bool] = True
    normalizes_entries: ClassVar[bool] = True

    def __init__(
        self, params: ParamsT, *, lr: Positive = 0.0001, momentum: Fraction = 0.9, weight_decay: NonNegative = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        averages = buffers(self, params, "momentum_buffer")
        torch._foreach_lerp_(averages, gradients(params), 1 - group["momentum"])
        move(group, params, torch._foreach_sign(averages))


Etas = tuple[OpenFraction, Annotated[float, Gt(1)]]


class Rprop(RealOptimizer):
    """Resilient propagation in its textbook form, Rprop- of Igel & Huesken 2003: each weight has its own step size and
    always moves by it against the sign of its gradient.

    The step size starts at lr. It is multiplied by etas[1] if the sign is the same as before and by etas[0] if it has
    changed, and is clipped to `step_sizes`. torch's Rprop (iRprop-) skips the step after a change of sign and sets that
    gradient to zero.
    """

    moves_at_zero_lr: ClassVar[bool] = True  # lr is the first step size only

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
            p.addcmul_(grad.sign(), size, value=-1)
            previous.copy_(grad)
