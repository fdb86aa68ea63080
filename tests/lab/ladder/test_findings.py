"""What a ladder says about its results."""

from dlopt.lab.ladder.findings import findings
from dlopt.lab.ladder.table import tables
from tests.support.ladders import results


def test_a_speed_up_far_beyond_the_measured_compute_is_called_an_extrapolation() -> None:
    [far] = [each.text for each in findings(results(50.0)) if "extrapolates the law" in each.text]
    assert far.startswith("mine: its speed-up at r4 extrapolates the law of adamw to ")
    assert far.endswith("times the largest compute measured; compare the losses instead.")
    assert not [each for each in findings(results(1.5)) if "extrapolates the law" in each.text]


def test_three_rungs_decide_nothing() -> None:
    found = [each.text for each in findings(results(1.5, rungs=3))]
    [gain] = [text for text in found if " times the compute of " in text]
    assert gain.endswith(" Neither has an interval, and nothing follows: that needs 4 rungs.")
    assert "With 3 rungs, speed-ups and laws have no intervals: two equal optimizers may look different." in found
    assert not any("distinguishable" in text or "[" in gain for text in found)


def test_no_speed_up_in_time_is_claimed() -> None:
    """The seconds of runs depend on the other processes of the machine."""
    titles = [str(table.title) for table in tables(results(1.5))]
    assert not any("Speed-up in time" in title for title in titles)
    assert any(title.startswith("Seconds of a training (median over seeds;") for title in titles)
