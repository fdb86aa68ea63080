"""Burgers' equation u_t + u u_x = nu u_xx, solved by a network (Raissi, Perdikaris & Karniadakis 2019, section 3.1).

cd docs/examples/tasks
dlopt train task=burgers.Burgers allow_packages=[burgers] data=drawn model=mlp model.widths=[32,32,32] \
    model.activation=tanh model.norm=none precision=fp64 data.batch_size=full optimizer=lbfgs epochs=50
"""

import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dlopt.extend import Draws, Positive, UserTask


class Burgers(UserTask):
    values: ClassVar = {"error": "min"}  # relative L2 error of the solution at t > 0

    def __init__(self, *, viscosity: Positive = 0.05) -> None:
        self.viscosity = viscosity
        x, t = torch.meshgrid(torch.linspace(-1, 1, 101), torch.linspace(0.02, 1, 50), indexing="ij")
        self.points = torch.stack([x.flatten(), t.flatten()], 1).double()
        self.solution = exact(self.points, viscosity)

    def model_arguments(self, shape, classes):
        return {"input_shape": (2,), "classes": 1}  # (x, t) -> u

    def loss(self, model, batch, draws: Draws) -> dict[str, Tensor]:
        x, t = 2 * draws.uniform(1) - 1, draws.uniform(1)
        points = torch.cat([x, t], 1).requires_grad_()
        u = model(points)
        u_x, u_t = derivative(u, points).split(1, 1)
        u_xx = derivative(u_x, points)[:, :1]
        start = torch.cat([x, torch.zeros_like(t)], 1)
        walls = torch.cat([torch.sign(x), t], 1)
        return {
            "equation": (u_t + u * u_x - self.viscosity * u_xx).square().mean(),
            "start": (model(start) + torch.sin(math.pi * x)).square().mean(),
            "walls": model(walls).square().mean(),
        }

    def evaluate(self, model, batches, draws: Draws, split):
        found = model(self.points.to(draws.device, draws.dtype)).flatten().cpu().double()
        return {"error": (found - self.solution).norm() / self.solution.norm()}


def derivative(u: Tensor, points: Tensor) -> Tensor:
    return torch.autograd.grad(u.sum(), points, create_graph=True)[0]


def exact(points: Tensor, viscosity: float) -> Tensor:
    """The Cole-Hopf transformation, integrated by Gauss-Hermite quadrature (Basdevant et al. 1986)."""
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    x, t = points.numpy().T[:, :, None]
    y = x - np.sqrt(4 * viscosity * t) * nodes
    f = weights * np.exp(-(np.cos(np.pi * y) + 1) / (2 * np.pi * viscosity))
    return torch.from_numpy(-(np.sin(np.pi * y) * f).sum(1) / f.sum(1))
