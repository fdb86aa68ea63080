"""Runs of several processes against runs of one, in fp64."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dlopt.parallel import rendezvous
from dlopt.training.trainer import Run, train
from tests.parallel.ranks import run_ranks
from tests.training.runs import experiment, metrics, start

# 96 training samples
BASE = [
    "data.subset=120", "data.val_split=0.2", "data.workers=0", "tracking=[]", "threads=1", "device=cpu",
    "precision=fp64", "schedule=constant", "optimizer.lr=0.05", "log_every_steps=3",
]  # fmt: skip
RESNET = [
    *BASE, "model=resnet20", "model.depth=8", "model.dropout=0.2", "augmentation=crop_flip",
    "optimizer.momentum=0.9", "optimizer.weight_decay=0.001",
]  # fmt: skip
MLP = [*BASE, "model=mlp", "model.widths=[12]", "model.dropout=0.3"]

Cases = dict[str, tuple[list[str], list[str]]]
"""By name: overrides of both runs, overrides of the distributed one."""


def run_all(folder: str, cases: Cases) -> None:
    """In each rank: the runs one after the other."""
    for name, (both, own) in cases.items():
        summary = train(Run(experiment(*both, *own), Path(folder) / name), console=False)
        assert summary["status"] in ("finished", "stopped_early")
        rendezvous.leave()


def figures(line: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in line.items() if key.startswith(("train_", "val_"))}


def assert_equal(single: Path, several: Path, tolerance: float = 1e-9) -> None:
    one, many = metrics(single), metrics(several)
    assert len(one) == len(many) > 0
    for a, b in zip(one, many, strict=True):
        assert a["step"] == b["step"]
        assert figures(b) == pytest.approx(figures(a), rel=tolerance), (single, a["epoch"])
    ends = [json.loads((folder / "summary.json").read_text()) for folder in (single, several)]
    for key in ("test_loss", "test_accuracy", "best_val_loss", "best_epoch", "steps"):
        assert ends[1][key] == pytest.approx(ends[0][key], rel=tolerance)
    assert ends[1]["processes"] > 1
    assert math.isfinite(ends[1]["test_loss"])


def compare(tmp_path: Path, processes: int, cases: Cases) -> None:
    run_ranks("tests.parallel.equality:run_all", processes, tmp_path, str(tmp_path / "several"), cases)
    for name, (both, _) in cases.items():
        start(tmp_path / "single" / name, *both)
        assert_equal(tmp_path / "single" / name, tmp_path / "several" / name)
