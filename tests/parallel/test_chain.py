"""Partitioning a model into pipeline stages."""

import itertools
import re
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.parallel.dropout import CurrentShard, convert_dropout
from dlopt.parallel.modes.chain import (
    ActivationSpec,
    ChainLayer,
    balance,
    check_tied_weights,
    divide_cores,
    flatten,
    named_starts,
    time_layers,
    trace,
)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)),
        nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(16, 8), nn.ReLU())),
        nn.Linear(8, 2),
    )


@given(st.lists(st.floats(0.01, 10.0), min_size=1, max_size=8), st.data())
def test_balance_minimizes_the_slowest_stage(seconds: list[float], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(seconds)))

    def slowest(starts: list[int]) -> float:
        return max(sum(seconds[start:stop]) for start, stop in itertools.pairwise([*starts, len(seconds)]))

    starts = balance(seconds, stages)
    assert starts[0] == 0 and len(starts) == stages and starts == sorted(set(starts))
    all_starts = [[0, *rest] for rest in itertools.combinations(range(1, len(seconds)), stages - 1)]
    assert slowest(starts) == pytest.approx(min(map(slowest, all_starts)), rel=1e-12)


def test_flattened_layers_are_in_call_order() -> None:
    model = net().eval()
    chain = flatten(model, 2)
    assert [layer.name for layer in chain] == ["0.0", "0.1", "0.2", "1.0", "1.1.0", "1.1.1", "2"]
    values = inputs = torch.randn(3, 1, 4, 4)
    for layer in chain:
        values = layer.module(values)
    assert torch.equal(values, model(inputs))


def test_trace_and_timing_leave_the_model_unchanged() -> None:
    model = net().train()
    convert_dropout(model, CurrentShard())
    state_before = {name: value.clone() for name, value in model.state_dict().items()}
    chain = flatten(model, 2)
    inputs = torch.randn(3, 1, 4, 4).contiguous(memory_format=torch.channels_last)
    trace(chain, inputs, nullcontext)
    assert len(time_layers(chain, inputs, nullcontext)) == len(chain)
    assert all(torch.equal(value, state_before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert [layer.output and layer.output.shape for layer in chain] == [(4, 2, 2)] * 3 + [(16,), (8,), (8,), (2,)]
    assert [layer.dropouts for layer in chain] == [[], [], [(model[0][2], (4, 2, 2))], [], [], [], []]


def test_activation_spec_restores_memory_order() -> None:
    tensor = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    arrange = ActivationSpec.of(tensor).restore_order(tensor.contiguous())
    assert torch.equal(arrange, tensor) and arrange.stride() == tensor.stride()


def test_cores_are_divided_in_proportion() -> None:
    assert divide_cores(8, [0.25, 0.75]) == [2, 6]
    assert divide_cores(2, [0.1, 0.9]) == [1, 1]
    assert divide_cores(1, [0.5, 0.5]) == [1, 1], "at least one core per stage"
    assert divide_cores(16, [0.5, 0.3, 0.2]) == [8, 5, 3]


def test_stages_start_at_named_layers() -> None:
    chain = flatten(net(), 3)
    assert named_starts(["1", "2"], chain, 3) == [0, 3, 6]
    assert named_starts(["0.1", "1.1"], chain, 3) == [0, 1, 4]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (["1"], "parallel.split=[1]: 3 processes need 2 names"),
        (["1", "9"], "parallel.split=[1,9]: no layer 9; allowed: 0.1, 0.2, 1.0,"),
        (["2", "1"], "parallel.split=[2,1]: 1 must come after"),
        (["0", "1"], "parallel.split=[0,1]: 0 must come after"),
    ],
)
def test_invalid_splits_raise(split: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}[^\n]*$"):
        named_starts(split, flatten(net(), 3), 3)


class Pair(nn.Module):
    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return inputs, inputs


def test_unsupported_models_raise() -> None:
    with pytest.raises(
        UserError, match=r"^parallel=pipeline: 8 processes, but the model has only 7 layers; start fewer processes$"
    ):
        flatten(net(), 8)
    with pytest.raises(UserError, match=r"^parallel=pipeline: Pair is not a sequence of layers"):
        flatten(Pair(), 2)
    with pytest.raises(UserError, match=r"^parallel=pipeline: layer 0 does not return a single tensor"):
        trace(flatten(nn.Sequential(Pair(), nn.ReLU()), 2), torch.ones(1), nullcontext)


def test_tied_weights_across_stages_raise() -> None:
    tied = nn.Linear(2, 2)
    chain = [ChainLayer("a", tied), ChainLayer("b", nn.ReLU()), ChainLayer("c", nn.Sequential(tied))]
    check_tied_weights([chain])
    with pytest.raises(UserError, match=r"^parallel=pipeline: c shares weights"):
        check_tied_weights([chain[:2], chain[2:]])


def test_a_sequence_with_a_forward_of_its_own_is_not_split() -> None:
    class Doubled(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = super().forward(inputs)
            return 2 * outputs

    model = nn.Sequential(Doubled(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))
    assert [layer.name for layer in flatten(model, 2)] == ["0", "1"]
    with pytest.raises(UserError, match="Doubled is not a sequence of layers"):
        flatten(Doubled(nn.Linear(2, 2)), 1)
