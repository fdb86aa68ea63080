import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.optim.common import Closure, as_groups, buffers, evaluate, gradients
from dlopt.ranges import Count, Fraction, NonNegative, Positive


def orthogonalize(matrices: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """U V^T, nearly, of each of the matrices U S V^T [n, rows, columns], in bfloat16.

    The quintic Newton-Schulz iteration X <- a X + (b X X^T + c (X X^T)^2) X of Jordan et al. 2024 ("Muon"), whose
    coefficients are chosen for few steps and not for convergence: the singular values end between 0.7 and 1.2.
    """
    a, b, c = coefficients
    x = matrices.to(torch.bfloat16)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum for matrices (Jordan et al. 2024), another method for the rest.

    Matrices are the parameters of two and more dimensions; a convolution's kernel counts as [out, in * height * width].
    A group with `use_muon=False` leaves its matrices to the other method, as is advised for embeddings and the last
    layer. The rest is updated by torch's AdamW, or SGD with Nesterov momentum, with a learning rate of its own. Both
    decays are decoupled (SGD's is the L2 penalty of torch's SGD). `normalize_weights` brings each matrix to the norm
    sqrt(rows) before its update (Jordan's airbench94_muon), so that the learning rate is relative to the weights.

    The parameters are regrouped: each group given becomes one of matrices and one of the rest.
    """

    evaluations: ClassVar[str] = "once"
    elementwise: ClassVar[bool] = False
    capturable: ClassVar[bool] = True  # on a GPU: nothing of an update is decided on the host

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.02,
        weight_decay: NonNegative = 0.01,
        momentum: Fraction = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        ns_steps: Count = 5,
        eps: Positive = 1e-7,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original",
        normalize_weights: bool = False,
        rest: Literal["adamw", "sgd"] = "adamw",
        rest_lr: Positive = 0.001,
        rest_momentum: Fraction = 0.9,
        rest_betas: tuple[Fraction, Fraction] = (0.9, 0.999),
        rest_eps: Positive = 1e-8,
    ) -> None:
        own = {"momentum": momentum, "nesterov": nesterov, "ns_coefficients": ns_coefficients, "ns_steps": ns_steps}
        own |= {"eps": eps, "adjust_lr_fn": adjust_lr_fn, "normalize_weights": normalize_weights}
        matrices, others = [], []
        for group in as_groups(params):
            members, keys = group.pop("params"), {"lr": lr, "weight_decay": weight_decay, **group}
            wanted = keys.pop("use_muon", True)
            chosen = [p for p in members if wanted and p.ndim > 1]
            left = [p for p in members if not (wanted and p.ndim > 1)]
            if chosen:
                matrices.append({**own, **keys, "params": chosen, "use_muon": True})
            if left:
                keys["lr"] = keys["lr"] / lr * rest_lr
                others.append({**keys, "params": left, "use_muon": False})
        self._rest: torch.optim.Optimizer | None = None
        if others:
            fused = all(p.device.type in ("cpu", "cuda") for group in others for p in group["params"]) or None
            self._rest = (
                torch.optim.AdamW(others, lr=rest_lr, betas=rest_betas, eps=rest_eps, fused=fused)
                if rest == "adamw"
                else torch.optim.SGD(
                    others, lr=rest_lr, momentum=rest_momentum, nesterov=rest_momentum > 0, fused=fused
                )
            )
        super().__init__([*matrices, *(self._rest.param_groups if self._rest else [])], {})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        loss = evaluate(closure)
        for group in self.param_groups:
            if group["use_muon"]:
                self._step_matrices(group)
        if self._rest is not None:  # shares groups and state, which loading a state replaces
            self._rest.param_groups = [group for group in self.param_groups if not group["use_muon"]]
            self._rest.state = self.state
            self._rest.step()
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """Nothing here asks for a number: a captured graph of it follows a learning rate that is a tensor."""
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        found, averages = gradients(params), buffers(self, params, "momentum_buffer")
        torch._foreach_lerp_(averages, found, 1 - group["momentum"])
        moves = torch._foreach_lerp(found, averages, group["momentum"]) if group["nesterov"] else averages
        if group["normalize_weights"]:
            for p in params:
                p.mul_(math.sqrt(len(p)) / p.norm())
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        alike: dict[tuple[int, ...], list[int]] = {}
        for index, p in enumerate(params):
            alike.setdefault((len(p), p.numel() // len(p)), []).append(index)
        for shape, members in alike.items():
            stacked = torch.stack([_matrix(moves[index], params[index]) for index in members])
            turned = orthogonalize(stacked, group["ns_coefficients"], group["ns_steps"], group["eps"])
            scaled = turned.to(stacked.dtype) * (group["lr"] * _rate_factor(shape, group["adjust_lr_fn"]))
            for index, move in zip(members, scaled, strict=True):
                _matrix(params[index], params[index]).sub_(move)


def _rate_factor(shape: tuple[int, ...], how: str) -> float:
    """By which the learning rate follows a matrix's shape: Jordan's, or the one that makes the updates as large as
    AdamW's (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2)."""
    rows, columns = shape
    return math.sqrt(max(1.0, rows / columns)) if how == "original" else 0.2 * math.sqrt(max(rows, columns))


def _matrix(t: Tensor, like: Tensor) -> Tensor:
    """[out, everything else], a view wherever t is laid out like `like`. The order of the columns is the layout's: it
    differs for channels-last kernels, and orthogonalization does not depend on it."""
    if like.ndim == 2:
        return t
    if not like.is_contiguous():
        order = sorted(range(1, like.ndim), key=like.stride, reverse=True)
        t = t.permute(0, *order)
    return t.reshape(len(t), -1)
