"""Model-parallel runs against single-process runs, in fp64."""

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from dlopt.basics.errors import UserError
from dlopt.parallel.processes import rendezvous
from dlopt.training.checkpoint.checkpoints import Checkpoints
from dlopt.training.progress import TrainingRun
from tests.support.equality import Cases, compare, run_legs
from tests.support.modes import COLUMNS, FILTER, MESH, SPATIAL, SYNC
from tests.support.ranks import run_ranks
from tests.support.runs import run_config, run_job, start
from tests.support.sizes import BASE, MLP, RESNET

ALEXNET = [*BASE, "model=two_column_alexnet", "model.hidden=16", "augmentation=crop_flip"]
IMAGES = [*BASE, "model=resnet20", "model.depth=8", "model.dropout=0.2", "augmentation=crop_flip"]

TWO: Cases = {
    "filter, last batch of two": ([*RESNET, "data.batch_size=47", "steps=4"], FILTER),
    "filter, accumulation": ([*MLP, "data.batch_size=35", "accumulate=3", "epochs=2", "ema=0.9", "clip=norm",
        "clip.max_norm=0.1"], FILTER),
    "filter, exact statistics": ([*MLP, "norm_statistics=exact", "data.batch_size=32", "epochs=2", "clip=adaptive",
        "clip.clipping=0.02"], FILTER),
    "spatial, accumulation": ([*RESNET, "data.batch_size=35", "accumulate=3", "steps=4", "ema=0.9",
        "norm_statistics=exact"], SPATIAL),
    "columns": ([*ALEXNET, "data.batch_size=47", "steps=4", "clip=norm", "clip.max_norm=0.1", "optimizer=adamw"],
        COLUMNS),
}  # fmt: skip
FOUR: Cases = {
    "filter": ([*RESNET, "data.batch_size=47", "steps=4"], FILTER),
    "spatial": ([*RESNET, "data.batch_size=47", "steps=4"], SPATIAL),
    "data x filter": ([*RESNET, "data.batch_size=35", "accumulate=2", "steps=4", "ema=0.9"], [*MESH, SYNC]),
    "data x filter, empty shards": ([*MLP, "model.norm=none", "data.batch_size=19", "epochs=2"], MESH),
    "data x columns": (
        [*ALEXNET, "data.batch_size=35", "steps=3", "clip=norm", "clip.max_norm=0.1"],
        [*MESH, "parallel.inside=columns"],
    ),
}


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    compare(tmp_path, 2, TWO)


@pytest.mark.slow
def test_four_processes_equal_one(tmp_path: Path) -> None:
    compare(tmp_path, 4, FOUR)


@pytest.mark.slow
def test_elementwise_optimizers(tmp_path: Path) -> None:
    # Without batch norm: some gradients before it are zero up to rounding, and Lion and Rprop follow their sign.
    both = [*MLP, "model.norm=none", "data.batch_size=35", "epochs=2"]
    names = ["adadelta", "adagrad", "adam", "irprop", "lion", "nadam", "radam", "rmsprop", "rprop"]
    names += ["schedule_free_adamw", "sgdw"]
    cases: Cases = {name: ([*both, f"optimizer={name}", "optimizer.lr=0.01"], FILTER) for name in [*names, "momentum"]}
    compare(tmp_path, 2, cases)


def relay(tmp_path: Path, processes: int, both: list[str], modes: list[list[str]]) -> None:
    """One process starts a run, each of `modes` resumes it for an epoch, and one process finishes it."""
    both = [*both, "optimizer=adamw", "optimizer.lr=0.01", "data.batch_size=48"]  # two updates per epoch
    legs = [(mode, 1 + number) for number, mode in enumerate(modes, 1)]
    start(tmp_path / "relay", *both, "epochs=1")
    run_legs(processes, tmp_path, tmp_path / "relay", both, legs)
    state = Checkpoints(tmp_path / "relay" / "checkpoints").load_newest()
    epochs = f"epochs={len(modes) + 2}"
    run_job(TrainingRun(run_config(*both, epochs), tmp_path / "relay", state))
    start(tmp_path / "whole", *both, epochs)
    ends = [Checkpoints(tmp_path / name / "checkpoints").load_newest() for name in ("relay", "whole")]
    for one, other in zip(*(_tensors(each) for each in ends), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert ends[0] is not None and len(ends[0].state["progress"]["resumed_from"]) == len(modes) + 1


def _tensors(checkpoint: Any) -> list[torch.Tensor]:
    parts = [checkpoint.model, *checkpoint.optimizer["state"].values(), checkpoint.state["ema"] or {}]
    return [value for part in parts for value in part.values() if isinstance(value, torch.Tensor)]


def test_checkpoints_resume_in_other_modes(tmp_path: Path) -> None:
    relay(tmp_path, 2, [*MLP, "model.norm=batch", "ema=0.9"], [FILTER, ["parallel=ddp", SYNC], SPATIAL])


@pytest.mark.slow
def test_checkpoints_of_convolutional_models_resume_in_other_modes(tmp_path: Path) -> None:
    relay(tmp_path / "columns", 2, ALEXNET, [COLUMNS, FILTER, ["parallel=ddp"], COLUMNS])
    relay(tmp_path / "four", 4, IMAGES, [[*MESH, SYNC], SPATIAL, FILTER])


def refused(cases: list[tuple[list[str], str]]) -> None:
    """Called on all ranks."""
    for overrides, message in cases:
        with pytest.raises(UserError, match=f"^{re.escape(message)}"), tempfile.TemporaryDirectory() as folder:
            run_job(TrainingRun(run_config(*BASE, *overrides), Path(folder)))
        rendezvous.leave()


def test_unsupported_combinations_raise_one_line(tmp_path: Path) -> None:
    cases = [
        ([*FILTER, "model=mlp", "optimizer=lamb"], "parallel=filter: LAMB needs full tensors or the full model"),
        ([*COLUMNS, "model=mlp"], "parallel=columns: MLP has no columns"),
        (
            [*MESH, "model=mlp", "parallel.data_degree=2"],
            "parallel=hybrid: data_degree x model_degree = 2 x 2 = 4, but there are 2",
        ),
        ([*SPATIAL, "model=locally_connected", "model.norm=group"], "parallel=spatial: layer1.1 is a GroupNorm, which"),
    ]
    run_ranks("tests.parallel.test_model_parallel:refused", 2, tmp_path, cases)
