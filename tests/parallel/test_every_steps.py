"""Evaluations within an epoch and on a subset give the metrics of one process in every mode, in fp64."""

from pathlib import Path

from tests.support.equality import compare
from tests.support.modes import FILTER, PIPELINE, SYNC_DDP, SYNC_FSDP
from tests.support.sizes import MLP

# Three updates in an epoch; 15 of 24 validation samples, which two processes cannot share evenly.
CASE = [
    *MLP, "data.batch_size=35", "epochs=2", "ema=0.9", "evaluate.every_steps=1", "evaluate.samples=15",
    "stopping=early", "stopping.patience=9",
]  # fmt: skip
MODES = {"ddp": SYNC_DDP, "fsdp": SYNC_FSDP, "pipeline": PIPELINE, "filter": FILTER}


def test_equal_in_every_mode(tmp_path: Path) -> None:
    compare(tmp_path, 2, {name: (CASE, mode) for name, mode in MODES.items()})
