"""The picture that a single run leaves in its folder: losses, accuracies and learning rate over the epochs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlopt.basics.files import read_json, write_atomically
from dlopt.basics.folders import RunFolder
from dlopt.basics.formats import format_epoch_number
from dlopt.basics.plain_values import flatten
from dlopt.metrics.names import Metric, Split, set_of, validation_sets
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
    config = flatten(RunFolder(folder).config() or {})
    figure = draw(read_metrics(folder), read_summary(folder) or {}, choices, restarts, config)
    write_atomically(folder / PICTURE, drawing.encoded(figure, "png", dpi=120))
    return folder / PICTURE


def draw(
    history: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    choices: Mapping[str, str],
    restarts: Sequence[float],
    config: Mapping[str, Any] | None = None,
) -> "Figure":
    """Plots the lines of metrics.jsonl in one panel each for losses, accuracies (if any) and the learning rate.

    `config`: of the run, by dotted key, for its validation sets with names.
    """
    sets = validation_sets(config or {})
    selected = set_of(str((config or {}).get("monitor")), sets)  # the set that chooses the best model
    metrics = [name for name in _PANELS if any(column in line for line in history for column in _columns(name, sets))]
    figure = drawing.figure(4.2 * (len(metrics) + 1), 3.6, _title(summary, choices))
    panels = figure.subplots(1, len(metrics) + 1, squeeze=False)[0]
    epochs = [line["epoch"] for line in history]
    marker = {"marker": "o", "markersize": 3} if len(epochs) <= _MAX_MARKED else {}
    for axes, name in zip(panels, metrics, strict=False):
        columns = _columns(name, sets)
        for i, (column, label) in enumerate(columns.items()):
            values = _values(history, column)
            if not all(map(math.isnan, values)):
                axes.plot(epochs, values, label=label, **drawing.style(i), **marker)
        monitored = Metric("val", name).on_set(selected) if selected else Metric("val", name)
        place = [*columns].index(monitored.column)
        _mark_best(
            axes, history, summary.get("best_epoch"), monitored.column, drawing.COLOURS[place % len(drawing.COLOURS)]
        )
        axes.set_ylabel("accuracy (%)" if name == "accuracy" else name)
        losses = [loss for column in columns for loss in _values(history, column) if math.isfinite(loss)]
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


def _columns(name: str, sets: Sequence[str]) -> dict[str, str]:
    """Returns the columns of a panel, and the labels of their lines."""
    found = {Metric(split, name).column: label for split, label in _SPLITS.items()}
    for each in sets:
        found[Metric("val", name).on_set(each).column] = f"validation: {drawing.literal(each)}"
    return found


def _mark_best(
    axes: "Axes", history: Sequence[Mapping[str, Any]], epoch: float | None, column: str, colour: str
) -> None:
    best = [line for line in history if line["epoch"] == epoch]
    if epoch is not None and best and not math.isnan(value := _values(best, column)[0]):
        label = f"best: epoch {format_epoch_number(epoch)}"
        axes.plot([epoch], [value], "*", color=colour, markersize=11, label=label)


def _values(history: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Returns a metric of every line; NaN where it is missing. Accuracies in percent, as on the screen."""
    scale = 100.0 if is_percent(key) else 1.0
    return [math.nan if line.get(key) is None else scale * line[key] for line in history]
