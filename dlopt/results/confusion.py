"""Confusion matrices as CSV and as plots."""

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dlopt.results import drawing
from dlopt.results.tables import spreadsheet_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

_MAX_COUNTED_CLASSES = 20  # the cells of larger confusion matrices are too small for their counts
_MAX_NAMED_CLASSES = 60  # the names of more classes are unreadable
_WIDEST = 40  # characters of all names beside each other


def confusion_table(confusion: "Tensor", classes: Sequence[str]) -> str:
    """Formats counts [true, predicted] as CSV: one row per true class, one column per predicted class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(map(spreadsheet_cell, classes))
    writer.writerow(["true \\ predicted", *names])
    for name, row in zip(names, confusion.tolist(), strict=True):
        writer.writerow([name, *row])
    return text.getvalue()


def plot_confusion(confusion: "Tensor", classes: Sequence[str], title: str) -> "Figure":
    """Plots counts [true, predicted], coloured by the fraction of the true class; small matrices show both in cells."""
    count = len(classes)
    classes = [name.encode(errors="backslashreplace").decode() for name in classes]  # folders' names may not be UTF-8
    fractions = (confusion / confusion.sum(1, keepdim=True).clamp(min=1)).tolist()
    size = min(max(3.2 + 0.42 * count, 5.0), 14.0)
    fontsize = 8 if count <= _MAX_COUNTED_CLASSES // 2 else 6
    figure = drawing.figure(size + 0.8, size)
    axes = figure.add_subplot()
    image = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="fraction of the true class", shrink=0.8)
    if count <= _MAX_COUNTED_CLASSES:
        for y, row in enumerate(confusion.tolist()):
            for x, number in enumerate(row):
                colour = "white" if fractions[y][x] > 0.5 else "black"
                if number:
                    text = f"{number:,}\n{100 * fractions[y][x]:.0f} %"
                    axes.text(x, y, text, ha="center", va="center", fontsize=fontsize, linespacing=1, color=colour)
    if count <= _MAX_NAMED_CLASSES:
        longest = max(len(name) for name in classes)
        rotation = 90 if longest * count > _WIDEST else 0
        axes.set_xticks(range(count), classes, rotation=rotation, fontsize=8, parse_math=False)
        axes.set_yticks(range(count), classes, fontsize=8, parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title, fontsize=11)
    return figure
