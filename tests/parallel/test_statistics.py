"""Running statistics of unsynchronized batch norms: equal on all ranks after every update."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from dlopt.parallel.modes.sync_batchnorm import buffer_averaging
from dlopt.parallel.processes import rendezvous
from dlopt.training.checkpoint.checkpoints import Checkpoints
from dlopt.training.progress import TrainingRun
from tests.support.ranks import run_ranks
from tests.support.runs import at_update, result, run_config, run_job, same, terminate, timeless
from tests.support.sizes import SMALL, without
from tests.support.split_models import join_all

# 90 training samples: batches of 25, 25, 25, 15, sharded unequally
CASE = [
    *without(SMALL, "model"),
    "model=resnet20", "model.depth=8", "augmentation=crop_flip", "model.dropout=0.2", "ema=0.9", "epochs=2",
]  # fmt: skip


def averaged() -> None:
    """Called on all ranks."""
    model_group = join_all()
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(2, track_running_stats=False), nn.BatchNorm1d(1))
    average = buffer_averaging(model, model_group.size)
    assert average is not None
    for _ in range(2):  # averaging equal statistics leaves them unchanged
        for number, norm in ((1, model[0]), (2, model[2])):
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean += model_group.rank * number
            norm.running_var *= 1 + model_group.rank
        average()
    assert torch.equal(model[0].running_mean, torch.full((3,), 1.0)) and model[2].running_mean == 2
    assert torch.equal(model[0].running_var, torch.full((3,), 2.25))
    assert buffer_averaging(nn.Linear(2, 2), model_group.size) is None and buffer_averaging(model, 1) is None


def resume_run(folder: Path, *overrides: str, until: int | None = None) -> None:
    """Called on all ranks: resumes the run in `folder`; only rank 0 receives the stop request."""
    is_main = os.environ["DLOPT_RANK"] == "0"
    state = Checkpoints(folder / "checkpoints").load_newest() if is_main else None
    run = TrainingRun(run_config(*overrides), folder, state)
    if until is None:
        run_job(run)
    else:
        with at_update(until, terminate if is_main else lambda: None):
            summary = run_job(run)
        # The next update's losses carry the request to all ranks; after the last update, its evaluation does.
        assert summary["status"] == "interrupted" and until <= summary["steps"] <= until + 1
    rendezvous.leave()


def interrupted(folder: str, mode: list[str]) -> None:
    """Called on all ranks: an uninterrupted run, one stopped in both epochs, and one saved after every update."""
    resume_run(Path(folder) / "whole", *CASE, *mode)
    for until in (2, 6, None):
        resume_run(Path(folder) / "stopped", *CASE, *mode, until=until)
    resume_run(Path(folder) / "saved", *CASE, *mode, "checkpoint.every_steps=1")


def check(folder: Path) -> None:
    for name in ("stopped", "saved"):
        assert timeless(folder / name) == timeless(folder / "whole"), name
        for file in ("last.pt", "best.pt"):
            assert same(result(folder / name, file), result(folder / "whole", file)), (name, file)


def test_statistics_are_averaged_over_ranks(tmp_path: Path) -> None:
    run_ranks("tests.parallel.test_statistics:averaged", 2, tmp_path)


@pytest.mark.slow
def test_interrupted_ddp_run_is_bitwise_identical(tmp_path: Path) -> None:
    run_ranks("tests.parallel.test_statistics:interrupted", 2, tmp_path, str(tmp_path), ["parallel=ddp"])
    check(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode", [["parallel=fsdp"], ["parallel=hybrid", "parallel.model_degree=2"]], ids=lambda m: m[0]
)
def test_interrupted_runs_are_bitwise_identical_in_other_modes(tmp_path: Path, mode: list[str]) -> None:
    four = [*mode, "data.batch_size=30"]  # three batches of 30
    run_ranks("tests.parallel.test_statistics:interrupted", 4, tmp_path, str(tmp_path), four)
    check(tmp_path)
