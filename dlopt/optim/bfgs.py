"""Quasi-Newton methods, and the line search for strong Wolfe conditions."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.basics.ranges import Count, Fraction, NonNegative, Positive, Probability
from dlopt.optim.common import (
    Closure,
    as_groups,
    assign,
    fill_defaults,
    flat,
    flat_gradient,
    loss_of,
    needs_closure,
    refuse_above,
    refuse_complex,
    refuse_group_rates,
    trainable,
    without_hooks,
)
from dlopt.optim.parameters import real_views
from dlopt.optim.traits import OptimizerTraits


@dataclass
class LinePoint:
    """Loss, slope along the line, and gradient [n] at step length t."""

    t: float
    loss: float
    slope: float
    gradient: Tensor


class BFGS(torch.optim.Optimizer):
    """Quasi-Newton method of the Broyden family with a dense inverse Hessian B: xi = 1 is BFGS, xi = 0 is DFP.

    With p the step and q the change of the gradient (Bertsekas, Nonlinear Programming, eq. 2.57):
    B <- B + p p^T / p^T q - B q q^T B / q^T B q + xi (q^T B q) v v^T, v = p / p^T q - B q / q^T B q,
    which satisfies B q = p for every xi. The line search ensures the strong Wolfe conditions, which keep B positive
    definite; c2 near zero makes it exact, as DFP requires. B starts as the identity. Scaled to p^T q / q^T q, as often
    recommended, it would start too small in flat directions: a quadratic of condition 1e4 takes 7x the steps.

    The step and the gradients of an update use the same batch. All parameters form one vector with one learning rate,
    the initial step length. Models with more than `max_parameters` parameters are rejected.
    """

    traits: ClassVar[OptimizerTraits] = OptimizerTraits(evaluations="many")

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
        name = "dfp" if xi == 0 else "bfgs"
        refuse_group_rates(name, lr, self.param_groups)
        refuse_complex(name, trainable(self))
        refuse_above(name, trainable(self), max_parameters, "lbfgs")

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Takes one step with a line search, or none if it finds no decrease. Returns the loss before the step."""
        closure = needs_closure(self, closure)
        before = loss_of(closure)
        params, group = trainable(self), self.param_groups[0]
        if not params:
            return before
        # The parameters become one vector: B couples all of them, across layers. Its state belongs to the first
        # parameter, because a state dict has no place for the state of an optimizer as a whole.
        state, start, gradient = self.state[params[0]], flat(params), flat_gradient(params)
        inverse: Tensor | None = state.get("inverse_hessian")
        if inverse is not None and len(inverse) != len(start):
            inverse = None  # a parameter group was added, or a parameter frozen: restart from the identity
        t = float(group["lr"])
        direction = -gradient if inverse is None else -(inverse @ gradient)
        # Not a descent direction: because of rounding, or because the batches disagree. Restart from the identity.
        if inverse is not None and not direction @ gradient < 0:
            inverse, direction = None, -gradient
        if inverse is None:  # as torch's L-BFGS does: the gradient's scale is arbitrary
            t *= min(1.0, 1.0 / max(float(gradient.abs().sum()), 1e-30))

        def evaluate_at(t: float) -> LinePoint:
            assign(params, start + t * direction)
            loss, g = loss_of(closure), flat_gradient(params)
            return line_point(t, loss, g)

        def line_point(t: float, loss: Any, g: Tensor) -> LinePoint:
            value, slope = torch.stack([torch.as_tensor(loss).to(g), g @ direction]).tolist()  # one synchronization
            return LinePoint(t, value, slope, g)

        # The closure evaluates the same batch at every point, with the same dropout masks and without touching the
        # running statistics of batch norm. Otherwise the search would compare different functions, and might see the
        # loss rise along a descent direction.
        origin = line_point(0.0, before, gradient)
        if not origin.slope < 0:  # at a stationary point, or not finite
            return before
        keys = {"c1": group["c1"], "c2": group["c2"], "evaluations": group["max_evaluations"]}
        end = strong_wolfe(evaluate_at, origin, t, **keys)
        assign(params, start + end.t * direction if end.t else start)
        if end.t:
            inverse = broyden(inverse, end.t * direction, end.gradient - gradient, group["xi"])
        if inverse is not None:
            state["inverse_hessian"] = inverse
        return before


def broyden(inverse: Tensor | None, p: Tensor, q: Tensor, xi: float) -> Tensor | None:
    """Updates the inverse Hessian [n, n] (None for the identity) for a step p [n] that changed the gradient by q [n].

    In place. Skips the update if p^T q is not positive beyond rounding, since B would not remain positive definite.
    """
    # Read together: each read waits for the device.
    pq, qq, pp = torch.stack([p @ q, q @ q, p @ p]).tolist()
    if not pq > torch.finfo(p.dtype).eps * (pp * qq) ** 0.5:
        return inverse
    if inverse is None:
        inverse = torch.eye(len(p), dtype=p.dtype, device=p.device)
    bq = inverse @ q
    qbq = float(q @ bq)
    v = p / pq - bq / qbq
    # The three rank-one terms of the update as one product X^T diag(s) X: B is read and written once instead of three
    # times, and stays symmetric, since each term is.
    rows = torch.stack([p, bq, v])
    scales = torch.tensor([1 / pq, -1 / qbq, xi * qbq], dtype=p.dtype, device=p.device)
    return inverse.addmm_((rows * scales.unsqueeze(1)).T, rows)


def strong_wolfe(
    evaluate: Callable[[float], LinePoint], start: LinePoint, t: float, *, c1: float, c2: float, evaluations: int
) -> LinePoint:
    """Finds a point with loss(t) <= loss(0) + c1 t slope(0) and |slope(t)| <= c2 |slope(0)|; tries t first.

    A line search along x + t d (Nocedal & Wright, Numerical Optimization, 2nd ed., algorithms 3.5 and 3.6).

    After `evaluations` without success returns the best point with sufficient decrease (the first condition), which may
    be `start`. A c2 near zero makes the search exact. Cubic interpolation: on a quadratic the second point is the
    minimizer.
    """

    def too_high(point: LinePoint) -> bool:
        return not point.loss <= start.loss + c1 * point.t * start.slope  # True for NaN

    # Bracketing (algorithm 3.5): increase t until a minimizer lies between two points.
    low, high = start, None
    while evaluations > 0:
        point = evaluate(t)
        evaluations -= 1
        if too_high(point) or (low.t > 0 and point.loss >= low.loss):
            high = point
            break
        if abs(point.slope) <= -c2 * start.slope:
            return point
        if point.slope >= 0:
            low, high = point, low
            break
        guess = _minimizer(low, point)
        # The cubic through both points extrapolates here, which is wild where the curve is nearly straight. So the next
        # step is at most nine intervals further (More & Thuente 1994 allow four), and at least 1 % beyond this point.
        longest = point.t + 9 * (point.t - low.t)
        t = longest if guess is None or guess <= point.t else min(max(guess, 1.01 * point.t), longest)
        low = point
    if high is None:
        return low

    # Zoom (algorithm 3.6): `low` has sufficient decrease and the lowest loss so far; a minimizer is between the two.
    width, bisect = math.inf, False
    while evaluations > 0 and abs(high.t - low.t) > 1e-12 * max(low.t, high.t):
        point = evaluate(_between(low, high, bisect))
        evaluations -= 1
        if too_high(point) or point.loss >= low.loss:
            high = point
        else:
            if abs(point.slope) <= -c2 * start.slope:
                return point
            # The loss rises from the new `low` towards `high`: the minimizer lies on the other side, towards the former
            # `low`, which becomes the new end of the interval.
            if point.slope * (high.t - low.t) >= 0:
                high = low
            low = point
        bisect = abs(high.t - low.t) > 0.66 * width  # interpolation shrinks the interval too slowly
        width = abs(high.t - low.t)
    return low


def _between(low: LinePoint, high: LinePoint, bisect: bool) -> float:
    """Returns the interpolated minimizer if it is well inside the interval, else the midpoint."""
    guess = None if bisect else _minimizer(low, high)
    a, b = min(low.t, high.t), max(low.t, high.t)
    margin = 1e-3 * (b - a)
    return guess if guess is not None and a + margin < guess < b - margin else 0.5 * (a + b)


def _minimizer(a: LinePoint, b: LinePoint) -> float | None:
    """Returns the minimizer of the cubic through the losses and slopes of two points (eq. 3.59), or None."""
    if not (math.isfinite(b.loss) and math.isfinite(b.slope) and a.t != b.t):
        return None
    d1 = a.slope + b.slope - 3 * (a.loss - b.loss) / (a.t - b.t)
    square = d1 * d1 - a.slope * b.slope
    if square < 0:
        return None
    d2 = math.copysign(math.sqrt(square), b.t - a.t)
    denominator = b.slope - a.slope + 2 * d2
    return b.t - (b.t - a.t) * (b.slope + d2 - d1) / denominator if denominator else None


class LBFGS(torch.optim.LBFGS):
    """torch's L-BFGS, which accepts one parameter group only: joins the groups, since it has no weight decay.

    In contrast to torch's class it can be copied and pickled, and trains parameters that are added later.
    """

    traits: ClassVar[OptimizerTraits] = OptimizerTraits(evaluations="many")

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
        refuse_group_rates("lbfgs", lr, groups)
        joined: Any = [p for group in groups for p in group["params"]]
        if "param_names" in groups[0]:
            joined = zip((name for group in groups for name in group["param_names"]), joined, strict=True)
        super().__init__(joined, lr, max_iter, max_eval, tolerance_grad, tolerance_change, history_size, line_search_fn)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        fill_defaults(self)
        # torch's class leaves these out of copies.
        self._params, self._numel_cache = self.param_groups[0]["params"], None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        first, *others = self.param_groups
        del self.param_groups[1:]
        for added in others:
            refuse_group_rates("lbfgs", self.defaults["lr"], [added])
            self.state.pop(first["params"][0], None)  # restart: the stored steps have another length
            self._numel_cache = None
            for key in {"params", "param_names"} & added.keys():
                first[key] += added[key]

    def step(self, closure: Closure | None = None) -> Any:
        closure = needs_closure(self, closure)
        if self.param_groups[0]["lr"] == 0:
            return loss_of(closure)  # torch's line search would divide by the length of its first step
        return without_hooks(super().step)(closure)  # they run once, around this step

    def _gather_flat_grad(self) -> Tensor:
        # torch's method fails for gradients without a flat view, such as those of channels-last kernels.
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in self._params]
        return flat(real_views(grads))
