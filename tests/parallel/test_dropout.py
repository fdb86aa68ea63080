import copy

import pytest
import torch
from torch import nn

from dlopt.parallel.dropout import GlobalDropout, Place, make_global
from dlopt.parallel.shares import Portion, cut

KINDS = [nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_drop_what_one_process_drops(
    kind: type[nn.Dropout], memory_format: torch.memory_format, ranks: int
) -> None:
    inputs = torch.randn(7, 3, 4, 5, dtype=torch.float64).to(memory_format=memory_format)
    torch.manual_seed(3)
    whole, after = kind(0.4)(inputs), torch.rand(())
    place = Place()
    dropout = GlobalDropout(kind(0.4), place)
    parts = []
    for rank in range(ranks):
        own = cut(0, 7, rank, ranks)
        place.portion = Portion(7, own)
        torch.manual_seed(3)
        parts.append(dropout(inputs[own]))
        assert torch.equal(torch.rand(()), after)  # the next layer draws alike, whatever the share
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole, inputs)


def test_gradients_are_those_of_the_own_samples() -> None:
    place = Place()
    place.portion = Portion(4, slice(1, 3))
    inputs = torch.randn(2, 6, requires_grad=True)
    outputs = GlobalDropout(nn.Dropout(0.5), place)(inputs)
    [gradient] = torch.autograd.grad(outputs.sum(), inputs)
    assert torch.equal(gradient, torch.where(outputs == 0, 0.0, 2.0))


def test_without_ranks_it_is_the_module_itself() -> None:
    inputs = torch.randn(4, 6)
    dropout = GlobalDropout(nn.Dropout(0.5), Place())
    torch.manual_seed(0)
    found = dropout(inputs)
    torch.manual_seed(0)
    assert torch.equal(found, nn.functional.dropout(inputs, 0.5))
    assert torch.equal(dropout.eval()(inputs), inputs)


def test_every_dropout_of_a_model_is_replaced_once() -> None:
    shared = nn.Dropout(0.3)
    inner = nn.Sequential(shared, nn.Dropout1d(0.1))
    model = nn.Sequential(nn.Linear(2, 2), shared, inner)
    names = list(model.state_dict())
    place = Place()
    make_global(model, place)
    make_global(model, place)
    assert model[1] is inner[0]
    assert [type(m) for m in (model[1], inner[1])] == [GlobalDropout] * 2
    assert type(model[1].dropout) is nn.Dropout
    assert list(model.state_dict()) == names
    assert copy.deepcopy(model)[1].place is place


def test_a_leading_dimension_that_is_no_sample_is_refused() -> None:
    place = Place()
    place.portion = Portion(4, slice(0, 2))
    with pytest.raises(RuntimeError, match="leading dimension"):
        GlobalDropout(nn.Dropout(0.5), place)(torch.ones(5, 2))
