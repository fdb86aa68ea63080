"""Quasi-Newton methods."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.optim.common import (
    Closure,
    as_groups,
    assign,
    evaluate,
    flat,
    flat_gradient,
    needs_closure,
    refuse_above,
    refuse_own_rates,
    trainable,
)
from dlopt.optim.line_search import Point, strong_wolfe
from dlopt.ranges import Count, Fraction, NonNegative, Positive, Probability


class BFGS(torch.optim.Optimizer):
    """Quasi-Newton method of the Broyden family with the whole inverse Hessian B: xi = 1 is BFGS, xi = 0 is DFP.

    With p the step and q the change of the gradient (Bertsekas, Nonlinear Programming, eq. 2.57):
    B <- B + p p^T / p^T q - B q q^T B / q^T B q + xi (q^T B q) v v^T, v = p / p^T q - B q / q^T B q,
    so that B q = p for every xi. The line search finds strong Wolfe conditions, which keep B positive definite; c2 near
    zero makes it exact, which DFP depends on. B is the identity at first: scaled to p^T q / q^T q, as is often advised,
    it begins too small in the flat directions, and a quadratic of condition 1e4 takes seven times the steps.

    Step and gradients of an update come from one batch. All parameters are one vector with one learning rate, the first
    step length that is tried. Models above `max_parameters` are refused.
    """

    evaluations: ClassVar[str] = "many"
    elementwise: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 1.0,
        xi: Probability = 1.0,
        c1: Fraction = 0.0001,
        c2: Fraction = 0.9,
        max_evaluations: Count = 25,
        max_parameters: Count = 10_000,
    ) -> None:
        super().__init__(params, {"lr": lr, "xi": xi, "c1": c1, "c2": c2, "max_evaluations": max_evaluations})
        refuse_own_rates("bfgs", lr, self.param_groups)
        refuse_above("bfgs", trainable(self), max_parameters, "lbfgs")

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One step with its line search; none where the search finds no decrease. Returns the loss before the step."""
        closure = needs_closure(self, closure)
        before = evaluate(closure)
        params, group = trainable(self), self.param_groups[0]
        state, start, gradient = self.state[params[0]], flat(params), flat_gradient(params)
        inverse: Tensor | None = state.get("inverse_hessian")
        t = float(group["lr"])
        direction = -gradient if inverse is None else -(inverse @ gradient)
        if inverse is not None and not direction @ gradient < 0:  # rounding, or batches that contradict each other
            inverse, direction = None, -gradient
        if inverse is None:
            t *= min(1.0, 1.0 / max(float(gradient.abs().sum()), 1e-30))

        def evaluate_at(t: float) -> Point:
            assign(params, start + t * direction)
            loss, g = evaluate(closure), flat_gradient(params)
            return point(t, loss, g)

        def point(t: float, loss: Any, g: Tensor) -> Point:
            value, slope = torch.stack([torch.as_tensor(loss).to(g), g @ direction]).tolist()
            return Point(t, value, slope, g)

        origin = point(0.0, before, gradient)
        if not origin.slope < 0:  # at a stationary point, or not finite
            return before
        keys = {"c1": group["c1"], "c2": group["c2"], "evaluations": group["max_evaluations"]}
        reached = strong_wolfe(evaluate_at, origin, t, **keys)
        assign(params, start + reached.t * direction if reached.t else start)
        if reached.t:
            inverse = broyden(inverse, reached.t * direction, reached.gradient - gradient, group["xi"])
        if inverse is not None:
            state["inverse_hessian"] = inverse
        return before


def broyden(inverse: Tensor | None, p: Tensor, q: Tensor, xi: float) -> Tensor | None:
    """The inverse Hessian [n, n] after the step p [n] that changed the gradient by q [n]; in place. It stays as it is
    where p^T q is not positive beyond rounding, since B would not remain positive definite."""
    pq, qq, pp = torch.stack([p @ q, q @ q, p @ p]).tolist()
    if not pq > torch.finfo(p.dtype).eps * (pp * qq) ** 0.5:
        return inverse
    if inverse is None:
        inverse = torch.eye(len(p), dtype=p.dtype, device=p.device)
    bq = inverse @ q
    qbq = float(q @ bq)
    v = p / pq - bq / qbq
    rows = torch.stack([p, bq, v])
    scales = torch.tensor([1 / pq, -1 / qbq, xi * qbq], dtype=p.dtype, device=p.device)
    return inverse.addmm_((rows * scales.unsqueeze(1)).T, rows)


class LBFGS(torch.optim.LBFGS):
    """torch's L-BFGS, which takes one group only: groups are joined, as it has no decay in which they differ."""

    evaluations: ClassVar[str] = "many"
    elementwise: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 1.0,
        max_iter: Count = 20,
        max_eval: Count | None = None,
        history_size: Count = 10,
        tolerance_grad: NonNegative = 1e-7,
        tolerance_change: NonNegative = 1e-9,
        line_search_fn: Literal["strong_wolfe"] | None = "strong_wolfe",
    ) -> None:
        groups = as_groups(params)
        refuse_own_rates("lbfgs", lr, groups)
        everything = [p for group in groups for p in group["params"]]
        super().__init__(
            everything, lr, max_iter, max_eval, tolerance_grad, tolerance_change, history_size, line_search_fn
        )
