"""`hydra/launcher=slurm`: runs every job of a sweep as a Slurm job, submitted and requeued by submitit."""

import contextlib
import getpass
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlopt.errors import FAILED, UserError, install
from dlopt.folders import RunFolder
from dlopt.job import CODE_OF
from dlopt.parallel.launch import RECORD, python_module
from dlopt.ranges import Count, Natural, Positive
from dlopt.sweeps.jobs import OUTPUT
from dlopt.sweeps.pool import Pool, Process

_FOLDER = "slurm"  # in a job's folder: submitit's files and the Slurm job id
_SIGNAL_SECONDS = 120  # before its time limit a job is signalled, to write a checkpoint
_QUEUE_SECONDS = 5.0  # between calls of squeue
_SUMMARY_SECONDS = 15.0  # that a summary may take to become visible here through a network file system


def slurm(
    *,
    n_jobs: Count,
    partition: str | None,
    nodes: Count,
    tasks_per_node: Count,
    gpus_per_node: Natural,
    cpus_per_task: Count,
    mem_gb: Positive | None,
    time: Count,
    requeue: Natural,
    account: str | None,
    extra: dict[str, str | int | float | bool],
) -> Pool:
    """Runs `n_jobs` Slurm jobs at once, each for `time` minutes, requeued up to `requeue` times.

    A job has `nodes` x `tasks_per_node` processes, the ranks of a distributed run.
    All nodes must see the sweep's folder under the same path. Raises `UserError` without sbatch or submitit.
    """
    if shutil.which("sbatch") is None:
        raise UserError("hydra/launcher=slurm: sbatch was not found; start the sweep on a login node of the cluster")
    # Slurm sends this signal to all processes of the job, and a run writes a checkpoint on it. submitit reads the
    # variable when it is imported.
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"
    try:
        import submitit
    except ImportError:
        raise UserError(f"hydra/launcher=slurm: needs the package submitit: {install('dlopt[slurm]')}") from None
    parameters = {
        "job_name": "dlopt",
        "partition": partition,
        "nodes": nodes,
        "ntasks_per_node": tasks_per_node,
        "gpus_per_node": gpus_per_node or None,
        "cpus_per_task": cpus_per_task,
        "mem": None if mem_gb is None else f"{round(1024 * mem_gb)}M",
        "time": time,
        "account": account,
        "signal_delay_s": _SIGNAL_SECONDS,
        "additional_parameters": extra or None,
    }
    queue = _Queue()

    def start(slot: int, folder: Path, environment: Mapping[str, str]) -> Process:
        executor = submitit.SlurmExecutor(folder=folder / _FOLDER, max_num_timeout=requeue)
        executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
        try:
            # Rank 0 records a config error in the folder: nobody reads its output.
            job_id = str(executor.submit(SlurmTask(str(folder), {**environment, RECORD: "1"})).job_id)
        except submitit.core.utils.FailedJobError as error:
            raise OSError(" ".join(str(error).split())) from None
        (folder / _FOLDER / "job_id").write_text(f"{job_id}\n")
        queue.add(job_id)
        return _SlurmJob(job_id, folder, queue)

    def find(folder: Path) -> Process | None:
        with contextlib.suppress(OSError):
            job_id = (folder / _FOLDER / "job_id").read_text().strip()
            if queue.may_have(job_id):
                return _SlurmJob(job_id, folder, queue)
        return None

    return Pool(n_jobs, start, find, poll_seconds=1.0, is_local=False)


class SlurmTask:
    """The callable that submitit pickles and runs in each task of the job; a task is a rank of the run."""

    def __init__(self, folder: str, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        rank = os.environ.get("SLURM_PROCID", "0")
        with open(os.path.join(self.folder, OUTPUT if rank == "0" else f"{_FOLDER}/rank-{rank}.log"), "ab") as output:
            self._process = subprocess.Popen(
                python_module("dlopt.job", self.folder),
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        while self._process.poll() is None:
            time.sleep(0.5)
        return self._process.returncode

    def checkpoint(self) -> Any:
        """Stops the run with a checkpoint and returns what submitit requeues, at the time limit or on preemption."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                self._process.terminate()
                # Not Popen.wait(): this is a signal handler, and the poll() it interrupted may hold Popen's lock.
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(SlurmTask(self.folder, self.environment))


class _Queue:
    """The states of the user's Slurm jobs, cached: one squeue call serves all jobs of the sweep."""

    def __init__(self) -> None:
        self._states: dict[str, str] = {}
        self._updated = float("-inf")

    def add(self, job_id: str) -> None:
        """Notes a job that was submitted now: it counts as pending until squeue answers."""
        self._states[job_id] = "PENDING"
        self._updated = float("-inf")

    def states(self) -> dict[str, str]:
        """Maps job ids to PENDING, RUNNING, ...; without jobs that have ended."""
        if time.monotonic() - self._updated >= _QUEUE_SECONDS:
            command = ["squeue", "-h", "-u", getpass.getuser(), "-o", "%i %T"]
            with contextlib.suppress(OSError, subprocess.SubprocessError):  # a busy controller: retry at the next poll
                lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
                self._states = dict(line.split(maxsplit=1) for line in lines.splitlines() if " " in line)
                self._updated = time.monotonic()
        return self._states

    def may_have(self, job_id: str) -> bool:
        """Returns whether an earlier sweep's job has not ended; true as well until squeue has answered once.

        A job that is submitted a second time would be refused by the running one, and recorded as failed.
        """
        if job_id not in self.states() and self._updated == float("-inf"):
            self.add(job_id)
        return job_id in self._states


class _SlurmJob:
    def __init__(self, job_id: str, folder: Path, queue: _Queue) -> None:
        self._job_id, self._folder, self._queue = job_id, RunFolder(folder), queue
        self._missing_since: float | None = None  # in the queue

    def poll(self) -> int | None:
        if self._job_id in self._queue.states():
            self._missing_since = None
            return None
        status = (self._folder.summary() or {}).get("status")
        # Without a final summary, wait: a job that is being requeued leaves the queue for a moment.
        if status in (None, "interrupted"):
            self._missing_since = self._missing_since or time.monotonic()
            if time.monotonic() - self._missing_since < _SUMMARY_SECONDS:
                return None
        return CODE_OF.get(status or "", FAILED)

    def stop(self) -> None:
        is_pending = self._queue.states().get(self._job_id) == "PENDING"
        self._cancel(*([] if is_pending else ["--signal=TERM"]))

    def kill(self) -> None:
        self._cancel()

    def _cancel(self, *options: str) -> None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["scancel", *options, self._job_id], capture_output=True, timeout=60, check=False)
