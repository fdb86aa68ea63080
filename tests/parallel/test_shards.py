"""Tensors that are cut over two processes against whole ones."""

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlopt.config.schema import Component
from dlopt.errors import UserError
from dlopt.optim import LBFGS
from dlopt.parallel.fsdp import FullySharded
from dlopt.parallel.mode import Mode
from dlopt.parallel.process_group import Group
from dlopt.parallel.rendezvous import current
from dlopt.parallel.shards import full_state, load_model, load_optimizer, local, total_norm
from dlopt.training.averaging import ExponentialAverage
from dlopt.training.clipping import Adaptive, ByNorm, ByValue, gradient_norm
from dlopt.training.optimizer import check_optimizer
from dlopt.training.stopping import Tolerance
from tests.parallel.ranks import ROOT, run_ranks
from tests.training.runs import experiment

CHOICES = sorted(path.stem for path in (ROOT / "conf/optimizer").glob("[!_]*.yaml"))
WHOLE_TENSORS = {"lamb", "lars", "muon"}
WHOLE_MODEL = {"bfgs", "dfp", "lbfgs", "newton", "newton_cg", "sam"}


def net() -> nn.Sequential:
    """With rows that two processes cannot share equally, and one that only one of them has."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 1)
    ).double()


def build_optimizer(choice: str, model: nn.Module) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = component_of(choice).build(params=model.parameters())
    return optimizer


@cache
def component_of(choice: str) -> Component:
    return experiment(f"optimizer={choice}").optimizer


def cut(model: nn.Module) -> nn.Module:
    """A copy whose parameters are cut along their first or second dimension, or not at all."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    model = copy.deepcopy(model)
    kinds = {"3.weight": Shard(1), "3.bias": Replicate()}
    for name, parameter in list(model.named_parameters()):
        parent, _, last = name.rpartition(".")
        placed = distribute_tensor(parameter.detach(), mesh, [kinds.get(name, Shard(0))])
        setattr(model.get_submodule(parent), last, nn.Parameter(placed))
    return model


def set_gradients(one: nn.Module, other: nn.Module, step: int) -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    draws = torch.Generator().manual_seed(step)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        a.grad = torch.randn(a.shape, generator=draws, dtype=a.dtype)
        assert isinstance(b, DTensor)
        b.grad = distribute_tensor(a.grad.clone(), b.device_mesh, b.placements)


def assert_alike(one: nn.Module, other: nn.Module, what: str) -> None:
    found = full_state(dict(other.state_dict()))
    for name, value in one.state_dict().items():
        assert torch.allclose(found[name], value, rtol=1e-12, atol=1e-14), (what, name)


def in_each_rank() -> None:
    world = current()
    assert world is not None
    placed(Group(world, torch.device("cpu"), minutes=1.0))
    for choice in CHOICES:
        if choice not in WHOLE_TENSORS | WHOLE_MODEL:
            updated(choice)
    clipped()
    averaged()
    tolerated()


def placed(group: Group) -> None:
    """Each process has its part of fsdp's weights from the start, and together they have those of the one model."""
    mode = FullySharded(
        group, torch.device("cpu"), accumulate=1, sync_batchnorm=True, shards=2, unit_parameters=1,
        reshard_after_forward=True, sync_every_micro_batch=False, cpu_offload=False, low_precision=False,
    )  # fmt: skip
    one, other = net(), net()
    call = mode.place(other, (1, 3, 3))
    assert_alike(one, other, "placed")
    held, total = (sum(kind(p).numel() for p in other.parameters()) for kind in (local, lambda p: p))
    assert total == sum(p.numel() for p in one.parameters()) and held < 0.7 * total
    inputs = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(call(inputs), one(inputs), rtol=1e-12, atol=1e-13)


def updated(choice: str) -> None:
    """Two updates, a checkpoint into fresh objects, two more."""
    one = net()
    other = cut(one)
    optimizers = build_optimizer(choice, one), build_optimizer(choice, other)
    for step in range(4):
        if step == 2:
            kept, weights = full_state(optimizers[1].state_dict()), full_state(dict(other.state_dict()))
            assert_alike_states(kept, optimizers[0].state_dict())
            optimizers = optimizers[0], build_optimizer(choice, other)
            load_optimizer(optimizers[1], kept)
            load_model(other, weights)
        set_gradients(one, other, step)
        for optimizer in optimizers:
            optimizer.step()
    assert_alike(one, other, choice)


def assert_alike_states(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found["param_groups"] == expected["param_groups"]
    assert list(found["state"]) == list(expected["state"])
    for number, values in expected["state"].items():
        assert list(found["state"][number]) == list(values)
        for name, value in values.items():
            torch.testing.assert_close(found["state"][number][name], value, rtol=1e-12, atol=1e-14)


def clipped() -> None:
    for clip in (ByNorm(max_norm=0.7), ByValue(max_value=0.3), Adaptive(net(), clipping=0.05, eps=1e-3)):
        one = net()
        other = cut(one)
        set_gradients(one, other, 0)
        before = gradient_norm(list(one.parameters()))
        found = gradient_norm(list(other.parameters()), total_norm)
        assert type(found) is Tensor
        torch.testing.assert_close(found, before, rtol=1e-13, atol=0)
        clip(list(one.parameters()))
        clip(list(other.parameters()), total_norm)
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert a.grad is not None and b.grad is not None
            torch.testing.assert_close(full_state(b.grad), a.grad, rtol=1e-12, atol=0)
        assert not torch.equal(gradient_norm(list(one.parameters())), before)


def averaged() -> None:
    one = net()
    other = cut(one)
    averages = ExponentialAverage(one, 0.8), ExponentialAverage(other, 0.8)
    for model, average in zip((one, other), averages, strict=True):
        with torch.no_grad():
            for parameter in model.parameters():
                local(parameter).mul_(1.5)
        average.update()
    assert_alike(one, other, "weights")
    with averages[0].swapped_in(), averages[1].in_place():
        assert_alike(one, other, "average")
        assert_alike(net_times(1.1), one, "average")


def net_times(factor: float) -> nn.Module:
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def tolerated() -> None:
    """A move that is small on each rank, and large enough for both together."""
    model = cut(net())
    rule = Tolerance(model, total_norm, tolerance=0.1, iterations=0)
    with torch.no_grad():
        own = local(next(model.parameters()))
        own.reshape(-1)[0] += 0.08
    rule.after_update()
    assert not rule.should_stop
    rule.after_update()
    assert rule.should_stop


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    run_ranks("tests.parallel.test_shards:in_each_rank", 2, tmp_path)


class Layers(Mode):
    sharding = "layers"


class Tensors(Mode):
    sharding = "tensors"


@pytest.mark.parametrize("choice", CHOICES)
def test_optimizers_that_need_more_than_a_part_are_refused(choice: str) -> None:
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(choice, model)
    cpu = torch.device("cpu")
    modes = (Tensors(cpu, "fsdp"), WHOLE_TENSORS | WHOLE_MODEL), (Layers(cpu, "pipeline"), WHOLE_MODEL)
    for mode, refused in modes:
        if choice not in refused:
            check_optimizer(mode, optimizer)
            continue
        with pytest.raises(UserError, match=rf"^parallel={mode.name}: \w+ (needs|looks) [^\n]+; use parallel=ddp"):
            check_optimizer(mode, optimizer)


def test_torchs_own_are_known() -> None:
    parameter = nn.Parameter(torch.zeros(2, 2))
    for optimizer in (torch.optim.LBFGS([parameter]), torch.optim.Adafactor([parameter]), LBFGS([parameter], lr=1.0)):
        with pytest.raises(UserError, match="parallel=fsdp"):
            check_optimizer(Tensors(torch.device("cpu"), "fsdp"), optimizer)
