"""Sharded tensors on two ranks against full tensors."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.torch_version import TorchVersion

from dlopt.basics.errors import UserError
from dlopt.config.parsing import parse
from dlopt.machine.world import current
from dlopt.optim import LBFGS
from dlopt.parallel.mode import Mode
from dlopt.parallel.modes.fsdp import FullySharded
from dlopt.parallel.owners import RowExchange, Whole, step_by_owners
from dlopt.parallel.processes.process_group import ProcessGroup
from dlopt.parallel.shards import Sharding, TensorShards, local, total_norm
from dlopt.training.averaging import ExponentialAverage
from dlopt.training.builders.optimizer import check_optimizer
from dlopt.training.clipping import Adaptive, ByNorm, ByValue, gradient_norm
from dlopt.training.stopping import Tolerance
from tests.support.choices import names
from tests.support.ranks import run_ranks
from tests.support.runs import Composed, composed

CHOICES = names("optimizer")
NEEDS_FULL_TENSORS = {
    "adafactor",
    "distributed_shampoo",
    "dmuon",
    "kron",
    "lamb",
    "lars",
    "mars",
    "muon",
    "scion",
    "shampoo",
    "soap",
}
if TorchVersion(torch.__version__) < "2.12":
    NEEDS_FULL_TENSORS.add("irprop")  # torch's Rprop cannot update shards there
SPHERE = ["optimizer.hyperball=true", "optimizer.weight_decay=0"]
OVERRIDES = {
    "dmuon": [*SPHERE, "optimizer.row_beta=0.9"],
}
NEEDS_FULL_MODEL = {"bfgs", "dfp", "lbfgs", "newton", "newton_cg", "newton_undamped", "prodigy", "sam", "sophia"}


def net() -> nn.Sequential:
    """Returns a model whose shards are unequal, or empty on one of two ranks."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 1)
    ).double()


def optimizer_of(plain: Composed, model: nn.Module) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = parse(*copy.deepcopy(plain)).optimizer.build(params=model.parameters())
    return optimizer


def shard_model(model: nn.Module, *, by_rows: bool = False) -> nn.Module:
    """Returns a copy with parameters sharded along dimension 0, or some along dimension 1 or replicated."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    model = copy.deepcopy(model)
    kinds = {} if by_rows else {"3.weight": Shard(1), "3.bias": Replicate()}
    for name, parameter in list(model.named_parameters()):
        parent, _, last = name.rpartition(".")
        distributed = distribute_tensor(parameter.detach(), mesh, [kinds.get(name, Shard(0))])
        setattr(model.get_submodule(parent), last, nn.Parameter(distributed))
    return model


def set_gradients(full: nn.Module, sharded: nn.Module, step: int) -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    draws = torch.Generator().manual_seed(step)
    for a, b in zip(full.parameters(), sharded.parameters(), strict=True):
        a.grad = torch.randn(a.shape, generator=draws, dtype=a.dtype)
        assert isinstance(b, DTensor)
        b.grad = distribute_tensor(a.grad.clone(), b.device_mesh, b.placements)


def assert_same(full: nn.Module, sharded: nn.Module, what: str) -> None:
    actual = TensorShards().full(dict(sharded.state_dict()))
    for name, value in full.state_dict().items():
        assert torch.allclose(actual[name], value, rtol=1e-12, atol=1e-14), (what, name)


def run_all(choices: dict[str, Composed]) -> None:
    """Called on all ranks, with the optimizers' configs by name."""
    world = current()
    assert world is not None
    check_placement(ProcessGroup(world, torch.device("cpu"), minutes=1.0))
    for choice, plain in choices.items():
        check_updates(choice, plain)
    check_exchange()
    check_clipping()
    check_strided()
    check_averaging()
    check_tolerance()


def check_placement(group: ProcessGroup) -> None:
    """FSDP shards weights at placement, and the gathered weights are those of the original model."""
    keys: Any = {
        "shards": 2, "unit_parameters": 1, "reshard_after_forward": True, "sync_every_micro_batch": False,
        "cpu_offload": False, "sync_batchnorm": True,
    }  # fmt: skip
    mode = FullySharded(group, torch.device("cpu"), accumulate=1, low_precision=False, keys=keys)
    full, sharded = net(), net()
    call = mode.place(sharded, (1, 3, 3)).model
    assert_same(full, sharded, "placement")
    local_size, total = (sum(kind(p).numel() for p in sharded.parameters()) for kind in (local, lambda p: p))
    assert total == sum(p.numel() for p in full.parameters()) and local_size < 0.7 * total
    inputs = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(call(inputs), full(inputs), rtol=1e-12, atol=1e-13)


def check_updates(choice: str, plain: Composed) -> None:
    """Two updates, a checkpoint loaded into new objects, two more updates."""
    full = net()
    sharded = shard_model(full, by_rows=choice in NEEDS_FULL_TENSORS)
    optimizers = optimizer_of(plain, full), of_shards(choice, plain, sharded)
    for step in range(4):
        if step == 2:
            saved, weights = (
                TensorShards().full(optimizers[1].state_dict()),
                TensorShards().full(dict(sharded.state_dict())),
            )
            assert_same_states(saved, optimizers[0].state_dict())
            optimizers = optimizers[0], of_shards(choice, plain, sharded)
            TensorShards().load_optimizer(optimizers[1], saved)
            TensorShards().load_model(sharded, weights)
        set_gradients(full, sharded, step)
        if step == 3:  # of a layer that this batch does not use
            full[3].bias.grad = sharded[3].bias.grad = None  # type: ignore[union-attr,operator,index]
        for optimizer in optimizers:
            optimizer.step()
    assert_same(full, sharded, choice)


def of_shards(choice: str, plain: Composed, sharded: nn.Module) -> torch.optim.Optimizer:
    optimizer = optimizer_of(plain, sharded)
    if choice in NEEDS_FULL_TENSORS:
        step_by_owners(optimizer)
    return optimizer


def assert_same_states(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert actual["param_groups"] == expected["param_groups"]
    assert list(actual["state"]) in (list(expected["state"]), sorted(expected["state"]))
    for number, values in expected["state"].items():
        assert list(actual["state"][number]) == list(values)
        for name, value in values.items():
            torch.testing.assert_close(actual["state"][number][name], value, rtol=1e-12, atol=1e-14)


def check_exchange() -> None:
    """Rows of unequal sizes and dtypes reach their owners and come back; a rank moves half of the bytes."""
    group = distributed.group.WORLD
    exchange, two = RowExchange(group, torch.device("cpu")), 2
    shapes = [((5, 3), torch.float64), ((1,), torch.bfloat16), ((4, 2, 2), torch.int32), ((3, 1), torch.float32)]
    tensors = [Whole(shape, dtype, owner) for (shape, dtype), owner in zip(shapes, (0, 1, 1, 0), strict=True)]
    full = [(torch.arange(math.prod(shape)) * 7 - 3).view(shape).to(dtype) for shape, dtype in shapes]
    rows = [tensor[each.rows(exchange.rank, two)] for tensor, each in zip(full, tensors, strict=True)]
    with mock.patch.object(distributed, "all_to_all_single", wraps=distributed.all_to_all_single) as moved:
        owned = exchange.collect(tensors, rows)
        assert {index: owner.owner for index, owner in enumerate(tensors) if index in owned} == dict.fromkeys(
            owned, exchange.rank
        )
        for index, tensor in owned.items():
            assert torch.equal(tensor, full[index])
        for actual, expected in zip(exchange.distribute(tensors, owned), rows, strict=True):
            assert torch.equal(actual, expected)
    sent = [call.args[1].nbytes for call in moved.call_args_list]
    assert sent == [sum(part.nbytes for part in rows), sum(tensor.nbytes for tensor in owned.values())]
    empty = exchange.collect([], [])
    assert empty == {} and exchange.distribute([], {}) == []


def check_clipping() -> None:
    for clip in (ByNorm(max_norm=0.7), ByValue(max_value=0.3), Adaptive(net(), clipping=0.05, eps=1e-3)):
        full = net()
        sharded = shard_model(full)
        set_gradients(full, sharded, 0)
        expected = gradient_norm(list(full.parameters()))
        actual = gradient_norm(list(sharded.parameters()), total_norm)
        assert type(actual) is Tensor
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)
        clip(list(full.parameters()))
        clip(list(sharded.parameters()), total_norm)
        for a, b in zip(full.parameters(), sharded.parameters(), strict=True):
            assert a.grad is not None and b.grad is not None
            torch.testing.assert_close(TensorShards().full(b.grad), a.grad, rtol=1e-12, atol=0)
        assert not torch.equal(gradient_norm(list(full.parameters())), expected)


def check_strided() -> None:
    """A rank's share of the rows of each of three maps, as in the weights of a layer after flattened maps."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = init_device_mesh("cpu", (2,))
    for rows in (4, 5, 1):
        full = torch.arange(2.0 * 3 * rows).view(2, 3 * rows)
        chunks = full.view(2, 3, rows).tensor_split([(rows + 1) // 2], 2)
        shard = chunks[mesh.get_rank()].flatten(1)
        placements = [_StridedShard(1, split_factor=3)]
        strided = DTensor.from_local(shard, mesh, placements, shape=full.shape, stride=full.stride())
        assert torch.equal(TensorShards().full(strided), full)
        layer = nn.Module()
        layer.register_buffer("values", torch.zeros_like(strided))
        TensorShards().load_model(layer, {"values": full})
        assert torch.equal(local(layer.values), shard)


def check_averaging() -> None:
    full = net()
    sharded = shard_model(full)
    averages = ExponentialAverage(full, 0.8), ExponentialAverage(sharded, 0.8)
    for model, average in zip((full, sharded), averages, strict=True):
        with torch.no_grad():
            for parameter in model.parameters():
                local(parameter).mul_(1.5)
        average.update()
    assert_same(full, sharded, "weights")
    with averages[0].swapped_in(), averages[1].swapped_in():
        assert_same(full, sharded, "average")
        assert_same(net_times(1.1), full, "average")


def net_times(factor: float) -> nn.Module:
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def check_tolerance() -> None:
    """A change below the tolerance on each rank, but above it in total."""
    model = shard_model(net())
    rule = Tolerance(model, total_norm, tolerance=0.1, iterations=0)
    with torch.no_grad():
        local_shard = local(next(model.parameters()))
        local_shard.reshape(-1)[0] += 0.08
    rule.after_change()
    assert not rule.should_stop
    rule.after_change()
    assert rule.should_stop


def test_two_processes_match_one(tmp_path: Path) -> None:
    choices = {*CHOICES} - NEEDS_FULL_MODEL
    plain = {choice: composed(f"optimizer={choice}", *OVERRIDES.get(choice, ())) for choice in sorted(choices)}
    run_ranks("tests.parallel.test_shards:run_all", 2, tmp_path, plain)


def mode(name: str, sharding: Any) -> Mode:
    """Returns a mode of one process that shards the model, as far as checks of optimizers can tell."""
    mode = Mode(torch.device("cpu"), name)
    mode.sharding = Sharding()
    mode.sharding.kind, mode.sharding.is_by_rows = sharding, name == "fsdp"
    return mode


@pytest.mark.parametrize("choice", CHOICES)
def test_optimizers_that_need_full_tensors_are_refused(choice: str) -> None:
    model = nn.Linear(2, 2)
    optimizer = optimizer_of(composed(f"optimizer={choice}"), model)
    refused = {"filter": NEEDS_FULL_TENSORS | NEEDS_FULL_MODEL, "pipeline": NEEDS_FULL_MODEL, "fsdp": NEEDS_FULL_MODEL}
    for each in (mode("filter", "tensors"), mode("fsdp", "tensors"), mode("pipeline", "layers")):
        if choice not in refused[each.name]:
            check_optimizer(each, optimizer)
            continue
        with pytest.raises(UserError, match=rf"^parallel={each.name}: \w+ needs [^\n]+; use parallel=ddp"):
            check_optimizer(each, optimizer)


def test_torch_optimizers_that_need_full_tensors_are_refused() -> None:
    parameter = nn.Parameter(torch.zeros(2, 2))
    for optimizer in (torch.optim.LBFGS([parameter]), torch.optim.Adafactor([parameter]), LBFGS([parameter], lr=1.0)):
        with pytest.raises(UserError, match="parallel=filter"):
            check_optimizer(mode("filter", "tensors"), optimizer)
