"""Plots of a diagnosis: distributions per layer, metrics against depth, training, curvature, time lag."""

import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from dlopt.basics.formats import format_count
from dlopt.instruments.layers import SATURATED_SLOPE, LayerStatistics, Moments
from dlopt.lab.diagnosis.measuring import STEP_FRACTIONS, Diagnosis, Snapshot
from dlopt.results import drawing
from dlopt.results.drawing import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_PANELS = 6  # layers with a histogram, evenly spread over the depth
_BINS = 60
_SATURATED_COLOUR = "0.92"
_SATURATED_INPUT = 2 * math.atanh(math.sqrt(1 - SATURATED_SLOPE))  # of a sigmoid: 4.4; of a tanh half of it
_BEFORE: dict[str, Any] = {"linestyle": "-", "marker": "o", "markersize": 3}
_AFTER: dict[str, Any] = {"linestyle": (0, (4, 2)), "marker": "s", "markersize": 3, "alpha": 0.7}


def plots(diagnoses: Sequence[Diagnosis], title: str) -> dict[str, "Figure"]:
    """Returns file name -> figure; each shows all diagnoses."""
    gradients = "Back-propagated gradients (at the activations' inputs)"
    figures = {
        "activations": _distributions(diagnoses, lambda layer: layer.outputs, f"Activations: {title}"),
        "gradients": _distributions(diagnoses, lambda layer: layer.gradients, f"{gradients}: {title}"),
        "depth": _depth(diagnoses, title),
    }
    if any(layer.saturated is not None for diagnosis in diagnoses for layer in diagnosis.before.layers):
        figures["inputs"] = _inputs_on_curve(diagnoses, title)
    if any(diagnosis.trace.losses for diagnosis in diagnoses):
        figures["updates"] = _updates([diagnosis for diagnosis in diagnoses if diagnosis.trace.losses], title)
    if any(diagnosis.before.spectrum is not None for diagnosis in diagnoses):
        figures["curvature"] = _curvature(diagnoses, title)
    if any(diagnosis.before.lags for diagnosis in diagnoses):
        figures["time_lag"] = _time_lag(diagnoses, title)
    return figures


def _figure(width: float, height: float, title: str) -> "Figure":
    shorter = re.sub(r"\b(\w+)(?:,\1){3,}\b", lambda run: f"{run[1]},...,{run[1]}", title)  # widths of many layers
    return drawing.figure(width, height, "\n".join(textwrap.wrap(shorter, int(width * 11))))


def _finish(*panels: tuple["Axes", str, str]) -> None:
    """Labels the axes of each panel (axes, x, y)."""
    for axes, x, y in panels:
        drawing.clean_axes(axes, color="0.92")
        axes.set(xlabel=x, ylabel=y)


def _snapshots(diagnoses: Sequence[Diagnosis]) -> Iterator[tuple[Snapshot, dict[str, Any]]]:
    """Yields all snapshots with the style of their curves."""
    for diagnosis, colour in zip(diagnoses, cycle(COLOURS), strict=False):
        for snapshot in diagnosis.snapshots:
            when = _snapshot_label(snapshot)
            label = when if len(diagnoses) == 1 else f"{diagnosis.label}, {when}"
            style = _BEFORE if snapshot is diagnosis.before else _AFTER
            yield snapshot, {**style, "color": colour, "label": label}


def spread_layers(layers: Sequence[LayerStatistics]) -> list[int]:
    """Returns the indices of at most `_MOST_PANELS` layers, evenly spread from the first to the last."""
    count = min(len(layers), _MOST_PANELS)
    return [round(i * (len(layers) - 1) / max(count - 1, 1)) for i in range(count)]


def _distributions(
    diagnoses: Sequence[Diagnosis], moments: Callable[[LayerStatistics], Moments], title: str
) -> "Figure":
    """Plots histograms: a row per diagnosis, a panel per layer; filled before training, as a line after it."""
    active = [[layer for layer in d.before.layers if layer.activation] or d.before.layers for d in diagnoses]
    columns = max(len(spread_layers(layers)) for layers in active)
    figure = _figure(2.1 * columns + 0.4, 1.9 * len(diagnoses) + 1.1, title)
    grid = figure.subplots(len(diagnoses), columns, squeeze=False)
    for row, (diagnosis, layers) in enumerate(zip(diagnoses, active, strict=True)):
        chosen = [layers[i] for i in spread_layers(layers)]
        trained = {} if diagnosis.after is None else {layer.name: layer for layer in diagnosis.after.layers}
        bound = max((_bound(moments(layer).values) for layer in chosen), default=1.0)
        for axes, layer in zip(grid[row], chosen, strict=False):
            values = _finite(moments(layer).values)
            low = 0.0 if len(values) and values.min() >= 0 else -bound
            heights = _histogram(axes, values, (low, bound), fill=True, color=COLOURS[6])
            zeros = f", {(values == 0).mean():.0%} zeros" if len(values) and (values == 0).mean() > 0.05 else ""
            if layer.name in trained:
                values = _finite(moments(trained[layer.name]).values)
                _histogram(axes, values, (low, bound), color=COLOURS[1], linewidth=1)
            if zeros and sorted(heights)[-2] > 0:
                axes.set_ylim(0, 1.3 * sorted(heights)[-2])  # else the zeros of a ReLU hide all other bars
            axes.set_title(f"{layer.name}\nstd {moments(layer).std:.2g}{zeros}", fontsize=10)
            axes.set_yticks([])
            axes.tick_params(labelsize=9)
            axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))
            axes.xaxis.get_offset_text().set_fontsize(9)
            axes.spines[["top", "right", "left"]].set_visible(False)
        for axes in grid[row][len(chosen) :]:
            axes.set_visible(False)
        grid[row][0].set_ylabel("\n".join(textwrap.wrap(diagnosis.label, 22)), fontsize=10)
    _snapshot_legend(figure, diagnoses)
    return figure


def _inputs_on_curve(diagnoses: Sequence[Diagnosis], title: str) -> "Figure":
    """Plots where the inputs of sigmoids and tanhs are on the curve: a row per diagnosis, a panel per layer.

    The histograms (filled before training, a line after it) are as high as the curve; grey: where values are saturated.
    """
    active = [[layer for layer in d.before.layers if layer.saturated is not None] for d in diagnoses]
    columns = max(len(spread_layers(layers)) for layers in active)
    width, height = 2.7 * columns + 0.8, 1.75 * len(diagnoses) + 1.2
    figure = _figure(width, height, f"Inputs of the activations, on the curve: {title}")
    grid = figure.subplots(len(diagnoses), columns, squeeze=False, sharex=True)
    every = [layer for d in diagnoses for snapshot in d.snapshots for layer in snapshot.layers]
    edge = max(6.0, *(_bound(layer.inputs.values) for layer in every if layer.saturated is not None))
    for row, (diagnosis, layers) in enumerate(zip(diagnoses, active, strict=True)):
        trained = {} if diagnosis.after is None else {layer.name: layer for layer in diagnosis.after.layers}
        chosen = [layers[i] for i in spread_layers(layers)]
        for number, (axes, layer) in enumerate(zip(grid[row], chosen, strict=False), 1):
            snapshots = [layer, *([trained[layer.name]] if layer.name in trained else [])]
            _curve_and_inputs(axes, snapshots, edge)
            fractions = " to ".join(f"{100 * (each.saturated or 0):.0f} %" for each in snapshots)
            axes.set_title(f"layer {number}, saturated: {fractions}", fontsize=10)
            axes.tick_params(labelsize=9)
            if row == len(diagnoses) - 1:
                axes.set_xlabel("input of the activation", fontsize=10)
        for axes in grid[row][len(chosen) :]:
            axes.set_visible(False)
        grid[row][0].set_ylabel("\n".join([*textwrap.wrap(diagnosis.label, 22), "(activation)"]), fontsize=10)
    _snapshot_legend(figure, diagnoses, ("slope below 5 % of the largest", _SATURATED_COLOUR))
    return figure


def _curve_and_inputs(axes: "Axes", snapshots: Sequence[LayerStatistics], edge: float) -> None:
    """Draws the sigmoid or tanh from -edge to edge, and the inputs of one layer before and after training."""
    function = torch.sigmoid if snapshots[0].activation == "Sigmoid" else torch.tanh
    x = torch.linspace(-edge, edge, 401)
    low = float(function(torch.tensor(-math.inf)))
    limit = _SATURATED_INPUT if function is torch.sigmoid else _SATURATED_INPUT / 2
    for left, right in ((-edge, -limit), (limit, edge)):
        axes.axvspan(left, right, color=_SATURATED_COLOUR, zorder=0)
    styles: tuple[dict[str, Any], ...] = ({"fill": True, "color": COLOURS[6]}, {"color": COLOURS[1]})
    for layer, style in zip(snapshots, styles, strict=False):
        heights, edges = _density(_finite(layer.inputs.values), (-edge, edge), 2 * _BINS)
        scaled = low + (1 - low) * heights / max(heights.max(), 1e-12)
        axes.stairs(scaled, edges, baseline=low, linewidth=1.5, **style)
    axes.plot(x, function(x), color="black", linewidth=2)
    axes.set(xlim=(-edge, edge))
    axes.spines[["top", "right"]].set_visible(False)


def _density(values: Any, limits: tuple[float, float], bins: int = _BINS) -> tuple[Any, Any]:
    """Returns the heights and edges of a histogram."""
    import numpy

    counts, edges = numpy.histogram(values, bins, range=limits)
    return counts / max(counts.sum(), 1) / (edges[1] - edges[0]), edges


def _histogram(axes: "Axes", values: Any, limits: tuple[float, float], **style: Any) -> Sequence[float]:
    """Draws the outline of a histogram, much faster than a rectangle per bar; returns the heights."""
    heights, edges = _density(values, limits)
    axes.stairs(heights, edges, **style)
    return [*heights]


def _snapshot_legend(figure: "Figure", diagnoses: Sequence[Diagnosis], *areas: tuple[str, str]) -> None:
    """Adds the legend of the snapshots and of shaded areas (label, colour)."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=COLOURS[6], label=_snapshot_label(diagnoses[0].before))]
    after = next((diagnosis.after for diagnosis in diagnoses if diagnosis.after is not None), None)
    if after is not None:
        handles.append(Line2D([], [], color=COLOURS[1], label=_snapshot_label(after)))
    handles += [Patch(color=colour, label=label) for label, colour in areas]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=10)


def _snapshot_label(snapshot: Snapshot) -> str:
    return "at initialization" if snapshot.updates == 0 else f"after {format_count('updates', snapshot.updates)}"


def _finite(values: torch.Tensor) -> Any:
    return values[values.isfinite()].numpy()


def _bound(values: torch.Tensor) -> float:
    """Returns half the width of the axis, which covers 99.9 % of the values."""
    finite = values[values.isfinite()].abs()
    bound = float(finite.quantile(0.999)) if len(finite) else 1.0
    return bound if bound > 0 else 1.0


def _depth(diagnoses: Sequence[Diagnosis], title: str) -> "Figure":
    figure = _figure(10, 7, f"Against depth: {title}")
    [(outputs, inputs), (weights, fractions)] = figure.subplots(2, 2)
    for snapshot, style in _snapshots(diagnoses):
        depth = range(1, len(snapshot.layers) + 1)
        outputs.plot(depth, [layer.outputs.std for layer in snapshot.layers], **style)
        inputs.plot(depth, [layer.gradient_norm for layer in snapshot.layers], **style)
        inactive = [layer.inactive for layer in snapshot.layers]
        fractions.plot(depth, [math.nan if fraction is None else fraction for fraction in inactive], **style)
        # Frozen layers have no norm, but count in the depth.
        norms = [snapshot.gradient_norms.get(layer.name, [math.nan]) for layer in snapshot.layers]
        weights.plot(depth, [sum(values) / len(values) for values in norms], **style)
        low, high = [min(values) for values in norms], [max(values) for values in norms]
        weights.fill_between(depth, low, high, color=style["color"], alpha=0.15, linewidth=0)
    depth_name = "layer, from the input"
    _finish(
        (outputs, depth_name, "standard deviation of the activations"),
        (inputs, depth_name, "norm of the gradient at the\nactivations' inputs"),
        (weights, depth_name, "norm of the weights' gradient\n(band: smallest to largest batch)"),
        (fractions, depth_name, _inactive_label(diagnoses)),
    )
    drawing.logarithmic(outputs, inputs, weights)
    drawing.integer_ticks(outputs, inputs, weights, fractions)
    fractions.set_ylim(-0.02, 1.02)
    for axes in (weights, fractions):
        axes.set_xlim(outputs.get_xlim())  # also of layers without a value
    drawing.legend_below(figure, outputs, 2)
    return figure


def _inactive_label(diagnoses: Sequence[Diagnosis]) -> str:
    layers = [layer for diagnosis in diagnoses for layer in diagnosis.before.layers]
    names = ["saturated values"] if any(layer.saturated is not None for layer in layers) else []
    names += ["dead units"] if any(layer.dead is not None for layer in layers) else []
    return "fraction of " + (", ".join(names) or "saturated values (no such activation)")


def _updates(diagnoses: Sequence[Diagnosis], title: str) -> "Figure":
    figure = _figure(11, 3.9, f"Updates: {title}")
    loss, norm, ratio = figure.subplots(1, 3)
    several, clipped = len(diagnoses) > 1, any(map(_was_clipped, diagnoses))
    for diagnosis, colour in zip(diagnoses, cycle(COLOURS), strict=False):
        trace = diagnosis.trace
        updates = range(diagnosis.before.updates + 1, diagnosis.before.updates + len(trace.losses) + 1)
        loss.plot(updates, trace.losses, color=colour, label=diagnosis.label if several else None)
        norm.plot(updates, trace.norms, color=colour, label=None if several else "before clipping")
        if _was_clipped(diagnosis):
            norm.plot(updates, trace.clipped, color=colour, linestyle=":", label=None if several else "after clipping")
        if several:
            ratio.plot(updates, [*map(median, zip(*trace.ratios.values(), strict=True))], color=colour)
        else:
            _plot_by_layer(figure, ratio, updates, trace.ratios)
    ratio.axhline(1e-3, color="0.5", linewidth=1, linestyle=":")
    of_layers = "median over layers" if several else "of each layer"
    _finish(
        (loss, "update", "loss of the batch"),
        (norm, "update", "norm of the gradient" + ("\n(dotted: after clipping)" if clipped and several else "")),
        (ratio, "update", f"||update|| / ||weights||\n{of_layers} (dotted: 1e-3, typical)"),
    )
    drawing.integer_ticks(loss, norm, ratio)
    drawing.logarithmic(norm, ratio)
    if clipped and not several:
        norm.legend(frameon=False, fontsize=8)
    if several:
        figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _plot_by_layer(figure: "Figure", axes: "Axes", updates: range, ratios: dict[str, list[float]]) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colours = ScalarMappable(Normalize(1, max(len(ratios), 2)), colormaps["viridis"])
    for number, values in enumerate(ratios.values(), 1):
        axes.plot(updates, values, color=colormaps["viridis"]((number - 1) / max(len(ratios) - 1, 1)), linewidth=1)
    figure.colorbar(colours, ax=axes, label="layer, from the input")


def _was_clipped(diagnosis: Diagnosis) -> bool:
    pairs = zip(diagnosis.trace.norms, diagnosis.trace.clipped, strict=True)
    return any(after < before * (1 - 1e-4) for before, after in pairs)


def _curvature(diagnoses: Sequence[Diagnosis], title: str) -> "Figure":
    figure = _figure(11, 3.9, f"Curvature of the loss of one batch: {title}")
    spectrum, along, losses = figure.subplots(1, 3)
    for snapshot, style in _snapshots(diagnoses):
        if snapshot.spectrum is not None:
            values = snapshot.spectrum.eigenvalues.tolist()
            spectrum.plot(range(1, len(values) + 1), values, **style)
    for diagnosis, colour in zip(diagnoses, cycle(COLOURS), strict=False):
        trace, first = diagnosis.trace, diagnosis.before.updates + 1
        along.plot([first + u for u in trace.curvatures], list(trace.curvatures.values()), color=colour, marker="o")
        losses.plot(STEP_FRACTIONS[: len(trace.along)], trace.along, color=colour, marker="o", markersize=3)
    losses.axvline(1, color="0.5", linewidth=1, linestyle=":")
    _finish(
        (spectrum, "rank", "eigenvalues of the Hessian\n(lower bounds)"),
        (along, "update", "curvature along the update\n(d'Hd / d'd)"),
        (losses, "fraction of the last update (1: as made)", "loss of its batch"),
    )
    drawing.integer_ticks(spectrum, along)
    drawing.legend_below(figure, spectrum, 2)
    return figure


def _time_lag(diagnoses: Sequence[Diagnosis], title: str) -> "Figure":
    """Plots the gradient at the states (left) and each step's term of the recurrent weight's gradient (right)."""
    figure = _figure(10, 4.3, f"Gradient against time lag at initialization: {title}")
    states, weights = figure.subplots(1, 2)
    for diagnosis in diagnoses:
        factor = clipping_factor(diagnosis)
        for lag in diagnosis.before.lags:
            colour = COLOURS[len(states.lines) % len(COLOURS)]
            name = lag.name if len(diagnoses) == 1 else diagnosis.label
            if len(diagnosis.before.lags) > 1 and len(diagnoses) > 1:
                name += f", {lag.name}"
            states.plot(range(1, len(lag.states) + 1), lag.states, color=colour, label=name)
            weights.plot(lag.contributions, color=colour)
            if factor < 1:
                weights.plot([factor * norm for norm in lag.contributions], color=colour, linestyle=":")
    clipped = ", dotted: clipped" if any(clipping_factor(diagnosis) < 1 for diagnosis in diagnoses) else ""
    steps = "time steps before the last one"
    _finish(
        (states, steps, "norm of the gradient at the state"),
        (weights, steps, f"norm of the step's term in the gradient\nof the recurrent weight{clipped}"),
    )
    drawing.logarithmic(states, weights)
    drawing.legend_below(figure, states, 2)
    return figure


def clipping_factor(diagnosis: Diagnosis) -> float:
    """Returns the gradient norm of the first update after clipping over the norm before."""
    trace = diagnosis.trace
    if not trace.norms or not trace.norms[0] > 0:
        return 1.0
    factor = trace.clipped[0] / trace.norms[0]
    return factor if factor < 1 - 1e-4 else 1.0
