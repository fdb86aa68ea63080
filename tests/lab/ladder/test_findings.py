"""What a ladder says about its results."""

from dlopt.lab.ladder.findings import findings
from tests.support.ladders import results


def test_a_speed_up_far_beyond_the_measured_compute_is_called_an_extrapolation() -> None:
    [far] = [each.text for each in findings(results(50.0)) if "extrapolates the law" in each.text]
    assert far.startswith("mine: its speed-up at r4 extrapolates the law of adamw to ")
    assert far.endswith("times the largest compute measured; compare the losses instead.")
    assert not [each for each in findings(results(1.5)) if "extrapolates the law" in each.text]
