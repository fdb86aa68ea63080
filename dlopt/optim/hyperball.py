"""Steps on a sphere: matrices keep the Frobenius norm that they have at the first update (Wen et al. 2026)."""

from typing import Any

import torch
from torch import Tensor

from dlopt.basics.errors import UserError


def move_on_sphere(p: Tensor, update: Tensor, lr: float | Tensor, radius: Tensor) -> None:
    """W <- R N(W - lr * R * N(u)) with N(X) = X / |X|_F, in place: a step of relative length `lr` along the sphere.

    This is "hyperball optimization" (Wen et al. 2026, arXiv 2606.16899): AdamH, MuonH, SOAP-H. A zero update moves
    nothing.
    """
    tiny = torch.finfo(p.dtype).tiny
    direction = update / update.norm().clamp(min=tiny)
    p.sub_(direction * (lr * radius))
    p.mul_(radius / p.norm().clamp(min=tiny))


def radius(optimizer: torch.optim.Optimizer, p: Tensor) -> Tensor:
    """Returns the norm of p at its first update, which is part of the state: rounding would let the norm drift."""
    state = optimizer.state[p]
    if "radius" not in state:
        state["radius"] = p.norm()
    found: Tensor = state["radius"]
    return found


def keeps_norm(group: dict[str, Any], p: Tensor) -> bool:
    """Whether p is a matrix of a hyperball: not in groups with `rest: true`, as is advised for embeddings."""
    return bool(group["hyperball"]) and p.ndim > 1 and group.get("use_muon", True)


def check_hyperball(group: dict[str, Any]) -> None:
    """Raises `UserError` for a parameter group whose matrices cannot keep their norms."""
    matrices = [p for p in group["params"] if keeps_norm(group, p)] if group.get("hyperball") else []
    if matrices and group["weight_decay"]:
        raise UserError(
            f"optimizer.weight_decay={group['weight_decay']:g}: optimizer.hyperball=true fixes the norm of matrices, "
            "which cannot decay; set optimizer.weight_decay=0, or weight_decay: 0 for them in optimizer.groups"
        )
    for p in matrices:
        # On shards, `any` of torch 2.11 covers this rank only.
        if p.numel() and not p.is_meta and not p.count_nonzero():
            raise UserError(
                f"optimizer.hyperball=true: a matrix of shape {list(p.shape)} is initialized to zero, and would stay "
                "zero; use another init, or rest: true for it in optimizer.groups"
            )


def refuse_with_hyperball(**others: bool) -> None:
    """Raises `UserError` for keys, by name, whose effect fixing the norm would undo."""
    for name, value in others.items():
        if value:
            raise UserError(
                f"optimizer.hyperball=true: fixes the norm of matrices after the update, which undoes "
                f"optimizer.{name}=true; set one of them to false"
            )
