"""Evaluations within an epoch and on a subset, and the user's metrics, are those of one process in fp64."""

import os
import traceback
from pathlib import Path

from dlopt.basics.errors import RunError
from dlopt.parallel.processes import rendezvous
from tests.support.equality import compare
from tests.support.modes import DDP, FILTER, PIPELINE, SYNC_DDP, SYNC_FSDP
from tests.support.ranks import run_ranks
from tests.support.runs import start
from tests.support.sizes import MLP

# Three updates in an epoch; 15 of 24 validation samples, which two processes cannot share evenly.
CASE = [
    *MLP, "data.batch_size=35", "epochs=2", "ema=0.9", "evaluate.every_steps=1", "evaluate.samples=15",
    "stopping=early", "stopping.patience=9", "allow_packages=[tests]", "validation.shaded.data=shaded_digits",
    "monitor=val_shaded_loss",
    "evaluate.metrics=[tests.support.user_parts.mean_rank_score]",
]  # fmt: skip
MODES = {"ddp": SYNC_DDP, "fsdp": SYNC_FSDP, "pipeline": PIPELINE, "filter": FILTER}


def test_equal_in_every_mode(tmp_path: Path) -> None:
    """The metric depends on the order of the samples."""
    compare(tmp_path, 2, {name: (CASE, mode) for name, mode in MODES.items()})


def fail(folder: str) -> None:
    """Called on all ranks."""
    try:
        start(Path(folder), *CASE, *DDP, "evaluate.metrics=[tests.support.user_parts.broken]")
    except RunError as error:
        print(os.environ["DLOPT_RANK"], error)
        traceback.clear_frames(error.__traceback__)
    rendezvous.leave()


def test_all_ranks_report_a_metric_that_raises(tmp_path: Path) -> None:
    message = "evaluate.metrics=tests.support.user_parts.broken: raised KeyError: 'weights'"
    outputs = run_ranks("tests.parallel.test_evaluation:fail", 2, tmp_path / "logs", str(tmp_path / "run"))
    assert [f"{rank} {message}" in output for rank, output in enumerate(outputs)] == [True, True]
