import copy

import pytest
import torch
from torch import nn

from dlopt.parallel.batch_shards import MicroBatchShard, local_slice
from dlopt.parallel.dropout import CurrentShard, GlobalDropout, replace_dropout

KINDS = [nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_masks_match_single_process(kind: type[nn.Dropout], memory_format: torch.memory_format, ranks: int) -> None:
    inputs = torch.randn(7, 3, 4, 5, dtype=torch.float64).to(memory_format=memory_format)
    torch.manual_seed(3)
    full, next_draw = kind(0.4)(inputs), torch.rand(())
    current = CurrentShard()
    dropout = GlobalDropout(kind(0.4), current)
    outputs = []
    for rank in range(ranks):
        local = local_slice(0, 7, rank, ranks)
        current.shard = MicroBatchShard(7, local)
        torch.manual_seed(3)
        outputs.append(dropout(inputs[local]))
        assert torch.equal(torch.rand(()), next_draw)  # the generator state does not depend on the shard
    assert torch.equal(torch.cat(outputs), full)
    assert not torch.equal(full, inputs)


def test_gradients_match_the_local_mask() -> None:
    current = CurrentShard()
    current.shard = MicroBatchShard(4, slice(1, 3))
    inputs = torch.randn(2, 6, requires_grad=True)
    outputs = GlobalDropout(nn.Dropout(0.5), current)(inputs)
    [gradient] = torch.autograd.grad(outputs.sum(), inputs)
    assert torch.equal(gradient, torch.where(outputs == 0, 0.0, 2.0))


def test_single_process_uses_the_plain_dropout() -> None:
    inputs = torch.randn(4, 6)
    dropout = GlobalDropout(nn.Dropout(0.5), CurrentShard())
    torch.manual_seed(0)
    outputs = dropout(inputs)
    torch.manual_seed(0)
    assert torch.equal(outputs, nn.functional.dropout(inputs, 0.5))
    assert torch.equal(dropout.eval()(inputs), inputs)


def test_shared_dropouts_are_replaced_once() -> None:
    shared = nn.Dropout(0.3)
    inner = nn.Sequential(shared, nn.Dropout1d(0.1))
    model = nn.Sequential(nn.Linear(2, 2), shared, inner)
    names = list(model.state_dict())
    current = CurrentShard()
    replace_dropout(model, current)
    replace_dropout(model, current)
    assert model[1] is inner[0]
    assert [type(m) for m in (model[1], inner[1])] == [GlobalDropout] * 2
    assert type(model[1].dropout) is nn.Dropout
    assert list(model.state_dict()) == names
    assert copy.deepcopy(model)[1].current is current


def test_wrong_leading_dimension_is_refused() -> None:
    current = CurrentShard()
    current.shard = MicroBatchShard(4, slice(0, 2))
    with pytest.raises(RuntimeError, match="leading dimension"):
        GlobalDropout(nn.Dropout(0.5), current)(torch.ones(5, 2))
