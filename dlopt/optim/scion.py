"""Scion."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.optim.common import RealOptimizer, buffers, gradients
from dlopt.optim.muon import as_matrix, orthogonalize
from dlopt.ranges import Count, Fraction, Positive


class Scion(RealOptimizer):
    """Stochastic conditional gradient over norm balls (Pethick et al. 2025, algorithms 1 and 2).

    d <- momentum * d + (1 - momentum) * g; theta <- (1 - lr) * theta - lr * radius * lmo(d) keeps the weights of each
    tensor in a ball of that radius; `constrained=False` (uSCG) leaves out the factor 1 - lr, which is the weight decay.

    lmo, by the number of dimensions: a matrix [out, in] takes the spectral norm: sqrt(out / in) * U V^T of d = U S V^T;
    a kernel [out, in, height, width] the same of [out, in * height * width], with sqrt(out / in) / (height * width);
    a vector d / RMS(d). Matrices in a group with `use_muon=False` (`rest: true`), as is advised for the last layer and
    for embeddings that share its weights, take the sign norm: sign(d) / in, with `rest_radius`.
    U V^T is computed by Newton-Schulz iterations, see `dlopt.optim.muon.orthogonalize`. The paper initializes the
    weights on the balls; dlopt's `init` stays as it is.
    """

    elementwise: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.000244140625,
        momentum: Fraction = 0.9,
        radius: Positive = 50.0,
        rest_radius: Positive = 3000.0,
        constrained: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        ns_steps: Count = 5,
        eps: Positive = 1e-8,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "momentum": momentum, "radius": radius, "rest_radius": rest_radius}
        defaults |= {"constrained": constrained, "ns_coefficients": ns_coefficients, "ns_steps": ns_steps, "eps": eps}
        super().__init__(params, {**defaults, "use_muon": True})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, averages = float(group["lr"]), buffers(self, params, "momentum_buffer")
        torch._foreach_lerp_(averages, gradients(params), 1 - group["momentum"])
        if group["constrained"]:
            torch._foreach_mul_(params, 1 - lr)
        for p, average in zip(params, averages, strict=True):
            if p.ndim < 2:
                p.sub_(average / (average.square().mean().sqrt() + group["eps"]), alpha=lr * group["radius"])
            elif not group["use_muon"]:
                p.sub_(average.sign(), alpha=lr * group["rest_radius"] * len(p) / p.numel())
            else:
                matrix = as_matrix(average, p).unsqueeze(0)
                move = orthogonalize(matrix, group["ns_coefficients"], group["ns_steps"], group["eps"])[0]
                scale = math.sqrt(len(p) / p.shape[1]) / math.prod(p.shape[2:])
                as_matrix(p, p).sub_(move.to(p.dtype), alpha=lr * group["radius"] * scale)
