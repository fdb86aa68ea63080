"""`hydra/launcher=slurm`: every job of a sweep is a Slurm job, submitted and requeued by submitit."""

import contextlib
import getpass
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlopt.errors import DONE, FAILED, INTERRUPTED, UserError, install
from dlopt.folders import RunFolder
from dlopt.parallel.launch import python_module
from dlopt.ranges import Count, Natural, Positive
from dlopt.sweeps.jobs import OUTPUT
from dlopt.sweeps.pool import Pool, Process

_FOLDER = "slurm"  # in a job's folder: what submitit writes, and the job's id
_NOTICE = 120  # seconds before its end in which a job writes its checkpoint
_QUEUE_SECONDS = 5.0  # between two calls of squeue
_SUMMARY_SECONDS = 15.0  # that a summary may take to be seen on this machine
_CODE_OF = {"interrupted": INTERRUPTED, "finished": DONE, "stopped_early": DONE}


def slurm(
    *,
    n_jobs: Count,
    partition: str | None,
    gpus_per_node: Natural,
    cpus_per_task: Count,
    mem_gb: Positive | None,
    time: Count,
    requeue: Natural,
    account: str | None,
    extra: dict[str, str | int | float | bool],
) -> Pool:
    """`n_jobs` Slurm jobs at once; `time` in minutes; `requeue`: how often a job that runs out of it is queued again.

    All nodes must see the sweep's folder under the same path.
    """
    if shutil.which("sbatch") is None:
        raise UserError("hydra/launcher=slurm: there is no sbatch here; start the sweep where Slurm's commands are")
    # Slurm signals all processes of a job, and a run writes a checkpoint at this one. submitit reads it when imported.
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"
    try:
        import submitit
    except ImportError:
        raise UserError(f"hydra/launcher=slurm: needs the package submitit: {install('dlopt[slurm]')}") from None
    parameters = {
        "job_name": "dlopt",
        "partition": partition,
        "gpus_per_node": gpus_per_node or None,
        "cpus_per_task": cpus_per_task,
        "mem": None if mem_gb is None else f"{round(1024 * mem_gb)}M",
        "time": time,
        "account": account,
        "signal_delay_s": _NOTICE,
        "additional_parameters": extra or None,
    }
    queue = _Queue()

    def start(slot: int, folder: Path, environment: Mapping[str, str]) -> Process:
        executor = submitit.SlurmExecutor(folder=folder / _FOLDER, max_num_timeout=requeue)
        executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
        try:
            number = str(executor.submit(InSlurm(str(folder), dict(environment))).job_id)
        except submitit.core.utils.FailedJobError as error:
            raise OSError(" ".join(str(error).split())) from None
        (folder / _FOLDER / "job_id").write_text(f"{number}\n")
        queue.forget()
        return _Submitted(number, folder, queue)

    def find(folder: Path) -> Process | None:
        with contextlib.suppress(OSError):
            number = (folder / _FOLDER / "job_id").read_text().strip()
            if number in queue.states():
                return _Submitted(number, folder, queue)
        return None

    return Pool(n_jobs, start, find, seconds=1.0, is_local=False)


class InSlurm:
    """What runs on the node."""

    def __init__(self, folder: str, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        with open(os.path.join(self.folder, OUTPUT), "ab") as output:
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
        """Called by submitit when the time is over or the job is preempted: what is to be queued again."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                self._process.terminate()  # it writes a checkpoint
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)  # poll() may hold Popen's lock
        return DelayedSubmission(InSlurm(self.folder, self.environment))


class _Queue:
    """The states of this user's jobs, from one squeue call for all of them."""

    def __init__(self) -> None:
        self._states: dict[str, str] = {}
        self.forget()

    def forget(self) -> None:
        self._at = float("-inf")

    def states(self) -> dict[str, str]:
        """Job id -> PENDING, RUNNING, ...; without the jobs that are over."""
        if time.monotonic() - self._at >= _QUEUE_SECONDS:
            command = ["squeue", "-h", "-u", getpass.getuser(), "-o", "%i %T"]
            with contextlib.suppress(OSError, subprocess.SubprocessError):  # a busy controller answers next time
                lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
                self._states = dict(line.split(maxsplit=1) for line in lines.splitlines() if " " in line)
                self._at = time.monotonic()
        return self._states


class _Submitted:
    def __init__(self, number: str, folder: Path, queue: _Queue) -> None:
        self._number, self._folder, self._queue = number, RunFolder(folder), queue
        self._gone: float | None = None  # since when it is not in the queue

    def poll(self) -> int | None:
        if self._number in self._queue.states():
            self._gone = None
            return None
        status = (self._folder.summary() or {}).get("status")
        if status in (None, "interrupted"):  # a job that is being queued again is out of sight for a moment
            self._gone = self._gone or time.monotonic()
            if time.monotonic() - self._gone < _SUMMARY_SECONDS:
                return None
        return _CODE_OF.get(status or "", FAILED)

    def stop(self) -> None:
        is_waiting = self._queue.states().get(self._number) == "PENDING"
        self._cancel(*([] if is_waiting else ["--signal=TERM"]))

    def kill(self) -> None:
        self._cancel()

    def _cancel(self, *options: str) -> None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["scancel", *options, self._number], capture_output=True, timeout=60, check=False)
