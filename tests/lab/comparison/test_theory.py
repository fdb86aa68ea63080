"""Initialization schemes preserve or lose variance over 30 layers as theory predicts."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dlopt import init
from dlopt.instruments.layers import LayerProbe, LayerStatistics
from dlopt.models.layers import Activation
from dlopt.models.layers import activation as make_activation

DEPTH = 30
Scheme = Callable[[nn.Module, torch.Generator], None]


def _fan_in(model: nn.Module, generator: torch.Generator) -> None:
    init.fan_in_normal(model, generator, zero_last_gamma=False)


def _kaiming(model: nn.Module, generator: torch.Generator) -> None:
    init.kaiming_normal(model, generator, mode="fan_in", gain=None, zero_last_gamma=False)


def _xavier(model: nn.Module, generator: torch.Generator) -> None:
    init.xavier_uniform(model, generator, gain=1.0, zero_last_gamma=False)


def _standard_normal(model: nn.Module, generator: torch.Generator) -> None:
    init.normal(model, generator, std=1.0, zero_last_gamma=False)


def _probed(activation: Activation, scheme: Scheme, width: int, samples: int) -> list[LayerStatistics]:
    """The hidden layers of a net with equal widths, for normal inputs and normal gradients at the outputs."""
    layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(width, width), make_activation(activation))]
    model: nn.Module = nn.Sequential(*layers, nn.Linear(width, width))
    generator = torch.Generator().manual_seed(1)
    scheme(model, generator)
    model = model.double()
    inputs = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    with LayerProbe(model).recording() as probe:
        outputs = model(inputs)
        outputs.backward(torch.randn(outputs.shape, generator=generator, dtype=torch.float64))
    return probe.layers[:DEPTH]


def _per_layer(first: float, last: float) -> float:
    return (last / first) ** (2 / (DEPTH - 1))


def test_fan_in_keeps_the_variance_of_a_linear_net_in_both_directions() -> None:
    layers = _probed("identity", _fan_in, 640, 256)
    for forward in layers:
        assert forward.inputs.variance == pytest.approx(1.0, rel=0.05)
    assert (layers[0].gradients.rms / layers[-1].gradients.rms) ** 2 == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(("scheme", "factor"), [(_kaiming, 1.0), (_xavier, 0.5)])
def test_relu_keeps_the_variance_under_kaiming_and_halves_it_under_xavier(scheme: Scheme, factor: float) -> None:
    """He et al. 2015, sections 2.2 and 2.3: per layer, forward and backward."""
    layers = _probed("relu", scheme, 384, 32)
    assert _per_layer(layers[0].inputs.rms, layers[-1].inputs.rms) == pytest.approx(factor, rel=0.05)
    assert _per_layer(layers[-1].gradients.rms, layers[0].gradients.rms) == pytest.approx(factor, rel=0.05)


def test_standard_normal_weights_multiply_the_variance_by_the_width() -> None:
    layers = _probed("identity", _standard_normal, 192, 96)
    assert _per_layer(layers[0].inputs.rms, layers[-1].inputs.rms) == pytest.approx(192, rel=0.05)
    assert _per_layer(layers[-1].gradients.rms, layers[0].gradients.rms) == pytest.approx(192, rel=0.05)


def test_tanh_follows_the_mean_field_recursion() -> None:
    """q_{l+1} = E[tanh(sqrt(q_l) z)^2] for Xavier's variance 1/n (Poole et al. 2016, equation 3)."""
    layers = _probed("tanh", _xavier, 640, 256)
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    q = layers[0].inputs.variance
    for layer in layers:
        assert layer.inputs.rms**2 == pytest.approx(q, rel=0.05)
        q = float(torch.trapezoid(torch.tanh(math.sqrt(q) * z) ** 2 * density, z))


def test_standard_normal_weights_saturate_a_five_layer_tanh_net_and_xavier_does_not() -> None:
    """The lecture's figure after Glorot & Bengio 2010."""
    saturated = _probed("tanh", _standard_normal, 100, 64)
    xavier = _probed("tanh", _xavier, 100, 64)
    assert all((layer.saturated or 0) > 0.7 for layer in saturated[1:5])
    assert all((layer.saturated or 0) < 0.05 for layer in xavier[:5])
