"""dlopt on a real Slurm: `srun`, `sbatch`, preemption with requeue and resume, an array."""

import json
import os
import shutil
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
from tests.training.runs import same, timeless

CLUSTER, BATCH = ROOT / "scripts" / "slurm" / "one_host_cluster", ROOT / "scripts" / "slurm" / "train.sbatch"
_SEARCHED = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_MISSING = [tool for tool in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(tool, path=_SEARCHED) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(_MISSING), reason=f"no Slurm here ({', '.join(_MISSING)}): apt install slurm-wlm munge"),
]

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
    """A regression whose epochs take as long on a quick machine as on a busy one: some seven seconds in all."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        time.sleep(0.004)
        return torch.tensor([index / 20, 1.0, (index % 5) / 5]), (index % 7) / 7


def free_ports() -> int:
    """The first of three neighbours that nobody listens at."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        try:
            for each in range(port, port + 3):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", each))
        except (OSError, OverflowError):
            continue
        return port


class Cluster:
    """What a user of it types, in the folder `home`."""

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        self.home, self.environment = home, environment

    def run(self, *command: str) -> str:
        words: dict[str, Any] = {"cwd": self.home, "env": self.environment, "capture_output": True, "text": True}
        done = subprocess.run(command, timeout=170, **words)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-4000:])
        return str(done.stdout)

    def start_now(self, job: str) -> None:
        """A job that was queued again, which otherwise waits two minutes. One that starts in the second in which it was
        queued has its credential revoked."""
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
            told = log.read_text()[-4000:] if log.exists() else ""
            assert time.monotonic() < deadline and "Traceback" not in told, (self.run("squeue"), told)
            time.sleep(pause)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    base = tmp_path_factory.mktemp("slurm")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    environment["PYTHONPATH"] = str(ROOT)
    environment["PATH"] = f"{Path(sys.executable).parent}:{_SEARCHED}"
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
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_preempted_job_is_requeued_and_ends_with_the_weights_of_an_undisturbed_one(cluster: Cluster) -> None:
    job = cluster.submit("--nodes=2", "--ntasks-per-node=1", str(BATCH), *LONG)
    folder = cluster.home / "outputs" / "slurm" / job
    cluster.wait(job, lambda: lines(folder) > 5, pause=0.1)
    cluster.run("scancel", "--signal=USR1", job)  # as --signal=USR1@120 of the script does before the time is over
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
    cluster.run("srun", "-n", "2", "dlopt", "train", *LONG, "hydra.run.dir=undisturbed")
    cluster.wait(job, lambda: cluster.states(job) == ["COMPLETED"])
    undisturbed = cluster.home / "undisturbed"
    last, whole = summary(folder), summary(undisturbed)
    assert last["status"] == whole["status"] == "finished" and last["epochs"] == whole["epochs"] == EPOCHS
    assert last["resumed_from"] == [first["steps"], second["steps"]] and whole["resumed_from"] == []
    assert whole["processes"] == 2 and whole["parallel"] == "ddp"
    assert timeless(folder) == timeless(undisturbed)
    models = [load(each / "checkpoints" / "last.pt")["model"] for each in (folder, undisturbed)]
    assert same(*models)


def test_a_job_that_is_preempted_while_python_starts_is_requeued(cluster: Cluster) -> None:
    """The signal ends it then, since nobody has begun to listen."""
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


def test_a_cancelled_job_stays_cancelled(cluster: Cluster) -> None:
    """It ends with 75, too, but nobody wants it back."""
    job = cluster.submit(str(BATCH), *SMALL, "epochs=100000", "stopping=none")
    folder = cluster.home / "outputs" / "slurm" / job
    cluster.wait(job, lambda: lines(folder) > 5, pause=0.1)
    cluster.run("scancel", job)
    cluster.wait(job, lambda: cluster.states(job) == ["CANCELLED"])
    assert cluster.restarts(job) == 0
    assert summary(folder)["status"] == "interrupted" and (folder / "checkpoints" / "last.pt").exists()


def test_a_task_of_an_array_that_is_interrupted_is_requeued_alone(cluster: Cluster) -> None:
    job = cluster.submit("--array=0-1", str(BATCH), *SMALL, "epochs=100000", "stopping=none", "optimizer=sgd,adam")
    folders = [cluster.home / "outputs" / "slurm" / job / str(task) for task in (0, 1)]
    for task, folder in enumerate(folders):
        cluster.wait(job, lambda folder=folder: lines(folder) > 5, pause=0.1)  # type: ignore[misc]
        cluster.run("scancel", "--signal=USR1", f"{job}_{task}")
        cluster.wait(job, lambda task=task: cluster.states(f"{job}_{task}") == ["PENDING"])  # type: ignore[misc]
        assert sorted(cluster.states(job)) == ["PENDING", "RUNNING"][: 2 - task] + ["PENDING"] * task
    cluster.run("scancel", job)


def test_every_task_of_an_array_is_a_job_of_the_sweep(cluster: Cluster) -> None:
    typed = [*SMALL, "epochs=1", "optimizer=sgd,adam", "optimizer.lr=0.1,0.01"]
    job = cluster.submit("--array=1-2", str(BATCH), *typed)
    cluster.wait(job, lambda: cluster.states(job) == ["COMPLETED"] * 2)
    for task, (optimizer, lr) in {1: ("sgd", 0.01), 2: ("adam", 0.1)}.items():
        folder = cluster.home / "outputs" / "slurm" / job / str(task)
        assert summary(folder)["status"] == "finished"
        overrides = yaml.safe_load((folder / "overrides.yaml").read_text())
        assert {f"optimizer={optimizer}", f"optimizer.lr={lr}"} < set(overrides)


def test_what_cannot_work_ends_with_one_message(cluster: Cluster) -> None:
    job = cluster.submit(str(BATCH), "optimizer.lr=-1")
    cluster.wait(job, lambda: cluster.states(job) == ["FAILED"])
    log = (cluster.home / f"slurm-{job}.log").read_text()
    assert log.count("dlopt: ") == 1 and "optimizer.lr=-1: input should be greater than 0" in log
    assert not (cluster.home / "outputs" / "slurm" / job).exists()
