"""The stopping rule of gradient descent against its closed form on a quadratic, and its plot."""

from pathlib import Path

import pytest
import torch

from dlopt.lab.trajectory.functions import Quadratic
from dlopt.lab.trajectory.paths import follow
from dlopt.lab.trajectory.tolerance import ITERATIONS, decay, draw_ends, end, end_table, ends
from tests.support.line import dlopt, refused


def quadratic(condition: float = 5.0, angle: float = 0.0, noise: float = 0.0) -> Quadratic:
    keys = {"start": (-4.0, 0.5), "window": (-5.0, 2.0, -2.2, 2.2)}
    return Quadratic(condition=condition, angle=angle, noise=noise, batch_size=1, **keys)  # type: ignore[arg-type]


def path(function: Quadratic, lr: float, steps: int = 1000) -> torch.Tensor:
    build = lambda params: torch.optim.SGD(params, lr=lr)  # noqa: E731
    return follow(function, build, steps=steps, seed=0, factor=lambda t: 1.0).points


@pytest.mark.parametrize("angle", [0.0, 30.0])
@pytest.mark.parametrize("lr", [0.03, 0.1, 0.3, 1 / 3, 0.39])
def test_gradient_descent_ends_with_the_next_integer_of_the_closed_form(angle: float, lr: float) -> None:
    """At 0.39 the steep coordinate is the slowest: its factor is -0.95. At 1/3 both are equally slow."""
    function = quadratic(angle=angle)
    closed, points = decay(function, lr), path(function, lr, steps=500)
    assert closed is not None
    for tolerance in (1e-5, 1e-3):
        updates = end(points, tolerance)
        assert updates is not None and 0 < updates - closed.updates(tolerance) <= 1 + 1e-6
        distance, expected = float(points[updates].norm()), closed.distance(tolerance)
        assert closed.factor * expected <= distance * (1 + 1e-6) <= expected * 1.001


def test_a_run_whose_first_updates_are_tiny_ends_where_it_began() -> None:
    points = path(quadratic(), 0.01)
    assert end(points, 0.1) == ITERATIONS + 1 == decay(quadratic(), 0.01).updates(0.1)  # type: ignore[union-attr]
    assert float(points[ITERATIONS + 1].norm()) > 3.5


def test_no_closed_form_for_a_rate_that_does_not_converge_or_with_noise() -> None:
    assert decay(quadratic(), 0.4) is None and decay(quadratic(), 0.5) is None
    assert decay(quadratic(noise=0.1), 0.1) is None
    assert end(path(quadratic(), 0.4, steps=100), 0.1) is None


def test_plot_and_table_show_marks_and_the_closed_form() -> None:
    function = quadratic()
    trajectory = follow(function, lambda params: torch.optim.SGD(params, lr=0.1), steps=200, seed=0, factor=lambda t: 1)
    found, closed = ends({"a": trajectory, "b": trajectory}, [0.01, 0.001]), {"a": decay(function, 0.1), "b": None}
    updates, distance = draw_ends(found, closed, title="t", subtitle="s").axes
    assert list(updates.lines[0].get_ydata()) == [row[1] for row in found["a"]]
    assert len(updates.lines) == 4 and len(distance.lines) == 3  # marks of both paths, one curve, and its legend
    lines = end_table(found, closed)
    assert lines[2].split()[:3] == ["a", "0.001", f"{found['a'][0][1]}"] and len(lines[4].split()) == 4


def test_command(tmp_path: Path) -> None:
    typed = ("trajectory", "function=quadratic", "optimizer=gradient_descent", "optimizer.lr=0.01", "steps=300")
    result = dlopt(tmp_path, *typed, "tolerances=[0.01]", "output=x")
    assert result.code == 0, result.err
    assert (tmp_path / "x/tolerance.png").exists() and "closed form" in result.out
    assert "tolerances" in refused(tmp_path, *typed, "tolerances=[0]")
