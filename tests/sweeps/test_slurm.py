"""`hydra/launcher=slurm` on a real Slurm: submit, log out, find the sweep done."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dlopt.sweeps.queue import Log
from tests.support.slurm import LONG, SMALL, Cluster, cluster, pytestmark, summary  # noqa: F401

ONE_PROCESS = [*(word for word in LONG if not word.startswith(("parallel", "epochs"))), "epochs=60"]
LONGER = [*(word for word in ONE_PROCESS if not word.startswith("epochs")), "epochs=250"]
RANKS = [*(word for word in LONG if not word.startswith("epochs")), "epochs=60"]


def submit(cluster: Cluster, sweep: str, *words: str, workers: int = 1) -> str:  # noqa: F811
    """Submits a sweep and returns its Slurm job id."""
    keys = ["hydra/launcher=slurm", "hydra.launcher.time=30", f"hydra.launcher.n_jobs={workers}"]
    said = cluster.run(sys.executable, "-m", "dlopt", "train", "-m", *keys, *words, f"hydra.sweep.dir={sweep}")
    return said.partition("Slurm job ")[2].split()[0]


def dlopt(cluster: Cluster, *words: str) -> "subprocess.CompletedProcess[str]":  # noqa: F811
    line = [sys.executable, "-m", "dlopt", *words]
    return subprocess.run(line, cwd=cluster.home, env=cluster.environment, capture_output=True, text=True, timeout=240)


def wait_until(condition: Callable[[], bool], sweep: Path) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        logs = [path.read_text()[-2000:] for path in (sweep / "workers").glob("*.log")]
        assert time.monotonic() < deadline, (logs, (sweep / "workers/log").read_text())
        time.sleep(0.2)


def has_begun(run: Path, lines: int = 5) -> bool:
    path = run / "metrics.jsonl"
    return path.exists() and len(path.read_text().splitlines()) > lines


def test_the_login_shell_is_killed(cluster: Cluster) -> None:  # noqa: F811
    """The sweep completes; short jobs share warm workers, and give the metrics of a local sweep."""
    line = [*SMALL, "epochs=2", "augmentation=crop_flip", "seed=range(0,4)"]
    keys = ["hydra/launcher=slurm", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=left", "wait=true"]
    shell = subprocess.Popen(
        ["/bin/sh", "-c", '"$@"; true', "sh", sys.executable, "-m", "dlopt", "train", "-m", *keys, *line],
        cwd=cluster.home,
        env=cluster.environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    sweep = cluster.home / "left"
    wait_until(lambda: bool(Log(sweep).read().slurm), sweep)
    os.killpg(shell.pid, signal.SIGKILL)
    shell.wait()
    done = dlopt(cluster, "sweep", "wait", "left")
    assert done.returncode == 0 and "4 jobs: 4 finished" in done.stdout, done
    cluster.run(sys.executable, "-m", "dlopt", "train", "-m", *line, "hydra.sweep.dir=local")
    for number in range(4):
        ours, theirs = sweep / str(number), cluster.home / "local" / str(number)
        for name in ("best_val_loss", "test_loss", "steps", "status"):
            assert summary(ours)[name] == summary(theirs)[name]
        log = (ours / "output.log").read_text()
        assert log.count("finished after 2 epochs") == 1 and "Traceback" not in log
    status = json.loads(dlopt(cluster, "sweep", "status", "left", "--json").stdout)
    assert status["counts"] == {"finished": 4} and status["workers"] == [] and status["exit_code"] == 0


def test_a_requeued_worker_and_a_killed_one(cluster: Cluster) -> None:  # noqa: F811
    """The first reaches its time limit; it is requeued, and its job is resumed elsewhere. Then that one is killed."""
    line = [*LONGER, "optimizer.lr=0.01,0.02"]
    job = submit(cluster, "jobs", *line, workers=2)
    sweep = cluster.home / "jobs"
    runs = [sweep / "0", sweep / "1"]
    wait_until(lambda: all(map(has_begun, runs)), sweep)
    cluster.run("scancel", "--signal=USR1", f"{job}_0")  # as Slurm does before the time is over
    wait_until(lambda: cluster.states(f"{job}_0") == ["PENDING"], sweep)
    assert cluster.restarts(f"{job}_0") == 1
    assert sorted(state.status for state in Log(sweep).read().jobs.values()) == ["queued", "running"]
    extra = submit(cluster, "jobs", *line)  # shares the sweep
    wait_until(lambda: [state.status for state in Log(sweep).read().jobs.values()] == ["running"] * 2, sweep)
    time.sleep(1)
    cluster.run("scancel", "--signal=KILL", "--full", f"{job}_1")
    done = dlopt(cluster, "sweep", "wait", "jobs")
    assert done.returncode == 0, done
    starts = sorted(state.starts for state in Log(sweep).read().jobs.values())
    assert starts == [2, 2] and all(summary(run)["status"] == "finished" for run in runs)
    wait_until(lambda: cluster.states(extra) == ["COMPLETED"], sweep)
    cluster.run("scancel", job)


def test_stop_and_resume(cluster: Cluster) -> None:  # noqa: F811
    """A cancelled worker is not requeued; `stop` also cancels workers that wait for an allocation."""
    job = submit(cluster, "stopped", *LONGER, "optimizer.lr=0.01,0.02", workers=2)
    sweep = cluster.home / "stopped"
    wait_until(lambda: has_begun(sweep / "0"), sweep)
    cluster.run("scancel", f"{job}_0")
    wait_until(lambda: cluster.states(f"{job}_0") == ["CANCELLED"], sweep)
    later = ["sbatch", "--parsable", "--begin=now+1hour", "--array=0-0", "--wrap=true"]
    waiting = cluster.run(*later, f"--output={sweep}/workers/%A_%a.log").strip()
    others = cluster.run(*later).strip()  # a stranger has written its id into the log
    with (sweep / "workers/log").open("a") as file:
        for job_id in (waiting, others, "--me"):
            file.write(json.dumps({"slurm": job_id}) + "\n")
    assert dlopt(cluster, "sweep", "stop", "stopped").returncode == 0
    wait_until(lambda: cluster.states(f"{job}_1") in (["COMPLETED"], ["FAILED"]), sweep)
    assert cluster.states(waiting) == ["CANCELLED"] and cluster.states(others) == ["PENDING"]
    cluster.run("scancel", others)
    status = dlopt(cluster, "sweep", "status", "stopped")
    assert status.returncode == 75 and "to continue: dlopt sweep resume stopped" in status.stdout
    assert summary(sweep / "0")["status"] == "interrupted" and (sweep / "0/checkpoints/last.pt").is_file()
    assert dlopt(cluster, "sweep", "resume", "stopped").returncode == 0
    done = dlopt(cluster, "sweep", "wait", "stopped")
    assert done.returncode == 0 and len(summary(sweep / "0")["resumed_from"]) >= 1, done  # 2: also by the second worker


def test_jobs_with_several_nodes(cluster: Cluster) -> None:  # noqa: F811
    """A worker starts the ranks of its jobs in its own allocation; preempted, it is requeued."""
    job = submit(cluster, "ranks", *RANKS, "optimizer.lr=0.01,0.02", "hydra.launcher.nodes=2")
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


def test_workers_of_a_search(cluster: Cluster) -> None:  # noqa: F811
    search = ["hydra/sweeper=dlopt_optuna", "hydra.sweeper.n_trials=4", "optimizer.lr=tag(log,interval(0.01,1))"]
    submit(cluster, "search", *SMALL, *search, "epochs=1", workers=2)
    done = dlopt(cluster, "sweep", "wait", "search")
    assert done.returncode == 0 and "4 jobs: 4 finished" in done.stdout, done
    assert len({summary(run)["run_id"] for run in (cluster.home / "search").glob("[0-9]*")}) == 4
