"""Arms of weight decay, on ladders whose best decay is known."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t

from dlopt.lab.benchmark.scores import Interval
from dlopt.lab.ladder.analysis import RungLosses, _interpolated
from dlopt.lab.ladder.arms import CENTRE, decay_search, missing_decays
from dlopt.lab.ladder.findings import findings
from dlopt.lab.ladder.ladder import RESULTS, LadderRequest, Outcome, Trial
from dlopt.lab.ladder.results import collect, to_json
from dlopt.lab.ladder.table import tables
from tests.support.ladders import simulate, with_arms

ARMS = ("constant", "inverse", "zero", "hyperball")


def test_decay_and_rates_are_searched_together_and_scaled_by_the_width(tmp_path: Path) -> None:
    request = LadderRequest(tmp_path, with_arms(ARMS, rungs=4))
    done = simulate(request, scaled=3.2)
    assert len(set(done)) == len({each.subfolder for each in done}) == len(done)  # arms share the joint search
    joint = [each for each in done if each.decay is not None]
    assert {each.optimizer for each in joint} == {"adamw", "mine"} and {each.rung for each in joint} == {"r0", "r1"}
    search = request.decay_search("adamw")
    assert search.optima["r0"].lr == pytest.approx(3.2 / 16) and search.optima["r1"].lr == pytest.approx(3.2 / 32)
    assert search.per_width == pytest.approx(3.2) and search.constant == pytest.approx(3.2 / math.sqrt(16 * 32))
    trials = {name: Trial(name, "r3", 1) for name in request.ladder.optimizers}
    assert {name: request.decay(each) for name, each in trials.items() if name.startswith("adamw")} == {
        "adamw.constant": 0.1414, "adamw.inverse": 3.2 / 128, "adamw.zero": None, "adamw.hyperball": None
    }  # fmt: skip
    lines = {name: request.line(each) for name, each in trials.items()}
    assert {"optimizer=adamw", "optimizer.lr=0.02", "optimizer.weight_decay=0.025"} < {*lines["adamw.inverse"]}
    assert {"optimizer=mine", "optimizer.weight_decay=0", "optimizer.hyperball=true"} < {*lines["mine.hyperball"]}
    assert not any("hyperball" in each for each in lines["mine.zero"])
    label = request.label(Trial("adamw", "r0", 0, -2, 2))
    assert label == "adamw, r0, search: lr=0.003162, weight_decay=0.3162"
    assert "weight_decay" not in request.label(trials["adamw.zero"])


def test_an_arm_waits_for_its_decay_and_the_others_do_not(tmp_path: Path) -> None:
    request = LadderRequest(tmp_path, with_arms(("inverse", "zero")))
    waiting = request.waiting()
    assert {each.optimizer for each in waiting} == {"adamw", "mine", "adamw.zero", "mine.zero"}
    assert request.expected() == 2 * (2 * 5 * 7 + 2 * 3 * 7 + 2 * 3 * 2)
    search = request.search("adamw.inverse")
    assert search.fit is None and not search.losses
    for trial in waiting:
        request._known[trial] = Outcome(math.inf, 1.0, "diverged")
    while waiting := request.waiting():
        request._known |= dict.fromkeys(waiting, Outcome(math.inf, 1.0, "diverged"))
    assert request.decay_search("mine").constant is None  # nothing follows where all runs of a rung failed
    texts = [each.text for each in findings(collect(request))]
    assert "adamw.inverse: the search of its learning rates has not ended." in texts


def test_the_grid_of_decays_is_that_of_rates_unrefined() -> None:
    losses: dict[int, float] = {}
    while new := missing_decays(losses):
        losses |= {index: abs(index - 7) for index in new}
    assert sorted(losses) == [-4, -2, 0, 2, 4, 6, 8]  # extended beyond the best
    found = decay_search({"r0": losses, "r1": losses}, [8, None])
    assert found.per_width is None and found.constant == pytest.approx(CENTRE * 10 ** (7 / 4), rel=1e-3)
    assert found.decay("inverse", 8) is None
    assert found.decay("constant", None) == pytest.approx(found.constant, rel=1e-3)


def test_optimizers_of_an_arm_are_compared_with_each_other(tmp_path: Path) -> None:
    request = LadderRequest(tmp_path, with_arms(("constant", "inverse")))
    simulate(request, scaled=3.2)
    made = collect(request)
    assert [*made.arms] == ["constant", "inverse"]
    gain = made.arms["inverse"].gains["mine.inverse"]
    known = [gain.interpolated[i].value for i in (0, 1)]
    assert known == pytest.approx([2, 2], rel=0.05) and gain.change.value == pytest.approx(known[1] / known[0])
    assert made.summed_decay("mine.inverse", "r1") == pytest.approx(0.02 / 2 * 0.1 * 100)
    titles = {table.title: table for table in tables(made)}
    difference = titles["Loss minus that of adamw of the same arm, paired by seed"]
    assert [row[0] for row in difference.rows] == ["mine.constant", "mine.inverse"]
    assert [row[:2] for row in titles["Weight decay"].rows][1] == ["adamw.inverse", "0.2"]
    texts = [each.text for each in findings(made)]
    assert "adamw: best weight decay 0.2 at r0, 0.1 at r1; arms: 0.141 (constant), 3.2 / width (inverse)." in texts
    [change] = [each for each in texts if each.startswith("Between measured losses, the speed-up of mine.inverse over")]
    assert "over adamw.inverse at r1 is" in change and change.endswith(" times that at r0.")  # no interval: 3 rungs
    for low, high, verdict in (
        (0.5, 0.8, "it shrinks"),
        (0.5, 1.1, "whether it changes is open"),
        (1.1, 2.0, "it grows"),
    ):
        changed = replace(gain, change=Interval(gain.change.value, low, high))
        analysis = replace(made.arms["inverse"], gains={"mine.inverse": changed})
        texts = [each.text for each in findings(replace(made, arms={"inverse": analysis}))]
        assert any(f"times that at r0: {verdict}." in each for each in texts)


def test_the_change_of_a_speed_up_is_paired_by_seed() -> None:
    """The interval of a ratio is that of Student's t over the seeds' logarithms."""
    compute = [1e12 * 16.0**i for i in range(4)]
    base = np.log(10) - 0.12 * np.log(compute)
    speed = np.log([[2.0, 3.0], [2.1, 3.1], [1.5, 2.0], [1.0, 1.2]])
    losses = {"base": np.exp(np.column_stack([base, base])), "mine": np.exp(base[:, None] - 0.12 * speed)}
    floor = Interval(0.0, 0.0, 0.0)
    known, change = _interpolated(RungLosses("abcd", compute, losses), "mine", floor)
    ratios = speed[2] - speed[0]  # at d, the baseline does not reach the loss
    half = t.isf(0.025, 1) * ratios.std(ddof=1) / math.sqrt(2)
    assert math.isnan(known[3].value) and change.value == pytest.approx(math.exp(ratios.mean()), rel=1e-2)
    assert (change.low, change.high) == pytest.approx(np.exp([ratios.mean() - half, ratios.mean() + half]), rel=1e-2)


def test_a_search_at_its_limit_is_a_warning(tmp_path: Path) -> None:
    request = LadderRequest(tmp_path, with_arms(("constant",)))
    simulate(request, scaled=1e9)
    assert "mine: the best weight decay of r1 is at the end of the searched range." in [
        each.text for each in findings(collect(request)) if each.is_warning
    ]


def test_results_alone_continue_the_arms(tmp_path: Path) -> None:
    request = LadderRequest(tmp_path, with_arms(("inverse", "zero")))
    simulate(request, scaled=3.2)
    made = collect(request)
    (tmp_path / RESULTS).write_text(to_json(made))
    copied = LadderRequest(tmp_path, made.ladder)
    assert not copied.waiting() and collect(copied).outcomes == made.outcomes
    assert copied.known() == request.known() and copied.decay_search("mine") == request.decay_search("mine")
    larger = replace(made.ladder, seeds=3)
    assert {each.seed for each in LadderRequest(tmp_path, larger).waiting()} == {2}
