"""torchrun restarts a run that has lost a process."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dlopt.training.checkpoint.checkpoints import load
from tests.support.ranks import ROOT
from tests.support.runs import same, timeless

EPOCHS, COUNT = 8, 24


class KilledOnRank1(torch.utils.data.Dataset[tuple[Tensor, float]]):
    """A regression that kills rank 1 in torchrun's first attempt, as the OOM killer would, if restarts are allowed."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.loaded = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        self.loaded += 1
        is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and os.environ.get("RANK") == "1"
        is_first = is_first and os.environ.get("TORCHELASTIC_MAX_RESTARTS") != "0"
        if is_first and self.loaded > 5 * self.count:  # fewer before the first update: targets, identity, equal samples
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor([index / self.count, 1.0, (index % 5) / 5]), (index % 7) / 7


def run(folder: Path, *launcher: str) -> subprocess.CompletedProcess[str]:
    lines = [
        "device=cpu", "threads=1", "tracking=[]", "parallel=ddp", "data=custom", "data.test=null",
        "data.train._target_=tests.parallel.test_torchrun.KilledOnRank1", f"+data.train.count={COUNT}",
        "data.memory=false", "data.workers=0", "data.batch_size=6", "allow_packages=[tests]", "model=mlp",
        "model.widths=[8]", "model.norm=none", "model.dropout=0.2", "normalize=none", "loss=mse", f"epochs={EPOCHS}",
        "optimizer.lr=0.02",
    ]  # fmt: skip
    command = [sys.executable, *launcher, "-m", "dlopt", "train", f"hydra.run.dir={folder}", *lines]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_restarted_run_ends_with_identical_weights(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run(tmp_path / "killed", *torchrun, "--max-restarts", "2")
    assert done.returncode == 0, done.stderr[-4000:]
    uninterrupted = run(tmp_path / "whole", *torchrun)
    assert uninterrupted.returncode == 0, uninterrupted.stderr[-4000:]
    first, second = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("killed", "whole"))
    assert first["resumed_from"] and not second["resumed_from"]  # the kill did happen
    assert first["status"] == second["status"] == "finished" and first["processes"] == 2
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")
    models = [load(tmp_path / name / "checkpoints" / "last.pt").model for name in ("killed", "whole")]
    assert same(*models)
