"""Gradients of recurrent layers against time lag."""

import pytest
import torch
from torch import nn

from dlopt.lab.diagnosis.probes import TimeLagProbe
from dlopt.models.layers import Norm
from dlopt.models.recurrent import LSTMLayer, RecurrentLayer

NONE = Norm(norm="none", norm_affine=False, norm_groups=1, norm_ghost_batch=None, norm_eps=1e-5, norm_momentum=0.1)


def test_gradient_of_linear_recurrence_shrinks_by_the_weight_per_step() -> None:
    """h_t = 0.5 h_{t-1} + x_t where tanh is linear: d loss / d h_{T-i} = 0.5^i."""
    layer = RecurrentLayer(1, 1, NONE).double()
    with torch.no_grad():
        layer.input.weight.fill_(1.0)
        layer.input.bias.zero_()
        layer.hidden.weight.fill_(0.5)
    sequence = 1e-6 * torch.ones(1, 8, 1, dtype=torch.float64)
    with TimeLagProbe(layer).recording() as probe:
        layer(sequence)[:, -1].sum().backward()
    [lag] = probe.lags()
    assert lag.name == "hidden"
    # The state before the last step is one step back.
    assert lag.states == pytest.approx([0.5**i for i in range(1, 8)], rel=1e-6)


def test_lstm_time_lags_match_autograd() -> None:
    torch.manual_seed(0)
    layer, sequence = LSTMLayer(2, 3, 1.0, NONE).double(), torch.randn(4, 5, 2, dtype=torch.float64)
    states: list[torch.Tensor] = []
    handle = layer.hidden.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    loss = layer(sequence)[:, -1].square().sum()
    handle.remove()
    true = [float(gradient.norm()) for gradient in torch.autograd.grad(loss, states[:0:-1])]
    with TimeLagProbe(layer).recording() as probe:
        layer(sequence)[:, -1].square().sum().backward()
    [lag] = probe.lags()
    assert lag.states == pytest.approx(true, rel=1e-12)
    assert len(lag.contributions) == 5 and lag.contributions[-1] == 0.0  # the first state is zero
    whole = layer.hidden.weight.grad
    assert whole is not None
    assert sum(lag.contributions) >= float(whole.norm()) >= max(lag.contributions) - sum(lag.contributions[1:])


def test_feedforward_network_has_no_time_lags() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    with TimeLagProbe(net).recording() as probe:
        net(torch.ones(3, 2)).sum().backward()
    assert probe.lags() == []
