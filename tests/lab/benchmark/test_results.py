"""The file of results, and results that come with dlopt."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from dlopt.basics.errors import UserError
from dlopt.lab.benchmark.results import best_trial, read, to_json
from tests.lab.benchmark.synthetic import flipped, make, saved_and_read

SMALL = make({"muon": 2.0, "sgd": 0.7, "bad": 1.0}, ("mlp", "gpt"), 2, 4, {"bad": flipped})


def test_json_round_trip(tmp_path: Path) -> None:
    text = to_json(SMALL)
    read_back = saved_and_read(SMALL, tmp_path)
    assert to_json(read_back) == text
    assert "Infinity" not in text and "NaN" not in text
    assert (read_back.workloads, read_back.spaces, read_back.facts) == (SMALL.workloads, SMALL.spaces, SMALL.facts)
    for key, cell in SMALL.cells.items():
        again = read_back.cells[key]
        assert again.cost is not None and cell.cost is not None
        assert dataclasses.astuple(again.cost) == pytest.approx(dataclasses.astuple(cell.cost), rel=1e-4)
        assert len(again.curve) == len(cell.curve)
        for a, b in zip(again.records, cell.records, strict=True):
            assert (a.updates, a.evaluations, a.values, a.failure) == (b.updates, b.evaluations, b.values, b.failure)
            assert a.best == pytest.approx(b.best, rel=1e-4) and (a.last is None) == (b.last is None)
    assert any(math.isinf(record.updates) for cell in read_back.cells.values() for record in cell.records)


@pytest.mark.parametrize("change", [{"format": 99}, {"cells": [{}]}, {"workloads": 3}, {"cells": None}])
def test_other_files_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(json.loads(to_json(SMALL)) | change))
    with pytest.raises(UserError, match=r"r\.json"):
        read(path)
    path.write_bytes(b"\xff{")
    with pytest.raises(UserError, match=r"r\.json"):
        read(path)


def test_shipped_optimizers_are_added_with_the_same_budget(tmp_path: Path) -> None:
    own = make({"mine": 1.0, "sgd": 5.0}, ("mlp",), 1, 2)
    merged = own.with_reference(SMALL)
    assert merged.optimizers == ["mine", "sgd", "muon", "bad"] and merged.shipped == {"muon", "bad"}
    assert merged.cell("sgd", "mlp") == own.cell("sgd", "mlp")  # the own measurement is kept
    assert [(each.study, each.trial) for each in merged.cell("muon", "mlp").records] == [(0, 0), (0, 1)]
    assert ("muon", "gpt") not in merged.cells and merged.missing() == 0
    assert merged.facts["reference"]["studies"] == 2 and merged.facts["reference"]["command"]
    assert saved_and_read(merged, tmp_path).optimizers == ["mine", "sgd"]  # a file has the own results only


def test_curves_and_tests_of_shipped_trials_outside_the_budget_are_omitted() -> None:
    reference = make({"muon": 2.0}, ("mlp",), 2, 10)
    cell, own = reference.cell("muon", "mlp"), make({"mine": 1.0}, ("mlp",), 2, 10)
    best = [best_trial(records, "val_loss") for records in (cell.study(0), cell.study(1), cell.records)]
    assert [each and (each.study, each.trial) for each in best] == [(0, 4), (1, 5), (1, 5)]
    for trials, studies in ((10, [0, 1]), (5, [0]), (4, [])):
        merged = dataclasses.replace(own, trials=trials).with_reference(reference).cell("muon", "mlp")
        assert sorted(merged.tests) == studies
        assert merged.curve == (cell.curve if trials == 10 else ())


def test_missing_trials_are_counted() -> None:
    key = ("sgd", "mlp")
    less = dataclasses.replace(SMALL, cells=SMALL.cells | {key: SMALL.cells[key].truncated(1, 3, "val_loss")})
    assert SMALL.missing() == 0 and less.missing() == 5
