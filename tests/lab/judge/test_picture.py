"""The picture of a judgement: what is drawn is what was found, at the number of its pair."""

import math

import numpy as np

from dlopt.lab.judge.picture import draw
from dlopt.lab.judge.sequential import Look


def test_gains_estimates_and_intervals_are_at_their_pairs() -> None:
    gains = [0.5, -math.inf, 0.25]
    looks = [
        Look(1, 0.5, -math.inf, math.inf, "undecided"),
        Look(2, 0.25, -1.0, 1.5, "undecided"),
        Look(3, 0.125, -0.5, 0.75, "undecided"),
    ]
    [axes] = draw("title", "val_loss", gains, looks, 0.0).axes
    points, estimates = (line for line in axes.lines if not line.get_label().startswith("_"))
    assert list(zip(*points.get_data(), strict=True)) == [(1, 0.5), (3, 0.25)]
    assert list(zip(*estimates.get_data(), strict=True)) == [(1, 0.5), (2, 0.25), (3, 0.125)]
    [bars] = axes.collections
    np.testing.assert_array_equal(bars.get_segments(), [[[2, -1.0], [2, 1.5]], [[3, -0.5], [3, 0.75]]])
