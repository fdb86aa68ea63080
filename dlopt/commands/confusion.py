"""The confusion matrix as a picture and as a table."""

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_NUMBERS = 20  # classes up to which each cell shows its count
_MOST_NAMES = 60  # classes up to which their names can be read


def confusion_table(confusion: Tensor, classes: Sequence[str]) -> str:
    """CSV: a row per true class, a column per predicted one, counts in the cells."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true \\ predicted", *classes])
    for name, row in zip(classes, confusion.tolist(), strict=True):
        writer.writerow([name, *row])
    return text.getvalue()


def confusion_picture(confusion: Tensor, classes: Sequence[str], title: str) -> "Figure":
    """Rows are true classes, shaded by the share of the row; counts stand in the cells where there is room."""
    from matplotlib.figure import Figure

    count = len(classes)
    shares = (confusion / confusion.sum(1, keepdim=True).clamp(min=1)).tolist()
    size = min(max(3.2 + 0.42 * count, 5.0), 14.0)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    if count <= _MOST_NUMBERS:
        for y, row in enumerate(confusion.tolist()):
            for x, number in enumerate(row):
                colour = "white" if shares[y][x] > 0.5 else "black"
                if number:
                    axes.text(x, y, f"{number}", ha="center", va="center", fontsize=8, color=colour)
    if count <= _MOST_NAMES:
        longest = max(len(name) for name in classes)
        axes.set_xticks(range(count), classes, rotation=90 if longest > 3 else 0, fontsize=8, parse_math=False)
        axes.set_yticks(range(count), classes, fontsize=8, parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title, fontsize=11)
    return figure
