"""Where a model is cut into stages."""

import itertools
import re
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dlopt.errors import UserError
from dlopt.parallel.chain import Form, Link, balanced, by_hand, check_owners, divided, links, look, measure, spans


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)),
        nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(16, 8), nn.ReLU())),
        nn.Linear(8, 2),
    )


@given(st.lists(st.floats(0.01, 10.0), min_size=1, max_size=8), st.data())
def test_the_slowest_stage_is_as_fast_as_can_be(seconds: list[float], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(seconds)))

    def slowest(starts: list[int]) -> float:
        return max(sum(seconds[span]) for span in spans(starts, len(seconds)))

    found = balanced(seconds, stages)
    assert found[0] == 0 and len(found) == stages and found == sorted(set(found))
    every = [[0, *rest] for rest in itertools.combinations(range(1, len(seconds)), stages - 1)]
    assert slowest(found) == pytest.approx(min(map(slowest, every)), rel=1e-12)


def test_the_layers_are_called_in_order() -> None:
    model = net().eval()
    chain = links(model, 2)
    assert [link.name for link in chain] == ["0.0", "0.1", "0.2", "1.0", "1.1.0", "1.1.1", "2"]
    values = inputs = torch.randn(3, 1, 4, 4)
    for link in chain:
        values = link.layer(values)
    assert torch.equal(values, model(inputs))


def test_looking_leaves_no_trace() -> None:
    model = net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chain = links(model, 2)
    inputs = torch.randn(3, 1, 4, 4).contiguous(memory_format=torch.channels_last)
    look(chain, inputs, nullcontext)
    assert len(measure(chain, inputs, nullcontext)) == len(chain)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert [link.output and link.output.shape for link in chain] == [(4, 2, 2)] * 3 + [(16,), (8,), (8,), (2,)]
    assert [len(link.draws) for link in chain] == [0, 0, 1, 0, 0, 0, 0]


def test_a_form_gives_a_tensor_its_order_back() -> None:
    tensor = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    arranged = Form.of(tensor).arranged(tensor.contiguous())
    assert torch.equal(arranged, tensor) and arranged.stride() == tensor.stride()


def test_cores_follow_the_work() -> None:
    assert divided(8, [0.25, 0.75]) == [2, 6]
    assert divided(2, [0.1, 0.9]) == [1, 1]
    assert divided(1, [0.5, 0.5]) == [1, 1], "no process can do without"
    assert divided(16, [0.5, 0.3, 0.2]) == [8, 5, 3]


def test_by_hand() -> None:
    chain = links(net(), 3)
    assert by_hand(["1", "2"], chain, 3) == [0, 3, 6]
    assert by_hand(["0.1", "1.1"], chain, 3) == [0, 1, 4]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (["1"], "parallel.split=[1]: 3 processes need 2 names of layers"),
        (["1", "9"], "parallel.split=[1,9]: there is no layer 9; allowed: 0.1, 0.2, 1.0,"),
        (["2", "1"], "parallel.split=[2,1]: 1 does not come behind"),
        (["0", "1"], "parallel.split=[0,1]: 0 does not come behind"),
    ],
)
def test_wrong_splits(split: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}[^\n]*$"):
        by_hand(split, links(net(), 3), 3)


class Pair(nn.Module):
    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return inputs, inputs


def test_what_cannot_be_cut() -> None:
    with pytest.raises(
        UserError, match=r"^parallel=pipeline: 8 processes, and the model has only 7 layers; start fewer$"
    ):
        links(net(), 8)
    with pytest.raises(UserError, match=r"^parallel=pipeline: Pair is no sequence of layers"):
        links(Pair(), 2)
    with pytest.raises(UserError, match=r"^parallel=pipeline: the layer 0 gives something else than one tensor"):
        look(links(nn.Sequential(Pair(), nn.ReLU()), 2), torch.ones(1), nullcontext)


def test_tied_weights_stay_together() -> None:
    tied = nn.Linear(2, 2)
    chain = [Link("a", tied), Link("b", nn.ReLU()), Link("c", nn.Sequential(tied))]
    check_owners([chain])
    with pytest.raises(UserError, match=r"^parallel=pipeline: c shares weights"):
        check_owners([chain[:2], chain[2:]])
