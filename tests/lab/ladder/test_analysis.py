"""The analysis on synthetic ladders whose speed-ups are known."""

import math

import numpy as np
import pytest
from scipy.stats import norm, ttest_rel

from dlopt.lab.ladder.analysis import RungLosses, _noise, analyze, band, difference

COMPUTE = np.geomspace(2e12, 7e14, 6)
SEEDS = 3


def ladder(noise: float = 0.003, rungs: int = 6, **laws: tuple[float, float]) -> RungLosses:
    """Returns runs of laws (scale, exponent) with an irreducible loss of 1.2; the noise is drawn per run."""
    rng = np.random.default_rng(3)
    compute = COMPUTE[:rungs]
    losses = {
        name: (1.2 + scale * compute[:, None] ** -exponent) * np.exp(noise * rng.standard_normal((rungs, SEEDS)))
        for name, (scale, exponent) in laws.items()
    }
    seconds = {name: [1.0 if name == "adamw" else 2.0] * rungs for name in laws}
    return RungLosses([f"r{i}" for i in range(rungs)], [*compute], losses, seconds)


def test_a_rescaled_optimizer_has_a_speed_up_of_one_within_its_interval() -> None:
    found = analyze(ladder(adamw=(60.0, 0.12), rescaled=(60.0, 0.12)), resamples=60)
    assert found is not None
    gain = found.gains["rescaled"]
    assert not gain.is_distinguishable and all(each.low <= 1 <= each.high for each in gain.speed_up)
    assert all(each.low < each.high < 1.6 and each.low > 0.6 for each in gain.speed_up)  # and the interval is useful
    assert gain.trend.low < 0 < gain.trend.high
    assert all(0.7 < each.low <= each.value <= each.high < 1.4 for each in gain.interpolated if each.value > 0)


def test_a_speed_up_that_shrinks_is_found_with_its_size() -> None:
    # The same excess loss at the largest rung, and a smaller exponent: a speed-up of
    # (A_b / A_o)^(1 / a_b) C^(a_o / a_b - 1).
    exponent = 0.10
    scale = 60 * COMPUTE[-1] ** (exponent - 0.12)
    found = analyze(ladder(adamw=(60.0, 0.12), muon=(scale, exponent)), resamples=60)
    assert found is not None
    gain = found.gains["muon"]
    expected = [(60 / scale) ** (1 / 0.12) * compute ** (exponent / 0.12 - 1) for compute in COMPUTE]
    assert expected[0] > 2 and expected[-1] == pytest.approx(1)
    for each, value in zip(gain.speed_up, expected, strict=True):
        assert each.low <= value <= each.high and each.value == pytest.approx(value, rel=0.2)
    assert gain.trend.high < 0 and gain.speed_up[0].low > 1


def multiples(
    irreducible: float, rungs: int, rng: np.random.Generator, speeds: tuple[float, ...] = (1.0, 1.0, 1.4, 2.0)
) -> RungLosses:
    """Returns runs of L = E + 3 C^-1/4, whose first optimizer needs `speeds` times the compute of the others.

    Each run has noise of 0.4 %, and as much that all runs of a seed share.
    """
    compute = 0.07 * np.geomspace(1, 10 ** (2.5 if rungs == 3 else rungs / 2 + 1), rungs)
    shared = 0.004 * rng.standard_normal((rungs, SEEDS))
    losses = {
        f"{i} {speed}": (irreducible + 3 * (speed * compute)[:, None] ** -0.25)
        * np.exp(shared + 0.004 * rng.standard_normal((rungs, SEEDS)))
        for i, speed in enumerate(speeds)
    }
    return RungLosses([f"r{i}" for i in range(rungs)], [*compute], losses)


@pytest.mark.parametrize("rungs", [3, 4, 6])
@pytest.mark.parametrize("irreducible", [0.0, 0.6, 1.2])
def test_speed_ups_have_no_bias(irreducible: float, rungs: int) -> None:
    """Chords of the log loss, without its floor, would give 2.1 for 2 and 1.45 for 1.4."""
    rng = np.random.default_rng(rungs)
    logs: dict[float, list[list[float]]] = {}
    for _ in range(8):
        found = analyze(multiples(irreducible, rungs, rng), resamples=0)
        assert found is not None
        for name, gain in found.gains.items():
            for each in (gain.speed_up, gain.interpolated):
                values = [math.log(one.value) for one in each[:-1] if not math.isnan(one.value)]
                logs.setdefault(float(name.split()[1]), []).append([float(np.mean(values))])
    for speed, means in logs.items():
        assert math.exp(np.mean(means)) == pytest.approx(speed, rel=0.02)


def coverage(irreducible: float, rungs: int, ladders: int, resamples: int) -> tuple[float, float, float]:
    """Returns how often intervals contain the truth: by the laws, interpolated; and how often 1 is called different."""
    rng = np.random.default_rng(0)
    laws, interpolated, different = [], [], []
    for _ in range(ladders):
        found = analyze(multiples(irreducible, rungs, rng), resamples=resamples)
        assert found is not None
        for name, gain in found.gains.items():
            truth = float(name.split()[1])
            laws += [each.low <= truth <= each.high for each in gain.speed_up]
            interpolated += [each.low <= truth <= each.high for each in gain.interpolated if not math.isnan(each.value)]
            different += [gain.is_distinguishable] if truth == 1 else []
    return float(np.mean(laws)), float(np.mean(interpolated)), float(np.mean(different))


def test_intervals_cover_the_speed_up_with_four_rungs() -> None:
    laws, interpolated, different = coverage(1.2, 4, 10, 40)
    assert laws >= 0.9 and interpolated >= 0.9 and different <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("irreducible", "rungs"), [(0.0, 4), (0.6, 4), (1.2, 6)])
def test_intervals_cover_the_speed_up(irreducible: float, rungs: int) -> None:
    laws, interpolated, different = coverage(irreducible, rungs, 25, 60)
    assert laws >= 0.9 and interpolated >= 0.9 and different <= 0.1


def test_three_rungs_have_no_intervals() -> None:
    found = analyze(multiples(1.2, 3, np.random.default_rng(0)))
    assert found is not None and math.isnan(found.irreducible.low)
    for gain in found.gains.values():
        assert all(math.isnan(each.low) for each in (*gain.speed_up, *gain.interpolated, gain.trend))
        assert not gain.is_distinguishable


def test_a_band_contains_its_share_of_whole_curves() -> None:
    rng = np.random.default_rng(0)
    replicas = np.exp(rng.standard_normal((4000, 5)))
    found = band([1.0] * 5, replicas, 0.025)
    inside = np.all([(each.low <= replicas[:, i]) & (replicas[:, i] <= each.high) for i, each in enumerate(found)], 0)
    assert inside.mean() == pytest.approx(0.95, abs=0.005)
    assert found[0].high == pytest.approx(math.exp(norm.isf((1 - 0.95 ** (1 / 5)) / 2)), rel=0.1)  # independent values


def test_the_interpolated_speed_up_needs_of_the_laws_only_their_floor() -> None:
    # A baseline whose log loss has bends, and an optimizer that needs a third of its compute.
    x, known = np.log(COMPUTE), np.log(np.array([3.0, 2.7, 2.3, 1.8, 1.3, 0.9]))
    losses = {"adamw": known, "mine": np.interp(x + math.log(3), x, known) - 0.1 * (x == x[-1])}
    tables = {name: np.exp(np.stack([each, each - 0.01, each + 0.01], axis=1)) for name, each in losses.items()}
    found = analyze(RungLosses([f"r{i}" for i in range(6)], [*COMPUTE], tables), resamples=20)
    assert found is not None
    *inside, last = found.gains["mine"].interpolated
    assert found.irreducible.value == pytest.approx(0, abs=1e-6)
    assert [each.value for each in inside] == [pytest.approx(3, rel=1e-3)] * 5
    assert all(each.low < 3.001 and each.high > 2.999 for each in inside)  # the seeds are shared
    assert math.isnan(last.value)  # the baseline has not reached this loss
    assert [math.isnan(each.value) for each in found.gains["mine"].speed_up] == [False] * 6


def test_the_interpolated_speed_up_survives_a_rung_that_is_worse_by_chance() -> None:
    table = np.array([3.0, 2.0, 2.01, 1.5])[:, None] * np.ones(2)
    found = analyze(RungLosses(["a", "b", "c", "d"], [1e12, 1e13, 1e14, 1e15], {"adamw": table, "mine": table * 1.0}),
                    resamples=20)  # fmt: skip
    assert found is not None
    first, second, third = np.log(np.array([3, 2, 2.01]) - found.irreducible.value)
    between = 10 ** ((first - third) / (first - second) - 2)  # the baseline has this loss between the first two
    assert [each.value for each in found.gains["mine"].interpolated] == pytest.approx([1, 1, between, 1], rel=1e-6)


def test_one_seed_gives_no_interval() -> None:
    measured = ladder(adamw=(60.0, 0.12), mine=(60.0, 0.12))
    measured.losses["mine"] = measured.losses["mine"][:, :1]
    found = analyze(measured, resamples=20)
    assert found is not None
    assert all(math.isnan(each.low) for each in found.gains["mine"].interpolated)


def test_the_held_out_rung_is_predicted_and_a_broken_law_is_not() -> None:
    measured = ladder(adamw=(60.0, 0.12), muon=(50.0, 0.12))
    found = analyze(measured, resamples=60)
    assert found is not None and all(each.holds for each in found.predictions.values())
    prediction = found.predictions["adamw"]
    assert prediction.measured == pytest.approx(measured.losses["adamw"][-1].mean())
    measured.losses["adamw"][-1] *= 1.1
    broken = analyze(measured, resamples=60)
    assert broken is not None and not broken.predictions["adamw"].holds
    assert broken.predictions["adamw"].predicted == prediction.predicted  # the largest rung is not in the fit
    few = analyze(ladder(rungs=4, adamw=(60.0, 0.12), muon=(50.0, 0.12)), resamples=20)
    assert few is not None and not few.predictions


def test_differences_have_the_interval_of_the_paired_t_test() -> None:
    own, base = np.array([2.0, 2.1, 1.9, np.nan]), np.array([2.2, 2.2, 2.3, 2.0])
    found = difference(own, base)
    reference = ttest_rel(own[:3], base[:3]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))
    assert math.isnan(difference(own[:1], base[:1]).low) and math.isnan(difference(own[3:], base[3:]).value)


def test_runs_that_failed_count_in_no_fit_and_a_missing_baseline_gives_no_analysis() -> None:
    measured = ladder(0.0, adamw=(60.0, 0.12), muon=(50.0, 0.12))
    measured.losses["adamw"][0, 1] = measured.losses["muon"][2] = np.nan
    found = analyze(measured, resamples=20)
    assert found is not None and found.scaling_laws.irreducible == pytest.approx(1.2)
    assert math.isnan(found.mean["muon"][2])
    measured.losses["muon"][1:] = np.nan
    alone = analyze(measured, resamples=20)
    assert alone is not None and not alone.gains
    measured.losses["adamw"][:] = np.nan
    assert analyze(measured) is None


def test_noise_has_the_variance_of_single_runs() -> None:
    """Deviations from a mean of three have 2/3 of it. Runs that failed, and rungs with one run, count for nothing."""
    table = np.exp(np.random.default_rng(0).normal(0.3, 0.1, (4000, 3)))
    assert _noise(table).var() == pytest.approx(0.01, rel=0.03)
    table[::2, 2] = math.nan  # half of the rungs have two runs
    table[:100, 1:] = math.inf
    assert _noise(table).var() == pytest.approx(0.01, rel=0.04) and len(_noise(table)) == 2 * 1950 + 3 * 1950
