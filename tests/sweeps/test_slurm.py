"""`hydra/launcher=slurm` on a real Slurm: submit, log out, find the sweep done."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dlopt.sweeps.slurm_queue import array_ids
from tests.support.slurm import LONG, SMALL, Cluster, cluster, pytestmark, summary  # noqa: F401

ONE_PROCESS = [*(word for word in LONG if not word.startswith(("parallel", "epochs"))), "epochs=60"]
LONGER = [*(word for word in ONE_PROCESS if not word.startswith("epochs")), "epochs=250"]
RANKS = [*(word for word in LONG if not word.startswith("epochs")), "epochs=60"]


def submit(cluster: Cluster, sweep: str, *words: str, at_once: int = 1) -> str:  # noqa: F811
    """Submits a sweep and returns its Slurm job id."""
    keys = ["hydra/launcher=slurm", "hydra.launcher.time=30", f"hydra.launcher.n_jobs={at_once}"]
    said = cluster.run(sys.executable, "-m", "dlopt", "train", "-m", *keys, *words, f"hydra.sweep.dir={sweep}")
    return said.partition("Slurm job ")[2].split()[0]


def dlopt(cluster: Cluster, *words: str) -> "subprocess.CompletedProcess[str]":  # noqa: F811
    line = [sys.executable, "-m", "dlopt", *words]
    return subprocess.run(line, cwd=cluster.home, env=cluster.environment, capture_output=True, text=True, timeout=240)


def wait_until(condition: Callable[[], bool], sweep: Path) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        logs = [path.read_text()[-2000:] for path in (sweep / "workers").glob("*.log")]
        assert time.monotonic() < deadline, logs
        time.sleep(0.2)


def has_begun(run: Path, lines: int = 5) -> bool:
    path = run / "metrics.jsonl"
    return path.exists() and len(path.read_text().splitlines()) > lines


def same_as_local(cluster: Cluster, sweep: Path, line: list[str]) -> None:  # noqa: F811
    """Checks that every job has ended once, with the metrics of the same sweep on this machine."""
    cluster.run(sys.executable, "-m", "dlopt", "train", "-m", *line, "hydra.sweep.dir=local")
    local = cluster.home / "local"
    for theirs in sorted(local.glob("[0-9]*")):
        ours = sweep / theirs.name
        for name in ("best_val_loss", "test_loss", "steps", "status"):
            assert summary(ours)[name] == summary(theirs)[name]
        log = (ours / "output.log").read_text()
        assert log.count("finished after") == 1 and "Traceback" not in log


def test_the_login_shell_is_killed(cluster: Cluster) -> None:  # noqa: F811
    """The array completes; short jobs share an element, and give the metrics of a local sweep."""
    line = [*SMALL, "epochs=2", "augmentation=crop_flip", "seed=range(0,4)"]
    keys = ["hydra/launcher=slurm", "hydra.launcher.n_jobs=1", "hydra.launcher.chunk=2", "hydra.sweep.dir=left"]
    shell = subprocess.Popen(
        ["/bin/sh", "-c", '"$@"; true', "sh", sys.executable, "-m", "dlopt", "train", "-m", *keys, "wait=true", *line],
        cwd=cluster.home,
        env=cluster.environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    sweep = cluster.home / "left"
    wait_until(lambda: bool(array_ids(sweep)), sweep)
    os.killpg(shell.pid, signal.SIGKILL)
    shell.wait()
    done = dlopt(cluster, "sweep", "wait", "left")
    assert done.returncode == 0 and "4 jobs: 4 finished" in done.stdout, done
    assert len([*(sweep / "workers").glob("*_*.log")]) == 2
    same_as_local(cluster, sweep, line)
    status = json.loads(dlopt(cluster, "sweep", "status", "left", "--json").stdout)
    assert status["counts"] == {"finished": 4} and status["exit_code"] == 0


def test_elements_that_are_requeued_cancelled_and_lose_their_node(cluster: Cluster) -> None:  # noqa: F811
    """One reaches its time limit, another one is cancelled, and the node of the third goes down."""
    line = [*LONGER, "optimizer.lr=0.01,0.02,0.03"]
    job = submit(cluster, "jobs", *line, at_once=3)
    sweep = cluster.home / "jobs"
    runs = [sweep / str(number) for number in range(3)]
    wait_until(lambda: all(map(has_begun, runs)), sweep)
    again = dlopt(cluster, "train", "-m", "hydra/launcher=slurm", *line, "hydra.sweep.dir=jobs")
    assert again.returncode == 0 and f"already submitted: Slurm job {job}, elements: 3 running" in again.stdout
    cluster.run("scancel", "--signal=USR1", f"{job}_0")  # as Slurm does before the time is over
    cluster.run("scancel", f"{job}_1")
    wait_until(lambda: cluster.states(f"{job}_0") == ["PENDING"], sweep)
    assert cluster.restarts(f"{job}_0") == 1
    wait_until(lambda: cluster.states(f"{job}_1") == ["CANCELLED"], sweep)
    node = cluster.run("squeue", "--noheader", f"--jobs={job}_2", "--format=%N").strip()
    cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    wait_until(lambda: cluster.states(f"{job}_2") == ["PENDING"], sweep)
    cluster.run("scontrol", "update", f"NodeName={node}", "State=IDLE")  # it may have returned already
    assert [summary(run)["status"] for run in runs[:2]] == ["interrupted"] * 2
    resumed = dlopt(cluster, "sweep", "resume", "jobs")
    assert resumed.returncode == 0 and resumed.stdout.startswith("resumed: 1 element, "), resumed
    for element in (0, 2):
        cluster.start_now(f"{job}_{element}")
    done = dlopt(cluster, "sweep", "wait", "jobs")
    assert done.returncode == 0, done
    assert all(summary(run)["status"] == "finished" for run in runs)
    assert [len(summary(run)["resumed_from"]) for run in runs[:2]] == [1, 1]


def test_stop_and_resume(cluster: Cluster) -> None:  # noqa: F811
    """`stop` cancels the elements of the sweep, and no others whose ids are in its file."""
    job = submit(cluster, "stopped", *LONGER, "optimizer.lr=0.01,0.02")
    sweep = cluster.home / "stopped"
    wait_until(lambda: has_begun(sweep / "0"), sweep)
    others = cluster.run("sbatch", "--parsable", "--begin=now+1hour", "--array=0-0", "--wrap=true").strip()
    with (sweep / "workers/slurm").open("a") as file:
        file.write(f"{others}\n--me\n")
    stopped = dlopt(cluster, "sweep", "stop", "stopped")
    assert stopped.returncode == 0 and stopped.stdout.startswith("cancelled 2 elements"), stopped
    wait_until(lambda: set(cluster.states(job)) == {"CANCELLED"}, sweep)
    assert cluster.states(others) == ["PENDING"]
    cluster.run("scancel", others)
    status = dlopt(cluster, "sweep", "status", "stopped")
    assert status.returncode == 75 and "to continue: dlopt sweep resume stopped" in status.stdout
    assert summary(sweep / "0")["status"] == "interrupted" and (sweep / "0/checkpoints/last.pt").is_file()
    assert dlopt(cluster, "sweep", "resume", "stopped").returncode == 0
    done = dlopt(cluster, "sweep", "wait", "stopped")
    assert done.returncode == 0 and len(summary(sweep / "0")["resumed_from"]) == 1, done


def test_jobs_with_several_nodes(cluster: Cluster) -> None:  # noqa: F811
    """An element starts the ranks of its jobs in its own allocation; preempted, it is requeued."""
    job = submit(cluster, "ranks", *RANKS, "optimizer.lr=0.01,0.02", "hydra.launcher.nodes=2", "hydra.launcher.chunk=2")
    sweep = cluster.home / "ranks"
    wait_until(lambda: has_begun(sweep / "0"), sweep)
    cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    wait_until(lambda: cluster.states(job) == ["PENDING"] and cluster.restarts(job) == 1, sweep)
    assert summary(sweep / "0")["status"] == "interrupted"
    cluster.start_now(f"{job}_0")
    done = dlopt(cluster, "sweep", "wait", "ranks")
    assert done.returncode == 0, done
    for number in range(2):
        run = summary(sweep / str(number))
        assert (run["status"], run["parallel"], run["processes"]) == ("finished", "ddp", 2)
        assert len(run["resumed_from"]) == 1 - number


def test_a_partition_that_slurm_does_not_have(cluster: Cluster) -> None:  # noqa: F811
    words = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", *SMALL, "seed=0,1", "hydra.sweep.dir=refused"]
    done = dlopt(cluster, "train", "-m", *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done
    assert "hydra/launcher=slurm: sbatch: sbatch: error: invalid partition specified: gpu" in done.stderr
    assert not (cluster.home / "refused").exists()


def test_workers_of_a_search(cluster: Cluster) -> None:  # noqa: F811
    search = ["hydra/sweeper=dlopt_optuna", "hydra.sweeper.n_trials=4", "optimizer.lr=tag(log,interval(0.01,1))"]
    submit(cluster, "search", *SMALL, *search, "epochs=1", at_once=2)
    done = dlopt(cluster, "sweep", "wait", "search")
    assert done.returncode == 0 and "4 jobs: 4 finished" in done.stdout, done
    assert len({summary(run)["run_id"] for run in (cluster.home / "search").glob("[0-9]*")}) == 4
