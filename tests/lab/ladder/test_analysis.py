"""The analysis on synthetic ladders whose speed-ups are known."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_rel

from dlopt.lab.ladder.analysis import Measured, analyze, difference

COMPUTE = np.geomspace(2e12, 7e14, 6)
SEEDS = 3


def ladder(noise: float = 0.003, rungs: int = 6, **laws: tuple[float, float]) -> Measured:
    """Returns runs of laws (scale, exponent) with an irreducible loss of 1.2; the noise is drawn per run."""
    rng = np.random.default_rng(3)
    compute = COMPUTE[:rungs]
    losses = {
        name: (1.2 + scale * compute[:, None] ** -exponent) * np.exp(noise * rng.standard_normal((rungs, SEEDS)))
        for name, (scale, exponent) in laws.items()
    }
    seconds = {name: [1.0 if name == "adamw" else 2.0] * rungs for name in laws}
    return Measured([f"r{i}" for i in range(rungs)], [*compute], losses, seconds)


def test_a_rescaled_optimizer_has_a_speed_up_of_one_within_its_interval() -> None:
    found = analyze(ladder(adamw=(60.0, 0.12), rescaled=(60.0, 0.12)))
    assert found is not None and found.draws_rungs
    gain = found.gains["rescaled"]
    assert all(each.low <= 1 <= each.high for each in gain.speed_up)
    assert all(each.low < each.high < 1.6 and each.low > 0.6 for each in gain.speed_up)  # and the interval is useful
    assert gain.trend.low < 0 < gain.trend.high
    assert all(0.7 < each.low <= each.value <= each.high < 1.4 for each in gain.interpolated if each.value > 0)


def test_a_speed_up_that_shrinks_is_found_with_its_size() -> None:
    # The same excess loss at the largest rung, and a smaller exponent: a speed-up of
    # (A_b / A_o)^(1 / a_b) C^(a_o / a_b - 1).
    exponent = 0.10
    scale = 60 * COMPUTE[-1] ** (exponent - 0.12)
    found = analyze(ladder(adamw=(60.0, 0.12), muon=(scale, exponent)))
    assert found is not None
    gain = found.gains["muon"]
    expected = [(60 / scale) ** (1 / 0.12) * compute ** (exponent / 0.12 - 1) for compute in COMPUTE]
    assert expected[0] > 2 and expected[-1] == pytest.approx(1)
    for each, value in zip(gain.speed_up, expected, strict=True):
        assert each.low <= value <= each.high and each.value == pytest.approx(value, rel=0.2)
    assert gain.trend.high < 0 and gain.speed_up[0].low > 1
    assert gain.speed_up_in_time[0] == pytest.approx(gain.speed_up[0].value / 2)  # its updates take 2x as long


def test_the_interpolated_speed_up_needs_no_law() -> None:
    # A baseline whose log loss has a bend, and an optimizer that needs a third of its compute.
    x, known = np.log(COMPUTE), np.log(np.array([3.0, 2.6, 2.0, 1.4, 1.2, 1.1]))
    losses = {"adamw": known, "mine": np.interp(x + math.log(3), x, known) - 0.1 * (x == x[-1])}
    tables = {name: np.exp(np.stack([each, each - 0.01, each + 0.01], axis=1)) for name, each in losses.items()}
    found = analyze(Measured([f"r{i}" for i in range(6)], [*COMPUTE], tables))
    assert found is not None
    *inside, last = found.gains["mine"].interpolated
    assert [each.value for each in inside] == [pytest.approx(3, rel=1e-3)] * 5
    assert all(1 < each.low < 3 < each.high < 6 for each in inside)
    assert math.isnan(last.value)  # the baseline has not reached this loss
    assert [math.isnan(each.value) for each in found.gains["mine"].speed_up] == [False] * 6


def test_the_interpolated_speed_up_survives_a_rung_that_is_worse_by_chance() -> None:
    table = np.array([3.0, 2.0, 2.01, 1.5])[:, None] * np.ones(2)
    found = analyze(Measured(["a", "b", "c", "d"], [1e12, 1e13, 1e14, 1e15], {"adamw": table, "mine": table * 1.0}))
    assert found is not None
    between = 10 ** (math.log(3 / 2.01) / math.log(3 / 2) - 2)  # the baseline has this loss between the first two
    assert [each.value for each in found.gains["mine"].interpolated] == pytest.approx([1, 1, between, 1], rel=1e-6)


def test_one_seed_gives_no_interval() -> None:
    measured = ladder(adamw=(60.0, 0.12), mine=(60.0, 0.12))
    measured.losses["mine"] = measured.losses["mine"][:, :1]
    found = analyze(measured, resamples=20)
    assert found is not None
    assert all(math.isnan(each.low) for each in found.gains["mine"].interpolated)


def test_the_held_out_rung_is_predicted_and_a_broken_law_is_not() -> None:
    measured = ladder(adamw=(60.0, 0.12), muon=(50.0, 0.12))
    found = analyze(measured)
    assert found is not None and all(each.holds for each in found.predictions.values())
    prediction = found.predictions["adamw"]
    assert prediction.measured == pytest.approx(measured.losses["adamw"][-1].mean())
    measured.losses["adamw"][-1] *= 1.1
    broken = analyze(measured)
    assert broken is not None and not broken.predictions["adamw"].holds
    assert broken.predictions["adamw"].predicted == prediction.predicted  # the largest rung is not in the fit
    few = analyze(ladder(rungs=3, adamw=(60.0, 0.12), muon=(50.0, 0.12)))
    assert few is not None and not few.predictions and not few.draws_rungs


def test_differences_have_the_interval_of_the_paired_t_test() -> None:
    own, base = np.array([2.0, 2.1, 1.9, np.nan]), np.array([2.2, 2.2, 2.3, 2.0])
    found = difference(own, base)
    reference = ttest_rel(own[:3], base[:3]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))
    assert math.isnan(difference(own[:1], base[:1]).low) and math.isnan(difference(own[3:], base[3:]).value)


def test_runs_that_failed_count_in_no_fit_and_a_missing_baseline_gives_no_analysis() -> None:
    measured = ladder(0.0, adamw=(60.0, 0.12), muon=(50.0, 0.12))
    measured.losses["adamw"][0, 1] = measured.losses["muon"][2] = np.nan
    found = analyze(measured)
    assert found is not None and found.laws.irreducible == pytest.approx(1.2)
    assert math.isnan(found.mean["muon"][2])
    measured.losses["muon"][1:] = np.nan
    alone = analyze(measured)
    assert alone is not None and not alone.gains
    measured.losses["adamw"][:] = np.nan
    assert analyze(measured) is None
