"""The way of a run, from the command line to an update: the functions that a reader opens, in this order."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from dlopt._version import ROOT
from dlopt.training.step import Step
from tests.support.line import dlopt
from tests.support.sizes import TINY

FRAMES = [
    "cli.main",
    "commands.train.train",
    "run.runner.run",
    "run.runner.execute",
    "training.run.train_run",
    "training.loop.Trainer.fit",
    "training.step.Step.update",
]


def test_frames_of_an_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    begin = Step.begin

    def noting(self: Step, *arguments: Any, **keys: Any) -> None:
        found[:] = []
        frame = sys._getframe(1)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT):
                found.insert(0, f"{module(path.relative_to(ROOT))}.{frame.f_code.co_qualname}")
            frame = frame.f_back
        begin(self, *arguments, **keys)

    monkeypatch.setattr(Step, "begin", noting)
    assert dlopt(tmp_path, "train", *TINY).code == 0
    assert found == FRAMES


def test_the_tour_of_contributors_names_them() -> None:
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    stops = re.findall(r"^\d\. `([\w.]+)` \(`dlopt/([\w/]+\.py)`\)", text, re.MULTILINE)
    assert [f"{module(Path(path))}.{name}" for name, path in stops] == FRAMES


def module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)
