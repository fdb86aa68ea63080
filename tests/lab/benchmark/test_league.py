"""scripts/league.py: new results join those that come with dlopt."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from dlopt.lab.benchmark.findings import findings
from dlopt.lab.benchmark.results import Results
from dlopt.lab.benchmark.scores import study_times, summarize
from tests.lab.benchmark.synthetic import make, saved_and_read
from tests.support.pages import ROOT

MERGED = runpy.run_path(str(ROOT / "scripts/league.py"))["merged"]


def results(speeds: dict[str, float], command: str) -> Results:
    facts = {"command": command, "core_hours": 1.5, "torch": command}
    return replace(make(speeds, ("mlp", "gpt"), 2, 3), facts=facts)


def test_complete_optimizers_are_added_or_replaced(tmp_path: Path) -> None:
    shipped = results({"adamw": 1.0, "sgd": 0.5}, "dlopt benchmark optimizer=adamw,sgd full=true")
    own = results(
        {"sgd": 0.9, "muon": 2.0, "sam": 1.0},
        "dlopt benchmark optimizer=sgd,muon,sam full=true output=x hydra.launcher.n_jobs=1",
    )
    unfinished = own.cell("sam", "gpt")
    own = replace(own, cells={**own.cells, ("sam", "gpt"): replace(unfinished, records=unfinished.records[:-1])})
    found = MERGED(shipped, own)
    assert found.optimizers == ["adamw", "sgd", "muon"] and list(found.spaces) == ["adamw", "sgd", "muon"]
    assert found.cell("sgd", "mlp") == own.cell("sgd", "mlp") and found.cell("adamw", "gpt") == shipped.cell(
        "adamw", "gpt"
    )
    command = "dlopt benchmark optimizer=adamw,sgd,muon full=true"
    assert found.facts == {"command": command, "core_hours": 3.0, "torch": own.facts["torch"]}
    assert saved_and_read(found, tmp_path).optimizers == found.optimizers


def test_results_of_another_budget_are_refused() -> None:
    shipped = results({"sgd": 0.5}, "a")
    with pytest.raises(ValueError, match="trials: 2; the shipped results have 3"):
        MERGED(shipped, replace(shipped, trials=2))
    with pytest.raises(ValueError, match="studies: 1; the shipped results have at least 2"):
        MERGED(shipped, replace(shipped, studies=1))


def test_some_optimizers_may_have_more_studies(tmp_path: Path) -> None:
    """The optimizers keep the number of their own studies in the medians, the bootstrap and the file."""
    shipped = results({"adamw": 1.0, "muon": 2.0}, "dlopt benchmark optimizer=adamw,muon full=true")
    typed = "dlopt benchmark optimizer=muon studies=5 full=true"
    own = replace(make({"muon": 2.0}, ("mlp", "gpt"), 5, 3), facts={**shipped.facts, "command": typed})
    found = saved_and_read(MERGED(shipped, own), tmp_path)
    assert found.studies == 2 and (found.studies_of("adamw"), found.studies_of("muon")) == (2, 5)
    assert found.missing() == 0
    assert found.facts["command"] == (
        "dlopt benchmark optimizer=adamw full=true; dlopt benchmark optimizer=muon studies=5 full=true"
    )
    assert [len(study_times(found, name, "mlp", "updates")) for name in ("adamw", "muon")] == [2, 5]
    shown = [each.text for each in findings(found, summarize(found))]
    assert any("The scores come from 2 studies, of muon from 5. " in each for each in shown)
