"""The results of `dlopt eval`: a line per class, eval.json, the confusion matrix, reconstructions."""

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dlopt.basics.files import write_atomically
from dlopt.basics.formats import format_number, format_percent
from dlopt.basics.plain_values import without_nan
from dlopt.basics.secrets import redacted
from dlopt.instruments import reconstructions
from dlopt.metrics.names import set_of, without_set
from dlopt.metrics.shown import format_metric, live_name
from dlopt.parallel.mode import Mode
from dlopt.results.confusion import confusion_table, plot_confusion
from dlopt.trained.ensemble import SPLITS, Tested

_MAX_LISTED_CLASSES = 20
_WIDTH = 80  # characters of a line


def class_lines(tested: Tested) -> list[str]:
    """Returns lines with the accuracy of each class, or the average precision of each label; of many the lowest."""
    if not (per_class := tested.per_class):
        return []
    is_label = "average_precision" in per_class[0]
    name = "average_precision" if is_label else "accuracy"
    show = format_number if is_label else format_percent
    rows = [row for row in per_class if row[name] is not None]
    title = "average precision per label" if is_label else "accuracy per class"
    if len(per_class) > _MAX_LISTED_CLASSES:
        title = "lowest average precisions" if is_label else "lowest accuracies"
        rows = sorted(rows, key=lambda row: row[name])[:5]
    lines = [f"{title}:"]
    for number, row in enumerate(rows, 1):
        text = f"{row['class']} {show(row[name])}" + ("," if number < len(rows) else "")
        if len(f"{lines[-1]} {text}") > _WIDTH:
            lines.append(" ")
        lines[-1] += f" {text}"
    return lines


def set_lines(tested: Tested) -> list[str]:
    """Returns a line with the metrics of each named validation set."""
    lines = []
    for name in tested.sets:
        shown = []
        for column, value in tested.report.metrics.items():
            if set_of(column, [name]):
                metric = without_set(column, [name])
                shown.append(f"{live_name(metric)} {format_metric(metric, value)}")
        lines.append(f"validation set {name}: {', '.join(shown)}")
    return lines


def write(folder: Path, record: Mapping[str, Any], tested: Tested) -> dict[str, Path]:
    """Writes the metrics, with `record`, and the plots of a test. Returns description -> path. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    record = without_nan({**record, **tested.report.metrics, "classes": tested.per_class})
    files: dict[str, tuple[str, bytes | str]] = {
        "metrics": ("eval.json", json.dumps(redacted(record), indent=2) + "\n"),
    }
    confusion, classes = tested.report.confusion, tested.classes
    if confusion is not None and classes is not None:
        plot = io.BytesIO()
        samples, count = int(confusion.sum()) + tested.report.unpredicted, tested.report.unpredicted
        unpredicted = f", {count} of them with NaN outputs and no cell" if count else ""
        accuracy = format_percent(tested.report.metrics[f"{tested.split}_accuracy"])
        split = SPLITS[tested.split].partition(",")[0].capitalize()
        title = f"{split} accuracy {accuracy} ({samples} samples{unpredicted})"
        plot_confusion(confusion, classes, title).savefig(plot, dpi=150, format="png")
        table = confusion_table(confusion, classes)
        files["confusion matrix"] = ("confusion.csv", table)
        files["plot"] = ("confusion.png", plot.getvalue())
    for name, data in files.values():
        write_atomically(folder / name, data)
    written = {description: folder / name for description, (name, _) in files.items()}
    if tested.workload is not None:
        # All processes hold the whole model: one of them draws.
        alone = replace(tested.workload, parallel=Mode(tested.workload.device))
        if (picture := reconstructions.write(alone, folder)) is not None:
            written["reconstructions"] = picture
    return written
