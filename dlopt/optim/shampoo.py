"""Shampoo, and SOAP, which is Adam in the basis of its preconditioners."""

import math
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


class SOAP(RealOptimizer):
    """Adam in the eigenbasis of Shampoo's preconditioners (Vyas et al. 2024, algorithm 3), with decoupled weight decay.

    For a matrix: G' = QL^T G QR; V averages G'^2; theta <- theta - lr * QL (QL^T M QR / (sqrt(V) + eps)) QR^T, with
    M, the average of G, and V corrected for their start at zero. L and R average G G^T and G^T G with `shampoo_beta`
    (null: betas[1]). Every `update_every` updates Q <- QR(L Q), one step of the power iteration (algorithm 4), with
    columns sorted by eigenvalue as in the authors' code.

    The first gradient only initializes L, R and their eigenvectors, as in the authors' code, so that no gradient is
    projected on its own eigenbasis. A kernel [out, in, height, width] has a basis for each of its four modes. Vectors,
    and modes larger than `max_size`, are not rotated: AdamW. (pytorch-optimizer's SOAP orthogonalizes in float32.)
    """

    elementwise: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.003,
        betas: tuple[Fraction, Fraction] = (0.95, 0.95),
        shampoo_beta: Fraction | None = None,
        eps: Positive = 1e-8,
        weight_decay: NonNegative = 0.01,
        update_every: Count = 10,
        max_size: Count = 10_000,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "shampoo_beta": shampoo_beta, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "update_every": update_every, "max_size": max_size})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, (beta1, beta2), beta3 = float(group["lr"]), group["betas"], group["shampoo_beta"]
        averages, squares = buffers(self, params, "exp_avg"), buffers(self, params, "exp_avg_sq")
        counts = count_steps(self, params)
        for p, grad, m, v, count in zip(params, gradients(params), averages, squares, counts, strict=True):
            state, modes = self.state[p], _rotated_modes(p, group["max_size"])
            if count > 1:
                t = count - 1  # updates, including this one
                bases = [state.get(f"basis{mode}") for mode in range(p.ndim)]
                m.lerp_(grad, 1 - beta1)
                v.mul_(beta2).add_(multiply_modes(grad, bases, transpose=True).square(), alpha=1 - beta2)
                denominator = v.sqrt().div_(math.sqrt(1 - beta2**t)).add_(group["eps"])
                normalized = multiply_modes(m, bases, transpose=True) / denominator
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(multiply_modes(normalized, bases), alpha=lr / (1 - beta1**t))
            self._average_grams(p, grad, modes, beta2 if beta3 is None else beta3)
            if count == 1:
                for mode in modes:
                    state[f"basis{mode}"] = eigenvectors(state[f"gram{mode}"])[1].flip(1)  # largest eigenvalue first
            elif (count - 1) % group["update_every"] == 0:
                self._refresh_bases(p, modes)

    def _average_grams(self, p: Tensor, grad: Tensor, modes: list[int], beta: float) -> None:
        state = self.state[p]
        for mode in modes:
            new = gram(grad, mode)
            if f"gram{mode}" not in state:
                state[f"gram{mode}"] = torch.zeros_like(new)
            state[f"gram{mode}"].lerp_(new, 1 - beta)

    def _refresh_bases(self, p: Tensor, modes: list[int]) -> None:
        """Moves the bases one step of the power iteration towards the eigenvectors; V follows their order."""
        state = self.state[p]
        for mode in modes:
            basis = state[f"basis{mode}"]
            product = state[f"gram{mode}"] @ basis
            order = (basis * product).sum(0).argsort(descending=True)
            state["exp_avg_sq"].copy_(state["exp_avg_sq"].index_select(mode, order))
            product = product[:, order]
            wide = product if product.dtype == torch.float64 else product.float()
            state[f"basis{mode}"] = torch.linalg.qr(wide).Q.to(product.dtype)


def _rotated_modes(p: Tensor, max_size: int) -> list[int]:
    return [mode for mode, size in enumerate(p.shape) if size <= max_size] if p.ndim > 1 else []
