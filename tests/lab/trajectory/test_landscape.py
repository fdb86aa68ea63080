"""Planes through weights, and loss surfaces on them."""

import pytest
import torch
from torch import nn

from dlopt.basics.errors import UserError
from dlopt.lab.trajectory.landscape import draw, random_plane, surface, trajectory_plane
from dlopt.models.locally_connected import LocallyConnected2d

pytestmark = pytest.mark.drawn


def test_random_directions_have_filter_norms_of_the_model() -> None:
    """A locally connected layer has a filter per position and output; its bias has three dimensions, as a norm may."""
    local = LocallyConnected2d(2, 3, 3, extent=(4, 5), stride=1, bias=True)
    model = nn.Sequential(nn.Conv2d(3, 4, 2), local, nn.LayerNorm([3, 4, 5]), nn.Linear(4, 5, bias=False))
    filters = {"0.weight": 1, "1.weight": 2, "3.weight": 1}
    plane = random_plane(model, 1.0, torch.Generator().manual_seed(0))
    for directions in (plane.first, plane.second):
        for (name, weight), direction in zip(model.named_parameters(), directions, strict=True):
            if name in filters:
                ours, theirs = (tensor.flatten(filters[name]).norm(dim=-1) for tensor in (direction, weight))
                assert torch.allclose(ours, theirs), name
            else:
                assert not direction.any(), name
    assert not torch.equal(plane.first[0], plane.second[0])


def test_trajectory_plane_recovers_planar_trajectory() -> None:
    one, two = torch.linalg.qr(torch.randn(7, 2, dtype=torch.float64)).Q.T
    coordinates = torch.tensor([[-4.0, 1.0], [-2.0, -1.0], [-1.0, 0.5], [0.0, 0.0]], dtype=torch.float64)
    trajectory = [[(x * one + y * two)[:4].view(2, 2), (x * one + y * two)[4:]] for x, y in coordinates.tolist()]
    plane = trajectory_plane(trajectory, [0, 10, 20, 30])
    assert plane.trajectory is not None
    for point, weights in zip(plane.trajectory, trajectory, strict=True):
        rebuilt = [
            o + point[0] * a + point[1] * b for o, a, b in zip(plane.origin, plane.first, plane.second, strict=True)
        ]
        assert all(torch.allclose(mine, theirs) for mine, theirs in zip(rebuilt, weights, strict=True))
    norm = sum(float(tensor.square().sum()) for tensor in plane.first)
    assert norm == pytest.approx(1.0)
    left, right, bottom, top = plane.window
    assert (plane.trajectory[:, 0] > left).all() and (plane.trajectory[:, 1] < top).all() and bottom < 0 < right
    assert "% of the variance" in plane.axes[0]


def test_surface_of_linear_model_matches_closed_form_and_restores_weights() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Dropout(0.9)).double()
    inputs, targets = torch.randn(50, 2).double(), torch.randn(50, 1).double()
    before = model[0].weight.detach().clone()
    plane = random_plane(model, 2.0, torch.Generator().manual_seed(1))
    done: list[int] = []
    result = surface(model, lambda: (model(inputs) - targets).square().mean(), plane, 5, done.append)
    for i, y in enumerate((-2, -1, 0, 1, 2)):
        for j, x in enumerate((-2, -1, 0, 1, 2)):
            weight = before + x * plane.first[0] + y * plane.second[0]
            assert float(result[i, j]) == pytest.approx(float((inputs @ weight.T - targets).square().mean()))
    assert torch.equal(model[0].weight, before) and model.training and done == [5, 10, 15, 20, 25]
    [axes, bar] = draw(plane, result, title="Loss", subtitle="25 points").axes
    assert axes.get_xlabel().startswith("first random direction") and bar.get_ylabel() == "training loss"


def test_surface_preserves_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plane = random_plane(model, 1.0, torch.Generator().manual_seed(0))
    surface(model, lambda: model(torch.randn(8, 2)).square().mean(), plane, 3, lambda done: None)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_ticks_of_small_differences_are_distinguishable() -> None:
    plane = random_plane(nn.Linear(2, 2), 1e-3, torch.Generator().manual_seed(0))
    figure = draw(plane, 2.05 + 1e-4 * torch.rand(5, 5, dtype=torch.float64), title="", subtitle="")
    figure.canvas.draw()
    labels = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert len(labels) == len(set(labels)) == 7


def test_refuses_to_draw_without_a_finite_loss() -> None:
    plane = random_plane(nn.Linear(2, 2), 1.0, torch.Generator().manual_seed(0))
    values = torch.tensor([[torch.nan, torch.inf], [torch.inf, torch.nan]])
    with pytest.raises(UserError, match="Landscape: the loss is not finite at any point"):
        draw(plane, values, title="Landscape", subtitle="")
