"""The paths of all optimizers on a small net, and of the line search on functions of one variable, as recorded.

The update of an optimizer is part of what runs are compared with: a change must be intended.

    REGENERATE_GOLDEN=1 python -m pytest tests/optim/test_recorded.py

writes tests/optim/recorded.json; say in the commit which numbers moved and why.
"""

import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlopt import optim
from dlopt.basics.random import generator
from dlopt.losses import sampled_cross_entropy
from dlopt.optim import LossClosure
from dlopt.optim.bfgs import LinePoint, strong_wolfe
from dlopt.optim.newton import UndampedNewton

FILE = Path(__file__).with_name("recorded.json")
DECAY: dict[str, Any] = {"lr": 0.03, "weight_decay": 0.2}
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "cautious adamw": (optim.CautiousAdamW, DECAY | {"betas": (0.8, 0.9)}),
    "cautious amsgrad": (optim.adamw, DECAY | {"cautious": True, "amsgrad": True, "betas": (0.8, 0.6)}),
    "adabelief": (optim.AdaBelief, DECAY | {"betas": (0.8, 0.9), "eps": 0.01}),
    "lamb": (optim.LAMB, DECAY | {"max_weight_norm": 0.5}),
    "lamb without limits": (optim.LAMB, DECAY | {"max_weight_norm": None, "bias_correction": False}),
    "nadam": (optim.NAdam, DECAY | {"momentum_decay": 0.1}),
    "adan": (optim.Adan, DECAY | {"betas": (0.7, 0.8, 0.9)}),
    "ademamix": (optim.AdEMAMix, DECAY | {"betas": (0.7, 0.8, 0.9), "warmup": 4}),
    "ademamix without warmup": (optim.AdEMAMix, DECAY | {"alpha": 2.0}),
    "adopt": (optim.ADOPT, DECAY | {"betas": (0.7, 0.8)}),
    "mars": (optim.MARS, DECAY | {"gamma": 3.0, "betas": (0.7, 0.8)}),
    "adafactor": (optim.Adafactor, DECAY),
    "sgdw": (optim.SGDW, DECAY | {"lr": 0.5}),
    "sgdw without momentum": (optim.SGDW, DECAY | {"lr": 0.5, "momentum": 0.0}),
    "lars": (optim.LARS, DECAY | {"lr": 2.0, "trust_coefficient": 0.05}),
    "lars, decoupled, all": (
        optim.LARS,
        DECAY | {"lr": 1.0, "trust_coefficient": 0.1, "decoupled_weight_decay": True, "adapt_vectors": True},
    ),
    "lars, decoupled": (optim.LARS, DECAY | {"lr": 1.0, "decoupled_weight_decay": True}),
    "lion": (optim.Lion, DECAY),
    "cautious lion": (optim.Lion, DECAY | {"cautious": True, "betas": (0.5, 0.7)}),
    "signum": (optim.Signum, DECAY | {"momentum": 0.5}),
    "rprop": (optim.Rprop, {"lr": 0.05, "etas": (0.3, 1.5), "step_sizes": (0.02, 0.1)}),
    "shampoo": (optim.Shampoo, DECAY | {"lr": 0.2, "update_every": 2, "max_size": 3}),
    "distributed shampoo": (optim.DistributedShampoo, DECAY | {"update_every": 2, "max_size": 3}),
    "soap": (optim.SOAP, DECAY | {"update_every": 2, "max_size": 3, "shampoo_beta": 0.7}),
    "kron": (optim.Kron, DECAY | {"lr": 0.1, "max_size": 3, "seed": 2, "precond_lr": 0.3, "min_update_rate": 0.5}),
    "prodigy": (optim.Prodigy, DECAY | {"lr": 0.5, "d0": 0.01, "d_coef": 2.0}),
    "prodigy, safeguard": (optim.Prodigy, DECAY | {"lr": 0.5, "d0": 0.01, "safeguard_warmup": True}),
    "sophia": (optim.Sophia, DECAY | {"update_every": 2, "seed": 3, "gamma": 0.5}),
    "sophia, gnb": (optim.Sophia, DECAY | {"update_every": 2, "seed": 3, "gamma": 0.5, "hessian": "gnb"}),
    "bfgs": (optim.BFGS, {}),
    "bfgs, long first step, few evaluations": (optim.BFGS, {"lr": 200.0, "max_evaluations": 3}),
    "dfp, exact": (optim.BFGS, {"lr": 0.01, "xi": 0.0, "c2": 1e-3}),
    "broyden": (optim.BFGS, {"lr": 20.0, "xi": 0.3, "c1": 0.2, "c2": 0.3}),
    "lbfgs": (optim.LBFGS, {"max_iter": 3, "history_size": 2}),
    "newton": (optim.Newton, {"damping": 0.01}),
    "newton, long steps": (optim.Newton, {"lr": 8.0, "damping": 0.0, "c1": 0.3}),
    "newton_cg": (optim.NewtonCG, {"tolerance": 0.1}),
    "newton_cg, few iterations": (optim.NewtonCG, {"max_iterations": 2, "lr": 4.0, "c1": 0.3, "damping": 0.1}),
    "undamped newton": (UndampedNewton, {"lr": 0.1}),
}
# In bfloat16, whose products are not the same on all processors
COARSE: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "muon": (optim.Muon, DECAY | {"rest_lr": 0.01}),
    "muon, normalized": (optim.Muon, DECAY | {"normalize_weights": True, "nesterov": False, "rest_lr": None}),
    "muon, cautious": (optim.Muon, DECAY | {"cautious": True, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 3}),
    "muon, sgd": (optim.Muon, DECAY | {"rest": "sgd", "momentum": 0.5, "rest_momentum": 0.7}),
    "scion": (optim.Scion, {"lr": 0.01, "radius": 2.0}),
    "scion, unconstrained": (optim.Scion, {"lr": 0.01, "radius": 2.0, "constrained": False, "momentum": 0.5}),
}


def check(name: str, found: Any, **tolerance: float) -> None:
    """Compares with the file, or writes it."""
    if os.environ.get("REGENERATE_GOLDEN"):
        known = json.loads(FILE.read_text()) if FILE.exists() else {}
        entries = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted((known | {name: found}).items())]
        FILE.write_text("{\n" + ",\n".join(entries) + "\n}\n")
    recorded = json.loads(FILE.read_text())
    message = f"{name!r} is not in {FILE.name}: run REGENERATE_GOLDEN=1 python -m pytest tests/optim/test_recorded.py"
    assert name in recorded, message
    assert found == [pytest.approx(each, **tolerance) for each in recorded[name]]


def steps(make: Callable[..., Any], keys: dict[str, Any], problem: Any, updates: int = 6) -> list[list[float]]:
    """Returns, after each update, the loss, a projection of the weights, and the number of evaluations so far.

    The weights of vectors have a group of their own, without decay if the optimizer has any.
    """
    p, evaluations = problem(), 0
    matrices, vectors = ([w for w in p.params if (w.ndim > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices}, {"params": vectors, **({"weight_decay": 0.0} if "weight_decay" in keys else {})}]
    optimizer = make(groups, **keys)
    weights = torch.linspace(-1.0, 2.0, len(p.weights()), dtype=torch.float64)

    def loss() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        found: Tensor = p.loss()
        return found

    def sampled(seed: int) -> tuple[Tensor, int]:
        noise = torch.rand(len(p.inputs), generator=generator("cpu", seed))
        return sampled_cross_entropy(p.model(p.inputs), noise), len(p.inputs)

    rows = []
    for _ in range(updates):
        optimizer.step(LossClosure(optimizer, loss, sampled))
        rows.append([float(p.loss().detach()), float(p.weights() @ weights), evaluations])
    return [[float(f"{number:.10g}") for number in row] for row in rows]


@pytest.mark.parametrize("case", CASES)
def test_path(case: str, problem: Callable[..., Any]) -> None:
    make, keys = CASES[case]
    check(case, steps(make, keys, problem), rel=1e-6)


@pytest.mark.parametrize("case", COARSE)
def test_path_of_orthogonalized_updates(case: str, problem: Callable[..., Any]) -> None:
    make, keys = COARSE[case]
    check(case, steps(make, keys, problem), rel=0.02, abs=0.002)


@pytest.mark.parametrize("adaptive", [False, True])
def test_path_of_sam(adaptive: bool, problem: Callable[..., Any]) -> None:
    def make(groups: Any, **keys: Any) -> Any:
        return optim.SAM(base=torch.optim.SGD(groups, lr=0.1, momentum=0.5), lr=0.2, rho=0.5, **keys)

    check(f"sam, adaptive={adaptive}", steps(make, {"adaptive": adaptive}, problem), rel=1e-6)


FUNCTIONS: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "quadratic": (lambda t: (t - 3) ** 2, lambda t: 2 * (t - 3)),
    "quartic": (lambda t: (t - 2) ** 4 - t, lambda t: 4 * (t - 2) ** 3 - 1),
    "flat": (lambda t: math.exp(-t) + 1e-3 * t, lambda t: 1e-3 - math.exp(-t)),
    "kink": (lambda t: abs(t - 1), lambda t: math.copysign(1, t - 1)),
    "wave": (lambda t: math.cos(t) - 0.2 * t, lambda t: -math.sin(t) - 0.2),
    "wall": (lambda t: -t if t < 4 else math.nan, lambda t: -1.0 if t < 4 else math.nan),
    "straight": (lambda t: -t, lambda t: -1.0),
    "hills": (lambda t: math.sin(5 * t) / 5 - 2 * t + t * t / 3, lambda t: math.cos(5 * t) - 2 + 2 * t / 3),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_points_of_the_line_search(name: str) -> None:
    value, slope = FUNCTIONS[name]
    found = []
    for t, c1, c2, evaluations in (
        (1.0, 1e-4, 0.9, 25), (0.01, 1e-4, 0.1, 25), (50.0, 1e-4, 1e-3, 25), (0.3, 0.3, 0.4, 4), (5.0, 1e-2, 1e-6, 60),
    ):  # fmt: skip
        points: list[float] = []

        def evaluate(at: float, points: list[float] = points) -> LinePoint:
            points.append(at)
            return LinePoint(at, value(at), slope(at), torch.zeros(1))

        start = LinePoint(0.0, value(0.0), slope(0.0), torch.zeros(1))
        end = strong_wolfe(evaluate, start, t, c1=c1, c2=c2, evaluations=evaluations)
        found.append([float(f"{number:.8g}") for number in (end.t, len(points), *points[:8])])
    check(f"line search: {name}", found, rel=1e-5)


def test_newton_with_many_parameters_and_unused_ones() -> None:
    """More rows of the Hessian than are computed at a time; a parameter that the loss does not depend on."""
    draw = torch.Generator().manual_seed(0)
    used, unused = (nn.Parameter(torch.randn(n, generator=draw, dtype=torch.float64)) for n in (70, 3))
    matrix = torch.randn(70, 70, generator=draw, dtype=torch.float64) / 8
    for make in (partial(optim.Newton, damping=1e-9), partial(optim.NewtonCG, tolerance=1e-9, damping=1e-9)):
        p, other = nn.Parameter(used.detach().clone()), nn.Parameter(unused.detach().clone())
        optimizer = make([other, p])
        for _ in range(2):
            optimizer.step(LossClosure(optimizer, lambda p=p: ((matrix @ p - 1) ** 2).sum() + (p**2).sum()))
        exact = torch.linalg.solve(matrix.T @ matrix + torch.eye(70).double(), matrix.T @ torch.ones(70).double())
        torch.testing.assert_close(p.detach(), exact, rtol=0.0, atol=1e-6)
        assert torch.equal(other, unused)


@pytest.mark.parametrize("case", CASES | COARSE)
def test_zero_gradients_move_nothing_but_the_decay(case: str) -> None:
    """Zero weights stay zero; the others decay by the same factor as those of another tensor with a gradient."""
    make, keys = (CASES | COARSE)[case]
    zeros, ones, vector = (
        nn.Parameter(torch.full(shape, value, dtype=torch.float64))
        for shape, value in (((2, 2), 0.0), ((3, 2), 1.0), ((4,), 1.0))
    )
    optimizer = make([zeros, ones, vector], **keys)
    sampled = partial(_no_loss, zeros, ones, vector)
    for _ in range(3):
        optimizer.step(LossClosure(optimizer, lambda: sampled(0)[0], sampled))
    assert not zeros.any() and ones.isfinite().all() and vector.isfinite().all(), case
    found = [float(f"{float(p.detach().mean()):.10g}") for p in (ones, vector)]
    check(f"zero gradients: {case}", [found], rel=1e-6)


def _no_loss(*parts: Any) -> tuple[Tensor, int]:
    *params, _ = parts
    return torch.stack([(p**2).sum() * 0 for p in params]).sum(), 3
