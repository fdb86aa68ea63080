"""dlopt on a real Slurm cluster: `srun`, `sbatch`, preemption with requeue and resume."""

import time
from pathlib import Path

from dlopt.training.checkpoint.checkpoints import load
from tests.support.ranks import ROOT
from tests.support.runs import same, timeless
from tests.support.slurm import BATCH, EPOCHS, LONG, SMALL, Cluster, cluster, pytestmark, summary  # noqa: F401


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_preempted_job_is_requeued_and_ends_with_identical_weights(cluster: Cluster) -> None:  # noqa: F811
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
    models = [load(run / "checkpoints" / "last.pt").model for run in (folder, uninterrupted)]
    assert same(*models)


def test_job_preempted_while_python_starts_is_requeued(cluster: Cluster) -> None:  # noqa: F811
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


def test_cancelled_job_is_not_requeued(cluster: Cluster) -> None:  # noqa: F811
    """It also exits with 75, but the user cancelled it."""
    job = cluster.submit(str(BATCH), *SMALL, "epochs=100000", "stopping=none")
    folder = cluster.home / "outputs" / "slurm" / job
    cluster.wait(job, lambda: lines(folder) > 5, pause=0.1)
    cluster.run("scancel", job)
    cluster.wait(job, lambda: cluster.states(job) == ["CANCELLED"])
    assert cluster.restarts(job) == 0
    assert summary(folder)["status"] == "interrupted" and (folder / "checkpoints" / "last.pt").exists()


def test_config_error_prints_one_message(cluster: Cluster) -> None:  # noqa: F811
    job = cluster.submit(str(BATCH), "optimizer.lr=-1")
    cluster.wait(job, lambda: cluster.states(job) == ["FAILED"])
    log = (cluster.home / f"slurm-{job}.log").read_text()
    assert log.count("dlopt: ") == 1 and "optimizer.lr=-1: input should be greater than 0" in log
    assert not (cluster.home / "outputs" / "slurm" / job).exists()
