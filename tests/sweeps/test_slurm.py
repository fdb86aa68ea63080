"""`hydra/launcher=slurm` on a real Slurm."""

import subprocess
import sys
import time
from pathlib import Path

from tests.support.slurm import EPOCHS, LONG, SMALL, Cluster, cluster, pytestmark, summary  # noqa: F401


def begin_sweep(cluster: Cluster, *arguments: str) -> "subprocess.Popen[str]":  # noqa: F811
    line = [sys.executable, "-m", "dlopt", "train", "-m", "hydra/launcher=slurm", "hydra.launcher.time=30", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(line, cwd=cluster.home, env=cluster.environment, **pipes)  # type: ignore[call-overload]


def test_sweep_survives_a_requeued_job(cluster: Cluster) -> None:  # noqa: F811
    """A job reaches its time limit, writes a checkpoint and is requeued, without an effect on the sweep."""
    long = [each for each in LONG if not each.startswith("parallel")]
    sweep = begin_sweep(cluster, *long, "optimizer.lr=0.01,0.02", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=jobs")
    first, second = cluster.home / "jobs/0", cluster.home / "jobs/1"
    deadline = time.monotonic() + 150
    while not (first / "metrics.jsonl").exists() or len((first / "metrics.jsonl").read_text()) < 1000:
        assert time.monotonic() < deadline and sweep.poll() is None, sweep.communicate()
        time.sleep(0.2)
    number = (first / "slurm/job_id").read_text().strip()
    cluster.run("scancel", "--signal=USR1", number)  # as Slurm does before the time is over
    cluster.wait(number, lambda: cluster.restarts(number) == 1 and cluster.states(number) == ["PENDING"])
    stopped = summary(first)
    assert stopped["status"] == "interrupted"
    cluster.start_now(number)
    said, _ = sweep.communicate(timeout=200)
    assert sweep.returncode == 0, said
    assert summary(first)["status"] == summary(second)["status"] == "finished"
    assert summary(first)["resumed_from"] == [stopped["steps"]] and summary(second)["resumed_from"] == []


def test_cancelled_job_does_not_affect_others(cluster: Cluster) -> None:  # noqa: F811
    sweep = begin_sweep(cluster, *SMALL, "epochs=100000,1", "checkpoint.every_epochs=null", "hydra.sweep.dir=cancelled")
    folder, deadline = cluster.home / "cancelled/0", time.monotonic() + 150
    while not (folder / "metrics.jsonl").exists():
        assert time.monotonic() < deadline and sweep.poll() is None, sweep.communicate()
        time.sleep(0.2)
    cluster.run("scancel", (folder / "slurm/job_id").read_text().strip())
    said, _ = sweep.communicate(timeout=200)
    assert sweep.returncode == 75, said  # Slurm gives it the time for a checkpoint
    assert summary(folder)["status"] == "interrupted" and (folder / "checkpoints/last.pt").is_file()
    assert summary(cluster.home / "cancelled/1")["status"] == "finished"


def test_jobs_with_several_nodes(cluster: Cluster) -> None:  # noqa: F811
    keys = ["hydra.launcher.nodes=2", "hydra.launcher.n_jobs=1", "epochs=1"]
    sweep = begin_sweep(cluster, *SMALL, *keys, "parallel=ddp", "seed=0,1", "hydra.sweep.dir=distributed")
    said, _ = sweep.communicate(timeout=200)
    assert sweep.returncode == 0, said
    for number in range(2):
        done = summary(cluster.home / f"distributed/{number}")
        assert (done["status"], done["parallel"], done["processes"]) == ("finished", "ddp", 2)


ONE_AT_A_TIME = [*(each for each in LONG if not each.startswith("parallel")), "hydra.launcher.n_jobs=1"]


def slurm_job(folder: Path) -> str:
    return (folder / "slurm/job_id").read_text().strip()


def test_short_jobs_share_a_warm_worker(cluster: Cluster) -> None:  # noqa: F811
    """They give the metrics of a local sweep, and each has its own log."""
    line = [*SMALL, "epochs=2", "augmentation=crop_flip", "seed=range(0,3)"]
    said, _ = (sweep := begin_sweep(cluster, *line, "hydra.launcher.n_jobs=1", "hydra.sweep.dir=warm")).communicate()
    assert sweep.returncode == 0, said
    cluster.run(sys.executable, "-m", "dlopt", "train", "-m", *line, "hydra.sweep.dir=local")
    warm, local = ([cluster.home / name / str(number) for number in range(3)] for name in ("warm", "local"))
    assert len({slurm_job(folder) for folder in warm}) == 1
    for ours, theirs in zip(warm, local, strict=True):
        for name in ("best_val_loss", "test_loss", "steps", "status"):
            assert summary(ours)[name] == summary(theirs)[name]
        log = (ours / "output.log").read_text()
        assert log.count("finished after 2 epochs") == 1 and "Traceback" not in log


def test_a_crash_in_a_warm_worker_does_not_affect_the_next_job(cluster: Cluster) -> None:  # noqa: F811
    targets = "data.train._target_=tests.support.slurm.Deadly,tests.support.slurm.Slow"
    sweep = begin_sweep(cluster, *ONE_AT_A_TIME, "epochs=1", targets, "hydra.sweep.dir=crash")
    said, _ = sweep.communicate(timeout=200)
    dead, alive = cluster.home / "crash/0", cluster.home / "crash/1"
    assert sweep.returncode == 1 and "killed by SIGKILL" in summary(dead)["reason"], said
    assert summary(alive)["status"] == "finished" and slurm_job(dead) != slurm_job(alive)


def test_a_later_job_of_a_warm_worker_resumes_in_a_slurm_job_of_its_own(cluster: Cluster) -> None:  # noqa: F811
    sweep = begin_sweep(cluster, *ONE_AT_A_TIME, f"epochs=1,{EPOCHS}", "hydra.sweep.dir=moved")
    first, second = cluster.home / "moved/0", cluster.home / "moved/1"
    deadline = time.monotonic() + 150
    while not (second / "metrics.jsonl").exists() or len((second / "metrics.jsonl").read_text()) < 1000:
        assert time.monotonic() < deadline and sweep.poll() is None, sweep.communicate()
        time.sleep(0.2)
    worker = slurm_job(second)
    assert worker == slurm_job(first)
    cluster.run("scancel", "--signal=USR1", worker)
    said, _ = sweep.communicate(timeout=200)
    assert sweep.returncode == 0, said
    assert slurm_job(second) != worker and cluster.restarts(worker) == 0
    assert summary(second)["status"] == "finished" and len(summary(second)["resumed_from"]) == 1
