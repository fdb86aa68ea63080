"""What `dlopt judge` prints: the gain in the unit of the metric, the interval, and how often the verdict is wrong."""

import math
from typing import Any

import pytest

from dlopt.lab.judge.ledger import Entry
from dlopt.lab.judge.sequential import rate_of
from dlopt.lab.judge.wording import frequency, pair_line, sentences


def entry(
    verdict: Any, metric: str, *found: float | None, number: int = 1, margin: float = 0.0, gains: Any = (0.1,) * 9
) -> Entry:
    """Returns an entry with the estimate and the interval `found`, after nine pairs."""
    estimate, low, high = found
    return Entry(
        number, "a", ["x=1"], None, rate_of(number, 0.05), margin, "d", verdict, metric, estimate, low, high, gains
    )


@pytest.mark.parametrize(
    ("judged", "expected"),
    [
        (entry("better", "val_accuracy", 0.0042, 0.0018, 0.0066),
         "Better by 0.42 points of validation accuracy (0.18 to 0.66) in 9 pairs of runs."),
        (entry("worse", "val_accuracy", -0.0042, -0.0066, -0.000018),
         "Worse by 0.42 points of validation accuracy (0.0018 to 0.66) in 9 pairs of runs."),
        (entry("worse", "val_loss", -0.01234, -0.02, -0.004),
         "Worse by 0.01234 in validation loss (0.004 to 0.02) in 9 pairs of runs."),
        (entry("better", "val_accuracy", 0.03, 0.02, None, margin=0.005),
         "Better by 3.00 points of validation accuracy (2.00 or more), more than the margin of 0.50 points, in 9 "
         "pairs of runs."),
        (entry("worse", "val_loss", -0.3, None, -0.2),
         "Worse by 0.3 in validation loss (0.2 or more) in 9 pairs of runs."),
        (entry("worse", "val_loss", None, None, None, gains=(-math.inf,) * 7),
         "Worse because the change diverged 7 times in 7 pairs of runs."),
        (entry("undecided", "val_accuracy", 0.0139, -0.00677, 0.0309),
         "Undecided: a gain of +1.39 points of validation accuracy (-0.68 to +3.09) in 9 pairs of runs."),
        (entry("undecided", "val_loss", -0.5, None, 0.25),
         "Undecided: a gain of -0.5 in validation loss (+0.25 or less) in 9 pairs of runs."),
        (entry("undecided", "val_loss", 0.1, None, None, gains=(0.1,)),
         "Undecided: no interval of the gain after 1 pair of runs."),
        (entry("equal", "val_accuracy", 0.0, -0.001, 0.002, margin=0.005),
         "Undecided: no difference of more than 0.50 points; a gain of 0.00 points of validation accuracy (-0.10 to "
         "+0.20) in 9 pairs of runs."),
    ],
)  # fmt: skip
def test_the_gain_is_in_the_unit_of_the_metric(judged: Entry, expected: str) -> None:
    assert sentences(judged, 0.05)[0] == expected


def test_how_often_a_verdict_is_wrong_is_in_whole_numbers_that_are_never_too_small() -> None:
    second = entry("better", "val_loss", 0.2, 0.1, 0.3, number=2)
    assert sentences(second, 0.05)[1:] == [
        "Of 1,000 changes that do nothing, at most 8 are called better or worse;",
        "of 100 bases with many changes each, at most 5 get any such wrong verdict.",
    ]
    undecided = entry("undecided", "val_loss", 0.2, -0.1, 0.3)
    assert sentences(undecided, 0.05)[1:] == ["Of 100 such intervals, at most 4 miss the true gain."]
    assert [frequency(rate) for rate in (0.05, 0.0304, 0.01, 0.0076, 3e-6)] == [
        (5, "100"), (4, "100"), (1, "100"), (8, "1,000"), (3, "1,000,000"),
    ]  # fmt: skip


def test_the_line_of_a_pair() -> None:
    assert pair_line("val_accuracy", 3, -0.0069, -math.inf, math.inf) == "  pair 3: -0.69 points; no interval yet"
    assert pair_line("val_accuracy", 8, 0.0, -0.047, 0.0258) == "  pair 8: 0.00 points; so far -4.70 to +2.58"
    assert pair_line("val_loss", 8, 0.0123, -1.0, 2.0) == "  pair 8: +0.0123; so far -1 to +2"
    assert pair_line("val_loss", 1, -math.inf, -math.inf, math.inf) == "  pair 1: the change diverged; no interval yet"
    assert pair_line("val_loss", 9, math.inf, 0.5, math.inf) == "  pair 9: the base diverged; so far +0.5 or more"
