from collections.abc import Callable

import pytest
import torch
from torch import nn

from dlopt.models.layers import Norm
from dlopt.models.recurrent import LSTMLayer, RecurrentLayer, Rows

Build = Callable[..., nn.Module]


def norm(kind: str) -> Norm:
    return Norm(norm=kind, norm_affine=True, norm_groups=1, norm_ghost_batch=None, norm_eps=1e-5, norm_momentum=0.1)  # type: ignore[arg-type]


def sequence() -> torch.Tensor:
    return torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_rows_are_the_time_steps() -> None:
    images = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    steps = Rows()(images)
    assert steps.shape == (2, 4, 15)
    assert torch.equal(steps[1, 2], images[1, :, 2].flatten())


def test_rnn_layer_matches_torch() -> None:
    ours, theirs = RecurrentLayer(5, 6, norm("none")).double(), nn.RNN(5, 6, batch_first=True).double()
    theirs.load_state_dict(
        {
            "weight_ih_l0": ours.input.weight,
            "weight_hh_l0": ours.hidden.weight,
            "bias_ih_l0": ours.input.bias,
            "bias_hh_l0": torch.zeros(6),
        }
    )
    torch.testing.assert_close(ours(sequence()), theirs(sequence())[0])


@pytest.mark.parametrize("forget_bias", [0.0, 1.0])
def test_lstm_layer_matches_torch(forget_bias: float) -> None:
    ours, theirs = LSTMLayer(5, 6, forget_bias, norm("none")).double(), nn.LSTM(5, 6, batch_first=True).double()
    bias = ours.input.bias.detach().clone()
    bias[6:12] += forget_bias
    theirs.load_state_dict(
        {
            "weight_ih_l0": ours.input.weight,
            "weight_hh_l0": ours.hidden.weight,
            "bias_ih_l0": bias,
            "bias_hh_l0": torch.zeros(24),
        }
    )
    torch.testing.assert_close(ours(sequence()), theirs(sequence())[0])


def test_layer_norm_is_inside_the_recurrence() -> None:
    layer = RecurrentLayer(5, 6, norm("layer")).double()
    state = torch.zeros(3, 6, dtype=torch.float64)
    for step in sequence().unbind(1):
        drive = step @ layer.input.weight.T + state @ layer.hidden.weight.T
        state = nn.functional.layer_norm(drive, (6,)).tanh()
    torch.testing.assert_close(layer(sequence())[:, -1], state)


def test_layer_norm_in_the_lstm() -> None:
    layer = LSTMLayer(5, 6, 0.5, norm("layer")).double()
    state = cell = torch.zeros(3, 6, dtype=torch.float64)
    for step in sequence().unbind(1):
        from_input = nn.functional.layer_norm(step @ layer.input.weight.T, (24,))
        i, f, g, o = (from_input + nn.functional.layer_norm(state @ layer.hidden.weight.T, (24,))).chunk(4, 1)
        cell = (f + 0.5).sigmoid() * cell + i.sigmoid() * g.tanh()
        state = o.sigmoid() * nn.functional.layer_norm(cell, (6,)).tanh()
    torch.testing.assert_close(layer(sequence())[:, -1], state)
