"""Paths on the quadratic of a matrix against the recursions of its singular values, and their picture."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dlopt.lab.trajectory.functions import MatrixQuadratic
from dlopt.lab.trajectory.matrix import draw_components
from dlopt.lab.trajectory.paths import Trajectory, best_rate, follow
from dlopt.optim import SOAP, Muon, Shampoo

CURVATURES, VALUES = (1.0, 0.3, 0.1, 0.03), (1.0, 0.8, 0.6, 0.4)
LR, STEPS = 0.02, 12


def quadratic(*, rotated: bool = True) -> MatrixQuadratic:
    return MatrixQuadratic(curvatures=CURVATURES, singular_values=VALUES, rotated=rotated)


def run(build: Callable[..., Any], function: MatrixQuadratic, steps: int = STEPS) -> Trajectory:
    return follow(function, build, steps=steps, seed=0, factor=lambda step: 1.0)


def gradient_descent(lr: float, t: int) -> Tensor:
    return torch.tensor([s * (1 - lr * c) ** t for s, c in zip(VALUES, CURVATURES, strict=True)], dtype=torch.float64)


def recursion(update: Callable[[float, int, dict[str, float]], float], *, skipped: int = 0) -> Tensor:
    """Returns [STEPS + 1, 4]: s <- s - LR * update(curvature * s, t, state) for each singular value on its own."""
    columns = []
    for s, curvature in zip(VALUES, CURVATURES, strict=True):
        column, state = [s], dict[str, float]()
        for t in range(STEPS):
            g = curvature * column[-1]
            column.append(column[-1] - (LR * update(g, t + 1 - skipped, state) if t >= skipped else 0.0))
        columns.append(column)
    return torch.tensor(columns, dtype=torch.float64).T


def shampoo(g: float, t: int, state: dict[str, float]) -> float:
    state["sum"] = state.get("sum", 1e-12) + g * g
    return g / math.sqrt(state["sum"])


def adam(g: float, t: int, state: dict[str, float], betas: tuple[float, float], eps: float = 1e-8) -> float:
    for name, beta, new in (("m", betas[0], g), ("v", betas[1], g * g)):
        state[name] = beta * state.get(name, 0.0) + (1 - beta) * new
    return state["m"] / (1 - betas[0] ** t) / (math.sqrt(state["v"] / (1 - betas[1] ** t)) + eps)


def test_gradient_descent_shrinks_each_singular_value_by_its_curvature() -> None:
    function = quadratic()
    points = run(partial(torch.optim.SGD, lr=1.2), function).points
    along, others = function.components(points)
    torch.testing.assert_close(along, torch.stack([gradient_descent(1.2, t) for t in range(STEPS + 1)]))
    assert float(others.max()) < 1e-12
    found = torch.linalg.svdvals(points.view(-1, 4, 4))
    torch.testing.assert_close(found, along.abs().sort(descending=True).values, rtol=0, atol=1e-12)


def test_muon_moves_all_singular_values_at_equal_speed() -> None:
    function = quadratic()
    exact: dict[str, Any] = {"ns_coefficients": "polar_express", "ns_steps": 9, "weight_decay": 0.0, "momentum": 0.0}
    along, others = function.components(run(partial(Muon, lr=LR, **exact), function).points)
    expected = torch.tensor(VALUES) - LR * torch.arange(STEPS + 1).unsqueeze(1)
    torch.testing.assert_close(along, expected.double(), rtol=0, atol=0.02 * LR * STEPS)  # in bfloat16
    assert float(others.max()) < 0.02 * LR * STEPS


def test_shampoo_and_soap_are_adagrad_and_adam_of_the_singular_values() -> None:
    function = quadratic()
    builds: list[tuple[Callable[..., Any], Tensor]] = [
        (partial(Shampoo, lr=LR, momentum=0.0, eps=1e-12, update_every=1), recursion(shampoo)),
        (
            # eps: SOAP would enlarge the rounding errors of entries without gradient. Its first update finds the basis.
            partial(SOAP, lr=LR, weight_decay=0.0, update_every=100, eps=1e-3),
            recursion(partial(adam, betas=(0.95, 0.95), eps=1e-3), skipped=1),
        ),
    ]
    for build, expected in builds:
        along, others = function.components(run(build, function).points)
        torch.testing.assert_close(along, expected, rtol=1e-5, atol=1e-6)
        assert float(others.max()) < 1e-5


def test_adam_depends_on_the_axes() -> None:
    """Along the axes it is Adam of the singular values; else it leaves the singular vectors."""
    build = partial(torch.optim.Adam, lr=LR)
    function = quadratic(rotated=False)
    along, others = function.components(run(build, function).points)
    torch.testing.assert_close(along, recursion(partial(adam, betas=(0.9, 0.999))), rtol=1e-9, atol=1e-9)
    assert not others.any()
    along, others = (function := quadratic()).components(run(build, function).points)
    assert float(others.max()) > 0.1


def test_tuned_rates_keep_the_singular_values_in_the_plot() -> None:
    function = quadratic()
    rate = best_rate(lambda lr: run(partial(torch.optim.SGD, lr=lr), function), function)
    assert rate == 1.0  # the largest singular value changes its sign beyond; 2 / (1 + 0.03) is the fastest
    assert run(partial(torch.optim.SGD, lr=rate), function).stays_in_the_plot(function)
    assert not run(partial(torch.optim.SGD, lr=1.9), function).stays_in_the_plot(function)


def test_picture_has_a_panel_per_path_and_a_line_per_singular_value() -> None:
    function = quadratic()
    paths = {f"lr={lr}": run(partial(torch.optim.SGD, lr=lr), function) for lr in (0.1, 0.5, 1.0, 1.1)}
    figure = draw_components(function, paths, title="Paths")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == list(paths)
    for axes, path in zip(shown, paths.values(), strict=True):
        lines: dict[Any, Any] = {line.get_label(): line.get_ydata() for line in axes.lines}
        along, _ = function.components(path.points)
        for i, curvature in enumerate(CURVATURES):
            assert list(lines[f"curvature {curvature:g}"]) == pytest.approx(along[:, i].tolist())
    assert len({line.get_color() for line in shown[0].lines}) == 6  # one per curvature, zero, and the rest
