"""Updates of recent optimizers against the algorithms of their papers, written out in NumPy in float64."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.basics.random import generator, stream
from dlopt.lab.verify.references import (
    DECAY,
    LR,
    Array,
    Formula,
    adabelief,
    adafactor,
    adan,
    ademamix,
    adopt,
    c_adamw,
    c_lion,
    distributed_shampoo,
    mars,
    prodigy,
    rms,
    shampoo,
    signum,
    soap,
)
from dlopt.losses import sampled_cross_entropy
from dlopt.optim import (
    SOAP,
    AdEMAMix,
    DistributedShampoo,
    Kron,
    LossClosure,
    Muon,
    Prodigy,
    Scion,
    Shampoo,
    Sophia,
    adamw,
)
from dlopt.optim.kronecker import eigenvectors, update_factors
from tests.support.updates import (
    GRADS,
    SHAPES,
    START,
    parameters,
    path,
    set_gradients,
    written,
)

ALGORITHMS: dict[str, tuple[str, list[str], Formula]] = {
    "C-AdamW": ("adamw", ["cautious=true"], c_adamw),
    "C-Lion": ("lion", ["cautious=true"], c_lion),
    "Signum": ("signum", [], signum),
    "ADOPT": ("adopt", [], adopt),
    "AdEMAMix": ("ademamix", ["warmup=7"], ademamix),
    "Adan": ("adan", [], adan),
    "AdaBelief": ("adabelief", [], adabelief),
    "MARS": ("mars", [], mars),
    "Adafactor": ("adafactor", [], adafactor),
    "Shampoo": ("shampoo", ["update_every=3"], shampoo),
    "DistributedShampoo": (
        "distributed_shampoo",
        ["update_every=3", "betas=[0.9,0.99]", "eps=0.0001"],
        distributed_shampoo,
    ),
    "SOAP": ("soap", ["update_every=3"], soap),
}


@pytest.mark.parametrize("case", ALGORITHMS)
def test_algorithm_at_every_update(case: str, choose: Callable[..., Any]) -> None:
    choice, typed, algorithm = ALGORITHMS[case]
    params = parameters()
    ours = path(choose(choice, params.values(), f"lr={LR}", f"weight_decay={DECAY}", *typed), params)
    torch.testing.assert_close(ours, written(algorithm), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("d_coef", [1.0, 2.5])
def test_prodigy_at_every_update(d_coef: float) -> None:
    """Runs the algorithm over all parameters together; a schedule changes gamma, and similar gradients increase d."""
    params = parameters()
    optimizer = Prodigy([{"params": [p]} for p in params.values()], weight_decay=DECAY, d0=0.01, d_coef=d_coef)
    x = np.concatenate([w.reshape(-1) for w in START.values()])
    gradients = [{name: GRADS[0][name] + 0.1 * each for name, each in noise.items()} for noise in GRADS]
    flat = [np.concatenate([each.reshape(-1) for each in gradient.values()]) for gradient in gradients]
    rates = [1 - number / 20 for number in range(len(GRADS))]
    expected = prodigy(x, flat, d_coef=d_coef, rates=rates)
    for gamma, gradient, (weights, d) in zip(rates, gradients, expected, strict=True):
        for group, (name, p) in zip(optimizer.param_groups, params.items(), strict=True):
            group["lr"], p.grad = gamma, torch.tensor(gradient[name])
        optimizer.step()
        ours = torch.cat([p.detach().reshape(-1) for p in params.values()])
        torch.testing.assert_close(ours, torch.tensor(weights), rtol=1e-10, atol=1e-12)
        assert optimizer.param_groups[1]["d"] == pytest.approx(d, rel=1e-10)
    assert d > 0.01


def test_prodigy_finds_the_scale_of_the_problem() -> None:
    """From d0 = 1e-6 to a minimum at distance 3, without a learning rate; d stays below the distance."""
    p, center = nn.Parameter(torch.zeros(4)), torch.tensor([1.0, -2.0, 2.0, 0.0])
    optimizer = Prodigy([p])
    for _ in range(400):
        optimizer.zero_grad()
        (p - center).abs().sum().backward()
        optimizer.step()
    assert (p - center).abs().max() < 0.3
    assert 0.1 < optimizer.param_groups[0]["d"] < 3


def test_sophia_at_every_update() -> None:
    """On sum w^4 / 4, whose Hessian is diagonal: 3 w^2, so that the estimate is 3 w^2 u^2."""
    p = nn.Parameter(torch.tensor(START["vector"]))
    optimizer = Sophia([p], lr=LR, weight_decay=DECAY, gamma=0.5, update_every=3, seed=5)
    w, m, h = START["vector"], np.zeros(5), np.zeros(5)
    for t in range(12):
        optimizer.step(LossClosure(optimizer, lambda: (p**4).sum() / 4))  # type: ignore[arg-type]
        if t % 3 == 0:
            u = torch.randn(5, generator=generator("cpu", 5, t, 0), dtype=torch.float64).numpy()
            h = 0.99 * h + 0.01 * 3 * w**2 * u**2
        m = 0.96 * m + 0.04 * w**3
        w = w - LR * DECAY * w - LR * np.clip(m / np.maximum(0.5 * h, 1e-12), -1, 1)
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-10, atol=1e-12)


def test_sophia_estimates_the_diagonal_of_a_full_hessian() -> None:
    draw = np.random.default_rng(1)
    a = torch.tensor(draw.normal(size=(6, 6)))
    hessian = a @ a.T
    p = nn.Parameter(torch.tensor(draw.normal(size=6)))
    optimizer = Sophia([p], lr=1e-12, betas=(0.9, 0.999), update_every=1)
    for _ in range(600):
        optimizer.step(LossClosure(optimizer, lambda: p @ hessian @ p / 2))  # type: ignore[arg-type]
    estimate = optimizer.state[p]["hessian"] / (1 - 0.999**600)
    torch.testing.assert_close(estimate, hessian.diagonal(), rtol=0.3, atol=1.0)


def test_sophia_g_at_every_update() -> None:
    """Softmax regression: estimates from labels drawn from the model's predictions (Liu et al. 2024, algorithm 2)."""
    draw = np.random.default_rng(1)
    x, y, w = draw.normal(size=(7, 4)), draw.integers(3, size=7), draw.normal(size=(3, 4))
    p, inputs, targets = nn.Parameter(torch.tensor(w)), torch.tensor(x), torch.tensor(y)

    def noise(seed: int) -> Tensor:
        return torch.rand(7, generator=generator("cpu", seed))

    optimizer = Sophia([p], lr=LR, weight_decay=DECAY, gamma=0.05, hessian="gnb", update_every=3, seed=5)
    closure = LossClosure(
        optimizer,
        lambda: nn.functional.cross_entropy(inputs @ p.T, targets),
        lambda seed: (sampled_cross_entropy(inputs @ p.T, noise(seed)), 7),
    )
    m, h = np.zeros((3, 4)), np.zeros((3, 4))
    for t in range(12):
        optimizer.step(closure)
        exponentials = np.exp(x @ w.T)
        probabilities = exponentials / exponentials.sum(1, keepdims=True)
        if t % 3 == 0:
            u = noise(stream(5, t)).double().numpy()
            labels = (probabilities.cumsum(1) <= u[:, None]).sum(1)
            h = 0.99 * h + 0.01 * 7 * ((probabilities - np.eye(3)[labels]).T @ x / 7) ** 2
        m = 0.96 * m + 0.04 * (probabilities - np.eye(3)[y]).T @ x / 7
        w = w - LR * DECAY * w - LR * np.clip(m / np.maximum(0.05 * h, 1e-12), -1, 1)
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-10, atol=1e-12)


def test_labels_drawn_from_the_model_estimate_the_gauss_newton_diagonal() -> None:
    """The exact mean over all labels: sum of P(labels) B g^2 = diagonal of the mean of J^T (diag(p) - p p^T) J."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 2, generator=draw, dtype=torch.float64)
    sizes = (4, 2), (4,), (3, 4)
    params = [nn.Parameter(torch.randn(*size, generator=draw, dtype=torch.float64)) for size in sizes]

    def outputs(first: Tensor, bias: Tensor, last: Tensor) -> Tensor:
        return torch.tanh(inputs @ first.T + bias) @ last.T

    p = outputs(*params).softmax(1).detach()
    upper = p.cumsum(1)
    means = [torch.zeros_like(param) for param in params]
    for labels in itertools.product(range(3), repeat=3):
        rows = torch.arange(3), torch.tensor(labels)
        noise = upper[rows] - p[rows] / 2  # the middle of the class's interval
        grads = torch.autograd.grad(sampled_cross_entropy(outputs(*params), noise), params)
        for mean, grad in zip(means, grads, strict=True):
            mean += p[rows].prod() * 3 * grad**2
    jacobians = torch.func.jacrev(outputs, argnums=(0, 1, 2))(*params)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    for mean, jacobian in zip(means, jacobians, strict=True):
        exact = torch.einsum("bk...,bkl,bl...->...", jacobian, curvature, jacobian) / 3
        torch.testing.assert_close(mean, exact.detach(), rtol=1e-11, atol=1e-14)


def numpy_factors(q: list[Array], g: Array, noise: Array) -> None:
    """Steps on the Lie group of a matrix: Q1 G Q2^T is whitened, Q1^-T V Q2^-1 its conjugate."""
    a = q[0] @ g @ q[1].T
    b = np.linalg.inv(q[0]).T @ noise @ np.linalg.inv(q[1])
    for i, (left, right) in enumerate(((a @ a.T, b @ b.T), (a.T @ a, b.T @ b))):
        total = left + right
        row = total @ total[np.argmax((total**2).sum(1))]
        bound = np.linalg.norm(total @ row / np.linalg.norm(row))
        q[i] = q[i] - 0.1 / bound * np.triu(left - right) @ q[i]


def test_kron_at_every_update() -> None:
    """Including the balance of the factors at the first update, where it changes nothing."""
    p = nn.Parameter(torch.tensor(START["matrix"]))
    optimizer = Kron([p], lr=LR, weight_decay=DECAY, seed=3)
    w, m, q = START["matrix"], np.zeros((4, 3)), [np.eye(4), np.eye(3)]
    for t, gradient in enumerate(GRADS, 1):
        g = gradient["matrix"]
        p.grad = torch.tensor(g)
        optimizer.step()
        m = 0.9 * m + 0.1 * g
        mean = m / (1 - 0.9**t)
        noise = torch.randn(4, 3, generator=generator("cpu", 3, t, 0, 0), dtype=torch.float64).numpy()
        numpy_factors(q, mean, noise)
        step = q[0].T @ q[0] @ mean @ q[1].T @ q[1]
        w = w - LR * (step / max(1.0, rms(step) / 1.1) + DECAY * w)
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-10, atol=1e-12)


def test_kron_draws_the_same_for_a_parameter_whatever_others_have_gradients() -> None:
    """A stage of a pipeline has gradients of its own layers only."""
    ends = []
    for alone in (False, True):
        first, second = (torch.ones(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
        optimizer = Kron([first, second], lr=LR)
        for _ in range(3):
            first.grad, second.grad = None if alone else torch.ones_like(first), torch.ones_like(second)
            optimizer.step()
        ends.append(second.detach())
    assert torch.equal(*ends)


def test_kron_learns_to_whiten() -> None:
    """P = Q^T Q approaches the inverse square root of the gradients' covariance, as whitening requires."""
    draw = torch.Generator().manual_seed(0)
    left, right = torch.diag(torch.tensor([10.0, 1.0, 0.1])).double(), torch.tensor([[2.0, 1.0], [0.0, 0.5]]).double()
    factors = [torch.eye(3).double(), torch.eye(2).double()]
    for _ in range(1500):
        gradient = left @ torch.randn(3, 2, generator=draw, dtype=torch.float64) @ right.T
        update_factors(factors, gradient, torch.randn(3, 2, generator=draw, dtype=torch.float64), 0.02)
    p = torch.kron(*(q.T @ q for q in factors))
    covariance = torch.kron(left @ left.T, right @ right.T)
    assert torch.dist(p @ covariance @ p, torch.eye(6)) < 2  # 5e2 at the start: P = I


def test_kron_limits_the_root_mean_square_of_an_update() -> None:
    p = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    p.grad = torch.full_like(p, 1e6)
    Kron([p], lr=0.5).step()
    assert rms(p.detach().numpy()) == pytest.approx(0.5 * 1.1)


@pytest.mark.parametrize("make", [Kron, Shampoo, partial(DistributedShampoo, update_every=2)])
def test_a_scalar_is_preconditioned_as_a_vector_of_one_entry(make: Callable[..., torch.optim.Optimizer]) -> None:
    scalar, vector = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor([0.5]))
    one, other = make([scalar]), make([vector])
    for t in range(5):
        scalar.grad, vector.grad = torch.tensor(0.01 + t / 100), torch.tensor([0.01 + t / 100])
        one.step(), other.step()
    assert scalar == vector[0] and scalar != 0.5


def test_distributed_shampoo_has_the_step_lengths_of_adam() -> None:
    """Without decay, its first updates are those of Adam; the later ones have other directions."""
    params, others = parameters(), parameters()
    optimizer = DistributedShampoo(params.values(), lr=LR, weight_decay=0.0, update_every=4)
    reference = torch.optim.Adam(others.values(), lr=LR)
    for count, gradient in enumerate(GRADS, 1):
        before = {name: p.detach().clone() for name, p in params.items()}
        before_others = {name: p.detach().clone() for name, p in others.items()}
        set_gradients(params, gradient)
        set_gradients(others, gradient)
        optimizer.step()
        reference.step()
        for name, p in params.items():
            step, other = p - before[name], others[name] - before_others[name]
            torch.testing.assert_close(step.norm(), other.norm(), rtol=1e-9, atol=0.0)
            assert torch.allclose(step, other, rtol=1e-9) == (count < 4 or p.numel() == 1), name


def test_distributed_shampoo_is_adam_with_diagonals_alone() -> None:
    """A vector with a diagonal H is preconditioned by the root of its averaged squares, as Adam's is."""
    p, q = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    optimizer = DistributedShampoo([p], lr=LR, weight_decay=DECAY, update_every=1, max_size=1)
    reference = torch.optim.AdamW([q], lr=LR, weight_decay=DECAY)
    for seed in range(6):
        p.grad = torch.randn(5, generator=torch.Generator().manual_seed(seed))
        q.grad = p.grad.clone()
        optimizer.step(), reference.step()
    torch.testing.assert_close(p, q)


def test_kron_survives_a_pause_of_gradients() -> None:
    """Fitted to zeros, the factors would grow by a tenth per update and overflow at the next gradient."""
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = Kron([p], min_update_rate=1.0)
    for gradient in (torch.zeros(2, 2), torch.eye(2)):
        for _ in range(600):
            p.grad = gradient
            optimizer.step()
    assert p.isfinite().all()


def test_kron_updates_parameters_in_bfloat16() -> None:
    p = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    Kron([p], lr=0.1).step()
    assert (p < 1).all()


def test_ademamix_without_fast_momentum() -> None:
    """A schedule may cycle betas[0] down to 0. Then the half-life of the slow average grows from 0: beta3^(1 / x)."""
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    optimizer = AdEMAMix([p], betas=(0.0, 0.999, 0.9), warmup=4)
    optimizer.step()
    assert float(optimizer.state[p]["exp_avg_slow"]) == pytest.approx(1 - 0.9**4)


def test_kron_balances_the_factors_of_matrices_every_hundred_updates() -> None:
    p = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    optimizer = Kron([p], precond_lr=1e-9)
    p.grad = torch.zeros_like(p)

    def largest() -> list[float]:
        return [float(optimizer.state[p][f"factor{mode}"].abs().max()) for mode in range(2)]

    optimizer.step()
    optimizer.state[p]["factor0"].mul_(16.0)
    for _ in range(98):
        optimizer.step()
    assert largest() == pytest.approx([16.0, 1.0], rel=1e-3)
    optimizer.step()
    assert largest() == pytest.approx([4.0, 4.0], rel=1e-3)


def test_kron_updates_the_preconditioner_less_often_later() -> None:
    """The counts are those of kron_torch's `precond_update_prob_schedule`, at its commit 884427c."""
    optimizer, counts = Kron([nn.Parameter(torch.zeros(2, 2))]), {}
    for t in range(1, 5001):
        optimizer.step()
        counts[t] = optimizer.param_groups[0]["updated"]
    assert [counts[t] for t in (500, 1000, 2000, 4000, 5000)] == [500, 750, 1076, 1258, 1287]


def test_scion_moves_each_tensor_by_the_norm_of_its_ball() -> None:
    """Spectral norm for matrices and kernels, RMS for vectors, sign for `rest`; the ball for constrained steps."""
    params = parameters()
    rest = nn.Parameter(torch.tensor(START["matrix"]))
    groups: list[dict[str, Any]] = [{"params": list(params.values())}, {"params": [rest], "use_muon": False}]
    exact: dict[str, Any] = {"ns_coefficients": (1.875, -1.25, 0.375), "ns_steps": 30}  # which converge to U V^T
    optimizer = Scion(groups, lr=LR, radius=2.0, rest_radius=6.0, **exact)
    momenta = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    weights, last = dict(START), START["matrix"]
    for gradient in GRADS:
        set_gradients(params, gradient)
        rest.grad = torch.tensor(gradient["matrix"])
        optimizer.step()
        for name, m in momenta.items():
            m += 0.1 * (gradient[name] - m)
            if name == "vector":
                direction = m / rms(m)
            else:
                u, _, vt = np.linalg.svd(m.reshape(len(m), -1), full_matrices=False)
                direction = (u @ vt).reshape(m.shape) * math.sqrt(m.shape[0] / m.shape[1]) / math.prod(m.shape[2:])
            weights[name] = (1 - LR) * weights[name] - LR * 2 * direction
        last = (1 - LR) * last - LR * 6 * np.sign(momenta["matrix"]) / 3
    for name, p in params.items():
        np.testing.assert_allclose(p.detach().numpy(), weights[name], rtol=0, atol=0.05 if p.ndim > 1 else 1e-6)
    np.testing.assert_allclose(rest.detach().numpy(), last, rtol=1e-12)


def test_dmuon_is_adamw_with_decay_for_vectors_and_matches_its_rms(choose: Callable[..., Any]) -> None:
    params, others = parameters(), parameters()
    reference = torch.optim.AdamW([others["vector"]], lr=LR, betas=(0.9, 0.95), weight_decay=DECAY)
    optimizer = choose("dmuon", params.values(), f"lr={LR}", f"weight_decay={DECAY}")
    path(optimizer, params)
    path(reference, others)
    assert torch.equal(params["vector"], others["vector"])
    before = params["matrix"].detach().clone()
    optimizer.step()
    moved = (params["matrix"] - (1 - LR * DECAY) * before).detach().square().mean().sqrt()
    assert float(moved) == pytest.approx(LR * 0.2, rel=0.3)  # singular values near 1, in bfloat16


def test_cautious_muon_never_moves_against_the_gradient() -> None:
    """Holds for matrices, and for other parameters, whose update equals that of cautious AdamW."""
    params, others = parameters(), parameters()
    optimizer = Muon(params.values(), lr=LR, rest_lr=LR, weight_decay=0.0, cautious=True)
    reference = adamw([others["vector"]], lr=LR, weight_decay=0.0, cautious=True)
    for gradient in GRADS:
        before = {name: p.detach().clone() for name, p in params.items()}
        set_gradients(params, gradient)
        others["vector"].grad = torch.tensor(gradient["vector"])
        optimizer.step()
        reference.step()
        for name, p in params.items():
            assert ((before[name] - p) * torch.tensor(gradient[name]) >= 0).all()
    assert torch.equal(params["vector"], others["vector"])
    with pytest.raises(UserError, match=r"optimizer\.cautious=true"):
        Muon(params.values(), cautious=True, rest="sgd")


def test_soap_does_not_rotate_large_dimensions() -> None:
    """With no dimension left to rotate it is AdamW from the second gradient on."""
    params, others = parameters(), parameters()
    optimizer = SOAP(params.values(), lr=LR, weight_decay=DECAY, max_size=1)
    reference = torch.optim.AdamW(others.values(), lr=LR, weight_decay=DECAY, betas=(0.95, 0.95))
    path(optimizer, params)
    for gradient in GRADS[1:]:
        set_gradients(others, gradient)
        reference.step()
    torch.testing.assert_close(dict(params), dict(others), rtol=1e-12, atol=1e-14)


def test_eigenvectors_of_an_embedding_with_few_used_tokens() -> None:
    """Of 256 tokens, 60 have gradients, of scales over four decades: LAPACK fails on most such matrices in float32."""
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        gradient, used = torch.zeros(256, 96), torch.randperm(256, generator=generator)[:60]
        gradient[used] = torch.randn(60, 96, generator=generator) * 10 ** (-4 * torch.rand(60, 1, generator=generator))
        matrix = gradient @ gradient.T
        values, vectors = eigenvectors(matrix)
        torch.testing.assert_close((vectors * values) @ vectors.T, matrix, rtol=0.0, atol=1e-5 * float(values[-1]))


@pytest.mark.parametrize("make", [Shampoo, partial(DistributedShampoo, update_every=1), SOAP])
def test_gradients_whose_products_overflow_give_nan(make: Callable[..., torch.optim.Optimizer]) -> None:
    """The check of the weights reports them; the eigenvalue solver would end the run with an error of its own."""
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = make([p])
    for scale in (1e25, 1.0):
        p.grad = torch.arange(6.0).view(3, 2) * scale
        optimizer.step()
    assert not p.isfinite().any()
