import copy
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dlopt.training.clipping import Adaptive, ByNorm, ByValue, Clip, Unclipped, gradient_norm


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3)
    ).double()


def with_gradients(scale: float, model: nn.Module | None = None) -> tuple[nn.Module, list[nn.Parameter]]:
    """The net with random gradients, except for one parameter without a gradient."""
    model = net() if model is None else model
    draws = torch.Generator().manual_seed(5)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=draws, dtype=parameter.dtype)
    parameters[1].grad = None
    return model, parameters


def gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.grad.clone() for p in parameters if p.grad is not None]


def test_gradient_norm_is_global() -> None:
    _, parameters = with_gradients(1.0)
    expected = math.sqrt(sum(float(g.pow(2).sum()) for g in gradients(parameters)))
    assert float(gradient_norm(parameters)) == pytest.approx(expected, rel=1e-14)


@given(scale=st.floats(1e-6, 1e6), limit=st.floats(1e-3, 1e3))
def test_by_norm(scale: float, limit: float) -> None:
    model, parameters = with_gradients(scale)
    before = gradients(parameters)
    _, reference = with_gradients(scale, copy.deepcopy(model))
    expected_norm = torch.nn.utils.clip_grad_norm_(reference, limit)
    norm = ByNorm(max_norm=limit)(parameters)
    assert norm is not None and torch.equal(norm, expected_norm), "the norm given back is the one before clipping"
    assert all(map(torch.equal, gradients(parameters), gradients(reference)))
    factor = min(1.0, limit / float(norm))
    for clipped, whole in zip(gradients(parameters), before, strict=True):
        torch.testing.assert_close(clipped, whole * factor, rtol=2e-6 / limit + 1e-5, atol=0)
    assert float(gradient_norm(parameters)) <= limit * (1 + 1e-12)


def test_by_value_clamps_every_entry() -> None:
    _, parameters = with_gradients(1.0)
    before = gradients(parameters)
    assert ByValue(max_value=0.25)(parameters) is None
    for clipped, whole in zip(gradients(parameters), before, strict=True):
        assert torch.equal(clipped, whole.clamp(-0.25, 0.25))
    assert any(bool((g.abs() > 0.25).any()) for g in before)


def test_unclipped() -> None:
    _, parameters = with_gradients(1e6)
    before = gradients(parameters)
    assert Unclipped()(parameters) is None
    assert all(map(torch.equal, gradients(parameters), before))


def equation_3(weight: Tensor, gradient: Tensor, clipping: float, eps: float) -> Tensor:
    """G_i <- lambda * max(|W_i|, eps) / |G_i| * G_i where |G_i| / max(|W_i|, eps) > lambda, unit by unit."""
    if weight.ndim == 1:  # a bias or gain is one unit, as in the authors' code
        return equation_3(weight[None], gradient[None], clipping, eps)[0]
    result = gradient.clone()
    for i in range(len(weight)):
        w = math.sqrt(sum(x * x for x in weight[i].flatten().tolist()))
        g = math.sqrt(sum(x * x for x in gradient[i].flatten().tolist()))
        if g / max(w, eps) > clipping:
            result[i] = clipping * max(w, eps) / g * gradient[i]
    return result


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0])
def test_adaptive_equals_equation_3(scale: float) -> None:
    model, parameters = with_gradients(scale)
    clipping, eps = 0.02, 1e-3
    before = {p: p.grad.clone() for p in parameters if p.grad is not None}
    Adaptive(model, clipping=clipping, eps=eps)(parameters)
    head = {model[6].weight, model[6].bias}  # type: ignore[index]
    changed = 0
    for parameter, gradient in before.items():
        assert parameter.grad is not None
        if parameter in head:
            assert torch.equal(parameter.grad, gradient), "the final linear layer is left alone"
            continue
        expected = equation_3(parameter.detach(), gradient, clipping, eps)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-13, atol=0)
        changed += int(not torch.equal(parameter.grad, gradient))
    assert changed > 0, "otherwise nothing was tested"


def test_adaptive_clips_by_unit_and_not_by_layer() -> None:
    layers = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1))
    layers[0].weight.data = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    layers[0].weight.grad = torch.tensor([[0.03, 0.04], [3.0, 4.0]])
    Adaptive(layers, clipping=0.1, eps=0.001)(list(layers.parameters()))
    expected = torch.tensor([[0.03, 0.04], [6e-5, 8e-5]])  # limits 0.5 and 0.0001, norms 0.05 and 5
    torch.testing.assert_close(layers[0].weight.grad, expected)


def test_adaptive_leaves_small_gradients_within_a_smaller_limit() -> None:
    layers = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1))
    layers[0].weight.data = torch.zeros(2, 2)
    layers[0].weight.grad = torch.tensor([[3e-8, 4e-8], [3e-7, 4e-7]])
    Adaptive(layers, clipping=0.01, eps=1e-5)(list(layers.parameters()))
    expected = torch.tensor([[3e-8, 4e-8], [6e-8, 8e-8]])  # the limit is 1e-7, the norms are 5e-8 and 5e-7
    torch.testing.assert_close(layers[0].weight.grad, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("clip", [ByNorm(max_norm=1.0), Adaptive(net(), clipping=0.1, eps=0.0)])
def test_ignores_parameters_without_gradients(clip: Clip) -> None:
    parameters = list(net().parameters())
    clip(parameters)
    assert all(p.grad is None for p in parameters)


def test_adaptive_gives_no_nan_for_zero_gradients_or_weights() -> None:
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    for parameter in layers.parameters():
        parameter.data.zero_()
        parameter.grad = torch.zeros_like(parameter)
    Adaptive(layers, clipping=0.1, eps=0.0)(list(layers.parameters()))
    assert all(bool(g.isfinite().all()) for g in gradients(list(layers.parameters())))
