"""`hydra/launcher=slurm`: runs the jobs of a sweep as Slurm jobs, submitted and requeued by submitit.

A Slurm job with one process is a warm worker (see `worker`): after a short job it runs the next one of its slot. A
longer job, and every job with several processes, gets a Slurm job of its own.
"""

import contextlib
import getpass
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from dlopt.errors import DONE, FAILED, INTERRUPTED, UserError, install
from dlopt.files import read_json, write_json
from dlopt.folders import RunFolder
from dlopt.job import CODE_OF
from dlopt.parallel.launch import RECORD, python_module
from dlopt.ranges import Count, Natural, Positive
from dlopt.sweeps.jobs import OUTPUT
from dlopt.sweeps.pool import Pool, Process
from dlopt.sweeps.worker import JOBS, LOG, Lines, create

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
    seconds = 60 * time - _SIGNAL_SECONDS if nodes * tasks_per_node == 1 else None
    workers: dict[int, _Worker] = {}  # by slot

    def submit(slot: int, folder: Path, environment: Mapping[str, str]) -> tuple[_Worker, int]:
        executor = submitit.SlurmExecutor(folder=folder / _FOLDER, max_num_timeout=requeue)
        executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
        mailbox = None if seconds is None else (folder / _FOLDER / f"worker-{uuid.uuid4().hex[:8]}").absolute()
        try:
            worker = _Worker(mailbox, queue)
            number = worker.assign(folder, environment)
            worker.job_id = str(executor.submit(SlurmTask(str(folder), environment, mailbox, seconds)).job_id)
        except submitit.core.utils.FailedJobError as error:
            raise OSError(" ".join(str(error).split())) from None
        queue.add(worker.job_id)
        workers[slot] = worker
        worker.note(folder, number)
        return worker, number

    def start(slot: int, folder: Path, environment: Mapping[str, str]) -> Process:
        # Rank 0 records a config error in the folder: nobody reads its output.
        environment = {**environment, RECORD: "1"}
        (folder / _FOLDER).mkdir(exist_ok=True)
        submit_again = partial(submit, slot, folder, environment)
        worker = workers.get(slot)
        if worker is not None and worker.is_free():
            number = worker.assign(folder, environment)
            worker.note(folder, number)
        else:
            worker, number = submit_again()
        return _SlurmJob(worker, number, folder, submit_again)

    def find(folder: Path) -> Process | None:
        with contextlib.suppress(OSError):
            if queue.may_have(job_id := (folder / _FOLDER / "job_id").read_text().strip()):
                worker, number = _Worker.of(folder, job_id, queue)
                return None if number in worker.codes else _SlurmJob(worker, number, folder, None)
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
            command, environment = python_module("dlopt.job", self.folder), self.environment
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
        log = [] if self.mailbox is None else Lines(self.mailbox / LOG).read()
        if any(line.keys() & {"left", "moved"} for line in log):
            return None
        return DelayedSubmission(replace(self))  # the process cannot be pickled


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


class _Worker:
    """A Slurm job as the sweep sees it. `folder`: of its `worker`; None if it runs one job in several processes.

    `codes`: exit codes of the jobs that have ended, by number.
    """

    def __init__(self, folder: Path | None, queue: _Queue, job_id: str = "") -> None:
        self.job_id, self._folder, self._queue = job_id, folder, queue
        self.codes: dict[int, int] = {}
        self._started: set[int] = set()
        self._moved: set[int] = set()
        self._has_left, self._count = False, 0
        if folder is not None:
            self._jobs, self._log = Lines(folder / JOBS), Lines(folder / LOG)

    @classmethod
    def of(cls, folder: Path, job_id: str, queue: _Queue) -> "tuple[_Worker, int]":
        """Returns the worker that an earlier sweep has given the job in `folder` to, and the job's number."""
        noted = read_json(folder / _FOLDER / "worker.json") or {}
        worker = cls(Path(noted["folder"]) if noted else None, queue, job_id)
        worker.update()
        return worker, noted.get("job", 0)

    def assign(self, folder: Path, environment: Mapping[str, str]) -> int:
        """Gives a job to this worker and returns its number. Raises OSError."""
        if self._folder is not None and self._count == 0:
            create(self._folder)
        self._count += 1
        if self._folder is not None:
            self._jobs.append(job=self._count - 1, folder=str(folder), environment=dict(environment))
        return self._count - 1

    def note(self, folder: Path, number: int) -> None:
        """Writes into the folder of a job which worker has it, for `of`."""
        (folder / _FOLDER / "job_id").write_text(f"{self.job_id}\n")
        if self._folder is not None:
            write_json(folder / _FOLDER / "worker.json", {"folder": str(self._folder), "job": number})

    def request(self, **line: Any) -> None:
        if self._folder is not None and not self._has_left:
            with contextlib.suppress(OSError):
                self._jobs.append(**line)

    def update(self) -> None:
        """Reads what the worker has reported."""
        if self._folder is None:
            return
        with contextlib.suppress(OSError):  # retry at the next poll
            for line in self._log.read():
                if "ended" in line:
                    self.codes[line["ended"]] = line["code"]
                if "started" in line:
                    self._started.add(line["started"])
                if "moved" in line:
                    self._moved.add(line["moved"])
                self._has_left |= bool(line.keys() & {"left", "moved"})

    def state(self) -> str | None:
        """Returns Slurm's PENDING, RUNNING, ...; None after the end."""
        return self._queue.states().get(self.job_id)

    def is_free(self) -> bool:
        """Returns whether the worker waits for a job."""
        self.update()
        return bool(self.codes) and len(self.codes) == self._count and not self._has_left and self.state() == "RUNNING"

    def has_returned(self, number: int) -> bool:
        """Returns whether the worker has ended without this job, which is to be started elsewhere."""
        return number in self._moved or (self._has_left and number not in self._started)

    def has_started(self, number: int) -> bool:
        return self._folder is None or number == 0 or number in self._started

    def stop(self, number: int) -> None:
        if self.state() == "PENDING":
            self.cancel()
        elif self._folder is None:
            self.cancel("--signal=TERM")
        else:
            self.request(stop=number)

    def cancel(self, *options: str) -> None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["scancel", *options, self.job_id], capture_output=True, timeout=60, check=False)


class _SlurmJob:
    """A job of the sweep in a worker. `resubmit`: gives it to a new worker; None if an earlier sweep has started it."""

    def __init__(
        self, worker: _Worker, number: int, folder: Path, resubmit: Callable[[], tuple[_Worker, int]] | None
    ) -> None:
        self._worker, self._number, self._folder, self._resubmit = worker, number, RunFolder(folder), resubmit
        self._missing_since: float | None = None  # in the queue, or its summary in the folder
        self._is_stopped = False

    def poll(self) -> int | None:
        self._worker.update()
        code = self._worker.codes.get(self._number)
        if code is not None:
            # The summary of another machine may become visible later.
            return code if code < 0 or self._folder.summary() is not None or self._is_missing() else None
        if self._worker.has_returned(self._number):
            return self._start_again()
        if self._worker.state() is not None:
            self._missing_since = None
            return None
        status = (self._folder.summary() or {}).get("status")
        # Without a final summary, wait: a job that is being requeued leaves the queue for a moment.
        if status in (None, "interrupted") and not self._is_missing():
            return None
        if not self._worker.has_started(self._number):
            return self._start_again()
        return CODE_OF.get(status or "", FAILED)

    def _is_missing(self) -> bool:
        """Returns whether the job, or its summary, has been missing for so long that it will not come."""
        self._missing_since = self._missing_since or time.monotonic()
        return time.monotonic() - self._missing_since >= _SUMMARY_SECONDS

    def _start_again(self) -> int | None:
        self._missing_since = None
        if self._is_stopped:
            return INTERRUPTED
        if self._resubmit is None:
            return DONE  # the sweep starts what is not done
        try:
            self._worker, self._number = self._resubmit()
        except OSError:
            return FAILED
        return None

    def stop(self) -> None:
        self._is_stopped = True
        self._worker.stop(self._number)

    def kill(self) -> None:
        self._worker.cancel()
