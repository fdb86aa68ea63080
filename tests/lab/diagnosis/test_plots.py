"""Plots of a diagnosis: where the inputs of sigmoids are on the curve."""

import pytest
import torch
from torch import Tensor, nn

from dlopt.instruments.layers import LayerProbe
from dlopt.lab.diagnosis.measuring import Diagnosis, Snapshot, UpdateTrace
from dlopt.lab.diagnosis.plots import plots

pytestmark = pytest.mark.drawn


def diagnosis(activation: nn.Module, values: Tensor) -> Diagnosis:
    """Returns a diagnosis of one layer whose activation has these inputs."""
    layer = nn.Linear(1, 1)
    nn.init.ones_(layer.weight), nn.init.zeros_(layer.bias)
    model = nn.Sequential(layer, activation)
    probe = LayerProbe(model, keep=1000)
    with probe.recording():
        model(values[:, None]).sum().backward()
    return Diagnosis(
        "x", Snapshot(0, 1.0, probe.layers, {"0": [1.0]}, [1.0], 1.0, {"0": 1.0}, None, [], []), UpdateTrace(), None
    )


@pytest.mark.parametrize(("activation", "limit"), [(nn.Sigmoid(), 4.357), (nn.Tanh(), 2.178)])
def test_inputs_are_drawn_on_the_curve_with_the_saturated_region(activation: nn.Module, limit: float) -> None:
    """The slope is 5 % of the largest at the edge of the grey region."""
    values = torch.cat([torch.zeros(75), torch.full((25,), 5.0)])
    figure = plots([diagnosis(activation, values)], "title")["inputs"]
    [axes] = figure.axes
    assert axes.get_title() == "layer 1, saturated: 25 %" and axes.get_xlim() == (-6, 6)
    [curve] = axes.lines
    x = torch.as_tensor(curve.get_xdata())
    torch.testing.assert_close(torch.as_tensor(curve.get_ydata()), activation(x))
    edges = torch.tensor([limit], dtype=torch.float64, requires_grad=True)
    [slope] = torch.autograd.grad(activation(edges).sum(), edges)
    [largest] = torch.autograd.grad(activation(zero := torch.zeros(1, requires_grad=True)).sum(), zero)
    assert float(slope / largest) == pytest.approx(0.05, rel=1e-3)
    assert [patch.get_x() for patch in axes.patches[:2]] == pytest.approx([-6, limit], rel=1e-3)
    bars = next(patch for patch in axes.patches if hasattr(patch, "get_data"))
    heights, edges_of_bars, low = bars.get_data()
    inside = [i for i, height in enumerate(heights) if height > low]
    assert [round(float(edges_of_bars[i]), 1) for i in inside] == [0.0, 5.0]
    assert heights[inside[0]] == pytest.approx(1) and heights[inside[1]] == pytest.approx(low + (1 - low) / 3)


def test_no_curve_without_sigmoid_or_tanh() -> None:
    assert "inputs" not in plots([diagnosis(nn.ReLU(), torch.zeros(5))], "title")
