from collections.abc import Callable

import pytest
import torch
from torch import nn

from dlopt import init
from dlopt.models.locally_connected import LocallyConnected2d

Build = Callable[..., nn.Module]


def maps() -> torch.Tensor:
    return torch.randn(2, 3, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("stride", [1, 2])
def test_equal_filters_give_a_convolution(stride: int) -> None:
    conv = nn.Conv2d(3, 4, 3, stride=stride, padding=1).double()
    layer = LocallyConnected2d(3, 4, 3, extent=(7, 6), stride=stride, bias=True).double()
    assert conv.bias is not None and layer.bias is not None
    with torch.no_grad():
        layer.weight.copy_(conv.weight.flatten(1).expand_as(layer.weight))
        layer.bias.copy_(conv.bias[:, None, None].expand_as(layer.bias))
    torch.testing.assert_close(layer(maps()), conv(maps()))


def test_filters_are_not_shared() -> None:
    layer = LocallyConnected2d(3, 4, 3, extent=(7, 6), stride=1, bias=False).double()
    with torch.no_grad():
        layer.weight[0] = 0
    output = layer(maps())
    assert not output[:, :, 0, 0].any() and output[:, :, 0, 1].all()


def test_initialization_uses_fans_per_position() -> None:
    layer = LocallyConnected2d(16, 24, 3, extent=(9, 9), stride=1, bias=True)
    assert init.fans(layer, layer.weight) == (144, 216)
    init.fan_in_normal(layer, torch.Generator().manual_seed(0), zero_last_gamma=False)
    assert layer.weight.var().item() == pytest.approx(1 / 144, rel=0.02)
    init.orthogonal(layer, torch.Generator().manual_seed(0), gain=1.0, zero_last_gamma=False)
    torch.testing.assert_close(layer.weight @ layer.weight.mT, torch.eye(24).expand(81, 24, 24), atol=1e-5, rtol=0)


def test_parameters(build: Build) -> None:
    model = build("locally_connected", "channels=[4,6]", "norm=none", input_shape=(1, 8, 8), classes=10)
    expected = 16 * 4 * (9 + 1) + 4 * 6 * (4 * 9 + 1) + 4 * 6 * 10 + 10
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
