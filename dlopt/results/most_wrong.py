"""The most wrong samples of a test: the least probable classes and labels that are true, the largest errors of values.

`dlopt eval` writes them as a table and, if they are images, as a picture.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dlopt.metrics.labels import THRESHOLD
from dlopt.results import drawing
from dlopt.results.tables import spreadsheet_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image
    from torch import Tensor

    from dlopt.metrics.declaration import Evaluated

COUNT = 24
TILE = 132  # largest width and height of an image in the picture, pixels
DPI = 120
_COLUMNS, _FEWEST_COLUMNS = 6, 4
_CELL_WIDTH, _TITLE_HEIGHT, _TEXT_HEIGHT, _MARGIN = TILE + 16, 60, 50, 8
_LONGEST = 19  # characters below an image


@dataclass(frozen=True)
class Wrong:
    """A wrongly predicted sample.

    Attributes:
        position: in the split, from 0.
        true: its class, labels or value.
        predicted: likewise.
        probability: of the predicted class, or of `label`; None for values.
        label: of several labels the one that is most wrong.
        source: file or row of the sample; empty if it has none.
        box: left, top, width and height of its image in the picture, in pixels; None without a picture.
    """

    position: int
    true: str
    predicted: str
    probability: float | None = None
    label: str = ""
    source: str = ""
    box: tuple[int, int, int, int] | None = None


def of_classes(part: "Evaluated", names: Sequence[str]) -> tuple[list[Wrong], int]:
    """Returns the wrong samples whose class has the lowest probabilities, and how many are wrong in all.

    Samples whose outputs have NaN are left out, here and below.
    """
    wrong = ((part.predictions != part.targets) & (part.predictions >= 0)).nonzero().flatten()
    probabilities, targets, best = (each[wrong] for each in (part.exact_probabilities, part.targets, part.predictions))
    order = probabilities.gather(1, targets[:, None]).flatten().argsort(stable=True)[:COUNT].tolist()
    chosen = ((i, int(targets[i]), int(best[i])) for i in order)
    return [Wrong(int(wrong[i]), names[a], names[b], float(probabilities[i, b])) for i, a, b in chosen], len(wrong)


def of_labels(part: "Evaluated", names: Sequence[str]) -> tuple[list[Wrong], int]:
    """Returns the wrong samples with the largest error of a label's probability, and how many are wrong in all."""
    probabilities, true = part.exact_probabilities, part.targets > 0
    predicted = probabilities >= THRESHOLD
    wrong = ((predicted != true).any(1) & ~probabilities.isnan().any(1)).nonzero().flatten()
    errors, labels = (probabilities - true.double()).abs()[wrong].max(1)
    found = []
    for i in errors.argsort(stable=True, descending=True)[:COUNT].tolist():
        position, label = int(wrong[i]), int(labels[i])
        a, b = ("; ".join(names[k] for k in each[position].nonzero().flatten()) for each in (true, predicted))
        found.append(Wrong(position, a, b, float(probabilities[position, label]), names[label]))
    return found, len(wrong)


def of_values(targets: "Tensor", predictions: "Tensor") -> list[Wrong]:
    """Returns the samples with the largest errors; float64 [N, K] each, in the unit of the targets."""
    errors = (predictions - targets).abs().amax(1)
    order = errors.nan_to_num(nan=-1.0).argsort(stable=True, descending=True)[:COUNT].tolist()
    pairs = [(i, *("; ".join(f"{value:.6g}" for value in each[i].tolist()) for each in (targets, predictions)))
             for i in order if not errors[i].isnan()]  # fmt: skip
    return [Wrong(*pair) for pair in pairs]


def table(samples: Sequence[Wrong], values: Mapping[str, Sequence[str | float]]) -> str:
    """Formats samples as CSV; `values`: further columns, such as the features of rows."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["position", "source", "true", "predicted", "label", "probability"]
    columns = [name for name in columns if any(getattr(each, name) not in ("", None) for each in samples)]
    writer.writerow([*columns, *map(spreadsheet_cell, values)])
    for i, each in enumerate(samples):
        cells = [getattr(each, name) for name in columns]
        writer.writerow(map(spreadsheet_cell, [*cells, *(column[i] for column in values.values())]))
    return text.getvalue()


def draw(samples: Sequence[Wrong], tiles: "Sequence[Image]", title: str) -> tuple["Figure", list[Wrong]]:
    """Draws image samples above their class and their prediction; also returns the samples with their boxes.

    `tiles`: RGB, of at most `TILE` pixels.
    """
    columns = min(max(len(samples), _FEWEST_COLUMNS), _COLUMNS)
    highest = max(tile.height for tile in tiles)
    rows = -(-len(samples) // columns)
    width, height = columns * _CELL_WIDTH + _MARGIN, _TITLE_HEIGHT + rows * (highest + _TEXT_HEIGHT)
    figure = drawing.figure(width / DPI, height / DPI)
    figure.set_layout_engine(None)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    axes.set_axis_off()
    axes.text(width / 2, 12, title, ha="center", va="top", fontsize=10, linespacing=1.3)
    boxed = []
    for number, (sample, tile) in enumerate(zip(samples, tiles, strict=True)):
        row, column = divmod(number, columns)
        left = _MARGIN + column * _CELL_WIDTH + (TILE - tile.width) // 2
        bottom = _TITLE_HEIGHT + row * (highest + _TEXT_HEIGHT) + highest
        box = left, bottom - tile.height, tile.width, tile.height
        axes.imshow(tile, extent=(left, left + tile.width, bottom, bottom - tile.height), interpolation="nearest")
        middle = _MARGIN + column * _CELL_WIDTH + TILE / 2
        share = "" if sample.probability is None else f" {100 * sample.probability:.1f} %"
        predicted = shortened(sample.label or sample.predicted, _LONGEST - len(share)) + share
        true = shortened(sample.true) or "none"  # of several labels
        for line, (text, colour) in enumerate([(true, "black"), (predicted, drawing.COLOURS[1])]):
            style: Any = {"ha": "center", "va": "top", "fontsize": 8, "color": colour, "parse_math": False}
            axes.text(middle, bottom + 4 + 17 * line, text, **style)
        boxed.append(replace(sample, box=box))
    axes.set_aspect("auto")
    return figure, boxed


def shortened(name: str, longest: int = _LONGEST) -> str:
    """Shortens a name that is too long in its middle."""
    name = name.encode(errors="backslashreplace").decode()  # folders' names may not be UTF-8
    half = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[: longest - 1 - half]}…{name[-half:]}"
