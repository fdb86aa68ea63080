"""The tests of runs on the page of a report: what their folders hold of them, read with limits.

Pictures are decoded and encoded again: nothing of a file is passed on.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from dlopt.basics.errors import UserError
from dlopt.basics.formats import printable
from dlopt.basics.plain_values import read_regular
from dlopt.basics.stored import Stored
from dlopt.results.most_wrong import COUNT, Wrong
from dlopt.results.tested_curves import Curve, Curves, thinned

_LARGEST, _LARGEST_PICTURE = 4_000_000, 8_000_000  # bytes
_MOST_PIXELS = 4_000_000
_MOST_CLASSES, _MOST_CURVES, _POINTS = 50, 6, 100
_LONGEST = 80  # characters of a name
_COLUMNS, _SIDE = 6, 64  # images in a row of the sheet, and their pixels
_SHEET = 30_000  # bytes


@dataclass(frozen=True)
class _Test:
    """What a page reads of eval.json."""

    split: str = ""
    samples: int = 0
    classes: list[dict[str, Any]] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)
    curves: Curves = field(default_factory=Curves)
    wrong: int = 0
    most_wrong: list[Wrong] = field(default_factory=list)


def test_of(folder: Path, *, is_test_shown: bool) -> dict[str, Any] | None:
    """Returns the test of a run as plain values; None if there is nothing to show of it, or its file is damaged.

    `is_test_shown`: whether the test set may be shown.
    """
    try:
        test = Stored(folder / "eval.json", _Test, _LARGEST).read()
    except UserError:
        return None
    if test is None or not (test.confusion or test.most_wrong) or (test.split == "test" and not is_test_shown):
        return None
    names = [_text(row.get("class")) for row in test.classes[:_MOST_CLASSES]]
    is_square = len(test.confusion) == len(names) and all(len(row) == len(names) for row in test.confusion)
    samples = test.most_wrong[:COUNT]
    return {
        "split": _text(test.split),
        "samples": test.samples,
        "classes": names,
        "confusion": test.confusion if is_square else [],
        "roc": _curves(test.curves.roc),
        "precision_recall": _curves(test.curves.precision_recall),
        "calibration": test.curves.calibration[:_POINTS],
        "predicted": test.curves.predicted[: 4 * _POINTS],
        "wrong": test.wrong,
        "most_wrong": [_sample(each) for each in samples],
        "sheet": _sheet(folder / "most_wrong.png", [each.box for each in samples]),
    }


def _text(value: Any) -> str:
    text = printable(str(value))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _curves(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    found = []
    for curve in curves[:_MOST_CURVES]:
        points = thinned(np.array(curve.points, dtype=float), _POINTS) if curve.points else []
        found.append(vars(replace(curve, name=_text(curve.name), points=points)))
    return found


def _sample(sample: Wrong) -> list[Any]:
    """Returns position, last parts of the path, truth, prediction, label and probability."""
    source = "/".join(PurePath(sample.source).parts[-2:])
    texts = map(_text, (source, sample.true, sample.predicted, sample.label))
    return [sample.position, *texts, sample.probability]


def _sheet(path: Path, boxes: Sequence[tuple[int, int, int, int] | None]) -> str:
    """Returns the images in the boxes of a picture as the address of one small image; "" if they cannot be read."""
    from PIL import Image

    if not boxes:
        return ""
    sheet = Image.new("RGB", (_COLUMNS * _SIDE, -(-len(boxes) // _COLUMNS) * _SIDE), "white")
    try:
        with Image.open(io.BytesIO(read_regular(path, _LARGEST_PICTURE)), formats=["PNG"]) as picture:
            width, height = picture.size
            if width * height > _MOST_PIXELS:
                return ""
            pixels = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    for number, box in enumerate(boxes):
        if box is None or min(box) < 0 or box[0] + box[2] > width or box[1] + box[3] > height or 0 in box[2:]:
            return ""
        tile = pixels.crop((box[0], box[1], box[0] + box[2], box[1] + box[3]))
        tile.thumbnail((_SIDE, _SIDE))
        sheet.paste(tile, (number % _COLUMNS * _SIDE, number // _COLUMNS * _SIDE))
    content = b""
    for quality in (80, 50, 20):
        file = io.BytesIO()
        sheet.save(file, "JPEG", quality=quality)
        content = file.getvalue()
        if len(content) <= _SHEET:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
