"""Newton's method with the exact Hessian, with and without safeguards, and Hessian-free.

All need `closure.loss()`, the differentiable loss of the step's batch, to compute derivatives of the gradient. All
parameters form one vector with one learning rate, the initial step length of the line search.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.basics.ranges import Count, NonNegative, Positive, PositiveFraction
from dlopt.optim.common import (
    Closure,
    assign,
    differentiable_loss,
    flat,
    flat_or_zero,
    loss_of,
    needs_closure,
    refuse_above,
    refuse_complex,
    refuse_group_rates,
    trainable,
)
from dlopt.optim.traits import OptimizerTraits

_ROWS = 64  # rows of the Hessian per batched backward pass


class _SecondOrder(torch.optim.Optimizer):
    """Base of the Newton methods: real parameters with one learning rate."""

    traits: ClassVar[OptimizerTraits] = OptimizerTraits(evaluations="many", ignores_clipping=True)

    def __init__(self, params: ParamsT, name: str, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        refuse_group_rates(name, defaults["lr"], self.param_groups)
        refuse_complex(name, trainable(self))

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Takes one step along the Newton direction, or none without a finite one; returns the loss before the step."""
        closure = needs_closure(self, closure)
        compute_loss = differentiable_loss(self, closure)
        before = loss_of(closure)
        params, group = trainable(self), self.param_groups[0]
        if not params or not math.isfinite(float(before)):
            return before
        with torch.enable_grad():
            loss = compute_loss()
            grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
            gradient = flat_or_zero(grads, params)
        direction = self._direction(group, params, gradient)
        if direction is None:
            return before
        start, gradient = flat(params), gradient.detach()
        # Read together: each read waits for the device. The line search compares them on the host.
        value, slope = torch.stack([loss.detach().to(gradient.dtype), gradient @ direction]).tolist()
        del grads, loss  # free the graph before the line search builds others

        def loss_at(t: float) -> float:
            assign(params, start + t * direction)
            return float(compute_loss())

        t = self._step_length(group, loss_at, value, slope)
        assign(params, start + t * direction if t else start)
        return before

    def _direction(self, group: dict[str, Any], params: list[Tensor], gradient: Tensor) -> Tensor | None:
        """Returns the direction [n] for the gradient [n], whose graph it may differentiate; None to take no step."""
        raise NotImplementedError

    def _step_length(
        self, group: dict[str, Any], loss_at: Callable[[float], float], loss: float, slope: float
    ) -> float:
        """Returns the step length by a backtracking line search; 0 if it finds no decrease."""
        if not slope < 0:  # at a stationary point, or not finite
            return 0.0
        lr, c1, evaluations = float(group["lr"]), group["c1"], group["max_backtracks"]
        return backtracking(loss_at, loss=loss, slope=slope, t=lr, c1=c1, evaluations=evaluations)


def backtracking(
    loss_at: Callable[[float], float], *, loss: float, slope: float, t: float, c1: float, evaluations: int
) -> float:
    """Returns the first of t, t/2, t/4, ... with loss(t) <= loss + c1 t slope; 0 if `evaluations` of them fail.

    A line search along x + t d (Nocedal & Wright, Numerical Optimization, 2nd ed., algorithm 3.1).
    """
    for _ in range(evaluations):
        if loss_at(t) <= loss + c1 * t * slope:  # False for NaN
            return t
        t *= 0.5
    return 0.0


class Newton(_SecondOrder):
    """theta <- theta - t (H + damping I)^-1 g, H the exact Hessian of the batch's loss.

    If H + damping I is not positive definite, the damping is increased until it is (Nocedal & Wright, algorithm 3.3),
    which guarantees a descent direction. Memory grows with the square of the parameters and the solve with the cube:
    models with more than `max_parameters` parameters are rejected.
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
        super().__init__(params, "newton", {"lr": lr, "damping": damping, "c1": c1, "max_backtracks": max_backtracks})
        refuse_above("newton", trainable(self), max_parameters, "newton_cg")

    def _direction(self, group: dict[str, Any], params: list[Tensor], gradient: Tensor) -> Tensor | None:
        hessian = _hessian(gradient, params)
        gradient = gradient.detach()
        # A negative curvature of the loss would turn the Newton direction uphill. Eigenvalues would say how much to add
        # to the diagonal, at many times the cost of a Cholesky factorization, which fails exactly if the matrix is not
        # positive definite. So the shift doubles until it succeeds: a few factorizations, the last of which is used
        # to solve.
        diagonal, increase = hessian.diagonal(), 1e-3 * (float(hessian.norm()) or 1.0)  # 1: of a linear loss
        if not math.isfinite(increase):
            return None
        shift = group["damping"]
        if float(diagonal.min()) + shift <= 0:  # then it is certainly not positive definite
            shift = float(-diagonal.min()) + increase
        while True:
            factor, failed = torch.linalg.cholesky_ex(hessian + shift * torch.eye(len(hessian)).to(hessian))
            if not failed:
                return -torch.cholesky_solve(gradient.unsqueeze(1), factor).squeeze(1)
            shift = max(2 * shift, increase)


class UndampedNewton(_SecondOrder):
    """theta <- theta - lr H^-1 g without damping or line search, H the exact Hessian of the batch's loss.

    Converges to the nearest stationary point, also to saddle points and maxima, and diverges where the quadratic model
    is wrong (Goodfellow, Bengio & Courville 2016, section 8.6.1). It is for demonstrations: use `Newton` to train. A
    singular Hessian is inverted on its range (pseudo-inverse). Models with more than `max_parameters` are rejected.
    Takes no step if the Hessian is not finite, or so large that its eigenvalues cannot be computed.
    """

    def __init__(self, params: ParamsT, *, lr: Positive = 1.0, max_parameters: Count = 10_000) -> None:
        super().__init__(params, "newton_undamped", {"lr": lr})
        refuse_above("newton_undamped", trainable(self), max_parameters, "newton_cg")

    def _direction(self, group: dict[str, Any], params: list[Tensor], gradient: Tensor) -> Tensor | None:
        hessian = _hessian(gradient, params)
        if not torch.isfinite(hessian).all():
            return None
        try:
            return -(torch.linalg.pinv(hessian, hermitian=True) @ gradient.detach())
        except torch.linalg.LinAlgError:
            return None

    def _step_length(
        self, group: dict[str, Any], loss_at: Callable[[float], float], loss: float, slope: float
    ) -> float:
        return float(group["lr"])


def _hessian(gradient: Tensor, params: list[Tensor]) -> Tensor:
    """Computes the Hessian [n, n], symmetrized, by differentiating the gradient [n]."""
    n = len(gradient)
    hessian = torch.zeros(n, n, dtype=gradient.dtype, device=gradient.device)
    if not gradient.requires_grad:  # the loss is linear in the parameters
        return hessian
    for start in range(0, n, _ROWS):
        rows = min(_ROWS, n - start)
        basis = torch.zeros(rows, n, dtype=gradient.dtype, device=gradient.device)
        basis[:, start : start + rows].fill_diagonal_(1)
        # Rows of the Hessian are gradients of the entries of the gradient. Many at a time share one batched backward
        # pass; all at once would hold n copies of the activations.
        blocks = torch.autograd.grad(
            gradient, params, basis, retain_graph=True, is_grads_batched=True, allow_unused=True
        )
        offset = 0
        for p, block in zip(params, blocks, strict=True):
            if block is not None:
                hessian[start : start + rows, offset : offset + p.numel()] = block.reshape(rows, -1)
            offset += p.numel()
    return 0.5 * (hessian + hessian.T)


class NewtonCG(_SecondOrder):
    """Hessian-free Newton: conjugate gradients on Hessian-vector products, for models of any size (Martens 2010;
    Nocedal & Wright, algorithm 7.1).

    The inner iteration ends when the residual is below min(tolerance, sqrt |g|) |g|, which makes convergence
    superlinear; at a direction of negative curvature, with the solution so far (-g in the first iteration); and after
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
        super().__init__(params, "newton_cg", {**defaults, "c1": c1, "max_backtracks": max_backtracks})

    def _direction(self, group: dict[str, Any], params: list[Tensor], gradient: Tensor) -> Tensor:
        def product(v: Tensor) -> Tensor:
            if not gradient.requires_grad:
                return group["damping"] * v
            hv = torch.autograd.grad(gradient, params, v, retain_graph=True, allow_unused=True)
            return flat_or_zero(hv, params) + group["damping"] * v

        g = gradient.detach()
        norm = float(g.norm())
        tolerance = min(group["tolerance"], math.sqrt(norm)) * norm
        return _conjugate_gradients(product, -g, tolerance, group["max_iterations"])


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, tolerance: float, max_iterations: int
) -> Tensor:
    """Solves A x = b for the symmetric A of `product` (v -> A v) up to |A x - b| <= tolerance, from x = 0."""
    x, residual, direction = torch.zeros_like(b), b, b
    residual_square = float(residual @ residual)
    for i in range(max_iterations):
        if math.sqrt(residual_square) <= tolerance:
            break
        a_direction = product(direction)
        curvature, direction_square = torch.stack([direction @ a_direction, direction @ direction]).tolist()
        # Along this direction the quadratic model has no minimum. What has been found so far is still a descent
        # direction; the next step would divide by a curvature that is zero, or negative, up to rounding.
        if curvature <= torch.finfo(b.dtype).eps * direction_square:
            return b if i == 0 else x
        alpha = residual_square / curvature
        x = x + alpha * direction
        residual = residual - alpha * a_direction
        new_square = float(residual @ residual)
        direction = residual + (new_square / residual_square) * direction
        residual_square = new_square
    return x
