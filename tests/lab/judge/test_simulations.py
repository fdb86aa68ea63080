"""`dlopt judge` on differences of known distributions: the simulations of the page, and a small part of them."""

import itertools
import json
import math
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dlopt.basics.folders import RunFolder
from dlopt.config.compose import Composer
from dlopt.lab.judge.ledger import Entry
from dlopt.lab.judge.proposal import read_base, read_change
from dlopt.lab.judge.running import Judgement, PairedRun
from dlopt.lab.judge.sequential import rate_of

ROOT = Path(__file__).resolve().parents[3]
SIMULATIONS = runpy.run_path(str(ROOT / "scripts/judge_simulations.py"))
RATE, PAIRS = SIMULATIONS["RATE"], SIMULATIONS["PAIRS"]
SEED = 20_261_130  # not that of the page
REPEATS = 400


SIMULATED = json.loads((ROOT / "docs/judge/simulations.json").read_text(encoding="utf-8"))


def test_no_promise_of_the_page_is_broken() -> None:
    assert SIMULATIONS["broken"](SIMULATED) == []


@pytest.mark.slow
def test_the_page_has_the_results_of_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of changes, only those of two standard deviations: as many differences again for each other size."""
    simulate, changes = SIMULATIONS["simulate"], SIMULATIONS["changes"]
    rows = {(each["metric"], each["size"]): each for each in SIMULATED["changes"]}

    def of_one_size(name: str, size: float, *arguments: Any) -> Any:
        return changes(name, size, *arguments) if size == 2.0 else rows[name, size]

    monkeypatch.setitem(simulate.__globals__, "changes", of_one_size)
    assert json.loads(json.dumps(simulate())) == SIMULATED


def test_the_runs_of_the_page_break_no_promise() -> None:
    """The margins of scripts/judge.py."""
    found = json.loads((ROOT / "docs/judge/evidence.json").read_text(encoding="utf-8"))
    nulls = [each for each in found["nulls"] if each["kind"] == "other seeds"]
    for metric in ("val_loss", "val_accuracy"):
        gains = np.array([[*map(float, each[metric])] for each in nulls])
        assert len(gains) == 160 and SIMULATIONS["false_rate"](gains) * 160 <= 13
    assert all(each["same"] for each in found["nulls"] if each["kind"] != "other seeds")
    wrong = 0
    for each in found["changes"]:
        [look] = SIMULATIONS["decided"](np.array([[*map(float, each["val_loss"])]]), rate_of(1, RATE))
        wrong += look.verdict == ("worse" if each["size"] > 0 else "better")
    assert len(found["changes"]) == 50 and wrong <= 2


@pytest.mark.parametrize("i", range(len(SIMULATIONS["METRICS"])))
def test_changes_that_do_nothing_are_called_better_or_worse_at_most_at_the_rate(i: int) -> None:
    name = [*SIMULATIONS["METRICS"]][i]
    found = SIMULATIONS["nulls"](name, REPEATS, (SEED, 1, i))
    most = RATE + 3 * math.sqrt(RATE * (1 - RATE) / REPEATS)
    assert max(found["rate"], found["rate_many_pairs"], found["rate_first_proposal"]) <= most
    assert found["better"] + found["worse"] <= 19  # 5 % of 200 and three standard errors


def test_changes_of_two_standard_deviations_are_found_in_their_direction() -> None:
    for i, name in enumerate(SIMULATIONS["CHANGED"]):
        found = SIMULATIONS["changes"](name, 2.0, 100, (SEED, 2, i))
        assert found["better"] >= 0.85 and found["worse"] == 0


def test_dependent_pairs_exceed_the_rate() -> None:
    assert (
        SIMULATIONS["common_part"](0.0, REPEATS, (SEED, 3)) < 0.08 < SIMULATIONS["common_part"](0.5, REPEATS, (SEED, 3))
    )
    assert SIMULATIONS["autoregressive"](-0.5, REPEATS, (SEED, 4)) < 0.08
    assert SIMULATIONS["autoregressive"](0.8, REPEATS, (SEED, 4)) > 0.08


def test_the_command_decides_as_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gains, as accuracies of runs: a change that acts in 2 of 20 runs, nothing, and clear changes."""
    orders = [*itertools.combinations(range(PAIRS), 2)][::19]
    gains = [[0.25 * (i in order) for i in range(PAIRS)] for order in orders]
    rng = np.random.default_rng((SEED, 5))
    for shift in (-4, 0, 4):
        gains += (np.round(rng.normal(shift, 2, (5, PAIRS))) / 64).tolist()  # exact in binary
    entry = Entry(1, "a", ["x=1"], None, rate_of(1, RATE), 0.0, "d")
    composer = Composer()
    base = read_base(composer, "model=mlp epochs=2 device=cpu")
    sides = {"base": base, "change": read_change(composer, base, ["optimizer.lr=0.2"])}
    monkeypatch.setattr(RunFolder, "has_ended", lambda *_, **__: True)
    concluded = []
    for row in gains:

        def record(judgement: Judgement, trial: PairedRun, row: Any = row) -> Any:
            gain = row[trial.seed - 1000] if trial.side == "change" else 0.0
            history = [{"epoch": 1, "val_accuracy": 0.5 + gain}]
            return SimpleNamespace(history=history, status="finished", config=base.plan.saved, metrics={})

        monkeypatch.setattr(Judgement, "_read", record)
        judgement = Judgement(tmp_path, sides, replace(entry), PAIRS)
        judgement.collect()
        concluded.append(judgement.concluded())
    simulated = SIMULATIONS["decided"](np.array(gains), entry.rate)
    for found, look in zip(concluded, simulated, strict=True):
        assert (found.verdict, found.pairs) == (look.verdict, look.pairs)
        assert (found.estimate, found.low, found.high) == (look.estimate, look.low, look.high)
    assert {(each.verdict, each.pairs) for each in concluded[: len(orders)]} == {("undecided", PAIRS)}
    assert {each.verdict for each in concluded[len(orders) :]} == {"better", "worse", "undecided"}
