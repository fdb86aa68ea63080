from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from dlopt.errors import UserError
from dlopt.models.polynomial import Polynomials

BASES = {
    "monomial": np.polynomial.polynomial.polyvander,
    "legendre": np.polynomial.legendre.legvander,
    "chebyshev": np.polynomial.chebyshev.chebvander,
}


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("degree", [1, 2, 12])
def test_bases_match_numpy(basis: str, degree: int) -> None:
    x = np.linspace(-1.2, 1.2, 31)
    ours = Polynomials(degree, basis)(torch.from_numpy(x)[:, None])  # type: ignore[arg-type]
    np.testing.assert_allclose(ours.numpy(), BASES[basis](x, degree)[:, 1:], rtol=1e-10, atol=1e-12)


def test_the_legendre_basis_is_well_conditioned_and_monomials_are_not() -> None:
    x = torch.linspace(-1, 1, 2001, dtype=torch.float64)[:, None]
    condition = {}
    for basis in BASES:
        features = Polynomials(15, basis)(x)  # type: ignore[arg-type]
        condition[basis] = torch.linalg.cond(features.T @ features).item()
    assert condition["legendre"] < 50 < 1e8 < condition["monomial"]


def test_one_coefficient_per_degree(build: Callable[..., nn.Module]) -> None:
    model = build("polynomial", "degree=9", input_shape=(1,), classes=1)
    assert sum(parameter.numel() for parameter in model.parameters()) == 10
    assert model(torch.zeros(4, 1)).shape == (4, 1)


def test_rejects_other_data(build: Callable[..., nn.Module]) -> None:
    with pytest.raises(UserError, match=r"model=polynomial: .*\[1, 8, 8\]"):
        build("polynomial", input_shape=(1, 8, 8), classes=1)
