"""Steps on spheres against the formula of Wen et al. 2026, with the updates of the optimizer without them."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.optim import SOAP, Muon, adamw
from dlopt.optim.orthogonalize import QUINTIC, orthogonalize
from dlopt.optim.parameters import Grouping, Rule, parameter_groups
from dlopt.optim.traits import optimizer_traits
from tests.support.updates import GRADS, parameters, set_gradients

LR = 0.02
Make = Callable[..., torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": partial(adamw, weight_decay=0.0),
    "adamw, amsgrad": partial(adamw, weight_decay=0.0, amsgrad=True),
    "muon": partial(Muon, weight_decay=0.0, rest_lr=None),
    "muon, rows": partial(Muon, weight_decay=0.0, rest_lr=None, row_beta=0.9, adjust_lr_fn="match_rms_adamw"),
    "soap": partial(SOAP, weight_decay=0.0, update_every=3),
    "soap, orthogonalized": partial(SOAP, weight_decay=0.0, update_every=3, orthogonalize=True),
}
ALL = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def step(optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter], gradient: Any) -> None:
    set_gradients(params, gradient)
    optimizer.step()


@ALL
def test_each_update_is_the_formula_of_the_paper(make: Make) -> None:
    """W <- R N(W - lr R N(u)); u is how the optimizer without spheres moves, whose updates depend on gradients only."""
    params, plain = parameters(), parameters()
    ours, others = make(params.values(), lr=LR, hyperball=True), make(plain.values(), lr=LR)
    weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in params.items()}
    radii = {name: w.norm() for name, w in weights.items()}
    for gradient in GRADS:
        before = {name: p.detach().clone() for name, p in plain.items()}
        step(ours, params, gradient)
        step(others, plain, gradient)
        for name in ("kernel", "matrix"):
            u, r = before[name] - plain[name].detach(), radii[name]
            if u.any():  # SOAP's first gradient moves nothing
                moved = weights[name] - LR * r * u / u.norm()
                weights[name] = r * moved / moved.norm()
            torch.testing.assert_close(params[name].detach(), weights[name], rtol=1e-8, atol=1e-9)
            torch.testing.assert_close(params[name].detach().norm(), r, rtol=1e-14, atol=0.0)
        torch.testing.assert_close(params["vector"].detach(), plain["vector"].detach(), rtol=1e-12, atol=1e-14)


@ALL
def test_matrices_of_other_methods_move_freely(make: Make) -> None:
    """`rest: true` of optimizer.groups, which sets use_muon."""
    params, plain = parameters(), parameters()
    optimizers = []
    for each, keys in ((params, {"hyperball": True}), (plain, {})):
        groups = [
            {"params": [each["kernel"], each["vector"]]},
            {"params": [each["matrix"]], "use_muon": False, "weight_decay": 0.3},
        ]
        optimizers.append(make(groups, lr=LR, **keys))
    for gradient in GRADS[:3]:
        for each, optimizer in zip((params, plain), optimizers, strict=True):
            step(optimizer, each, gradient)
    torch.testing.assert_close(params["matrix"], plain["matrix"], rtol=1e-12, atol=1e-14)
    assert not torch.equal(params["kernel"], plain["kernel"])


@ALL
def test_the_radius_is_part_of_the_state(make: Make) -> None:
    whole, first, second = parameters(), parameters(), parameters()
    optimizer, resumed = (make(each.values(), lr=LR, hyperball=True) for each in (first, second))
    reference = make(whole.values(), lr=LR, hyperball=True)
    for gradient in GRADS[:6]:
        step(reference, whole, gradient)
    for gradient in GRADS[:3]:
        step(optimizer, first, gradient)
    with torch.no_grad():
        for name, p in second.items():
            p.copy_(first[name])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for gradient in GRADS[3:6]:
        step(resumed, second, gradient)
    assert all(torch.equal(whole[name], second[name]) for name in whole)
    assert all("radius" in resumed.state[p] for p in second.values() if p.ndim > 1)


def test_soap_orthogonalizes_its_updates_to_an_rms_of_one() -> None:
    """As the authors' olmo_optimizer: ten iterations, then division by the RMS; vectors are as without."""
    params, plain = parameters(), parameters()
    ours = SOAP(params.values(), lr=LR, weight_decay=0.0, update_every=3, orthogonalize=True)
    others = SOAP(plain.values(), lr=LR, weight_decay=0.0, update_every=3)
    for number, gradient in enumerate(GRADS):
        before = [{name: p.detach().clone() for name, p in each.items()} for each in (params, plain)]
        step(ours, params, gradient)
        step(others, plain, gradient)
        for name in ("kernel", "matrix"):
            moved, update = (
                (start[name] - each[name].detach()).flatten(1)
                for start, each in zip(before, (params, plain), strict=True)
            )
            if number == 0:  # only initializes the eigenbasis
                assert not moved.any()
                continue
            u = orthogonalize(update.unsqueeze(0) * (1 - 0.95**number) / LR, QUINTIC, 10, 1e-7)[0].double()
            torch.testing.assert_close(moved, LR * u / u.square().mean().sqrt(), rtol=1e-9, atol=1e-12)
            values = torch.linalg.svdvals(moved)
            assert float(values.max() / values.min()) < 2  # of the update itself, up to 100
    assert torch.equal(params["vector"], plain["vector"])


def test_refusals_name_the_key() -> None:
    matrix, vector = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.zeros(3))
    makes: list[Make] = [adamw, Muon, SOAP]
    for make in makes:
        with pytest.raises(UserError, match=r"^optimizer.weight_decay=0.01: optimizer.hyperball=true fixes the norm"):
            make([matrix], hyperball=True)
        with pytest.raises(UserError, match=r"matrix of shape \[2, 2\] is initialized to zero"):
            make([nn.Parameter(torch.zeros(2, 2))], weight_decay=0.0, hyperball=True)
        groups: list[dict[str, Any]] = [{"params": [matrix], "weight_decay": 0.0}, {"params": [vector]}]
        make(groups, hyperball=True)
        optimizer = make([matrix, vector], weight_decay=0.0, hyperball=True)
        with pytest.raises(UserError, match=r"weight_decay=0\.1"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "weight_decay": 0.1})
    for key in ("cautious", "normalize_weights"):
        keys: dict[str, Any] = {key: True}
        with pytest.raises(UserError, match=f"undoes optimizer.{key}=true"):
            Muon([matrix], weight_decay=0.0, hyperball=True, **keys)
    with pytest.raises(UserError, match=r"undoes optimizer.cautious=true"):
        adamw([matrix], weight_decay=0.0, hyperball=True, cautious=True)


@pytest.mark.parametrize("make", [adamw, Muon, SOAP])
def test_traits_with_a_fixed_norm(make: Make) -> None:
    """muP's rates, and freezing at a learning rate of zero, do not apply; shards of tensors do not suffice."""
    traits = optimizer_traits(make([nn.Parameter(torch.ones(2, 2))], weight_decay=0.0, hyperball=True))
    assert (traits.scope, traits.normalizes_entries, traits.rests_at_zero_lr) == ("tensor", False, False)
    assert optimizer_traits(make([nn.Parameter(torch.ones(2, 2))])).rests_at_zero_lr


def test_rules_say_which_matrices_move_freely() -> None:
    model, grouping = (
        nn.Linear(3, 2),
        Grouping(groups=[Rule(match="weight", rest=True)], layer_decay=None),
    )
    keys: dict[str, Any] = {"lr": LR, "weight_decay": 0.0, "hyperball": True}
    groups = parameter_groups(model, grouping, keys, decay_norm_and_bias=True)
    assert [group.get("use_muon", True) for group in groups] == [False, True]
    with pytest.raises(UserError, match=r"optimizer.groups.0.rest=true: this optimizer has a single method"):
        parameter_groups(model, grouping, keys | {"hyperball": False}, decay_norm_and_bias=True)
