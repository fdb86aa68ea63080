"""The search of learning rates, on losses with a known optimum, and its extrapolation."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import linregress

from dlopt.lab.ladder.rates import GRID, LIMIT, SPACING, fit_rates, grid_around, missing, optimum, rate


def search(loss: Callable[[float], float], centre: float, grid: Sequence[int] = GRID) -> dict[float, float]:
    """Runs the whole search; returns the losses by rate."""
    found: dict[int, float] = {}
    while new := missing(found, grid):
        found |= {index: loss(rate(centre, index)) for index in new}
    return {rate(centre, index): value for index, value in found.items()}


@pytest.mark.parametrize("best", [0.01, 0.004, 0.5, 1e-4])
def test_finds_the_minimum_of_a_parabola_also_outside_the_first_grid(best: float) -> None:
    def loss(lr: float) -> float:
        return 2 + 0.1 * math.log(lr / best) ** 2

    losses = search(loss, 0.01)
    found = optimum(losses)
    assert found is not None and not found.at_end
    assert found.lr == pytest.approx(best, rel=1e-6) and found.loss == pytest.approx(2)
    assert len(losses) >= len(GRID) + 2


@pytest.mark.parametrize(("expected", "runs"), [(0.02, 5), (0.05, 5), (0.5, 7), (1e-9, 10)])
def test_a_search_around_an_expected_rate_finds_the_best_in_fewer_runs(expected: float, runs: int) -> None:
    losses = search(lambda lr: 2 + 0.1 * math.log(lr / 0.03) ** 2, 0.01, grid_around(expected, 0.01))
    found = optimum(losses)
    assert found is not None and found.lr == pytest.approx(0.03, rel=1e-6)
    assert len(losses) == runs


@pytest.mark.parametrize("lr", [1e-9, 0.002, 0.01, 0.017, 1e9])
def test_the_grid_around_a_rate_has_it_in_the_middle(lr: float) -> None:
    grid = grid_around(lr, 0.01)
    rates = [rate(0.01, index) for index in grid]
    nearest = min(range(-LIMIT + 2, LIMIT - 1, 2), key=lambda index: abs(math.log(rate(0.01, index) / lr)))
    assert grid == (nearest - 2, nearest, nearest + 2) and rates[1] / rates[0] == pytest.approx(SPACING, rel=1e-3)


def test_agrees_with_scipy_on_the_parabola_of_the_best_three() -> None:
    losses = {0.01: 3.0, 0.02: 2.1, 0.04: 2.0, 0.08: 2.7, 0.16: math.inf}
    found = optimum(losses)
    x, y = np.log([0.02, 0.04, 0.08]), [2.1, 2.0, 2.7]
    curve = np.polynomial.Polynomial.fit(x, y, 2)
    expected = minimize_scalar(curve, bounds=(x[0], x[-1]), method="bounded", options={"xatol": 1e-10})
    assert found is not None and math.log(found.lr) == pytest.approx(expected.x, abs=1e-6)
    assert found.loss == pytest.approx(expected.fun)


def test_the_search_ends_at_its_limit_and_reports_it() -> None:
    losses = search(lambda lr: 1 / lr, 0.01)
    found = optimum(losses)
    assert found is not None and found.at_end and max(losses) == rate(0.01, LIMIT) == found.lr
    assert optimum(search(lambda lr: math.inf, 0.01)) is None
    diverging = search(lambda lr: 2 - lr if lr < 0.02 else math.inf, 0.01)
    found = optimum(diverging)
    assert found is not None and found.lr == pytest.approx(0.01 * SPACING**0.5, rel=1e-3)


def test_extrapolates_a_power_law_and_shows_the_error_of_leaving_one_out() -> None:
    sizes = [6e4, 1.2e5, 4e5]
    exact = fit_rates(sizes, [3 * size**-0.4 for size in sizes])
    assert exact.error == pytest.approx(1) and exact.exponent == pytest.approx(-0.4)
    assert exact(2e6) == pytest.approx(3 * 2e6**-0.4, rel=1e-3)
    rates = [0.03, 0.008, 0.01]
    fit, errors = fit_rates(sizes, rates), []
    reference = linregress(np.log(sizes), np.log(rates))
    assert fit.exponent == pytest.approx(reference.slope) and math.log(fit.scale) == pytest.approx(reference.intercept)
    for i in range(3):
        line = linregress(np.delete(np.log(sizes), i), np.delete(np.log(rates), i))
        errors.append(abs(math.log(rates[i]) - line.intercept - line.slope * math.log(sizes[i])))
    assert fit.error == pytest.approx(math.exp(max(errors)))
    assert fit_rates([1e3, 2e4, *sizes], [10, 1e-3, *rates]) == fit  # of the largest three
    assert fit_rates([1e4], [0.1])(1e6) == 0.1 and fit_rates([1e4, 1e5], [0.1, 0.2]).error is None
