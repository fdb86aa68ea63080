"""dlopt on a real Slurm cluster: `srun`, `sbatch`, preemption with requeue and resume, arrays."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from dlopt.training.checkpoint import load
from tests.parallel.ranks import ROOT
from tests.support.requires import requires
from tests.training.runs import same, timeless

CLUSTER, BATCH = ROOT / "scripts" / "slurm" / "one_host_cluster", ROOT / "dlopt" / "templates" / "train.sbatch"

pytestmark = [pytest.mark.slow, requires("munged", "slurmctld", "slurmd", "sbatch")]

SMALL = [
    "device=cpu", "threads=1", "tracking=[]", "model=mlp", "model.widths=[8]", "data.subset=100", "data.workers=0",
    "log_every_steps=null",
]  # fmt: skip
EPOCHS = 150
LONG = [
    "device=cpu", "threads=1", "tracking=[]", "log_every_steps=null", "parallel=ddp", f"epochs={EPOCHS}",
    "checkpoint.every_epochs=null", "data=custom", "data.train._target_=tests.cluster.test_slurm.Slow",
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


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_preempted_job_is_requeued_and_ends_with_identical_weights(cluster: Cluster) -> None:
    job = cluster.submit("--nodes=2", "--ntasks-per-node=1", str(BATCH), *LONG)
    folder = cluster.home / "outputs" / "slurm" / job
    cluster.wait(job, lambda: lines(folder) > 5, pause=0.1)
    cluster.run("scancel", "--signal=USR1", job)  # as --signal=USR1@120 in the script, before the time limit
    cluster.wait(job, lambda: cluster.restarts(job) == 1 and cluster.states(job) == ["PENDING"])
    first = summary(folder)
    assert first["status"] == "interrupted" and first["processes"] == 2 and 0 < first["epochs"] < EPOCHS - 10

    cluster.start_now(job)
    cluster.wait(job, lambda: lines(folder) > first["epochs"] + 5, pause=0.1)
    cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    cluster.wait(job, lambda: cluster.restarts(job) == 2 and cluster.states(job) == ["PENDING"])
    second = summary(folder)
    assert second["status"] == "interrupted" and second["resumed_from"] == [first["steps"]]

    cluster.start_now(job)
    cluster.run("srun", "-n", "2", "dlopt", "train", *LONG, "hydra.run.dir=uninterrupted")
    cluster.wait(job, lambda: cluster.states(job) == ["COMPLETED"])
    uninterrupted = cluster.home / "uninterrupted"
    last, expected = summary(folder), summary(uninterrupted)
    assert last["status"] == expected["status"] == "finished" and last["epochs"] == expected["epochs"] == EPOCHS
    assert last["resumed_from"] == [first["steps"], second["steps"]] and expected["resumed_from"] == []
    assert expected["processes"] == 2 and expected["parallel"] == "ddp"
    assert timeless(folder) == timeless(uninterrupted)
    models = [load(run / "checkpoints" / "last.pt")["model"] for run in (folder, uninterrupted)]
    assert same(*models)


def test_job_preempted_while_python_starts_is_requeued(cluster: Cluster) -> None:
    """The signal kills it, because no handler is installed yet."""
    slow = cluster.home / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text("import time\ntime.sleep(4)\n")
    job = cluster.submit(f"--export=ALL,PYTHONPATH={slow}:{ROOT}", str(BATCH), *SMALL, "epochs=1")
    folder, log = cluster.home / "outputs" / "slurm" / job, cluster.home / f"slurm-{job}.log"
    cluster.wait(job, lambda: log.exists() and "dlopt train" in log.read_text(), pause=0.1)
    time.sleep(1.5)  # srun has started Python
    cluster.run("scancel", "--signal=TERM", "--full", job)
    cluster.wait(job, lambda: cluster.restarts(job) == 1 and cluster.states(job) == ["PENDING"])
    assert not folder.exists()

    cluster.start_now(job)
    cluster.wait(job, lambda: cluster.states(job) == ["COMPLETED"])
    assert summary(folder)["status"] == "finished"


def test_cancelled_job_is_not_requeued(cluster: Cluster) -> None:
    """It also exits with 75, but the user cancelled it."""
    job = cluster.submit(str(BATCH), *SMALL, "epochs=100000", "stopping=none")
    folder = cluster.home / "outputs" / "slurm" / job
    cluster.wait(job, lambda: lines(folder) > 5, pause=0.1)
    cluster.run("scancel", job)
    cluster.wait(job, lambda: cluster.states(job) == ["CANCELLED"])
    assert cluster.restarts(job) == 0
    assert summary(folder)["status"] == "interrupted" and (folder / "checkpoints" / "last.pt").exists()


def test_interrupted_array_task_is_requeued_alone(cluster: Cluster) -> None:
    job = cluster.submit("--array=0-1", str(BATCH), *SMALL, "epochs=100000", "stopping=none", "optimizer=sgd,adam")
    folders = [cluster.home / "outputs" / "slurm" / job / str(task) for task in (0, 1)]
    for task, folder in enumerate(folders):
        cluster.wait(job, lambda folder=folder: lines(folder) > 5, pause=0.1)  # type: ignore[misc]
        cluster.run("scancel", "--signal=USR1", f"{job}_{task}")
        cluster.wait(job, lambda task=task: cluster.states(f"{job}_{task}") == ["PENDING"])  # type: ignore[misc]
        assert sorted(cluster.states(job)) == ["PENDING", "RUNNING"][: 2 - task] + ["PENDING"] * task
    cluster.run("scancel", job)


def test_array_tasks_train_the_combinations_of_the_sweep(cluster: Cluster) -> None:
    typed = [*SMALL, "epochs=1", "optimizer=sgd,adam", "optimizer.lr=0.1,0.01"]
    job = cluster.submit("--array=1-2", str(BATCH), *typed)
    cluster.wait(job, lambda: cluster.states(job) == ["COMPLETED"] * 2)
    for task, (optimizer, lr) in {1: ("sgd", 0.01), 2: ("adam", 0.1)}.items():
        folder = cluster.home / "outputs" / "slurm" / job / str(task)
        assert summary(folder)["status"] == "finished"
        overrides = yaml.safe_load((folder / "overrides.yaml").read_text())
        assert {f"optimizer={optimizer}", f"optimizer.lr={lr}"} < set(overrides)


def test_config_error_prints_one_message(cluster: Cluster) -> None:
    job = cluster.submit(str(BATCH), "optimizer.lr=-1")
    cluster.wait(job, lambda: cluster.states(job) == ["FAILED"])
    log = (cluster.home / f"slurm-{job}.log").read_text()
    assert log.count("dlopt: ") == 1 and "optimizer.lr=-1: input should be greater than 0" in log
    assert not (cluster.home / "outputs" / "slurm" / job).exists()
