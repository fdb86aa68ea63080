"""Planes through weights, and loss surfaces on them."""

import pytest
import torch
from torch import nn

from dlopt.analysis.landscape import draw, random_plane, surface, trajectory_plane


def test_random_directions_have_filter_norms_of_the_model() -> None:
    weights = [torch.randn(4, 3, 2, 2), torch.randn(4), torch.randn(5, 4)]
    plane = random_plane(weights, 1.0, torch.Generator().manual_seed(0))
    for direction in (plane.first, plane.second):
        assert torch.allclose(direction[0].flatten(1).norm(dim=1), weights[0].flatten(1).norm(dim=1))
        assert torch.allclose(direction[2].norm(dim=1), weights[2].norm(dim=1))
        assert not direction[1].any()
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
    plane = random_plane([before], 2.0, torch.Generator().manual_seed(1))
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
    plane = random_plane([p.detach().clone() for p in model.parameters()], 1.0, torch.Generator().manual_seed(0))
    surface(model, lambda: model(torch.randn(8, 2)).square().mean(), plane, 3, lambda done: None)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_ticks_of_small_differences_are_distinguishable() -> None:
    weights = [torch.zeros(2, 2)]
    plane = random_plane(weights, 1e-3, torch.Generator().manual_seed(0))
    figure = draw(plane, 2.05 + 1e-4 * torch.rand(5, 5, dtype=torch.float64), title="", subtitle="")
    figure.canvas.draw()
    labels = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert len(labels) == len(set(labels)) == 7
