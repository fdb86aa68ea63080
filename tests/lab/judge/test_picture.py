"""The picture of a judgement: what is drawn is what was found, at the number of its pair."""

import math

import numpy as np
import pytest

from dlopt.lab.judge.picture import draw
from dlopt.lab.judge.sequential import Look

pytestmark = pytest.mark.drawn

LOOKS = [
    Look(1, 0.5, -math.inf, math.inf, "undecided"),
    Look(2, 0.25, -1.0, 1.5, "undecided"),
    Look(3, 0.125, -0.5, 0.75, "undecided"),
]


@pytest.mark.parametrize(("metric", "unit"), [("val_loss", 1), ("val_accuracy", 100)])
def test_gains_estimates_and_intervals_are_at_their_pairs(metric: str, unit: int) -> None:
    [axes] = draw("title", metric, [0.5, -math.inf, 0.25], LOOKS, 0.0625).axes
    points, estimates = (line for line in axes.lines if not line.get_label().startswith("_"))
    assert list(zip(*points.get_data(), strict=True)) == [(1, unit * 0.5), (3, unit * 0.25)]
    assert list(zip(*estimates.get_data(), strict=True)) == [(1, unit * 0.5), (2, unit * 0.25), (3, unit * 0.125)]
    [bars] = axes.collections
    ends = [[[2, -1.0], [2, 1.5]], [[3, -0.5], [3, 0.75]]]
    np.testing.assert_array_equal(bars.get_segments(), np.array(ends) * [1, unit])
    horizontal = sorted(line.get_ydata()[0] for line in axes.lines if line.get_label().startswith("_"))
    assert horizontal == [-unit * 0.0625, 0, unit * 0.0625]


def test_the_axis_names_the_metric_and_its_unit() -> None:
    assert draw("t", "val_loss", [0.5], LOOKS[:1], 0.0).axes[0].get_ylabel().startswith("gain in validation loss\n")
    [axes] = draw("x=1: worse", "val_accuracy", [-0.5], LOOKS[:1], 0.0).axes
    assert axes.get_ylabel() == "gain in validation accuracy (points)\nabove 0: the change is better"
    assert axes.get_xlabel() == "pairs of runs" and axes.figure.get_suptitle() == "x=1: worse"
