"""Compares distributed runs with single-process runs, in fp64."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from dlopt.config.parsing import parse
from dlopt.parallel.processes import rendezvous
from dlopt.training.checkpoint.checkpoints import Checkpoints
from dlopt.training.progress import TrainingRun
from tests.support.ranks import run_ranks
from tests.support.runs import Composed, composed, metrics, run_config, run_job, start

Cases = dict[str, tuple[list[str], list[str]]]
"""By name: (overrides of both runs, additional overrides of the distributed run)."""


def run_distributed(processes: int, folder: Path, cases: Cases) -> None:
    """Runs all cases in folders of their names, and compares the ranks in every update (`check=step`).

    Composes them here: each rank would need the same time again.
    """
    run_configs = {
        name: composed(*overrides, *distributed, "check=step") for name, (overrides, distributed) in cases.items()
    }
    run_ranks("tests.support.equality:run_all", processes, folder, str(folder), run_configs)


def run_all(folder: str, run_configs: dict[str, Composed]) -> None:
    """Runs all experiments; called on all ranks."""
    for name, plain in run_configs.items():
        summary = run_job(TrainingRun(parse(*plain), Path(folder) / name))
        assert summary["status"] in ("finished", "stopped_early")
        rendezvous.leave()


def resume_run(folder: Path, *overrides: str) -> dict[str, Any]:
    """Called on all ranks: resumes the run in `folder` from the checkpoint that rank 0 loads."""
    state = Checkpoints(folder / "checkpoints").load_newest() if os.environ["DLOPT_RANK"] == "0" else None
    summary = run_job(TrainingRun(run_config(*overrides), folder, state))
    rendezvous.leave()
    return summary


def run_legs(processes: int, logs: Path, run: Path, both: list[str], legs: list[tuple[list[str], int]]) -> None:
    """Resumes one run in several modes, one after the other: (overrides of the mode, number of epochs)."""
    run_ranks("tests.support.equality:_run_legs", processes, logs, run, both, legs)


def _run_legs(run: Path, both: list[str], legs: list[tuple[list[str], int]]) -> None:
    """Called on all ranks."""
    for mode, epochs in legs:
        resume_run(run, *both, *mode, f"epochs={epochs}")


def metric_values(line: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in line.items() if key.startswith(("train_", "val_"))}


def assert_equal(single: Path, distributed_folder: Path, tolerance: float = 1e-9) -> None:
    expected, actual = metrics(single), metrics(distributed_folder)
    assert len(expected) == len(actual) > 0
    for a, b in zip(expected, actual, strict=True):
        assert a["step"] == b["step"]
        assert metric_values(b) == pytest.approx(metric_values(a), rel=tolerance), (single, a["epoch"])
    ends = [json.loads((folder / "summary.json").read_text()) for folder in (single, distributed_folder)]
    keys = [key for key in ends[0] if key.startswith(("test_", "best_"))]
    assert {"test_loss", "best_val_loss", "best_epoch"} <= set(keys)
    for key in (*keys, "steps"):
        assert ends[1][key] == pytest.approx(ends[0][key], rel=tolerance)
    assert ends[1]["processes"] > 1
    assert math.isfinite(ends[1]["test_loss"])


def compare(tmp_path: Path, processes: int, cases: Cases) -> None:
    run_distributed(processes, tmp_path / "distributed", cases)
    single: dict[tuple[str, ...], Path] = {}  # cases that differ only in the mode share a run
    for name, (overrides, _) in cases.items():
        if tuple(overrides) not in single:
            single[tuple(overrides)] = tmp_path / "single" / name
            start(tmp_path / "single" / name, *overrides)
        assert_equal(single[tuple(overrides)], tmp_path / "distributed" / name)
