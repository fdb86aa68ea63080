"""Optimal learning rate and momentum on a quadratic, in closed form."""

import math
from collections.abc import Mapping

import torch

from dlopt.config.schema import Component
from dlopt.optim import SGDW


def optimum(optimizer: Component, least: float, largest: float, *, fixed_momentum: bool) -> Mapping[str, float] | None:
    """Returns the keys with the fastest convergence on a quadratic with Hessian eigenvalues `least` to `largest`.

    Gradient descent: lr = 2 / (L + mu). Heavy ball: lr = 4 / (sqrt L + sqrt mu)^2 and momentum ((sqrt L - sqrt mu) /
    (sqrt L + sqrt mu))^2 (Polyak 1964); with `fixed_momentum` the lr for the momentum of the optimizer. None for other
    optimizers. Momentum as an average of gradients (`SGDW`) takes steps 1 - momentum times as long.
    """
    arguments = optimizer.arguments
    averages = optimizer.target is SGDW
    heavy_ball = optimizer.target is torch.optim.SGD and not arguments["nesterov"] and arguments["dampening"] == 0
    if not (averages or heavy_ball) or arguments["weight_decay"] != 0:
        return None
    if arguments["momentum"] == 0:
        return {"lr": 2 / (largest + least)}
    best = ((math.sqrt(largest) - math.sqrt(least)) / (math.sqrt(largest) + math.sqrt(least))) ** 2
    momentum = arguments["momentum"] if fixed_momentum else best
    scale = 1 - momentum if averages else 1.0
    lr = _rate(momentum, best, least, largest) / scale
    return {"lr": lr} if fixed_momentum else {"lr": lr, "momentum": momentum}


def _rate(momentum: float, best: float, least: float, largest: float) -> float:
    """Returns the heavy ball's best lr at this momentum.

    Below the best momentum the slowest roots of both ends are equal at 2 (1 + momentum) / (L + mu). Above it, every lr
    from (1 - sqrt momentum)^2 / mu to (1 + sqrt momentum)^2 / L converges with sqrt momentum; the geometric mean.
    """
    if momentum <= best:
        return 2 * (1 + momentum) / (largest + least)
    root = math.sqrt(momentum)
    return math.sqrt((1 - root) ** 2 / least * (1 + root) ** 2 / largest)
