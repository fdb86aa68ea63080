"""`hydra/launcher=slurm`: runs the jobs of a sweep as Slurm jobs, submitted and requeued by submitit.

A Slurm job with one process is a warm worker (see `worker`): after a short job it runs the next one of its slot. A
longer job, and every job with several processes, gets a Slurm job of its own.
"""

import contextlib
import getpass
import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.utils import env_override

from dlopt.basics.errors import FAILED, INTERRUPTED, UserError, install
from dlopt.basics.files import read_json, write_atomically
from dlopt.basics.folders import RunFolder
from dlopt.basics.ranges import Count, Natural, Positive
from dlopt.basics.secrets import is_secret_name
from dlopt.parallel.processes.launch import RECORD, python_module
from dlopt.run.runner import CODE_OF
from dlopt.sweeps.jobs import OUTPUT
from dlopt.sweeps.pool import Pool, Process, Returned
from dlopt.sweeps.worker import JOBS, LOG, Lines, create, has_left

_FOLDER = "slurm"  # in a job's folder: submitit's files, the Slurm job id, and the folder of the worker
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
    queue = _Queue()
    seconds = 60 * time - _SIGNAL_SECONDS if nodes * tasks_per_node == 1 else None
    workers: dict[int, _Worker] = {}  # by slot

    def submit(folder: Path, environment: Mapping[str, str], secrets: Mapping[str, str]) -> _Worker:
        """Submits a job with `environment`, which is stored; `secrets`: further variables, which sbatch passes on."""
        executor = submitit.SlurmExecutor(folder=folder / _FOLDER, max_num_timeout=requeue)
        executor.update_parameters(
            job_name="dlopt",
            partition=partition,
            nodes=nodes,
            ntasks_per_node=tasks_per_node,
            gpus_per_node=gpus_per_node or None,
            cpus_per_task=cpus_per_task,
            mem=None if mem_gb is None else f"{round(1024 * mem_gb)}M",
            time=time,
            account=account,
            signal_delay_s=_SIGNAL_SECONDS,
            additional_parameters=extra,
        )
        path = (folder / _FOLDER / f"worker-{uuid.uuid4().hex[:8]}").absolute()
        mailbox = None if seconds is None else create(path)
        try:
            with env_override(dict(secrets)):
                job_id = str(executor.submit(SlurmTask(str(folder), environment, mailbox, seconds)).job_id)
        except submitit.core.utils.FailedJobError as error:
            raise OSError(" ".join(str(error).split())) from None
        queue.expire()
        return _Worker(mailbox, queue, job_id)

    def start(slot: int, folder: Path, environment: Mapping[str, str]) -> Process:
        # Rank 0 records a config error in the folder: nobody reads its output.
        secrets = {name: value for name, value in environment.items() if is_secret_name(name)}
        environment = {name: value for name, value in environment.items() if name not in secrets} | {RECORD: "1"}
        (folder / _FOLDER).mkdir(exist_ok=True)
        if slot not in workers or not workers[slot].is_free():
            workers[slot] = submit(folder, environment, secrets)
        return _SlurmJob(workers[slot], workers[slot].assign(folder, environment), folder)

    def find(folder: Path) -> Process | None:
        with contextlib.suppress(OSError):
            job_id = (folder / _FOLDER / "job_id").read_text().strip()
            noted = read_json(folder / _FOLDER / "worker.json") or {}
            worker = _Worker(Path(noted["folder"]) if noted else None, queue, job_id)
            job = _SlurmJob(worker, noted.get("job", 0), folder)
            return job if worker.state is not None and worker.code_of(job.number) is None else None
        return None

    def close() -> None:
        for worker in workers.values():
            worker.request(close=True)

    return Pool(n_jobs, start, find, poll_seconds=1.0, is_local=False, close=close)


@dataclass
class SlurmTask:
    """The callable that submitit pickles and runs in each task of the job: a rank of the run, or a worker.

    `mailbox`, `seconds`: the folder of the worker and its time; None if the job has several tasks.
    """

    folder: str
    environment: Mapping[str, str]
    mailbox: Path | None = None
    seconds: float | None = None
    _process: "subprocess.Popen[bytes] | None" = field(default=None, init=False)

    def __call__(self) -> int:
        rank = os.environ.get("SLURM_PROCID", "0")
        if self.mailbox is None:
            command, environment = python_module("dlopt.run.job", self.folder), self.environment
        else:  # each of its jobs has its own environment
            command, environment = python_module("dlopt.sweeps.worker", str(self.mailbox), str(self.seconds)), {}
        with open(os.path.join(self.folder, OUTPUT if rank == "0" else f"{_FOLDER}/rank-{rank}.log"), "ab") as output:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        while self._process.poll() is None:
            time.sleep(0.5)
        return self._process.returncode

    def checkpoint(self) -> Any:
        """Stops the run with a checkpoint and returns what submitit requeues, at the time limit or on preemption.

        None: a worker that has no job, or whose job gets a new Slurm job, is not requeued.
        """
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                self._process.send_signal(signal.SIGUSR1)
                # Not Popen.wait(): this is a signal handler, and the poll() it interrupted may hold Popen's lock.
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        if self.mailbox is not None and has_left(Lines(self.mailbox / LOG).read()):
            return None
        return DelayedSubmission(replace(self))  # the process cannot be pickled


class _Queue:
    """The states of the user's Slurm jobs, cached: one squeue call serves all jobs of the sweep."""

    def __init__(self) -> None:
        self._states: dict[str, str] = {}
        self._updated = float("-inf")

    def expire(self) -> None:
        """Makes the next call of `state` ask squeue: a job was submitted."""
        self._updated = float("-inf")

    def state(self, job_id: str) -> str | None:
        """Returns PENDING, RUNNING, ...; None after the end. An unknown job counts as pending until squeue answers.

        A job that is submitted a second time would be refused by the running one, and recorded as failed.
        """
        if time.monotonic() - self._updated >= _QUEUE_SECONDS:
            command = ["squeue", "-h", "-u", getpass.getuser(), "-o", "%i %T"]
            with contextlib.suppress(OSError, subprocess.SubprocessError):  # a busy controller: retry at the next poll
                lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
                self._states = dict(line.split(maxsplit=1) for line in lines.splitlines() if " " in line)
                self._updated = time.monotonic()
        return self._states.get(job_id, "PENDING" if self._updated == float("-inf") else None)


class _Worker:
    """A Slurm job as the sweep sees it. `folder`: of its `worker`; None if it runs one job in several processes."""

    def __init__(self, folder: Path | None, queue: _Queue, job_id: str) -> None:
        self.job_id, self.folder, self._queue = job_id, folder, queue
        self._count, self._reports = 0, list[dict[str, Any]]()
        if folder is not None:
            self._jobs, self._log = Lines(folder / JOBS), Lines(folder / LOG)

    @property
    def state(self) -> str | None:
        return self._queue.state(self.job_id)

    def assign(self, folder: Path, environment: Mapping[str, str]) -> int:
        """Gives a job to this worker, which the job's folder notes, and returns its number. Raises OSError."""
        number, self._count = self._count, self._count + 1
        # Noted before a worker receives the job: a sweep that is killed in between leaves a worker that ends without
        # the job (`has_returned`). In the other order it would leave a running job that no sweep finds.
        (folder / _FOLDER / "job_id").write_text(f"{self.job_id}\n")
        if self.folder is not None:
            noted = {"folder": str(self.folder), "job": number}
            write_atomically(folder / _FOLDER / "worker.json", json.dumps(noted).encode())  # a path is not redacted
            self._jobs.append(job=number, folder=str(folder), environment=dict(environment))
        return number

    def request(self, **line: Any) -> None:
        with contextlib.suppress(OSError):
            if self.folder is not None:
                self._jobs.append(**line)

    def reports(self) -> list[dict[str, Any]]:
        """Reads what the worker has reported: the lines of its log."""
        if self.folder is not None:
            with contextlib.suppress(OSError):  # retry at the next poll
                self._reports += self._log.read()
        return self._reports

    def code_of(self, number: int) -> int | None:
        """Returns the exit code of a job; None if the worker has not reported its end."""
        return next((line["code"] for line in self.reports() if line.get("ended") == number), None)

    def has(self, event: str, number: int) -> bool:
        """Returns whether the worker has reported that the job has `started`, or has `moved` to another Slurm job."""
        return any(line.get(event) == number for line in self._reports)

    def has_returned(self, number: int) -> bool:
        """Returns whether the worker has ended without this job."""
        return self.has("moved", number) or (has_left(self._reports) and not self.has("started", number))

    def is_free(self) -> bool:
        """Returns whether the worker waits for a job."""
        ended = sum("ended" in line for line in self.reports())
        return ended == self._count and not has_left(self._reports) and self.state == "RUNNING"

    def cancel(self, *options: str) -> None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["scancel", *options, self.job_id], capture_output=True, timeout=60, check=False)


@dataclass
class _SlurmJob:
    """A job of the sweep in a worker."""

    worker: _Worker
    number: int
    folder: Path
    is_stopped: bool = False
    missing_since: float | None = None  # in the queue, or its summary in the folder

    def poll(self) -> int | Returned | None:
        code = self.worker.code_of(self.number)
        if code is not None:
            # The summary of another machine may become visible later.
            return code if code < 0 or RunFolder(self.folder).summary() is not None or self._is_missing() else None
        if self.worker.has_returned(self.number):
            return INTERRUPTED if self.is_stopped else "returned"
        if self.worker.state is not None:
            self.missing_since = None
            return None
        status = (RunFolder(self.folder).summary() or {}).get("status")
        # Without a final summary, wait: a job that is being requeued leaves the queue for a moment.
        if status in (None, "interrupted") and not self._is_missing():
            return None
        if self.number > 0 and not self.worker.has("started", self.number):
            return INTERRUPTED if self.is_stopped else "returned"
        return CODE_OF.get(status or "", FAILED)

    def _is_missing(self) -> bool:
        """Returns whether the job, or its summary, has been missing for so long that it will not come."""
        self.missing_since = self.missing_since or time.monotonic()
        return time.monotonic() - self.missing_since >= _SUMMARY_SECONDS

    def stop(self) -> None:
        self.is_stopped = True
        if self.worker.state == "PENDING":
            self.worker.cancel()
        elif self.worker.folder is None:
            self.worker.cancel("--signal=TERM")
        else:
            self.worker.request(stop=self.number)

    def kill(self) -> None:
        self.worker.cancel()
