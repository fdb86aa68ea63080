"""Newton's and quasi-Newton methods: what theory promises on quadratics, and SciPy on Rosenbrock's valley."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.optim import BFGS, LBFGS, LossClosure, Newton, NewtonCG
from dlopt.optim.bfgs import LinePoint, broyden, strong_wolfe
from dlopt.optim.newton import UndampedNewton, backtracking

Loss = Callable[[Tensor], Tensor]


def quadratic(n: int, condition: float) -> tuple[Tensor, Tensor, Loss]:
    """Hessian [n, n] with eigenvalues from 1 to `condition`, minimizer [n], loss."""
    draw = torch.Generator().manual_seed(n)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64))
    hessian = (q * torch.logspace(0, math.log10(condition), n, dtype=torch.float64)) @ q.T
    center = torch.randn(n, generator=draw, dtype=torch.float64)
    return hessian, center, lambda x: 0.5 * (x - center) @ hessian @ (x - center)


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


VALLEY = torch.tensor([-1.2, 1.0], dtype=torch.float64)


def descend(make: Callable[..., Any], loss: Loss, start: Tensor, most: int, until: float = 1e-8) -> list[Tensor]:
    """The points visited, from `start` until the gradient's largest entry is below `until`."""
    x = nn.Parameter(start.clone())
    optimizer = make([x])
    points = [x.detach().clone()]
    closure = LossClosure(optimizer, lambda: loss(x))
    for _ in range(most):
        optimizer.step(closure)
        points.append(x.detach().clone())
        if torch.autograd.grad(loss(x), x)[0].abs().max() < until:
            break
    return points


def scipy_result(method: str, loss: Loss, start: Tensor, tolerance: float = 1e-8) -> Any:
    def value(x: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
        t = torch.tensor(x, requires_grad=True)
        f = loss(t)
        return float(f.detach()), torch.autograd.grad(f, t)[0].numpy()

    def product(x: np.ndarray[Any, Any], v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        t = torch.tensor(x)
        return torch.autograd.functional.hvp(loss, t, torch.tensor(v))[1].numpy()

    keys: dict[str, Any] = {"hessp": product, "tol": tolerance} if method == "Newton-CG" else {}
    options = {"gtol": tolerance} if method == "BFGS" else {}
    return optimize.minimize(value, start.numpy(), jac=True, method=method, options=options, **keys)


@pytest.mark.parametrize("condition", [5.0, 1e4])
def test_newton_takes_one_step_on_a_quadratic(condition: float) -> None:
    _, center, loss = quadratic(8, condition)
    for make in (
        lambda p: Newton(p, damping=0.0),
        lambda p: NewtonCG(p, damping=0.0, tolerance=1e-14, max_iterations=200),
    ):
        (_, x) = descend(make, loss, torch.zeros(8, dtype=torch.float64), 1)
        torch.testing.assert_close(x, center, rtol=1e-8, atol=1e-8)


def test_undamped_newton_stops_at_a_saddle_and_newton_does_not() -> None:
    def saddle(x: torch.Tensor) -> torch.Tensor:
        return (x[0] ** 2 - x[1] ** 2) / 2 + x[1] ** 4 / 4

    start = torch.tensor([-1.5, 0.1], dtype=torch.float64)
    points = descend(UndampedNewton, saddle, start, 20)
    # d/dy: y <- y - (y^3 - y) / (3 y^2 - 1)
    assert points[1].tolist() == pytest.approx([0, 0.1 - (0.1**3 - 0.1) / (3 * 0.1**2 - 1)], abs=1e-12)
    assert float(points[-1].norm()) < 1e-12
    assert abs(float(descend(Newton, saddle, start, 20)[-1][1])) == pytest.approx(1, abs=1e-3)
    _, center, loss = quadratic(8, 1e4)
    torch.testing.assert_close(descend(UndampedNewton, loss, torch.zeros(8).double(), 1)[1], center)
    flat_valley = descend(UndampedNewton, lambda x: x[0] ** 2, torch.ones(2).double(), 1)[1]  # singular Hessian
    assert flat_valley.tolist() == pytest.approx([0, 1])


@pytest.mark.parametrize("xi", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("condition", [5.0, 1e4])
def test_exact_line_search_ends_within_n_plus_one_steps(condition: float, xi: float) -> None:
    n = 6
    _, center, loss = quadratic(n, condition)
    points = descend(lambda p: BFGS(p, xi=xi, c2=1e-12, max_evaluations=60), loss, torch.zeros(n).double(), n + 1, 1e-9)
    first, last = (torch.autograd.functional.jacobian(loss, x).norm() for x in (points[0], points[-1]))
    assert last < 1e-9 * first
    torch.testing.assert_close(points[-1], center, rtol=1e-5, atol=1e-6)
    assert float(loss(points[-3])) > 1e3 * float(loss(points[-1]))  # and not much earlier


@pytest.mark.parametrize("condition", [5.0, 1e4])
@pytest.mark.parametrize(("method", "make"), [("BFGS", BFGS), ("Newton-CG", lambda p: NewtonCG(p, damping=0.0))])
def test_quadratics_as_fast_as_scipy(method: str, make: Any, condition: float) -> None:
    _, center, loss = quadratic(10, condition)
    points = descend(make, loss, torch.zeros(10).double(), 200, 1e-6)
    theirs = scipy_result(method, loss, torch.zeros(10).double(), 1e-6)
    assert len(points) - 1 <= 1.5 * theirs.nit + 3
    torch.testing.assert_close(points[-1], center, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "make"),
    [
        ("BFGS", BFGS),
        ("BFGS", lambda p: BFGS(p, xi=0.5)),
        ("Newton-CG", lambda p: NewtonCG(p, damping=0.0)),
        ("Newton-CG", lambda p: Newton(p, damping=0.0)),
    ],
)
@pytest.mark.parametrize("n", [2, 6])
def test_rosenbrock_as_fast_as_scipy(method: str, make: Any, n: int) -> None:
    start = VALLEY if n == 2 else torch.zeros(n).double()
    points = descend(make, rosenbrock, start, 300)
    theirs = scipy_result(method, rosenbrock, start)
    assert len(points) - 1 <= 1.5 * theirs.nit + 3
    torch.testing.assert_close(points[-1], torch.ones(n).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(points[-1], torch.tensor(theirs.x), rtol=0, atol=1e-5)
    assert torch.autograd.functional.jacobian(rosenbrock, points[-1]).abs().max() < 1e-8


@pytest.mark.parametrize("make", [BFGS, lambda p: Newton(p, damping=0.0), lambda p: NewtonCG(p, damping=0.0)])
def test_convergence_is_superlinear(make: Any) -> None:
    """The ratio of successive errors goes to zero; gradient descent's stays at one value below 1."""
    minimum = torch.ones(2).double()
    errors = [float((x - minimum).norm()) for x in descend(make, rosenbrock, VALLEY, 100, 1e-9)]
    ratios = [b / a for a, b in itertools.pairwise(errors) if a > 1e-9]
    assert min(ratios[-2:]) < 0.05
    assert max(ratios[-2:]) < 0.25

    x = nn.Parameter(torch.tensor([1.01, 1.0201], dtype=torch.float64))
    descent = torch.optim.SGD([x], lr=1e-3)
    slow = []
    for _ in range(200):
        descent.step(LossClosure(descent, lambda: rosenbrock(x)))
        slow.append(float((x.detach() - minimum).norm()))
    assert slow[-1] / slow[-2] > 0.9


@given(xi=st.floats(0, 1), n=st.integers(1, 6), seed=st.integers(0, 10_000), first=st.booleans())
def test_secant_condition_and_positive_definiteness(xi: float, n: int, seed: int, first: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    p, q, root = (torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((n,), (n,), (n, n)))
    q = q if p @ q > 0 else -q
    if p @ q < 1e-2 * p.norm() * q.norm():
        q = q + p
    old = None if first else root @ root.T + 0.1 * torch.eye(n).double()
    new = broyden(None if old is None else old.clone(), p, q, xi)
    assert new is not None
    torch.testing.assert_close(new @ q, p, rtol=1e-7, atol=1e-8 * float(p.norm() + new.norm()))
    torch.testing.assert_close(new, new.T, rtol=1e-9, atol=1e-9 * float(new.norm()))
    assert torch.linalg.eigvalsh((new + new.T) / 2).min() > 0


def test_ends_of_the_family_are_bfgs_and_dfp() -> None:
    draw = torch.Generator().manual_seed(0)
    p, q, root = (torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((4,), (4,), (4, 4)))
    q = q + 3 * p
    b = root @ root.T + torch.eye(4)
    rho, eye = 1 / (p @ q), torch.eye(4).double()
    bfgs = (eye - rho * torch.outer(p, q)) @ b @ (eye - rho * torch.outer(q, p)) + rho * torch.outer(p, p)
    dfp = b + rho * torch.outer(p, p) - torch.outer(b @ q, b @ q) / (q @ b @ q)
    torch.testing.assert_close(broyden(b.clone(), p, q, 1.0), bfgs)
    torch.testing.assert_close(broyden(b.clone(), p, q, 0.0), dfp)
    assert broyden(b, p, -q, 1.0) is b  # negative curvature changes nothing
    torch.testing.assert_close(b, root @ root.T + torch.eye(4))


@given(
    st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    st.floats(1e-3, 50),
    st.sampled_from([1e-4, 0.1]),
    st.sampled_from([0.2, 0.9]),
)
def test_line_searches_satisfy_their_conditions(shape: list[float], t: float, c1: float, c2: float) -> None:
    a, b, c, d = shape

    def value(t: float) -> float:
        return -t * (1 + abs(d)) + 0.3 * t * t + a * math.sin(b * t + c) - a * math.sin(c) - a * b * math.cos(c) * t

    def slope(t: float) -> float:
        return -(1 + abs(d)) + 0.6 * t + a * b * math.cos(b * t + c) - a * b * math.cos(c)

    origin = LinePoint(0.0, value(0), slope(0), torch.zeros(1))
    evaluations = 0

    def evaluate(t: float) -> LinePoint:
        nonlocal evaluations
        evaluations += 1
        return LinePoint(t, value(t), slope(t), torch.zeros(1))

    found = strong_wolfe(evaluate, origin, t, c1=c1, c2=c2, evaluations=60)
    assert evaluations <= 60
    assert found.loss <= origin.loss + c1 * found.t * origin.slope
    assert abs(found.slope) <= c2 * abs(origin.slope)
    back = backtracking(value, loss=origin.loss, slope=origin.slope, t=t, c1=c1, evaluations=60)
    assert 0 < back <= t
    assert value(back) <= origin.loss + c1 * back * origin.slope


def test_line_searches_step_back_from_infinity_and_give_up() -> None:
    def barrier(t: float) -> LinePoint:  # the minimum of -log(1 - t) - 2 t is at 1/2
        inside = t < 1
        return LinePoint(
            t, -math.log(1 - t) - 2 * t if inside else math.nan, 1 / (1 - t) - 2 if inside else math.nan, one
        )

    one = torch.ones(1)
    found = strong_wolfe(barrier, barrier(0.0), 7.0, c1=1e-4, c2=0.1, evaluations=30)
    assert 0.4 < found.t < 0.6
    assert backtracking(lambda t: barrier(t).loss, loss=0.0, slope=-1.0, t=4.0, c1=1e-4, evaluations=30) == 0.5
    uphill = strong_wolfe(
        lambda t: LinePoint(t, t, -1.0, one), LinePoint(0, 0, -1, one), 1.0, c1=1e-4, c2=0.9, evaluations=9
    )
    assert uphill.t == 0
    assert backtracking(lambda t: t, loss=0.0, slope=-1.0, t=1.0, c1=1e-4, evaluations=9) == 0


@pytest.mark.parametrize("make", [Newton, NewtonCG, BFGS])
def test_descends_where_the_hessian_is_not_positive(make: Any) -> None:
    def saddle(x: Tensor) -> Tensor:
        return x[0] ** 2 + (x[1] ** 2 - 1) ** 2  # a maximum in x[1] at 0, minima at -1 and 1

    points = descend(make, saddle, torch.tensor([1.0, 0.1]).double(), 100, 1e-6)
    losses = [float(saddle(x)) for x in points]
    assert losses == sorted(losses, reverse=True)
    torch.testing.assert_close(points[-1], torch.tensor([0.0, 1.0]).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", [Newton, NewtonCG, BFGS])
@pytest.mark.parametrize("value", [0.0, math.nan])
def test_zero_gradients_and_nan_losses_change_nothing(make: Any, value: float) -> None:
    x = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = make([x])
    loss = optimizer.step(LossClosure(optimizer, lambda: (x * value).sum()))
    assert x.tolist() == [1.0, 2.0]
    assert float(loss) == pytest.approx(value, nan_ok=True)


def test_newton_and_newton_cg_take_the_same_step_on_a_net(problem: Callable[..., Any]) -> None:
    first, second, before = problem(), problem(), problem().weights()
    newton = Newton(first.params, damping=1.0)
    free = NewtonCG(second.params, damping=1.0, tolerance=1e-12)
    newton.step(LossClosure(newton, first.loss))
    free.step(LossClosure(free, second.loss))
    torch.testing.assert_close(first.weights(), second.weights(), rtol=1e-8, atol=1e-10)
    net, names = problem(), [name for name, _ in problem().model.named_parameters()]
    sizes, shapes = [q.numel() for q in net.params], [q.shape for q in net.params]

    def loss(vector: Tensor) -> Tensor:
        weights = dict(zip(names, (v.view(s) for v, s in zip(vector.split(sizes), shapes, strict=True)), strict=True))
        return nn.functional.cross_entropy(torch.func.functional_call(net.model, weights, net.inputs), net.targets)

    hessian = torch.autograd.functional.hessian(loss, before)
    gradient = torch.autograd.functional.jacobian(loss, before)
    step = torch.linalg.solve(hessian + torch.eye(len(before)).double(), -gradient)
    torch.testing.assert_close(first.weights() - before, step, rtol=1e-7, atol=1e-9)


def test_rejects_large_models() -> None:
    big = [nn.Parameter(torch.zeros(50, 40)), nn.Parameter(torch.zeros(1), requires_grad=False)]
    for make, instead in ((Newton, "newton_cg"), (BFGS, "lbfgs")):
        with pytest.raises(UserError, match=rf"2,000 parameters.*at most 1,999 are allowed.*optimizer={instead}"):
            make(big, max_parameters=1999)
        make(big, max_parameters=2000)
    NewtonCG(big)


def test_undamped_newton_stays_where_the_eigenvalues_cannot_be_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "pinv", fails)
    points = descend(UndampedNewton, rosenbrock, VALLEY, 2)
    assert all(torch.equal(point, VALLEY) for point in points)


def test_rejects_group_learning_rates() -> None:
    groups: list[dict[str, Any]] = [{"params": [nn.Parameter(torch.ones(2))]} for _ in range(2)]
    for make in (Newton, UndampedNewton, NewtonCG, BFGS, LBFGS):
        make([{**group, "weight_decay": 0.0} for group in groups], lr=0.5)
        with pytest.raises(UserError, match="one step length"):
            make([groups[0], {**groups[1], "lr": 0.1}], lr=0.5)


def test_requires_a_closure_with_loss() -> None:
    x = nn.Parameter(torch.ones(2))
    for make in (Newton, NewtonCG):
        with pytest.raises(UserError, match=r"loss\(\).*LossClosure"):
            make([x]).step(lambda: (x**2).sum())
    for optimizer in (Newton([x]), NewtonCG([x]), BFGS([x])):
        with pytest.raises(UserError, match="call step"):
            optimizer.step()


def test_lbfgs_does_not_depend_on_the_layout_of_kernels() -> None:
    """torch takes a flat view of the gradients, which channels-last kernels do not have."""
    start = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        kernel = nn.Parameter(start.clone(memory_format=layout))
        optimizer = LBFGS([kernel], max_iter=5)
        scales = torch.arange(1.0, 55.0, dtype=torch.float64).view(3, 2, 3, 3)
        optimizer.step(LossClosure(optimizer, lambda p=kernel, s=scales: (s * p.square()).sum() + p.sin().sum()))
        results.append(kernel.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    assert not torch.equal(results[0], start)


def test_newton_without_damping_ends_on_flat_and_infinite_curvature() -> None:
    """A zero or NaN Hessian has no norm to increase the damping by: the search for it must end."""
    x = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = Newton([x], damping=0.0)
    optimizer.step(LossClosure(optimizer, lambda: (3 * x).sum()))
    assert float(x.detach().sum()) < 2
    flat = nn.Parameter(torch.ones(2))
    optimizer = Newton([flat], damping=0.0)
    optimizer.step(LossClosure(optimizer, lambda: (0 * flat).sum()))
    assert flat.tolist() == [1.0, 1.0]
    zero = nn.Parameter(torch.zeros(2))
    optimizer = Newton([zero], damping=0.0)
    optimizer.step(LossClosure(optimizer, lambda: zero.square().sqrt().sum()))  # gradient and Hessian are NaN
    assert zero.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("make", [LBFGS, BFGS])
def test_a_learning_rate_of_zero_takes_no_step(make: Callable[..., torch.optim.Optimizer]) -> None:
    """As after the end of a schedule: torch's line search would divide by zero."""
    x = nn.Parameter(VALLEY.clone())
    optimizer = make([x])
    closure = LossClosure(optimizer, lambda: rosenbrock(x))
    optimizer.step(closure)
    before = x.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    assert float(optimizer.step(closure)) == float(rosenbrock(before))
    assert torch.equal(x.detach(), before)
