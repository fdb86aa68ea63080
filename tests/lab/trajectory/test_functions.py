"""Minima of the test functions match the literature; their noise has the documented covariance."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from dlopt.basics.errors import UserError
from dlopt.config.choices import extensions
from dlopt.config.compose import Composer
from dlopt.config.resolve import to_plain
from dlopt.config.schema import component
from dlopt.lab.trajectory.functions import DigitPair, Quadratic

NAMES = sorted({path.stem for path in (extensions()["dlopt.lab"] / "function").glob("*.yaml")} - {"matrix"})


def function(name: str, **keys: Any) -> Any:
    node = to_plain(Composer("trajectory").compose([f"function={name}"]))[0]["function"]
    return component("function", {**node, **keys}, (), ("dlopt",)).build()


@pytest.mark.parametrize("name", NAMES)
def test_minima_match_scipy_and_are_within_the_window(name: str) -> None:
    found = function(name)

    def value(point: np.ndarray) -> float:
        return float(found(torch.from_numpy(point)))

    left, right, bottom, top = found.window
    assert left < found.start[0] < right and bottom < found.start[1] < top
    for minimum in found.minima:
        assert left < minimum[0] < right and bottom < minimum[1] < top
        near = minimize(value, np.array(minimum) + 0.05, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-15})
        assert near.x == pytest.approx(np.array(minimum), abs=1e-5)
        assert value(np.array(minimum)) == pytest.approx(found.least, abs=1e-10)
    grid = torch.from_numpy(np.stack(np.meshgrid(np.linspace(left, right, 60), np.linspace(bottom, top, 50)), -1))
    values = found(grid)
    assert values.shape == (50, 60) and float(values.min()) >= found.least - 1e-12


def test_published_values() -> None:
    at = lambda name, *point: float(function(name)(torch.tensor(point, dtype=torch.float64)))  # noqa: E731
    assert at("rosenbrock", -1.2, 1.0) == pytest.approx(24.2)  # Moré, Garbow & Hillstrom 1981, problem 1
    assert at("beale", 1.0, 1.0) == pytest.approx(14.203125)  # problem 5
    assert at("himmelblau", -0.270845, -0.923039) == pytest.approx(181.617, abs=1e-3)  # its local maximum
    assert at("saddle", 0.0, 0.0) == 0.0
    assert at("quadratic", 2.0, 1.0) == pytest.approx((4 + 100) / 2)


def test_rotated_quadratic_keeps_its_condition_number() -> None:
    turned: Any = function("quadratic", condition=7.0, angle=30.0)
    hessian = torch.autograd.functional.hessian(turned, torch.zeros(2, dtype=torch.float64))
    values, vectors = torch.linalg.eigh(hessian)
    assert values.tolist() == pytest.approx([1.0, 7.0])
    assert abs(float(vectors[0, 0])) == pytest.approx(3**0.5 / 2)


def test_noise_has_the_stated_covariance() -> None:
    bowl = Quadratic(condition=5.0, angle=0.0, noise=2.0, batch_size=4, start=(1.0, 1.0), window=(-1.0, 1.0, -1.0, 1.0))
    point = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    gradients = torch.stack([torch.autograd.grad(bowl.sample(generator)(point), point)[0] for _ in range(4000)])
    assert gradients.mean(0).tolist() == pytest.approx([1.0, 5.0], abs=0.25)
    assert gradients.var(0).tolist() == pytest.approx([2.0**2 / 4, 2.0**2 * 25 / 4], rel=0.1)


def test_batch_losses_average_to_the_full_loss() -> None:
    whole: Any = function("digits")
    single: Any = function("digits", batch_size=1)
    point = torch.tensor([0.7, -0.2], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    assert whole.sample(generator) is whole
    mean = torch.stack([single.sample(generator)(point) for _ in range(3000)]).mean()
    assert float(mean) == pytest.approx(float(whole(point)), rel=0.05)
    assert whole(torch.zeros(2, dtype=torch.float64)) == pytest.approx(np.log(2))


def test_rejects_invalid_digit_pairs() -> None:
    keys: dict[str, Any] = {"weight_decay": 0.01, "start": (0.0, 0.0), "window": (0.0, 1.0, 0.0, 1.0)}
    with pytest.raises(UserError, match=r"function.classes=\[3,3\]: two different"):
        DigitPair(classes=(3, 3), batch_size="full", **keys)
    with pytest.raises(UserError, match=r"function.batch_size=5000: there are 285 images"):
        DigitPair(classes=(3, 8), batch_size=5000, **keys)
