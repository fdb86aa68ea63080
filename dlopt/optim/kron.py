"""Kron, the Kronecker-product preconditioner of PSGD."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.optim.common import Closure, RealOptimizer, buffers, chunks, count_steps, evaluate, gradients
from dlopt.optim.modes import gram, multiply_modes
from dlopt.random import generator
from dlopt.ranges import Count, Fraction, NonNegative, Positive, PositiveFraction, Seed

_FLAT_UPDATES, _DECAY = 250, 0.001  # of the fraction of updates that also update the preconditioner
_MAX_RMS = 1.1  # of a preconditioned update
_BALANCE_EVERY = 100  # updates of the preconditioner between two balancings of its factors


class Kron(RealOptimizer):
    """PSGD with a Kronecker-factored whitening preconditioner (Li 2018; Pooladzandi & Li 2024), with decoupled weight
    decay. Follows Kron in the authors' psgd_torch and in kron_torch.

    P = Q^T Q with Q = Q_1 x ... x Q_k, one factor per mode of a tensor: upper triangular, or diagonal for vectors and
    for modes larger than `max_size`; a kernel [out, in, height, width] has four. P minimizes E[m^T P m + v^T P^-1 v]
    over momenta m and white noise v by steps on the Lie group: Q_i <- Q_i - precond_lr / |A_i + B_i| *
    triu(A_i - B_i) Q_i, with A_i and B_i the Gram matrices along mode i of Q m and of Q^-T v.
    theta <- theta - lr * (P m^, scaled down to an RMS of 1.1 + weight_decay * theta).

    The preconditioner is updated at every update at first, then at a fraction of them that decays from 1 to
    `min_update_rate` between updates 250 and about 4000. kron_torch draws these updates at random; here they are evenly
    spaced, and the noise depends on `seed` and on the update only, which makes resumed runs exact. (pytorch-optimizer
    draws from NumPy's global generator, which a checkpoint does not hold.)
    """

    elementwise: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.001,
        momentum: Fraction = 0.9,
        weight_decay: NonNegative = 0.0,
        precond_lr: PositiveFraction = 0.1,
        min_update_rate: PositiveFraction = 0.03,
        max_size: Count = 8192,
        seed: Seed = 0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "precond_lr": precond_lr}
        defaults |= {"min_update_rate": min_update_rate, "max_size": max_size, "seed": seed}
        super().__init__(params, {**defaults, "step": 0, "due": 0.0, "updated": 0})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        loss = evaluate(closure)
        for number, group in enumerate(self.param_groups):
            is_due = _count_update(group)
            # Also parameters without a gradient count: a pipeline's stage must draw what one process would.
            numbers = {p: index for index, p in enumerate(group["params"])}
            for params in chunks(group["params"]):
                averages, counts = buffers(self, params, "momentum_buffer"), count_steps(self, params)
                torch._foreach_lerp_(averages, gradients(params), 1 - group["momentum"])
                means = torch._foreach_div(averages, [1 - group["momentum"] ** t for t in counts])
                for p, mean in zip(params, means, strict=True):
                    draw = generator(p.device, group["seed"], group["step"], number, numbers[p]) if is_due else None
                    self._update_one(group, p, mean, draw)
        return loss

    def _update_one(self, group: dict[str, Any], p: Tensor, mean: Tensor, draw: torch.Generator | None) -> None:
        """Updates one parameter with its average gradient; its preconditioner if there is a generator for the noise."""
        lr = float(group["lr"])
        factors, mean = self._factors(p, group["max_size"]), torch.atleast_1d(mean)
        if draw is not None:
            if p.ndim > 1 and group["updated"] % _BALANCE_EVERY == 0:
                _balance(factors)
            noise = torch.randn(mean.shape, generator=draw, dtype=p.dtype, device=p.device)
            update_factors(factors, mean, noise, group["precond_lr"])
        update = multiply_modes(multiply_modes(mean, factors), factors, transpose=True)
        update.div_((update.square().mean().sqrt() / _MAX_RMS).clamp_(min=1.0))
        p.mul_(1 - lr * group["weight_decay"])
        p.sub_(update.view(p.shape), alpha=lr)

    def _factors(self, p: Tensor, max_size: int) -> list[Tensor]:
        """Returns Q_1 ... Q_k, the identity at first; a scalar has one of size 1."""
        state, factors = self.state[p], []
        for mode, size in enumerate(p.shape or (1,)):
            if f"factor{mode}" not in state:
                ones = torch.ones(size, dtype=p.dtype, device=p.device)
                state[f"factor{mode}"] = ones if p.ndim < 2 or size > max_size else ones.diag()
            factors.append(state[f"factor{mode}"])
        return factors


def _count_update(group: dict[str, Any]) -> bool:
    """Counts an update of the group; returns whether its preconditioners are due."""
    rate = math.exp(-_DECAY * (group["step"] - _FLAT_UPDATES))
    group["step"] += 1
    group["due"] += min(1.0, max(group["min_update_rate"], rate))
    is_due = bool(group["due"] >= group["updated"] + 1)
    group["updated"] += is_due
    return is_due


def update_factors(factors: list[Tensor], gradient: Tensor, noise: Tensor, lr: float) -> None:
    """Takes one step of the factors Q_i, in place, towards the preconditioner that whitens such gradients.

    A gradient of zeros does not change them: the factors would grow by `lr` at every such step, without bound.
    """
    rate, wide = lr * gradient.any().to(gradient.dtype), torch.promote_types(gradient.dtype, torch.float32)
    whitened = multiply_modes(gradient, factors)
    inverse = noise
    for factor in factors:  # Q^-T noise; each mode goes to the end, as in multiply_modes
        if factor.ndim == 1:
            inverse = inverse.movedim(0, -1) / factor
        else:
            unfolded = inverse.movedim(0, -1)
            rows = unfolded.reshape(-1, len(factor)).to(wide)  # torch solves no systems in bfloat16
            solved = torch.linalg.solve_triangular(factor.to(wide), rows, upper=True, left=False)
            inverse = solved.reshape(unfolded.shape).to(gradient.dtype)
    for mode, factor in enumerate(factors):
        diagonal = factor.ndim == 1
        a, b = gram(whitened, mode, diagonal=diagonal), gram(inverse, mode, diagonal=diagonal)
        tiny = torch.finfo(a.dtype).tiny
        if diagonal:
            step = rate / (a + b).max().clamp_(min=tiny)
            factor.sub_((a - b) * factor * step)
        else:
            step = rate / _norm_bound(a + b).clamp_(min=tiny)
            factor.sub_((a - b).triu_() @ factor * step)


def _norm_bound(matrix: Tensor) -> Tensor:
    """Returns a lower bound of the spectral norm of a symmetric matrix, by one power iteration from a row."""
    scale = matrix.abs().max().clamp(min=torch.finfo(matrix.dtype).tiny)
    matrix = matrix / scale
    start = matrix @ matrix[matrix.square().sum(1).argmax()]
    return scale * (matrix @ (start / start.norm().clamp(min=torch.finfo(matrix.dtype).tiny))).norm()


def _balance(factors: list[Tensor]) -> None:
    """Gives all factors the same largest entry, which does not change their product."""
    norms = torch.stack([factor.abs().max() for factor in factors])
    mean = norms.log().mean().exp()
    for factor, norm in zip(factors, norms, strict=True):
        factor.mul_(mean / norm)
