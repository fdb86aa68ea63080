"""Metrics of benchmarked modes."""

import pytest

from dlopt.lab.scaling.modes import summarize


def test_an_update_takes_the_median_of_an_even_number_of_updates() -> None:
    rank = {"threads": 1, "samples": 64, "peak_mb": 0.0, "sent_mb": 0.0, "collectives": 0, "communicating": 0.0}
    result = summarize("a", "a", [{**rank, "steps": [0.1, 0.5, 0.3, 0.2], "waiting": 0.0}])
    assert result.step == pytest.approx(0.25) and result.samples_per_second == pytest.approx(64 / 0.25)
