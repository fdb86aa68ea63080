"""What a ladder says about its results."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from dlopt.lab.benchmark.scores import Interval
from dlopt.lab.ladder.figures import draw
from dlopt.lab.ladder.findings import findings
from dlopt.lab.ladder.ladder import Contestant, Outcome, Search
from dlopt.lab.ladder.rates import Optimum, RateFit
from dlopt.lab.ladder.results import Results
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


def test_learning_rates_and_their_doubts_are_stated() -> None:
    made = results(1.5)
    contestants = {
        "adamw": Contestant({}, 0.1, ["optimizer.lr=0.1"]),
        "mine": Contestant({"optimizer.lr": 1.0, "optimizer.muon_lr": 2.0}, None, ["optimizer.eps=1e-8"]),
        "lost": Contestant({"optimizer.lr": 1.0}, None, []),
        "new": Contestant({"optimizer.lr": 1.0}, None, []),
    }
    optima = {"r0": Optimum(0.1, 1.0, at_end=True), "r1": Optimum(0.1, 1.0, at_end=False)}
    searches = {
        "adamw": Search({}, {}, None),
        "mine": Search({"r0": {}}, optima, RateFit(0.1, -0.25, 1.7)),
        "lost": Search({"r0": {0.1: math.inf}, "r1": {}}, {}, None),
        "new": Search({"r0": {}}, {}, None),
    }
    outcomes = dict(made.outcomes)
    outcomes.pop(next(trial for trial in outcomes if trial.optimizer == "adamw"))
    outcomes[next(trial for trial in outcomes if trial.optimizer == "mine")] = Outcome(math.inf, 1.0, "nan")
    ladder = replace(made.ladder, optimizers=contestants, searched=["r0"])
    made = replace(made, ladder=ladder, searches=searches, outcomes=outcomes, analysis=None)
    found = findings(made)
    assert [each.text for each in found if not each.is_warning] == [
        "adamw: the same rate at all sizes (optimizer.lr=0.1), not tuned per rung.",
        "mine: best lr proportional to parameters^-0.25; left out, a searched rung is predicted within 1.7x; one "
        "searched rung: the same at all sizes. muon_lr moves with it in a constant ratio. Set: optimizer.eps=1e-8.",
    ]
    assert [each.text for each in found if each.is_warning] == [
        "no run at r0, r1, r2, r3 and r4: lost and new.",
        "1 runs at the best rates have not ended: the results are preliminary.",
        "mine: the best rate of r0 is at the end of the searched range.",
        "mine: learning rates are extrapolated poorly (1.7x); search more rungs.",
        "mine: 1 runs failed or diverged, and count in no fit.",
        "lost: no rate is extrapolated: all runs that search the rate of r0 failed so far.",
        "new: the search of its learning rates has not ended.",
    ]


def test_a_changing_speed_up_has_its_exponent() -> None:
    made = results(1.5)
    assert made.analysis is not None
    gain = made.analysis.gains["mine"]
    for trend, words in (((0.1, 0.05, 0.2), "grows with the models"), ((-0.1, -0.2, -0.05), "shrinks as models grow")):
        gains = {"mine": replace(gain, trend=Interval(*trend))}
        found = [each.text for each in findings(replace(made, analysis=replace(made.analysis, gains=gains)))]
        assert f"By the laws, the speed-up {words} (exponent {trend[0]:+.2f} [" in found[0]


def searched(made: Results, *names: str) -> Results:
    """Returns a ladder on which one search found the rates of these optimizers; the others have a typed one."""
    contestants = {
        name: replace(each, lr=None if name in names else 0.1, rates={"optimizer.lr": 0.1})
        for name, each in made.ladder.optimizers.items()
    }
    return replace(made, ladder=replace(made.ladder, searched=["r0"], optimizers=contestants))


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("mine",), "one search found the rate of mine, and"),
        (("adamw",), "one search found the rate of adamw, and"),
        (("adamw", "mine"), "one search each found the rates of adamw and mine, and"),
    ],
)
def test_no_speed_up_is_stated_whose_rates_were_found_by_one_search(names: Sequence[str], text: str) -> None:
    made = searched(results(3.0), *names)
    found = [each.text for each in findings(made)]
    [said] = [each for each in found if "speed-up" in each and "is stated" in each]
    assert said.startswith(f"No speed-up of mine over adamw is stated: {text} a bad rate would look like a speed-up.")
    assert not any("times the compute" in each or "measured losses" in each for each in found)
    titles = [str(each.title) for each in tables(made)]
    assert not any("Speed-up" in each for each in titles) and "Loss minus that of adamw, paired by seed" in titles
    assert "speed_up" not in draw(made) and "speed_up" in draw(searched(results(3.0)))


def test_no_speed_up_is_stated_that_the_paired_differences_contradict() -> None:
    made = results(3.0)
    assert made.analysis is not None
    gain = replace(made.analysis.gains["mine"], difference=[Interval(-0.2, -0.3, -0.1)] * 5)
    assert gain.contradicted == [] and gain.speed_up[0].low > 1
    unknown = Interval(0.1, math.nan, math.nan)
    for difference, contradicted in (
        ([Interval(-0.1, -0.3, 0.1), *gain.difference[1:]], [0]),
        ([*gain.difference[:-1], Interval(0.1, 0.05, 0.2)], [4]),
        ([gain.difference[0], Interval(0.1, 0.05, 0.2), *gain.difference[2:]], []),  # neither of the stated rungs
        ([unknown] * 5, []),
    ):
        changed = replace(gain, difference=difference)
        assert changed.contradicted == contradicted
        said = replace(made, analysis=replace(made.analysis, gains={"mine": changed}))
        texts = [each.text for each in findings(said)]
        assert any("times the compute of mine" in each for each in texts) == (not contradicted)
        titles = [str(each.title) for each in tables(said)]
        assert ("Speed-up over adamw in compute, by the laws" in titles) == (not contradicted)
    slower = replace(gain, speed_up=[Interval(0.5, 0.4, 0.6)] * 5, difference=[Interval(0.0, -0.1, 0.1)] * 5)
    assert slower.contradicted == [0, 4]
    said = replace(made, analysis=replace(made.analysis, gains={"mine": slower}))
    text = findings(said)[0].text
    assert text.startswith(
        "No speed-up of mine over adamw by the laws is stated: the losses paired by seed contradict it (difference "
        "+0.000 [-0.100, +0.100] at r0, +0.000 [-0.100, +0.100] at r4). More seeds, or rates searched on more rungs, "
    )
    assert replace(slower, difference=[Interval(0.1, 0.05, 0.2)] * 5).contradicted == []
