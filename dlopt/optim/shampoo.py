"""Shampoo."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.optim.common import RealOptimizer, buffers, count_steps, gradients
from dlopt.optim.modes import eigenvectors, gram, multiply_modes
from dlopt.ranges import Count, Fraction, NonNegative, Positive


class Shampoo(RealOptimizer):
    """Full-matrix preconditioning of each mode of a tensor (Gupta et al. 2018, algorithm 2), with decoupled
    weight decay.

    H_i <- H_i + X_i X_i^T, from eps * I, where X_i is the gradient unfolded along mode i of k;
    theta <- theta - lr * m x_1 H_1^(-1/2k) ... x_k H_k^(-1/2k), where m averages gradients. A matrix (k = 2) is
    preconditioned by L^(-1/4) m R^(-1/4), a kernel [out, in, height, width] along its four modes, a vector by
    H^(-1/2), which is full-matrix AdaGrad, a scalar as a vector of one entry. Modes larger than `max_size` use the
    diagonal of H_i (section 4.3 of the paper). The roots are computed at the first update and then every
    `update_every` ones.
    """

    elementwise: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.1,
        momentum: Fraction = 0.9,
        eps: Positive = 0.0001,
        weight_decay: NonNegative = 0.0,
        update_every: Count = 10,
        max_size: Count = 1024,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "update_every": update_every, "max_size": max_size})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, averages = float(group["lr"]), buffers(self, params, "momentum_buffer")
        counts = count_steps(self, params)
        for p, grad, average, count in zip(params, gradients(params), averages, counts, strict=True):
            average.lerp_(grad, 1 - group["momentum"])
            roots = self._inverse_roots(group, p, grad, is_due=(count - 1) % group["update_every"] == 0)
            p.mul_(1 - lr * group["weight_decay"])
            p.sub_(multiply_modes(torch.atleast_1d(average), roots).view(p.shape), alpha=lr)

    def _inverse_roots(self, group: dict[str, Any], p: Tensor, grad: Tensor, *, is_due: bool) -> list[Tensor]:
        """Adds the gradient to H_1 ... H_k; returns H_i^(-1/2k), which are computed if `is_due`."""
        state, roots, grad = self.state[p], [], torch.atleast_1d(grad)
        for mode, size in enumerate(grad.shape):
            added = gram(grad, mode, diagonal=size > group["max_size"])
            name, root = f"sum{mode}", f"root{mode}"
            if name not in state:
                state[name] = _start(added, group["eps"])
            state[name].add_(added)
            if is_due:
                state[root] = _inverse_root(state[name], 2 * grad.ndim, group["eps"])
            roots.append(state[root])
        return roots


def _start(like: Tensor, eps: float) -> Tensor:
    """Returns eps * I, or its diagonal."""
    return torch.full_like(like, eps) if like.ndim == 1 else eps * torch.eye(len(like), dtype=like.dtype).to(like)


def _inverse_root(sums: Tensor, order: int, eps: float) -> Tensor:
    """Returns H^(-1/order) of a symmetric H >= eps * I, or of a diagonal."""
    if sums.ndim == 1:
        return sums.pow(-1 / order)
    values, vectors = eigenvectors(sums)
    # rounding may push the smallest eigenvalues below eps
    return (vectors * values.clamp(min=eps).pow(-1 / order)) @ vectors.T
