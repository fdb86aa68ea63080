"""The gradient noise scale where it is known."""

import math

import pytest
import torch

from dlopt.analysis.diagnosis.layers import norms
from dlopt.analysis.diagnosis.noise import GradientSpread, noise_scale


def test_the_noise_scale_of_gaussian_gradients() -> None:
    """Gradients of b samples are G + N(0, Sigma / b): tr(Sigma) / |G|^2 is known."""
    torch.manual_seed(0)
    true, variance, batch = torch.full((400,), 0.3), 4.0, 8
    spread = GradientSpread(["a", "b"])
    for _ in range(400):
        gradient = true + torch.randn(400) * math.sqrt(variance / batch)
        spread.add([[gradient[:100]], [gradient[100:250], gradient[250:]]])
    whole, by_name = spread.noise_scale(batch)
    expected = variance / 0.09
    assert whole == pytest.approx(expected, rel=0.05)
    assert by_name == pytest.approx([expected, expected], rel=0.15)
    assert spread.norms().shape == (400, 2)


def test_equal_gradients_have_no_noise_and_opposite_ones_nothing_else() -> None:
    gradient = torch.tensor([3.0, 4.0])
    spread = GradientSpread(["w"])
    spread.add([[gradient]])
    assert math.isnan(spread.noise_scale(4)[0])
    spread.add([[gradient]])
    assert spread.noise_scale(4)[0] == pytest.approx(0, abs=1e-6)
    assert noise_scale(25.0, 0.0, 4, 2) == math.inf
    assert math.isnan(noise_scale(math.nan, 0.0, 4, 2))


def test_norms_of_lists_of_tensors() -> None:
    found = norms([[torch.tensor([3.0]), torch.tensor([[4.0]])], [torch.zeros(2)], [torch.ones(4)]])
    assert found.tolist() == [5.0, 0.0, 2.0]
