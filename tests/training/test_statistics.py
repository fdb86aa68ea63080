"""Tests of exact batch-norm statistics against the moments of all samples."""

import pytest
import torch
from torch import nn

from dlopt.training.batch_norm import exact_statistics


def batches(inputs: torch.Tensor, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(part, torch.zeros(len(part))) for part in inputs.split(size)]


@pytest.mark.parametrize("size", [1, 7, 64, 100])
def test_first_norm_has_the_moments_of_the_full_set(size: int) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(100, 3, 5, 5, dtype=torch.float64) * torch.tensor([1.0, 3.0, 0.1]).view(3, 1, 1) + 2
    model = nn.Sequential(nn.BatchNorm2d(3)).double()
    with exact_statistics(model, model, batches(inputs, size)):
        torch.testing.assert_close(model[0].running_mean, inputs.mean((0, 2, 3)), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model[0].running_var, inputs.var((0, 2, 3)), rtol=1e-12, atol=1e-12)


def test_one_batch_equals_training_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8)).double()
    inputs = torch.randn(50, 4, dtype=torch.float64)
    with exact_statistics(model, model, batches(inputs, 50)):
        model.eval()
        evaluated = model(inputs)
        model.train()
    for norm in (model[1], model[4]):
        norm.track_running_stats = False
    trained = model(inputs)
    # the running variance is the unbiased one: a factor of 50/49 stands between the two
    torch.testing.assert_close(evaluated, trained, rtol=0.03, atol=0.03)
    assert (evaluated - trained).abs().max() > 1e-4


def test_restores_model_and_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    model(torch.randn(8, 1, 6, 6))
    model[2].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with exact_statistics(model, model, batches(torch.randn(8, 1, 6, 6) + 5, 4)):
        assert not torch.equal(model[1].running_mean, state["1.running_mean"])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model[1].training and model[1].track_running_stats and not model[2].training


def test_restores_model_after_an_error() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(RuntimeError), exact_statistics(model, model, batches(torch.randn(4, 5), 2)):
        pass
    assert model[0].training and model[0].track_running_stats
    assert not model[0]._forward_pre_hooks
