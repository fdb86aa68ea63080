"""Updates do not depend on rounding in fp64, also where the gradients have no full rank."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlopt.optim import SOAP, DistributedShampoo, Shampoo
from dlopt.optim.kronecker import eigenbasis

UPDATES = 60


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _of_rank(rank: int, rows: int, columns: int) -> Callable[[int], Tensor]:
    return lambda t: _normal(rows, rank, seed=t) @ _normal(rank, columns, seed=1000 + t)


def _in_one_space(rank: int, size: int) -> Callable[[int], Tensor]:
    left, right = _normal(size, rank, seed=1), _normal(rank, size, seed=2)
    return lambda t: left @ _normal(rank, rank, seed=100 + t) @ right


def _of_tokens(t: int) -> Tensor:
    """Few rows of an embedding have gradients."""
    rows = torch.randint(0, 50, (4,), generator=torch.Generator().manual_seed(t))
    return torch.zeros(50, 8, dtype=torch.float64).index_add_(0, rows, _normal(4, 8, seed=t))


def _of_equal_lengths(t: int) -> Tensor:
    """All singular values of the gradient are equal, and so are many eigenvalues."""
    return torch.linalg.qr(_normal(24, 24, seed=0)).Q[:, :4] @ torch.eye(4, 16, dtype=torch.float64)


GRADIENTS: dict[str, Callable[[int], Tensor]] = {
    "wide": lambda t: _normal(10, 120, seed=t),
    "tall": lambda t: _normal(120, 10, seed=t),
    "large": lambda t: 1e3 * _normal(10, 40, seed=t),
    "square, rank 4": _of_rank(4, 32, 32),
    "square, one space of rank 4": _in_one_space(4, 32),
    "rank 1": _of_rank(1, 24, 20),
    "rank that grows by one": lambda t: (1 + t) * _of_rank(1, 40, 30)(t),
    "tokens": _of_tokens,
    "equal singular values": _of_equal_lengths,
    "kernels": lambda t: _of_rank(3, 16, 36)(t).view(16, 4, 3, 3),
    "zero": lambda t: torch.zeros(12, 9, dtype=torch.float64),
    "zero at first": lambda t: (t > 13) * _normal(12, 9, seed=t),
    "zero later": lambda t: (t < 3) * _normal(12, 9, seed=t),
    "full rank": lambda t: _normal(12, 9, seed=t),
}


def _train(make: Callable[..., Any], gradient: Callable[[int], Tensor], noise: float) -> Tensor:
    weights = nn.Parameter(torch.zeros_like(gradient(0)))
    optimizer = make([weights])
    for t in range(UPDATES):
        exact = gradient(t)
        weights.grad = exact * (1 + noise * _normal(*exact.shape, seed=5000 + t)) if noise else exact
        optimizer.step()
    return weights.detach()


@pytest.mark.parametrize("update_every", [1, 10])
@pytest.mark.parametrize("name", GRADIENTS)
def test_soap_does_not_amplify_rounding(name: str, update_every: int) -> None:
    make = partial(SOAP, update_every=update_every)
    exact, noisy = (_train(make, GRADIENTS[name], noise) for noise in (0.0, 1e-16))
    assert exact.isfinite().all()
    assert (noisy - exact).norm() <= 1e-9 * exact.norm()


@pytest.mark.parametrize("make", [partial(Shampoo, update_every=10), partial(DistributedShampoo, update_every=10)])
@pytest.mark.parametrize("name", ["wide", "square, rank 4", "rank 1", "rank that grows by one", "large", "tokens"])
def test_inverse_roots_do_not_amplify_rounding(name: str, make: Callable[..., Any]) -> None:
    """They raise directions without gradients to eps^(-1/4), of which a new gradient has some: less than SOAP can."""
    exact, noisy = (_train(make, GRADIENTS[name], noise) for noise in (0.0, 1e-16))
    assert (noisy - exact).norm() <= 1e-7 * exact.norm()


def test_soap_moves_as_long_steps_when_the_basis_jumps() -> None:
    """V follows a basis that changes at once: with that of other columns, steps would be longer by orders."""
    gradient, longest = _of_rank(2, 40, 30), 0.0
    weights = nn.Parameter(torch.zeros(40, 30, dtype=torch.float64))
    optimizer = SOAP([weights], lr=1.0, weight_decay=0.0, update_every=3)
    for t in range(40):
        before, weights.grad = weights.detach().clone(), gradient(t)
        optimizer.step()
        longest = max(longest, float((weights.detach() - before).square().mean().sqrt()))
    assert longest < 2.0


def test_eigenbasis_of_equal_eigenvalues_depends_on_their_space_only() -> None:
    rotation = torch.linalg.qr(_normal(12, 12, seed=3)).Q
    values = torch.tensor([5.0, 3.0, 3.0, 3.0, 2.0, 1.0, 1e-3, *[0.0] * 5], dtype=torch.float64)
    matrix = (rotation * values) @ rotation.T
    first = eigenbasis(matrix)
    torch.testing.assert_close(first.T @ first, torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close((first.T @ matrix @ first).diagonal(), values)
    for seed in range(3):
        noise = 1e-16 * _normal(12, 12, seed=seed)
        # eigh returns columns of either sign.
        assert ((eigenbasis(matrix + noise + noise.T).T @ first).diagonal().abs() - 1).abs().max() < 1e-10
