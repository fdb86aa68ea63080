"""Loss landscape of a trained model on a plane through its weights (Li et al. 2018, Visualizing the loss landscape)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dlopt.extend import UserError
from dlopt.instruments.curvature import restoring
from dlopt.models.layers import evaluation_mode, frozen_statistics
from dlopt.models.locally_connected import LocallyConnected2d
from dlopt.optim.common import flat
from dlopt.optim.parameters import NORMS
from dlopt.results import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Weights = Sequence[Tensor]


@dataclass(frozen=True)
class Plane:
    """origin + x first + y second for x and y in `window`; `trajectory` [n, 2]: coordinates of a run's checkpoints."""

    origin: Weights
    first: Weights
    second: Weights
    window: tuple[float, float, float, float]
    axes: tuple[str, str]
    trajectory: Tensor | None = None
    steps: Sequence[int] = ()


def random_plane(module: nn.Module, span: float, generator: torch.Generator) -> Plane:
    """Returns a plane of two random directions with filter normalization, which makes different models comparable.

    Scales each filter (the weights of one output, in a locally connected layer at one position) of a direction to the
    norm of the model's filter, so a step of 1 is as long as the filters themselves. Biases and the parameters of
    normalizations stay constant.
    """
    weights = [p.detach().clone() for p in module.parameters()]
    norms = {p for layer in module.modules() if isinstance(layer, NORMS) for p in layer.parameters()}
    local = {layer.weight for layer in module.modules() if isinstance(layer, LocallyConnected2d)}
    # Dimensions that count the filters; 0: constant
    dims = [
        0 if p.ndim < 2 or p in norms or "bias" in name.rpartition(".")[2] else 2 if p in local else 1
        for name, p in module.named_parameters()
    ]
    first, second = ([_normalized(*pair, generator) for pair in zip(weights, dims, strict=True)] for _ in range(2))
    names = ("first random direction (filter norms)", "second random direction (filter norms)")
    return Plane(weights, first, second, (-span, span, -span, span), names)


def _normalized(weight: Tensor, dims: int, generator: torch.Generator) -> Tensor:
    if dims == 0:
        return torch.zeros_like(weight)
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight)
    lengths, noise_lengths = (
        torch.linalg.vector_norm(tensor, dim=tuple(range(dims, weight.ndim)), keepdim=True)
        for tensor in (weight, noise)
    )
    return noise * (lengths / noise_lengths.clamp(min=1e-12))


def trajectory_plane(trajectory: Sequence[Weights], steps: Sequence[int]) -> Plane:
    """Returns the plane through the last weights along the first two principal components, of unit length, of the
    differences to the last weights. Requires three or more weights."""
    last = trajectory[-1]
    *earlier, end = (flat([weight.detach().double() for weight in weights]) for weights in trajectory)
    differences = torch.stack([vector - end for vector in earlier])
    _, scales, rows = torch.linalg.svd(differences, full_matrices=False)
    fractions = scales**2 / (scales**2).sum()
    coordinates = torch.cat([differences @ rows[:2].T, differences.new_zeros(1, 2)])
    low, high = coordinates.min(0).values, coordinates.max(0).values
    margin = 0.25 * (high - low).clamp(min=0.25 * float((high - low).max()))
    window = (low[0] - margin[0], high[0] + margin[0], low[1] - margin[1], high[1] + margin[1])
    first, second = (_shaped(row, last) for row in rows[:2])
    x, y = (f"principal component {i + 1} ({float(fractions[i]):.0%} of the variance)" for i in range(2))
    left, right, bottom, top = map(float, window)
    return Plane(last, first, second, (left, right, bottom, top), (x, y), coordinates, list(steps))


def _shaped(vector: Tensor, like: Weights) -> list[Tensor]:
    slices = vector.split([weight.numel() for weight in like])
    return [values.view(weight.shape).to(weight) for values, weight in zip(slices, like, strict=True)]


@torch.no_grad()
def surface(
    module: nn.Module, loss: Callable[[], Tensor], plane: Plane, points: int, moved: Callable[[int], None]
) -> Tensor:
    """Evaluates the loss [points, points] on the plane, row by row from the bottom; restores the module's weights.

    Disables dropout. BatchNorm normalizes with batch statistics, because running statistics belong to one point of the
    plane. Calls `moved` with the number of evaluated points.
    """
    parameters = list(module.parameters())
    left, right, bottom, top = plane.window
    values = torch.empty(points, points, dtype=torch.float64)
    with evaluation_mode(module):
        for layer in module.modules():
            if isinstance(layer, _BatchNorm):
                layer.train()
        with frozen_statistics(module), restoring(parameters):
            for i, y in enumerate(np.linspace(bottom, top, points)):
                for j, x in enumerate(np.linspace(left, right, points)):
                    for p, origin, one, two in zip(parameters, plane.origin, plane.first, plane.second, strict=True):
                        p.copy_(origin + x * one + y * two)
                    values[i, j] = float(loss())
                moved((i + 1) * points)
    return values


def draw(plane: Plane, values: Tensor, *, title: str, subtitle: str) -> "Figure":
    """Plots contours of the loss, evenly spaced on a logarithmic scale, and the run's trajectory if there is one.

    Errors: UserError if the loss is finite nowhere.
    """
    if not values.isfinite().any():
        raise UserError(f"{title}: the loss is not finite at any point; use another checkpoint or a smaller span")
    figure = drawing.figure(8, 6.4)
    axes = figure.add_subplot()
    left, right, bottom, top = plane.window
    x, y = np.linspace(left, right, len(values)), np.linspace(bottom, top, len(values))
    heights = values.clamp(min=1e-12).numpy()
    finite = heights[np.isfinite(heights)]
    levels = np.geomspace(finite.min(), finite.max() * (1 + 1e-9), 25)
    filled = axes.contourf(x, y, heights, levels=levels, cmap="viridis_r", norm="log")
    axes.contour(x, y, heights, levels=levels, colors="white", linewidths=0.4)
    ticks = levels[::4].tolist()
    # Enough digits to distinguish the ticks: the losses of a small window differ little.
    digits = next((n for n in range(3, 12) if len({f"{tick:.{n}g}" for tick in ticks}) == len(ticks)), 3)
    bar = figure.colorbar(filled, ax=axes, label="training loss", format=f"%.{digits}g")
    bar.set_ticks(ticks)
    if plane.trajectory is not None:
        trajectory = plane.trajectory.numpy()
        axes.plot(*trajectory.T, "-o", color=drawing.COLOURS[1], markersize=4, linewidth=1.5)
        for i in (0, len(trajectory) - 1):
            box = {"boxstyle": "round", "facecolor": "white", "alpha": 0.8, "linewidth": 0}
            text = f"update {plane.steps[i]:,}"
            axes.annotate(text, trajectory[i], xytext=(9, 9), textcoords="offset points", fontsize=9, bbox=box)
    axes.plot(0, 0, "*", color="white", markeredgecolor="black", markersize=16)
    axes.set(xlabel=plane.axes[0], ylabel=plane.axes[1])
    axes.set_title(drawing.title_with_subtitle(title, subtitle), fontsize=10)
    return figure
