"""A Slurm cluster of two nodes on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.ranks import ROOT
from tests.support.requires import requires

CLUSTER, BATCH = ROOT / "scripts" / "slurm" / "one_host_cluster", ROOT / "dlopt" / "templates" / "train.sbatch"


pytestmark = [pytest.mark.slow, requires("munged", "slurmctld", "slurmd", "sbatch")]


SMALL = [
    "device=cpu", "threads=1", "tracking=[]", "model=mlp", "model.widths=[8]", "data.subset=100", "data.workers=0",
    "log_every_steps=null",
]  # fmt: skip


EPOCHS = 150


LONG = [
    "device=cpu", "threads=1", "tracking=[]", "log_every_steps=null", "parallel=ddp", f"epochs={EPOCHS}",
    "checkpoint.every_epochs=null", "data=custom", "data.train._target_=tests.support.slurm.Slow",
    "data.test=null", "data.memory=false", "data.workers=0", "data.batch_size=8", "allow_packages=[tests]",
    "normalize=none", "loss=mse", "model=mlp", "model.widths=[8]", "model.norm=none", "model.dropout=0.2",
    "optimizer.lr=0.02",
]  # fmt: skip


class Slow(torch.utils.data.Dataset[tuple[Tensor, float]]):
    """A regression whose samples sleep: runs take about 7 s on two ranks, on a fast machine and on a busy one."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        time.sleep(0.004)
        return torch.tensor([index / 20, 1.0, (index % 5) / 5]), (index % 7) / 7


class Deadly(Slow):
    """Kills the process that reads it."""

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def free_ports() -> int:
    """Returns the first of three consecutive free ports."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        try:
            for candidate in range(port, port + 3):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", candidate))
        except (OSError, OverflowError):
            continue
        return port


class Cluster:
    """Slurm commands of a user, run in the folder `home`."""

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        self.home, self.environment = home, environment

    def run(self, *command: str) -> str:
        options: dict[str, Any] = {"cwd": self.home, "env": self.environment, "capture_output": True, "text": True}
        done = subprocess.run(command, timeout=170, **options)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-4000:])
        return str(done.stdout)

    def start_now(self, job: str) -> None:
        """Starts a requeued job without Slurm's delay of two minutes."""
        # Slurm revokes the credential of a job that starts within the second in which it was requeued.
        time.sleep(5)
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def submit(self, *arguments: str) -> str:
        return self.run("sbatch", "--parsable", *arguments).strip()

    def states(self, job: str) -> list[str]:
        return self.run("squeue", "--noheader", "--array", f"--jobs={job}", "--format=%T", "--states=all").split()

    def restarts(self, job: str) -> int:
        shown = self.run("scontrol", "show", "job", job)
        return int(shown.partition("Restarts=")[2].split()[0])

    def wait(self, job: str, condition: Callable[[], bool], pause: float = 0.5) -> None:
        deadline, log = time.monotonic() + 240, self.home / f"slurm-{job}.log"
        while not condition():
            log_text = log.read_text()[-4000:] if log.exists() else ""
            assert time.monotonic() < deadline and "Traceback" not in log_text, (self.run("squeue"), log_text)
            time.sleep(pause)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    base = tmp_path_factory.mktemp("slurm")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    environment["PYTHONPATH"] = str(ROOT)
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    up = subprocess.run(
        [CLUSTER, "up", base / "cluster"],
        env={**environment, "SLURM_PORT": str(free_ports())},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert up.returncode == 0
    home = base / "home"
    home.mkdir()
    try:
        yield Cluster(home, {**environment, "SLURM_CONF": up.stdout.strip()})
    finally:
        subprocess.run([CLUSTER, "down", base / "cluster"], timeout=60, check=True)


def summary(folder: Path) -> dict[str, Any]:
    contents: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return contents
