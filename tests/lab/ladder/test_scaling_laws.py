"""The fit of the scaling laws: noiseless laws, an independent minimizer, and closed forms."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import huber

from dlopt.lab.ladder.scaling_laws import DELTA, Points, fit_scaling_laws

COMPUTE = np.repeat(np.geomspace(2e12, 7e14, 6), 3)


def points(noise: float = 0.0, **laws: tuple[float, float]) -> Points:
    rng = np.random.default_rng(0)
    return {
        name: (COMPUTE, (1.2 + scale * COMPUTE**-exponent) * np.exp(noise * rng.standard_normal(len(COMPUTE))))
        for name, (scale, exponent) in laws.items()
    }


def test_recovers_noiseless_laws() -> None:
    laws = fit_scaling_laws(points(a=(60.0, 0.12), b=(300.0, 0.18)))
    assert laws.irreducible == pytest.approx(1.2) and laws.objective < 1e-12
    for name, (scale, exponent) in {"a": (60.0, 0.12), "b": (300.0, 0.18)}.items():
        assert math.exp(laws.curves[name].log_scale) == pytest.approx(scale)
        assert laws.curves[name].exponent == pytest.approx(exponent)
    assert laws.loss("a", 1e16) == pytest.approx(1.2 + 60 * 1e16**-0.12)


def test_minimizes_the_objective_of_hoffmann_et_al() -> None:
    data = points(0.004, a=(60.0, 0.12), b=(55.0, 0.13))
    laws = fit_scaling_laws(data)

    def objective(values: np.ndarray) -> float:
        total = 0.0
        for i, (compute, loss) in enumerate(data.values()):
            predicted = np.logaddexp(values[0], values[1 + 2 * i] - values[2 + 2 * i] * np.log(compute))
            total += float(huber(DELTA, predicted - np.log(loss)).sum())
        return total

    curves = [laws.curves[name] for name in data]
    own = [math.log(laws.irreducible), *(value for each in curves for value in (each.log_scale, each.exponent))]
    assert objective(np.array(own)) == pytest.approx(laws.objective, rel=1e-6)
    for start in ([0.2, 4.0, 0.12, 4.0, 0.13], [-1.0, 3.0, 0.1, 3.0, 0.1], own):
        options = {"maxiter": 20000, "maxfev": 20000, "xatol": 1e-10, "fatol": 1e-12}
        other = minimize(objective, start, method="Nelder-Mead", options=options)
        assert laws.objective <= other.fun * (1 + 1e-4)


def test_speed_up_is_the_ratio_of_computes_at_equal_loss() -> None:
    laws = fit_scaling_laws(points(a=(60.0, 0.12), b=(40.0, 0.12), c=(300.0, 0.18)))
    factor = (60 / 40) ** (1 / 0.12)
    for compute in (1e13, 1e15):
        assert laws.speed_up("b", "a", compute) == pytest.approx(factor, rel=1e-3)
        needed = compute * laws.speed_up("c", "a", compute)
        assert laws.loss("a", needed) == pytest.approx(laws.loss("c", compute))
    assert laws.trend("b", "a") == pytest.approx(0, abs=1e-4)
    assert laws.trend("c", "a") == pytest.approx(0.18 / 0.12 - 1, rel=1e-3)
    ratio = laws.speed_up("c", "a", 1e15) / laws.speed_up("c", "a", 1e13)
    assert math.log(ratio) / math.log(100) == pytest.approx(laws.trend("c", "a"))


def test_two_rungs_have_no_irreducible_loss_and_one_no_law() -> None:
    compute = np.array([1e12, 1e14])
    laws = fit_scaling_laws({"a": (compute, np.array([4.0, 2.0]))})
    assert laws.irreducible == 0 and laws.curves["a"].exponent == pytest.approx(math.log(2) / math.log(100))
    with pytest.raises(ValueError, match="two rungs"):
        fit_scaling_laws({"a": (compute[:1], np.array([4.0]))})
