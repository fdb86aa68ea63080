"""Sophia."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.basics.random import generator, stream
from dlopt.basics.ranges import Count, Fraction, NonNegative, Positive, Seed
from dlopt.optim.common import (
    Closure,
    RealOptimizer,
    buffers,
    differentiable_loss,
    gradients,
    loss_of,
    move,
    needs_closure,
    sampled_loss,
    trainable,
)
from dlopt.optim.traits import OptimizerTraits


class Sophia(RealOptimizer):
    """Momentum divided by an estimate of the Hessian's diagonal, and clipped (Liu et al. 2024, algorithm 3).

    m <- beta1 * m + (1 - beta1) * g; every `update_every` updates h <- beta2 * h + (1 - beta2) * estimate;
    theta <- theta - lr * weight_decay * theta - lr * clip(m / max(gamma * h, eps), 1).

    hessian: the estimate, on the batch of the update:
        hutchinson  u * (H u), with u standard normal and H the Hessian of the loss (Sophia-H, algorithm 1). Needs
            `closure.loss()` and costs about two backward passes.
        gnb  B * g' * g', with g' the gradient of the mean loss for labels that are drawn from the model's softmax, and
            B their number (Gauss-Newton-Bartlett, Sophia-G, algorithm 2): its mean is the diagonal of the Gauss-Newton
            matrix, which is never negative. Needs `closure.sampled_loss()` and costs one forward and backward pass.

    Where h <= 0 the step is the sign of m. u and the labels depend on `seed` and on the update only.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.0006,
        betas: tuple[Fraction, Fraction] = (0.96, 0.99),
        gamma: Positive = 0.01,
        eps: Positive = 1e-12,
        weight_decay: NonNegative = 0.2,
        hessian: Literal["hutchinson", "gnb"] = "hutchinson",
        update_every: Count = 10,
        seed: Seed = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "gamma": gamma, "eps": eps, "weight_decay": weight_decay}
        estimate = {"hessian": hessian, "update_every": update_every, "seed": seed, "step": 0}
        super().__init__(params, {**defaults, **estimate})

    @property
    def traits(self) -> OptimizerTraits:
        samples = bool(self.param_groups[0]["hessian"] == "gnb")
        return OptimizerTraits(evaluations="many", samples_labels=samples, decoupled_decay=True)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        closure, first = needs_closure(self, closure), self.param_groups[0]
        # First the gradient at the present weights, then the estimate of the Hessian at the same ones. The closure's
        # gradients stay in the parameters: the estimates use torch.autograd.grad, which leaves them alone.
        loss = loss_of(closure)
        if first["step"] % first["update_every"] == 0:
            self._estimate_hessian(first, closure)
        for group in self.param_groups:
            group["step"] += 1
        super().step()
        return loss

    def _estimate_hessian(self, first: dict[str, Any], closure: Closure) -> None:
        """Averages an estimate of the Hessian's diagonal into the state."""
        params = trainable(self)
        if not params:
            return
        estimate = self._gauss_newton if self.traits.samples_labels else self._hutchinson
        for h, new in zip(buffers(self, params, "hessian"), estimate(first, params, closure), strict=True):
            h.lerp_(torch.zeros_like(h) if new is None else new, 1 - first["betas"][1])

    def _gauss_newton(self, first: dict[str, Any], params: list[Tensor], closure: Closure) -> list[Tensor | None]:
        with torch.enable_grad():
            loss, count = sampled_loss(self, closure)(stream(first["seed"], first["step"]))
            grads = torch.autograd.grad(loss, params, allow_unused=True)
        return [None if g is None else count * g.square() for g in grads]

    def _hutchinson(self, first: dict[str, Any], params: list[Tensor], closure: Closure) -> list[Tensor | None]:
        compute_loss = differentiable_loss(self, closure)
        draws = [generator(p.device, first["seed"], first["step"], index) for index, p in enumerate(params)]
        noise = [
            torch.randn(p.shape, generator=draw, dtype=p.dtype, device=p.device)
            for p, draw in zip(params, draws, strict=True)
        ]
        with torch.enable_grad():
            grads = torch.autograd.grad(compute_loss(), params, create_graph=True, allow_unused=True)
            inner = [(g * u).sum() for g, u in zip(grads, noise, strict=True) if g is not None and g.requires_grad]
            products: tuple[Tensor | None, ...] = (None,) * len(params)
            if inner:  # else the loss is linear in the parameters
                products = torch.autograd.grad(torch.stack(inner).sum(), params, allow_unused=True)
        return [None if product is None else u * product for u, product in zip(noise, products, strict=True)]

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        averages, hessians = buffers(self, params, "exp_avg"), buffers(self, params, "hessian")
        torch._foreach_lerp_(averages, gradients(params), 1 - group["betas"][0])
        bounds = torch._foreach_mul(hessians, group["gamma"])
        torch._foreach_clamp_min_(bounds, group["eps"])
        updates = torch._foreach_div(averages, bounds)
        torch._foreach_clamp_max_(updates, 1.0)
        torch._foreach_clamp_min_(updates, -1.0)
        move(group, params, updates)
