"""Orthogonalization against singular value decompositions in float64, and its coefficients against their derivation."""

import numpy as np
import pytest
import torch

from dlopt.basics.errors import UserError
from dlopt.config.schema import check_value
from dlopt.optim import Muon
from dlopt.optim.orthogonalize import (
    POLAR_EXPRESS,
    QUINTIC,
    Coefficients,
    iterate,
    normalize_rows,
    orthogonalize,
    triples,
)
from tests.support.updates import GRADS, START, Array, parameters, set_gradients

STACKS = [(2, 12, 20), (1, 20, 12), (3, 9, 9), (1, 1, 5)]


def matrices(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def best_quintic(low: float, high: float) -> tuple[float, float, float]:
    """Returns a, b, c that minimize the largest |1 - (a x + b x^3 + c x^5)| on [low, high], by Remez' exchange."""
    inner = np.array([(3 * low + high) / 4, (low + 3 * high) / 4])
    for _ in range(100):
        points = np.array([low, *inner, high])
        system = np.stack([points, points**3, points**5, [1.0, -1.0, 1.0, -1.0]], axis=1)
        a, b, c, _ = np.linalg.solve(system, np.ones(4))
        inner = np.sqrt((-3 * b + np.array([-1, 1]) * np.sqrt(9 * b**2 - 20 * a * c)) / (10 * c))
    return a, b, c


def test_polar_express_has_the_best_quintic_of_each_iteration() -> None:
    """The offline stage in the code of Amsel et al. 2025: from [0.001, 1], cushioned, then centered around 1."""
    low, high, cushion = 1e-3, 1.0, 0.02407327424182761
    for a, b, c in POLAR_EXPRESS[:6]:
        found = np.array(best_quintic(max(low, cushion * high), high))
        low_end, high_end = (found @ [x, x**3, x**5] for x in (low, high))
        found *= 2 / (low_end + high_end)
        low = float(found @ [low, low**3, low**5])
        high = 2 - low
        np.testing.assert_allclose((a * 1.01, b * 1.01**3, c * 1.01**5), found, rtol=1e-5)


@pytest.mark.parametrize("shape", STACKS)
def test_iterations_map_the_singular_values(shape: tuple[int, ...]) -> None:
    x = matrices(shape)
    x = x / x.norm(dim=(1, 2), keepdim=True) / 1.01
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    for coefficients in (QUINTIC, [QUINTIC, (1.5, -0.5, 0.0)], "polar_express"):
        each = triples(coefficients, 5)
        mapped = s
        for a, b, c in each:
            mapped = a * mapped + b * mapped**3 + c * mapped**5
        torch.testing.assert_close(iterate(x, each), u * mapped.unsqueeze(1) @ vh, rtol=0, atol=1e-12)
    torch.testing.assert_close(iterate(x, triples("polar_express", 10)), u @ vh, rtol=0, atol=1e-10)
    found = orthogonalize(matrices(shape), "polar_express", 8, 1e-7)
    torch.testing.assert_close(found.double(), u @ vh, rtol=0, atol=0.03)  # in bfloat16


@pytest.mark.parametrize("shape", [(99, 256, 16), (99, 16, 64)])
def test_a_matrix_does_not_depend_on_its_stack(shape: tuple[int, ...]) -> None:
    """In fp64: with parallel=fsdp each process orthogonalizes a part of the stack."""
    stack = matrices(shape)
    together = orthogonalize(stack, QUINTIC, 5, 1e-7)
    assert torch.equal(together, torch.cat([orthogonalize(each, QUINTIC, 5, 1e-7) for each in stack.split(1)]))


def test_coefficients_of_each_iteration() -> None:
    first, last = (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)
    assert triples(QUINTIC, 3) == [QUINTIC] * 3
    assert triples([first, last], 1) == [first]
    assert triples([first, last], 4) == [first, last, last, last]
    assert triples("polar_express", 5) == POLAR_EXPRESS[:5]
    assert check_value("k", [[1, 2, 3], [4, 5, 6]], Coefficients) == [first, last]
    for wrong in ([1, 2], [[1, 2]], [], "express"):
        with pytest.raises(UserError, match=r"^k="):
            check_value("k", wrong, Coefficients)


def test_muon_takes_coefficients_of_each_iteration() -> None:
    """Few iterations of Polar Express are closer to U V^T than as many of the quintic."""
    gradient = matrices((1, 12, 20))[0]
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    errors = {}
    for name, coefficients in {"quintic": QUINTIC, "polar": "polar_express", "list": POLAR_EXPRESS}.items():
        p = torch.nn.Parameter(torch.zeros(12, 20, dtype=torch.float64))
        p.grad = gradient.clone()
        Muon([p], lr=1.0, ns_coefficients=coefficients, ns_steps=6).step()  # type: ignore[arg-type]
        errors[name] = float((p.detach() + u @ vh).norm() / (u @ vh).norm())
    assert errors["polar"] < 0.02 < 0.1 < errors["quintic"]
    assert errors["list"] == pytest.approx(errors["polar"], abs=0.01)  # which scales by the safety factor first


def normuon(update: Array, second: Array, beta2: float) -> tuple[Array, Array]:
    """The normalization in the authors' code (Li et al. 2025): `normuon_update` between orthogonalization and scale."""
    norm = np.linalg.norm(update)
    second = second + (1 - beta2) * ((update * update).mean(-1, keepdims=True) - second)
    update = update / (np.sqrt(second) + 1e-10)
    return update * norm / (np.linalg.norm(update) + 1e-10), second


def test_rows_are_normalized_as_in_the_code_of_normuon() -> None:
    averages, seconds = [torch.zeros(12, 1, dtype=torch.float64) for _ in range(2)], [np.zeros((12, 1))] * 2
    for seed in range(4):
        updates = torch.randn(2, 12, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        updates[0, 3] = 0.0  # a row without a gradient stays zero
        found = normalize_rows(updates, averages, 0.9)
        for i in range(2):
            expected, seconds[i] = normuon(updates[i].numpy(), seconds[i], 0.9)
            np.testing.assert_allclose(found[i].numpy(), expected, rtol=1e-12)
            np.testing.assert_allclose(averages[i].numpy(), seconds[i], rtol=1e-12)
        torch.testing.assert_close(found.norm(dim=(1, 2)), updates.norm(dim=(1, 2)))


def test_muon_normalizes_the_rows_of_orthogonalized_momenta() -> None:
    """Kernels as [out, everything else]; vectors, and the state of others, as without."""
    params, plain = parameters(), parameters()
    ours = Muon(params.values(), lr=0.1, weight_decay=0.0, row_beta=0.9)
    others = Muon(plain.values(), lr=0.1, weight_decay=0.0)
    weights = {name: START[name].reshape(len(START[name]), -1) for name in ("kernel", "matrix")}
    momenta, seconds = {name: np.zeros_like(w) for name, w in weights.items()}, dict.fromkeys(weights, np.zeros(1))
    for gradient in GRADS:
        for each, optimizer in ((params, ours), (plain, others)):
            set_gradients(each, gradient)
            optimizer.step()
        for name, w in weights.items():
            g = gradient[name].reshape(w.shape)
            momenta[name] += 0.05 * (g - momenta[name])
            nesterov = torch.tensor(g + 0.95 * (momenta[name] - g)).unsqueeze(0)
            update = orthogonalize(nesterov, QUINTIC, 5, 1e-7)[0].double().numpy()
            second = np.broadcast_to(seconds[name], (len(w), 1))
            update, seconds[name] = normuon(update, second, 0.9)
            weights[name] = w - 0.1 * max(1, w.shape[0] / w.shape[1]) ** 0.5 * update
            np.testing.assert_allclose(params[name].detach().numpy().reshape(w.shape), weights[name], atol=1e-9)
    assert torch.equal(params["vector"], plain["vector"])
    assert all("row_square" not in others.state[p] for p in plain.values())
