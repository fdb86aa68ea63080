"""The recorded loss curve of a run."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dlopt.lab.ladder.curve import LossCurve, interval, read_curve

LOSSES = [3.0, 2.5, 2.0, 1.75, 1.5, 1.25, 1.0]
MODEL = nn.Linear(1, 1)


def observe(folder: Path, steps: range, every: int = 2, *, ends: bool) -> None:
    """Passes updates to a new observer, as a run does that starts or resumes; `ends`: or is killed."""
    curve = LossCurve(folder=str(folder), every=every)
    for step in steps:
        curve.after_update(step, torch.tensor(LOSSES[step - 1]), MODEL)
    if ends:
        curve.at_end({})


def read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    monkeypatch.setattr("dlopt.lab.ladder.curve.POINTS", 4)
    return read_curve(folder, len(LOSSES))


def test_a_point_is_the_mean_of_its_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    observe(tmp_path, range(1, 8), ends=True)
    assert read(tmp_path, monkeypatch) == [2.75, 1.875, 1.375, 1.0]  # the last has one update


def test_a_run_has_about_fifty_points() -> None:
    assert [interval(updates) for updates in (3, 50, 51, 785, 7818)] == [1, 1, 2, 16, 157]


@pytest.mark.parametrize(
    ("first", "resumed", "ends"),
    [(3, 4, True), (4, 5, True), (5, 5, False), (7, 3, False), (1, 2, True)],
    ids=["within a point", "between points", "killed after the checkpoint", "killed late", "first point"],
)
def test_a_resumed_run_has_the_curve_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, resumed: int, ends: bool
) -> None:
    """An interruption ends the first run after `first` updates; a killed one resumes between two points."""
    observe(tmp_path, range(1, first + 1), ends=ends)
    observe(tmp_path, range(resumed, 8), ends=True)
    assert read(tmp_path, monkeypatch) == [2.75, 1.875, 1.375, 1.0]


def test_a_run_from_the_start_removes_a_former_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    observe(tmp_path, range(1, 8), every=1, ends=True)
    observe(tmp_path, range(1, 8), ends=True)
    assert read(tmp_path, monkeypatch) == [2.75, 1.875, 1.375, 1.0]


def test_an_incomplete_curve_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(tmp_path, monkeypatch) == []
    observe(tmp_path, range(1, 7), ends=True)
    assert read(tmp_path, monkeypatch) == []


def test_a_curve_with_a_value_that_is_not_finite_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curve = LossCurve(folder=str(tmp_path), every=2)
    for step in range(1, 8):
        curve.after_update(step, torch.tensor(float("nan") if step == 3 else 1.0), MODEL)
    curve.at_end({})
    assert read(tmp_path, monkeypatch) == []
