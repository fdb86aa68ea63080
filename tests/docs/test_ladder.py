"""The page of a ladder is generated from its results.json."""

import math
from pathlib import Path

import pytest

from dlopt.lab.ladder.findings import findings
from dlopt.lab.ladder.ladder import LadderRequest
from dlopt.lab.ladder.results import collect, to_json
from dlopt.lab.ladder.table import tables
from tests.support.ladders import results, simulate, with_arms
from tests.support.pages import ROOT


def test_results_read_from_the_file_show_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs/_ext"))
    import ladder

    made = results(1.5)
    (tmp_path / "results.json").write_text(to_json(made))
    read = ladder.results(tmp_path)
    assert (read.ladder.optimizers, read.outcomes) == (made.ladder.optimizers, made.outcomes)
    assert tables(read) == tables(made) and findings(read) == findings(made)
    made.facts["command"] = "dlopt ladder optimizer=adamw,mine model=f; dlopt ladder optimizer=mine model=f"
    made.facts["processor"] = "some processor"
    (tmp_path / "results.json").write_text(to_json(made))
    text = ladder.ladder(tmp_path)
    assert "| Optimizer | `r0` | `r1` | `r2` | `r3` | `r4` |" in text and text.count("\n| `mine` |") == 4
    assert "`dlopt ladder optimizer=mine model=f`, with processor some processor." in text
    assert math.isnan(ladder._number(None))


def test_arms_read_from_the_file_show_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs/_ext"))
    import ladder

    request = LadderRequest(tmp_path / "runs", with_arms(("inverse", "hyperball")))
    simulate(request, scaled=3.2)
    made = collect(request)
    (tmp_path / "results.json").write_text(to_json(made))
    read = ladder.results(tmp_path)
    assert read.decays == made.decays and tables(read) == tables(made) and findings(read) == findings(made)
