"""Line searches evaluate the points that the algorithms prescribe, and leave the weights at the accepted one."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dlopt.basics.errors import UserError
from dlopt.optim import BFGS, LBFGS, LossClosure, Newton, NewtonCG
from dlopt.optim.bfgs import LinePoint, strong_wolfe

ZERO = torch.zeros(1)


class Line:
    """A function of t that records where it is evaluated."""

    def __init__(self, value: Callable[[float], float], slope: Callable[[float], float]) -> None:
        self.value, self.slope = value, slope
        self.evaluated: list[float] = []

    def __call__(self, t: float) -> LinePoint:
        self.evaluated.append(t)
        return LinePoint(t, self.value(t), self.slope(t), ZERO)

    @property
    def start(self) -> LinePoint:
        return LinePoint(0.0, self.value(0.0), self.slope(0.0), ZERO)


def parabola(minimum: float) -> Line:
    return Line(lambda t: (t - minimum) ** 2, lambda t: 2 * (t - minimum))


@pytest.mark.parametrize("minimum", [0.3, 0.7])
def test_the_second_point_is_the_minimizer_of_a_quadratic(minimum: float) -> None:
    """The first point overshoots: it is too high for 0.3, and has a positive slope for 0.7."""
    line = parabola(minimum)
    found = strong_wolfe(line, line.start, 1.0, c1=1e-4, c2=1e-3, evaluations=10)
    assert line.evaluated == pytest.approx([1.0, minimum]) and found.t == pytest.approx(minimum)


def test_a_short_first_point_is_extended_to_the_minimizer_of_a_quadratic() -> None:
    line = parabola(0.5)
    strong_wolfe(line, line.start, 0.1, c1=1e-4, c2=1e-3, evaluations=10)
    assert line.evaluated == pytest.approx([0.1, 0.5])


def test_an_extension_is_at_least_one_percent() -> None:
    line = parabola(0.1005)
    strong_wolfe(line, line.start, 0.1, c1=1e-9, c2=1e-9, evaluations=2)
    assert line.evaluated == pytest.approx([0.1, 0.101])


@pytest.mark.parametrize("steepness", [0.01, 1.0, 100.0])
@pytest.mark.parametrize(("c2", "is_accepted"), [(0.5, True), (0.49, False)])
def test_the_slope_must_fall_to_c2_of_that_of_the_start(steepness: float, c2: float, is_accepted: bool) -> None:
    """The slope at 0.25 is half of that at 0."""
    line = Line(lambda t: steepness * (t - 0.5) ** 2, lambda t: 2 * steepness * (t - 0.5))
    strong_wolfe(line, line.start, 0.25, c1=1e-4, c2=c2, evaluations=2)
    assert (line.evaluated == [0.25]) == is_accepted


def test_a_second_point_as_high_as_the_first_ends_the_extension() -> None:
    """The loss falls with slope 1, but rises by 1.125 at 0.5: it is -0.125 at 0.125 and at the second point, 1.25."""
    line = Line(lambda t: -t if t < 0.5 else 1.125 - t, lambda t: -1.0)
    found = strong_wolfe(line, line.start, 0.125, c1=1e-4, c2=0.1, evaluations=6)
    assert max(line.evaluated) == line.evaluated[1] == 1.25 and 0.125 < found.t < 0.5


@pytest.mark.parametrize("minimum", [0.0004, 0.9996])
def test_a_guess_next_to_an_end_of_the_interval_is_replaced_by_the_midpoint(minimum: float) -> None:
    line = parabola(minimum)
    strong_wolfe(line, line.start, 1.0, c1=1e-9, c2=1e-9, evaluations=2)
    assert line.evaluated == pytest.approx([1.0, 0.5])


def test_a_stationary_point_without_sufficient_decrease_is_not_accepted() -> None:
    """f = -t + 2.9 t^2 - 1.6 t^3 has a maximum of 0.3 at t = 1, and its minimum at t = 5/24."""
    line = Line(lambda t: -t + 2.9 * t**2 - 1.6 * t**3, lambda t: -1 + 5.8 * t - 4.8 * t**2)
    found = strong_wolfe(line, line.start, 1.0, c1=0.4, c2=0.1, evaluations=20)
    assert found.t == pytest.approx(5 / 24, abs=0.02) and found.loss < 0


@pytest.mark.parametrize("evaluations", [1, 2, 5])
def test_evaluates_at_most_as_often_as_allowed(evaluations: int) -> None:
    falling = Line(lambda t: -t, lambda t: -1.0)  # never satisfies the curvature condition
    assert strong_wolfe(falling, falling.start, 1.0, c1=1e-4, c2=0.1, evaluations=evaluations).t > 0
    rising = Line(lambda t: 0.0 if t == 0 else 1.0, lambda t: -1.0)
    assert strong_wolfe(rising, rising.start, 1.0, c1=1e-4, c2=0.1, evaluations=evaluations).t == 0
    assert len(falling.evaluated) == len(rising.evaluated) == evaluations


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_the_search_ends_when_the_interval_is_as_short_as_rounding(scale: float) -> None:
    """The loss falls up to a step at 0.3 `scale`: no point satisfies the conditions."""
    line = Line(lambda t: -t / scale if t < 0.3 * scale else 1.0, lambda t: -1 / scale)
    found = strong_wolfe(line, line.start, scale, c1=1e-4, c2=0.1, evaluations=1000)
    assert found.t < 0.3 * scale and found.t == pytest.approx(0.3 * scale, rel=1e-11)
    assert 40 < len(line.evaluated) < 55  # 40 bisections to 1e-12, and a few interpolations


def test_the_search_ends_at_the_start_when_no_shorter_step_exists() -> None:
    rising = Line(lambda t: 0.0 if t == 0 else 1.0, lambda t: -1.0)
    assert strong_wolfe(rising, rising.start, 1.0, c1=1e-4, c2=0.1, evaluations=3000).t == 0
    assert len(rising.evaluated) < 1100  # 1074 bisections lead from 1 to the smallest number


def test_steps_grow_at_most_tenfold() -> None:
    falling = Line(lambda t: -t, lambda t: -1.0)
    strong_wolfe(falling, falling.start, 1.0, c1=1e-4, c2=0.1, evaluations=4)
    assert falling.evaluated == pytest.approx([1.0, 10.0, 91.0, 820.0])  # t + 9 (t - the point before)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: BFGS(p, lr=1e9, max_evaluations=1),
        lambda p: LBFGS(p, lr=1e9, max_iter=1, max_eval=2, line_search_fn="strong_wolfe"),
        lambda p: Newton(p, lr=1e9, max_backtracks=1),
        lambda p: NewtonCG(p, lr=1e9, max_backtracks=1),
    ],
    ids=["bfgs", "lbfgs", "newton", "newton_cg"],
)
def test_a_search_without_success_leaves_the_weights_where_they_were(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> None:
    x = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))
    before = x.detach().clone()
    optimizer = make([x])
    optimizer.step(LossClosure(optimizer, lambda: torch.cosh(x).sum() - math.cos(float(x.detach().sum()))))
    torch.testing.assert_close(x.detach(), before, rtol=0, atol=0)


def test_bfgs_restarts_from_the_identity_where_its_direction_is_none_of_descent() -> None:
    ends = []
    for state in (None, -torch.eye(2, dtype=torch.float64), torch.eye(3, dtype=torch.float64)):
        p = nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
        optimizer = BFGS([p])
        if state is not None:
            optimizer.state[p]["inverse_hessian"] = state
        optimizer.step(LossClosure(optimizer, lambda p=p: (p**2 * torch.tensor([1.0, 4.0])).sum()))
        ends.append((p.detach().clone(), optimizer.state[p]["inverse_hessian"]))
    for end, inverse in ends[1:]:
        assert torch.equal(end, ends[0][0]) and torch.equal(inverse, ends[0][1])


def test_bfgs_stops_at_a_stationary_point() -> None:
    p = nn.Parameter(torch.tensor([0.0, -2.0], dtype=torch.float64))
    optimizer, evaluations = BFGS([p]), []

    def loss() -> torch.Tensor:
        evaluations.append(p.tolist())
        return p[0] ** 2 + 0 * p[1]

    optimizer.step(LossClosure(optimizer, loss))
    assert evaluations == [[0.0, -2.0]] and p.tolist() == [0.0, -2.0]


def test_newton_cg_on_a_loss_that_is_linear() -> None:
    p = nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
    optimizer = NewtonCG([p], damping=0.5, lr=0.25)
    optimizer.step(LossClosure(optimizer, lambda: 2 * p.sum()))
    assert p.tolist() == pytest.approx([3.0 - 0.25 * 2 / 0.5, -2.0 - 0.25 * 2 / 0.5])


def test_the_size_of_a_dense_hessian_is_named() -> None:
    p = nn.Parameter(torch.zeros(10_001))
    with pytest.raises(UserError, match=r"10,001 x 10,001 values \(0\.4 GiB\).*at most 10,000 .*optimizer=newton_cg"):
        Newton([p])
    BFGS([nn.Parameter(torch.zeros(5))], max_parameters=5)
