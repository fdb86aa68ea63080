"""scripts/league.py: new results join those that come with dlopt."""

import runpy
from dataclasses import replace

import pytest

from dlopt.lab.benchmark.results import Results, from_json, to_json
from tests.lab.benchmark.synthetic import make
from tests.support.pages import ROOT

MERGED = runpy.run_path(str(ROOT / "scripts/league.py"))["merged"]


def results(speeds: dict[str, float], command: str) -> Results:
    facts = {"command": command, "core_hours": 1.5, "torch": command}
    return replace(make(speeds, ("mlp", "gpt"), 2, 3), facts=facts)


def test_complete_optimizers_are_added_or_replaced() -> None:
    shipped, own = results({"adamw": 1.0, "sgd": 0.5}, "a"), results({"sgd": 0.9, "muon": 2.0, "sam": 1.0}, "b")
    unfinished = own.cell("sam", "gpt")
    own = replace(own, cells={**own.cells, ("sam", "gpt"): replace(unfinished, records=unfinished.records[:-1])})
    found = MERGED(shipped, own)
    assert found.optimizers == ["adamw", "sgd", "muon"] and list(found.spaces) == ["adamw", "sgd", "muon"]
    assert found.cell("sgd", "mlp") == own.cell("sgd", "mlp") and found.cell("adamw", "gpt") == shipped.cell(
        "adamw", "gpt"
    )
    assert found.facts == {"command": "a; b", "core_hours": 3.0, "torch": "b"}
    assert from_json(to_json(found), "x").optimizers == found.optimizers


def test_results_of_another_budget_are_refused() -> None:
    shipped = results({"sgd": 0.5}, "a")
    with pytest.raises(ValueError, match="trials: 2; the shipped results have 3"):
        MERGED(shipped, replace(shipped, trials=2))
