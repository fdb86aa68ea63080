"""Newton's method with the exact Hessian, and without ever forming it.

Both need `closure.loss()`, the differentiable loss of the step's batch: from it come the gradient and its derivatives.
All parameters are one vector with one learning rate, the first step length that the line search tries.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.optim.common import (
    Closure,
    assign,
    differentiable_loss,
    evaluate,
    flat,
    needs_closure,
    refuse_above,
    refuse_own_rates,
    trainable,
)
from dlopt.optim.line_search import backtracking
from dlopt.ranges import Count, NonNegative, Positive, PositiveFraction

_ROWS = 64  # rows of the Hessian that one batched backward pass gives


class _SecondOrder(torch.optim.Optimizer):
    evaluations: ClassVar[str] = "many"
    elementwise: ClassVar[bool] = False

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One step along the Newton direction, with a backtracking line search on the closure's loss; none where the
        search finds no decrease. Returns the loss before the step."""
        closure = needs_closure(self, closure)
        loss_of = differentiable_loss(self, closure)
        before = evaluate(closure)
        params, group = trainable(self), self.param_groups[0]
        if not math.isfinite(float(before)):
            return before
        with torch.enable_grad():
            loss = loss_of()
            grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
            gradient = flat(torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True))
        direction = self._direction(group, params, gradient)
        del grads
        gradient = gradient.detach()
        value, slope = torch.stack([loss.detach().to(gradient.dtype), gradient @ direction]).tolist()
        del loss  # the graph, before the search builds its own
        if slope >= 0:
            return before
        start = flat(params)

        def loss_at(t: float) -> float:
            assign(params, start + t * direction)
            return float(loss_of())

        t = backtracking(
            loss_at, loss=value, slope=slope, t=float(group["lr"]), c1=group["c1"], evaluations=group["max_backtracks"]
        )
        assign(params, start + t * direction if t else start)
        return before

    def _direction(self, group: dict[str, Any], params: list[Tensor], gradient: Tensor) -> Tensor:
        """[n], from the gradient [n] with its graph."""
        raise NotImplementedError


class Newton(_SecondOrder):
    """theta <- theta - t (H + damping I)^-1 g, H the exact Hessian of the batch's loss.

    Where H + damping I is not positive definite, the damping is raised until it is (Nocedal & Wright, algorithm 3.3),
    so that the direction always descends. Time and memory grow with the square of the parameters, the solution with the
    cube: models above `max_parameters` are refused.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 1.0,
        damping: NonNegative = 0.0001,
        c1: PositiveFraction = 0.0001,
        max_backtracks: Count = 25,
        max_parameters: Count = 10_000,
    ) -> None:
        super().__init__(params, {"lr": lr, "damping": damping, "c1": c1, "max_backtracks": max_backtracks})
        refuse_own_rates("newton", lr, self.param_groups)
        refuse_above("newton", trainable(self), max_parameters, "newton_cg")

    def _direction(self, group: dict[str, Any], params: list[Tensor], gradient: Tensor) -> Tensor:
        hessian = _hessian(gradient, params)
        gradient = gradient.detach()
        diagonal = hessian.diagonal()
        shift = group["damping"]
        if float(diagonal.min()) + shift <= 0:
            shift = float(-diagonal.min()) + 1e-3 * float(hessian.norm())
        while True:
            factor, failed = torch.linalg.cholesky_ex(hessian + shift * torch.eye(len(hessian)).to(hessian))
            if not failed:
                return -torch.cholesky_solve(gradient.unsqueeze(1), factor).squeeze(1)
            shift = max(2 * shift, 1e-3 * float(hessian.norm()))
            if not math.isfinite(shift):
                return torch.zeros_like(gradient)


def _hessian(gradient: Tensor, params: list[Tensor]) -> Tensor:
    """[n, n], symmetrized, from the gradient [n] with its graph."""
    n = len(gradient)
    hessian = torch.zeros(n, n, dtype=gradient.dtype, device=gradient.device)
    if not gradient.requires_grad:  # a loss that is linear in the parameters
        return hessian
    for begin in range(0, n, _ROWS):
        rows = min(_ROWS, n - begin)
        basis = torch.zeros(rows, n, dtype=gradient.dtype, device=gradient.device)
        basis[:, begin : begin + rows].fill_diagonal_(1)
        parts = torch.autograd.grad(
            gradient, params, basis, retain_graph=True, is_grads_batched=True, allow_unused=True
        )
        offset = 0
        for p, part in zip(params, parts, strict=True):
            if part is not None:
                hessian[begin : begin + rows, offset : offset + p.numel()] = part.reshape(rows, -1)
            offset += p.numel()
    return 0.5 * (hessian + hessian.T)


class NewtonCG(_SecondOrder):
    """The Newton direction from conjugate gradients on products with the Hessian: any size (Martens 2010; Nocedal &
    Wright, algorithm 7.1).

    The inner iteration ends when the residual falls below min(tolerance, sqrt |g|) |g|, which makes convergence
    superlinear; at a direction of negative curvature, where it returns what it has (-g when it has nothing); and after
    `max_iterations`. Each iteration costs about two backward passes.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 1.0,
        damping: NonNegative = 0.0001,
        tolerance: PositiveFraction = 0.5,
        max_iterations: Count = 100,
        c1: PositiveFraction = 0.0001,
        max_backtracks: Count = 25,
    ) -> None:
        defaults = {"lr": lr, "damping": damping, "tolerance": tolerance, "max_iterations": max_iterations}
        super().__init__(params, {**defaults, "c1": c1, "max_backtracks": max_backtracks})
        refuse_own_rates("newton_cg", lr, self.param_groups)

    def _direction(self, group: dict[str, Any], params: list[Tensor], gradient: Tensor) -> Tensor:
        def product(v: Tensor) -> Tensor:
            if not gradient.requires_grad:
                return group["damping"] * v
            parts = torch.autograd.grad(gradient, params, v, retain_graph=True, allow_unused=True)
            hv = flat(torch.zeros_like(p) if h is None else h for p, h in zip(params, parts, strict=True))
            return hv + group["damping"] * v

        g = gradient.detach()
        norm = float(g.norm())
        tolerance = min(group["tolerance"], math.sqrt(norm)) * norm
        return _conjugate_gradients(product, -g, tolerance, group["max_iterations"])


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, tolerance: float, max_iterations: int
) -> Tensor:
    """x with |A x - b| < tolerance for the symmetric A of `product`, from x = 0."""
    x, residual, direction = torch.zeros_like(b), b, b
    square = float(residual @ residual)
    for i in range(max_iterations):
        if math.sqrt(square) <= tolerance:
            break
        image = product(direction)
        curvature, length = torch.stack([direction @ image, direction @ direction]).tolist()
        if curvature <= torch.finfo(b.dtype).eps * length:
            return b if i == 0 else x
        alpha = square / curvature
        x = x + alpha * direction
        residual = residual - alpha * image
        new = float(residual @ residual)
        direction = residual + (new / square) * direction
        square = new
    return x
