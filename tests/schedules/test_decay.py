"""Weight decay over a run: each schedule, plain and cautious, against closed forms in float64."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hydra.utils import get_method
from torch import Tensor

from dlopt.optim import SAM, SGDW, Lion, Muon, adamw
from dlopt.optim.cautious_decay import make_decay_cautious
from dlopt.optim.muon import orthogonalize
from dlopt.schedules import Horizon, Scheduler
from dlopt.schedules.decay import DecaySettings, WeightDecay
from tests.support.choices import names, values
from tests.support.schedules import make

STEPS, LR, DECAY = 12, 0.02, 0.3
RATE = make("cosine_warmup", STEPS, 4, final=0.1)  # with a warmup
# Of update t: the decay per weight and weight_decay, with the peak rate of its group.
PER_UPDATE: dict[str, Callable[[int, float], float]] = {
    "constant": lambda t, lr: lr * RATE(t),
    "independent": lambda t, lr: RATE(t),
    "linear": lambda t, lr: lr * RATE(t) * (1 - t / STEPS),
    "cosine": lambda t, lr: lr * RATE(t) * (1 + math.cos(math.pi * t / STEPS)) / 2,
    "corrected": lambda t, lr: lr * RATE(t) ** 2,
}
Updates = Iterator[Tensor]


def decay_of(name: str, **typed: float) -> WeightDecay | None:
    keys = {key: value for key, value in values("decay", name).items() if key not in DecaySettings.__dataclass_fields__}
    decay: WeightDecay | None = get_method(keys.pop("_target_"))(**{**keys, **typed}, horizon=Horizon(0, STEPS, 4))
    return decay


def gradients(p: Tensor) -> list[Tensor]:
    draw = torch.Generator().manual_seed(p.numel())
    return [torch.randn(p.shape, generator=draw, dtype=p.dtype) for _ in range(STEPS)]


def adam_updates(grads: list[Tensor]) -> Updates:
    m = v = torch.zeros_like(grads[0])
    for t, g in enumerate(grads, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        yield m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


def lion_updates(grads: list[Tensor]) -> Updates:
    m = torch.zeros_like(grads[0])
    for g in grads:
        yield (0.9 * m + 0.1 * g).sign()
        m = 0.99 * m + 0.01 * g


def sgdw_updates(grads: list[Tensor]) -> Updates:
    m = torch.zeros_like(grads[0])
    for g in grads:
        m = 0.9 * m + 0.1 * g
        yield m


def muon_updates(grads: list[Tensor]) -> Updates:
    if grads[0].ndim < 2:
        yield from adam_updates(grads)
        return
    m = torch.zeros_like(grads[0])
    for g in grads:
        m = 0.95 * m + 0.05 * g
        move = orthogonalize((0.05 * g + 0.95 * m)[None], (3.4445, -4.775, 2.0315), 5, 1e-7)[0].double()
        yield move * math.sqrt(max(1.0, len(g) / g.shape[1]))


METHODS: dict[str, tuple[Callable[..., torch.optim.Optimizer], Callable[[list[Tensor]], Updates]]] = {
    "adamw": (adamw, adam_updates),
    "lion": (Lion, lion_updates),
    "sgdw": (SGDW, sgdw_updates),
    "muon": (partial(Muon, rest_lr=LR / 4), muon_updates),
}


def weights() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (3, 4), (5,)]
    return [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("choice", names("decay"))
@pytest.mark.parametrize("method", METHODS)
def test_updates_are_those_of_the_formula(method: str, choice: str, cautious: bool) -> None:
    """theta <- theta - lr_t u - d_t [u theta >= 0] theta (Chen et al. 2025, algorithm 1), d_t as in the table.

    Every second weight is in a group that no normalization layer follows: AdamC leaves it alone.
    """
    (build, updates_of), params = METHODS[method], weights()
    groups = [{"params": params[::2], "normalized": True}, {"params": params[1::2]}]
    optimizer = build(groups, lr=LR, weight_decay=DECAY)
    if cautious:
        make_decay_cautious(optimizer)
    schedule = Scheduler(optimizer, RATE, decay=decay_of(choice))
    expected = []
    for number, p in enumerate(params):
        theta, lr = p.detach().clone(), LR / 4 if method == "muon" and p.ndim < 2 else LR
        per_update = PER_UPDATE["constant" if choice == "corrected" and number == 1 else choice]
        for t, u in enumerate(updates_of(gradients(p))):
            mask = (u * theta >= 0).double() if cautious else 1.0
            theta = theta - lr * RATE(t) * u - DECAY * per_update(t, lr) * mask * theta
        expected.append(theta)
    for t in range(STEPS):
        for p in params:
            p.grad = gradients(p)[t]
        optimizer.step()
        schedule.step()
    for p, theta in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), theta, rtol=1e-11, atol=1e-13)


def test_the_end_of_a_run() -> None:
    for choice in ("linear", "cosine"):
        decay = decay_of(choice, final=0.25)
        assert decay is not None
        ends = [decay.factor(t, 0.5, LR) for t in (0, STEPS // 2, STEPS, 2 * STEPS)]
        assert ends == pytest.approx([1.0, 0.625, 0.25, 0.25], rel=1e-15)
    decay = decay_of("independent")
    assert decay is not None and not decay.varies
    assert decay.factor(3, 0.5, 0.0) == 0.0  # optimizer.groups=[{match: ..., lr: 0}]


def test_the_default_leaves_the_groups_alone_and_horizons_shorten_a_decay() -> None:
    assert decay_of("constant") is None
    parts: list[Any] = []
    for decay in (None, decay_of("linear")):
        params = weights()
        groups = [{"params": params[:1]}, {"params": params[1:], "horizon": 0.5, "weight_decay": 0.1}]
        optimizer = SGDW(groups, lr=LR, weight_decay=DECAY)
        schedule = Scheduler(optimizer, RATE, decay=decay)
        for _ in range(3):
            schedule.step()
        parts.append([group["weight_decay"] for group in optimizer.param_groups])
    assert parts == [[DECAY, 0.1], pytest.approx([DECAY * 3 / 4, 0.1 / 2])]


@pytest.mark.parametrize("name", ["independent", "linear", "cosine", "corrected"])
def test_the_shown_decay_is_that_of_the_group_of_the_shown_rate(name: str) -> None:
    params = weights()
    groups = [{"params": params[:1], "weight_decay": 0.0}, {"params": params[1:], "normalized": True, "lr": 2 * LR}]
    optimizer = SGDW(groups, lr=LR, weight_decay=DECAY)
    schedule = Scheduler(optimizer, RATE, decay=decay_of(name))
    for t in range(STEPS):
        assert schedule.weight_decay(t) == optimizer.param_groups[1]["weight_decay"], "group 0 decays nothing"
        schedule.step()
    for other, decay in (([DECAY, DECAY], decay_of("constant")), ([0.0, 0.0], decay_of(name))):
        optimizer = SGDW([{"params": [p], "weight_decay": d} for p, d in zip(params, other, strict=False)], lr=LR)
        assert Scheduler(optimizer, RATE, decay=decay).weight_decay(0) is None


def test_resumes_keep_the_base() -> None:
    """A restored optimizer has the decay of its last update, from which the schedule must not start again."""
    states: list[dict[str, Any]] = []
    for restored in (False, True):
        optimizer = SGDW(weights(), lr=LR, weight_decay=DECAY)
        schedule = Scheduler(optimizer, RATE, decay=decay_of("linear"))
        if restored:
            optimizer.load_state_dict(states[0])
            schedule.load_state_dict(states[1])
        else:
            for _ in range(4):
                schedule.step()
            states += [optimizer.state_dict(), schedule.state_dict()]
        schedule.step()
        assert optimizer.param_groups[0]["weight_decay"] == DECAY * (1 - 5 / STEPS)


def test_cautious_decay_of_sam_and_of_parameters_without_gradient() -> None:
    """SAM's update is measured from the weights, not from the point with the perturbation."""
    ends = []
    for cautious in (False, True):
        params = weights()
        base = SGDW(params, lr=LR, momentum=0.0, weight_decay=DECAY if cautious else 0.0)
        optimizer = SAM(base=base)
        assert optimizer.traits.decoupled_decay
        if cautious:
            make_decay_cautious(optimizer)

        def closure(params: list[Tensor] = params) -> Tensor:
            for p in params[:2]:
                p.grad = p.detach() ** 3 + 0.1
            return torch.tensor(0.0)

        optimizer.step(closure)
        ends.append(params)
    for start, plain, cautious_one in zip(weights(), *ends, strict=True):
        mask = ((start - plain) * start >= 0).double() if plain.grad is not None else 0.0
        torch.testing.assert_close(cautious_one, plain - LR * DECAY * mask * start, rtol=1e-12, atol=0)


def test_cautious_decay_runs_hooks_once_and_leaves_a_skipped_update_alone() -> None:
    params, seen = weights(), []
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=DECAY)
    make_decay_cautious(optimizer)
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    for p in params:
        p.grad = torch.ones_like(p)
    assert optimizer.step(lambda: 2.5) == 2.5
    assert seen == ["pre", "post"]
    assert optimizer.param_groups[0]["weight_decay"] == DECAY

    before = [p.detach().clone() for p in params]
    for group in optimizer.param_groups:
        group["fused"] = True
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(params, before, strict=True))
