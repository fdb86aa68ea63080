"""The confusion matrix as a table and as a picture."""

import csv
import io

import numpy as np
import pytest
import torch

from dlopt.commands.eval import confusion_picture, confusion_table


def test_table_survives_odd_names() -> None:
    names = ["a,b", 'c"d', "größe"]
    head, *rows = csv.reader(io.StringIO(confusion_table(torch.arange(9).view(3, 3), names)))
    assert head[1:] == names and [row[0] for row in rows] == names
    assert [[int(cell) for cell in row[1:]] for row in rows] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize("count", [2, 40, 150])
def test_picture(count: int) -> None:
    names = [f"$class_{i}" for i in range(count)]  # no formulas
    confusion = torch.eye(count, dtype=torch.int64) * 5
    confusion[0, 0] = 0  # a class without samples
    figure = confusion_picture(confusion, names, "title")
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), confusion / 5)
    assert len(axes.texts) == (count - 1 if count <= 20 else 0)  # of zeros none is written
    if count <= 60:
        assert [label.get_text() for label in axes.get_yticklabels()] == names
    figure.savefig(io.BytesIO())
