"""Eigenvalues and curvature against dense Hessians."""

import math

import pytest
import torch
from torch import Tensor, nn

from dlopt.instruments.curvature import (
    GradientSpread,
    curvature_along,
    hessian_product,
    lanczos,
    largest_eigenvalues,
    losses_along,
    noise_scale,
)
from dlopt.instruments.layers import norms
from dlopt.optim.common import flat


def _problem() -> tuple[nn.Module, Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return net, torch.randn(20, 3, dtype=torch.float64), torch.randint(2, (20,)), list(net.parameters())


def _dense(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Computes the dense Hessian by differentiating every entry of the gradient."""
    parameters = list(net.parameters())
    loss = nn.functional.cross_entropy(net(x), y)
    gradient = flat(torch.autograd.grad(loss, parameters, create_graph=True))
    rows = [flat(torch.autograd.grad(entry, parameters, retain_graph=True)) for entry in gradient]
    return torch.stack(rows)


def test_products_and_eigenvalues_match_dense_hessian() -> None:
    net, x, y, parameters = _problem()
    dense = _dense(net, x, y)
    product = hessian_product(nn.functional.cross_entropy(net(x), y), parameters)
    vector = torch.randn(len(dense), dtype=torch.float64)
    assert torch.allclose(product(vector), dense @ vector, rtol=1e-10, atol=1e-14)
    assert all(p.grad is None for p in parameters)
    result = largest_eigenvalues(
        lambda: nn.functional.cross_entropy(net(x), y), parameters, count=5, iterations=len(dense)
    )
    true = torch.linalg.eigvalsh(dense).flip(0)
    assert torch.allclose(result.eigenvalues, true[:5], rtol=1e-8)
    first = result.vectors[0]
    assert torch.allclose(dense @ first, true[0] * first, atol=1e-8)
    direction = torch.randn(len(dense), dtype=torch.float64)
    along = float(direction @ dense @ direction / direction.square().sum())
    assert curvature_along(product, direction) == pytest.approx(along, rel=1e-10)


def test_residual_bounds_error_of_largest_eigenvalue() -> None:
    net, x, y, parameters = _problem()
    true = float(torch.linalg.eigvalsh(_dense(net, x, y))[-1])
    result = largest_eigenvalues(lambda: nn.functional.cross_entropy(net(x), y), parameters, count=1, iterations=12)
    error = abs(float(result.eigenvalues[0]) - true)
    assert error <= float(result.residuals[0]) + 1e-12 and error < 0.01 * true


def test_lanczos_stops_when_krylov_space_is_exhausted() -> None:
    matrix = torch.diag(torch.tensor([3.0, 1.0, 1.0, -2.0], dtype=torch.float64))  # three different eigenvalues
    result = lanczos(lambda v: matrix @ v, torch.ones(4, dtype=torch.float64), 10, 4)
    assert result.eigenvalues.tolist() == pytest.approx([3, 1, -2])
    zero = lanczos(torch.zeros_like, torch.ones(4), 10, 2)
    assert zero.eigenvalues.tolist() == [0.0]


def test_unused_parameters_have_zero_curvature() -> None:
    a, b = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    product = hessian_product((a**3).sum(), [a, b])
    assert product(torch.ones(5)).tolist() == [6, 6, 0, 0, 0]
    linear = hessian_product(a.sum(), [a, b])  # no second derivative at all
    assert linear(torch.ones(5)).tolist() == [0, 0, 0, 0, 0]


def test_non_finite_loss_has_nan_eigenvalues() -> None:
    a = torch.zeros(2, requires_grad=True)
    result = largest_eigenvalues(lambda: (a.log() * 2).sum(), [a], count=2, iterations=3)
    assert result.eigenvalues.isnan().all()


def test_losses_along_a_step_restores_parameters() -> None:
    p = torch.tensor([1.0, 2.0], requires_grad=True)
    kept = p.detach().clone()
    result = losses_along(lambda: (p**2).sum(), [p], [torch.tensor([-1.0, 0.0])], [0.0, 0.5, 1.0])
    assert result == pytest.approx([5.0, 4.25, 4.0]) and torch.equal(p, kept)


def test_noise_scale_of_gaussian_gradients() -> None:
    """Gradients of b samples are G + N(0, Sigma / b), so tr(Sigma) / |G|^2 is known."""
    torch.manual_seed(0)
    true, variance, batch = torch.full((400,), 0.3), 4.0, 8
    spread = GradientSpread()
    for _ in range(400):
        gradient = true + torch.randn(400) * math.sqrt(variance / batch)
        spread.add([[gradient[:100]], [gradient[100:250], gradient[250:]]])
    total, by_name = spread.noise_scale(batch)
    expected = variance / 0.09
    assert total == pytest.approx(expected, rel=0.05)
    assert by_name == pytest.approx([expected, expected], rel=0.15)
    assert spread.norms().shape == (400, 2)


def test_noise_scale_of_equal_and_opposite_gradients() -> None:
    gradient = torch.tensor([3.0, 4.0])
    spread = GradientSpread()
    spread.add([[gradient]])
    assert math.isnan(spread.noise_scale(4)[0])
    spread.add([[gradient]])
    assert spread.noise_scale(4)[0] == pytest.approx(0, abs=1e-6)
    assert noise_scale(25.0, 0.0, 4, 2) == math.inf
    assert math.isnan(noise_scale(math.nan, 0.0, 4, 2))


def test_norms_of_tensor_lists() -> None:
    result = norms([[torch.tensor([3.0]), torch.tensor([[4.0]])], [torch.zeros(2)], [torch.ones(4)]])
    assert result.tolist() == [5.0, 0.0, 2.0]
