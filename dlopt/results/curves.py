"""The picture that a single run leaves in its folder: losses, accuracies and learning rate over the epochs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlopt.basics.files import read_json, write_atomically
from dlopt.basics.formats import format_epoch_number
from dlopt.metrics.names import Metric, Split
from dlopt.metrics.shown import format_metric, is_percent
from dlopt.results import drawing
from dlopt.tracking.metrics import read_metrics, read_summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE = "curves.png"
_PANELS = ("loss", "accuracy")
_SPLITS: Mapping[Split, str] = {"train": "training", "val": "validation"}
_MAX_MARKED = 40  # epochs; markers of more would hide the curve


def write(folder: Path, restarts: Sequence[float]) -> Path:
    """Draws the metrics of a run folder into `PICTURE` and returns its path.

    `restarts`: positions, in epochs, at which the schedule starts another cycle.
    """
    choices = (read_json(folder / "environment.json") or {}).get("choices") or {}
    figure = draw(read_metrics(folder), read_summary(folder) or {}, choices, restarts)
    write_atomically(folder / PICTURE, drawing.encoded(figure, "png", dpi=120))
    return folder / PICTURE


def draw(
    history: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    choices: Mapping[str, str],
    restarts: Sequence[float],
) -> "Figure":
    """Plots the lines of metrics.jsonl in one panel each for losses, accuracies (if any) and the learning rate."""
    metrics = [
        name for name in _PANELS if any(Metric(split, name).column in line for line in history for split in _SPLITS)
    ]
    figure = drawing.figure(4.2 * (len(metrics) + 1), 3.6, _title(summary, choices))
    panels = figure.subplots(1, len(metrics) + 1, squeeze=False)[0]
    epochs = [line["epoch"] for line in history]
    marker = {"marker": "o", "markersize": 3} if len(epochs) <= _MAX_MARKED else {}
    for axes, name in zip(panels, metrics, strict=False):
        for i, (split, label) in enumerate(_SPLITS.items()):
            values = _values(history, Metric(split, name).column)
            if not all(map(math.isnan, values)):
                axes.plot(epochs, values, label=label, **drawing.style(i), **marker)
        _mark_best(axes, history, summary.get("best_epoch"), name)
        axes.set_ylabel("accuracy [%]" if name == "accuracy" else name)
        losses = [
            loss for split in _SPLITS for loss in _values(history, Metric(split, "loss").column) if math.isfinite(loss)
        ]
        if name == "loss" and drawing.spans_decades(losses):
            drawing.logarithmic(axes)
    panels[-1].plot(epochs, _values(history, "lr"), **drawing.style(2, dash=0), **marker)
    panels[-1].set_ylabel("learning rate (end of epoch)")
    for axes in panels:
        for i, position in enumerate(restarts):
            axes.axvline(
                position, color="0.6", linewidth=1, linestyle=":", label="" if i else "restart of the schedule"
            )
        axes.set_xlabel("epoch")
    drawing.legend_below(figure, panels[0], columns=4)  # the first panel has the lines of the others
    drawing.integer_ticks(*panels)
    drawing.clean_axes(*panels)
    return figure


def _title(summary: Mapping[str, Any], choices: Mapping[str, str]) -> str:
    """Returns "mlp on digits, sgd: test accuracy 97.22 %"."""
    names = [choices.get(group) for group in ("model", "data", "optimizer")]
    run = "{} on {}, {}".format(*names) if all(names) else ""
    metric = next((key for key in ("test_accuracy", "test_loss") if summary.get(key) is not None), None)
    result = "" if metric is None else f"{metric.replace('_', ' ')} {format_metric(metric, summary[metric])}"
    return ": ".join(text for text in (run, result) if text)


def _mark_best(axes: "Axes", history: Sequence[Mapping[str, Any]], epoch: float | None, name: str) -> None:
    best = [line for line in history if line["epoch"] == epoch]
    if epoch is not None and best and not math.isnan(value := _values(best, Metric("val", name).column)[0]):
        label = f"best: epoch {format_epoch_number(epoch)}"
        axes.plot([epoch], [value], "*", color=drawing.COLOURS[1], markersize=11, label=label)


def _values(history: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Returns a metric of every line; NaN where it is missing. Accuracies in percent, as on the screen."""
    scale = 100.0 if is_percent(key) else 1.0
    return [math.nan if line.get(key) is None else scale * line[key] for line in history]
