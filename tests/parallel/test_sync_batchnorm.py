"""SyncBatchNorm against torch's batch norm on the full batch in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.models.layers import GhostBatchNorm2d
from dlopt.parallel.modes.sync_batchnorm import SyncBatchNorm, synchronize
from tests.support.ranks import run_ranks

SPLITS = [[3, 5], [8, 0], [1, 1], [0, 2]]
VARIANTS: list[dict[str, Any]] = [
    {"momentum": 0.1, "affine": True},
    {"momentum": None, "affine": False},
    {"momentum": 0.3, "affine": True, "track_running_stats": False},
]


def inputs_of(count: int, dims: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed + count + dims)
    shape = (count, 4, *[3, 2][: dims - 2])
    values = [torch.randn(shape, generator=draws, dtype=torch.float64) for _ in range(2)]
    return values[0] * 3 + 100, values[1]  # a mean far from zero: a difference of squares would lose digits


def same(actual: Tensor | None, expected: Tensor | None) -> bool:
    if actual is None or expected is None:
        return actual is expected
    return torch.allclose(actual, expected, rtol=1e-11, atol=1e-11)


def compare() -> None:
    from dlopt.machine.world import current
    from dlopt.parallel.processes.process_group import ProcessGroup

    world = current()
    assert world is not None
    group = ProcessGroup(world, torch.device("cpu"), minutes=1)
    for split in SPLITS:
        for dims in (2, 4):
            for variant in VARIANTS:
                kind = nn.BatchNorm1d if dims == 2 else nn.BatchNorm2d
                full = kind(4, dtype=torch.float64, **variant)
                model = nn.Sequential(kind(4, dtype=torch.float64, **variant))
                synchronize(model, torch.device("cpu"))
                assert isinstance(model[0], SyncBatchNorm)
                if variant["affine"]:
                    for norm in (full, model[0]):
                        torch.nn.init.constant_(norm.weight, 1.5)
                        torch.nn.init.constant_(norm.bias, -0.5)
                start = sum(split[: group.rank])
                local = slice(start, start + split[group.rank])
                for seed in (0, 100):
                    inputs, weights = inputs_of(sum(split), dims, seed)
                    shard = inputs[local].clone().requires_grad_()
                    inputs.requires_grad_()
                    outputs, expected = model(shard), full(inputs)
                    assert same(outputs, expected[local]), (split, dims, variant)
                    (outputs * weights[local]).sum().backward()
                    (expected * weights).sum().backward()
                    assert inputs.grad is not None and same(shard.grad, inputs.grad[local])
                assert same(model[0].running_mean, full.running_mean)
                assert same(model[0].running_var, full.running_var)
                if variant["affine"]:
                    gradients = group.all_gather(torch.cat([model[0].weight.grad, model[0].bias.grad])).sum(0)  # type: ignore[list-item]
                    assert same(gradients, torch.cat([full.weight.grad, full.bias.grad]))  # type: ignore[list-item]
                inputs, _ = inputs_of(3, dims)
                assert same(model.eval()(inputs), full.eval()(inputs)) or not full.track_running_stats
    print("compared")


def test_matches_single_process_for_unequal_and_empty_shards(tmp_path: Path) -> None:
    outputs = run_ranks("tests.parallel.test_sync_batchnorm:compare", 2, tmp_path)
    assert all("compared" in output for output in outputs)


def test_single_process_is_plain_batch_norm_and_shares_its_state() -> None:
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(norm)
    names = list(model.state_dict())
    synchronize(model, torch.device("cpu"))
    inputs = torch.randn(3, 4, 2, 2)
    assert torch.equal(model(inputs), nn.functional.batch_norm(inputs, None, None, training=True))
    assert list(model.state_dict()) == names
    assert model[0].weight is norm.weight
    assert model[0].running_mean is norm.running_mean


def test_ghost_batch_norm_is_refused() -> None:
    model = nn.Sequential(GhostBatchNorm2d(4, affine=True, ghost_batch=8))
    with pytest.raises(UserError, match=r"parallel\.sync_batchnorm=true"):
        synchronize(model, torch.device("cpu"))
