import pytest
import torch

from dlopt.basics.errors import UserError
from dlopt.parallel.empty_shards import accept_empty_batches
from tests.support.user_parts import ViewNet


def test_an_empty_batch_has_empty_outputs_and_gradients_of_zero() -> None:
    model, images = ViewNet(), torch.randn(3, 1, 8, 8)
    expected = model(images)
    with pytest.raises(RuntimeError, match="0 elements"):
        model(images[:0])
    accept_empty_batches(model, 19)
    outputs = model(images[:0])
    assert outputs.shape == (0, 10)
    outputs.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert torch.equal(model(images), expected)


def test_batch_norm_sees_no_sample_that_is_not_in_the_batch() -> None:
    model = ViewNet(norm=True)
    accept_empty_batches(model, 19)
    with pytest.raises(UserError, match=r"^data\.batch_size=19: .*batch norm, fails on an empty shard; use larger"):
        model(torch.empty(0, 1, 8, 8))
    assert model.eval()(torch.empty(0, 1, 8, 8)).shape == (0, 10)
