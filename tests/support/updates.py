"""Weights of three shapes, gradients for them, and optimizers that are compared with update formulas."""

import numpy as np
import torch
from torch import Tensor, nn

from dlopt.lab.verify.references import Array, Formula

_DRAW = np.random.default_rng(0)
SHAPES = {"kernel": (3, 2, 2, 2), "matrix": (4, 3), "vector": (5,)}
START = {name: _DRAW.normal(size=shape) for name, shape in SHAPES.items()}
GRADS = [{name: _DRAW.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(12)]


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.tensor(value)) for name, value in START.items()}


def set_gradients(params: dict[str, nn.Parameter], gradient: dict[str, Array]) -> None:
    for name, p in params.items():
        p.grad = torch.tensor(gradient[name])


def path(
    optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter], grads: list[dict[str, Array]] = GRADS
) -> list[Tensor]:
    """Returns all weights after each update."""
    seen = []
    for gradient in grads:
        set_gradients(params, gradient)
        optimizer.step()
        seen.append(torch.cat([p.detach().reshape(-1) for p in params.values()]))
    return seen


def written(formula: Formula) -> list[Tensor]:
    """Returns the weights of `path` by a formula in NumPy."""
    weights = [list(formula(START[name], [g[name] for g in GRADS])) for name in SHAPES]
    return [torch.cat([torch.tensor(w).reshape(-1) for w in step]) for step in zip(*weights, strict=True)]
