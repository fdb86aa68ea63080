"""`hydra/launcher=slurm`: submits the elements of a sweep as a job array, and requeues them."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlopt._version import ROOT
from dlopt.basics.errors import INTERRUPTED, UserError
from dlopt.basics.files import open_to_append
from dlopt.basics.folders import RunFolder
from dlopt.basics.interruption import end_with
from dlopt.basics.ranges import Count, Natural, Positive
from dlopt.parallel.processes.launch import RECORD, python_module
from dlopt.sweeps.jobs import OUTPUT
from dlopt.sweeps.pool import Process
from dlopt.sweeps.slurm_queue import is_job_id, run_tool

_SIGNAL_SECONDS = 120  # before its time limit, an element gets a signal to write the checkpoint of its job
_REQUEUED_SECONDS = 60.0  # until Slurm kills a process that has requeued its job
_STARTING = ".starting_"  # a file in the folder of the workers; its name ends with that of the element


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """Settings of hydra/launcher=slurm, which conf/hydra/launcher/slurm.yaml explains."""

    n_jobs: Natural
    chunk: Count | None
    partition: str | None
    nodes: Count
    tasks_per_node: Count
    gpus_per_node: Natural
    cpus_per_task: Count
    mem_gb: Positive | None
    time: Count
    requeue: Natural
    account: str | None
    extra: dict[str, str | int | float | bool]
    stop_on_failure: bool

    @property
    def slots(self) -> int:
        return max(self.n_jobs, 1)

    @property
    def tasks(self) -> int:
        """Returns the number of processes of a job, the ranks of a distributed run."""
        return self.nodes * self.tasks_per_node

    def require(self) -> None:
        """Raises `UserError` without sbatch."""
        if self.n_jobs and shutil.which("sbatch") is None:
            raise UserError(
                "hydra/launcher=slurm: sbatch was not found; start the sweep on a login node of the cluster"
            )

    def submit(self, array: str, command: Sequence[str], log: Path, cwd: Path, secrets: Mapping[str, str]) -> str:
        """Submits an array of elements that run `command`; returns its Slurm job id. Raises `UserError`.

        Args:
            array: the option of sbatch: 0-39%8.
            log: folder of the elements' output.
            secrets: variables of the elements that no file may hold: sbatch passes them on.
        """
        options: dict[str, object] = {
            "job-name": "dlopt",
            "array": array,
            "output": f"{str(log).replace('%', '%%')}/%A_%a.log",
            "open-mode": "append",
            "chdir": cwd,
            "signal": f"USR1@{min(_SIGNAL_SECONDS, 15 * self.time)}",  # at least three quarters of the time are left
            "requeue": True,
            "partition": self.partition,
            "nodes": self.nodes,
            "ntasks-per-node": self.tasks_per_node,
            "gpus-per-node": self.gpus_per_node or None,
            "cpus-per-task": self.cpus_per_task,
            "mem": None if self.mem_gb is None else f"{round(1024 * self.mem_gb)}M",
            "time": self.time,
            "account": self.account,
            **{name.replace("_", "-"): value for name, value in self.extra.items()},
        }
        flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()
                 if value is not None and value is not False]  # fmt: skip
        # In a step: Slurm signals no batch script on preemption. Jobs with several processes have their own steps.
        # srun does not inherit --cpus-per-task since Slurm 22.05.
        step = [] if self.tasks > 1 else ["srun", "--nodes=1", "--ntasks=1", f"--cpus-per-task={self.cpus_per_task}"]
        script = f"#!/bin/sh\nexec {shlex.join(command)}\n"
        if step:
            line = shlex.join([*step, *command])
            values = {"folder": shlex.quote(str(log)), "starting": _STARTING, "command": line, "requeue": self.requeue}
            script = (ROOT / "templates/element.sh").read_text(encoding="utf-8") % values
        from hydra.core.utils import env_override

        with env_override(dict(secrets)):
            done = run_tool("sbatch", "--parsable", *flags, text=script)
        if done is None or done.returncode:
            reason = "does not answer" if done is None else " ".join(done.stderr.split())
            if re.search("configuration source|fetch_config|contact slurm controller", reason):
                reason = "no Slurm cluster is configured here (SLURM_CONF), or it does not answer; "
                reason += "hydra.launcher.n_jobs=0 writes the sweep without one"
            raise UserError(f"hydra/launcher=slurm: sbatch: {reason}")
        job_id = done.stdout.strip().partition(";")[0]
        if not is_job_id(job_id):
            raise UserError(f"hydra/launcher=slurm: sbatch: answers {done.stdout[:200]!r} instead of a job id")
        return job_id


def note_start(log: Path) -> None:
    """Notes that this element handles Slurm's signals itself. `log`: the folder of the elements' output."""
    job = "_".join(os.environ.get(name, "") for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"))
    with contextlib.suppress(OSError):
        (log / f"{_STARTING}{job}").unlink(missing_ok=True)


def requeue_element() -> None:
    """Makes Slurm start this element again later, unless the user has cancelled it."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    if (array := os.environ.get("SLURM_ARRAY_JOB_ID")) is not None:
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    # If the controller does not respond, the element counts as not cancelled.
    state = run_tool("squeue", "--noheader", f"--jobs={job}", "--format=%T/%r")
    if state is not None and state.stdout.strip().startswith(("CANCELLED/", "COMPLETING/None")):
        return
    # Slurm does not list it: cancelled while its node was lost, and a requeue would revive it.
    if state is not None and state.returncode == 0 and not state.stdout.strip():
        return
    done = run_tool("scontrol", "requeue", job)
    if done is not None and done.returncode == 0:
        end_with(INTERRUPTED)
        time.sleep(_REQUEUED_SECONDS)  # the requeue kills this process


# -- jobs with several processes


class Allocation:
    """Starts jobs whose ranks fill all nodes of this allocation, by srun.

    Slurm signals the ranks itself, at the time limit and on preemption, but not the element's own process, which
    the batch script runs. `reason` then makes the element stop, too.
    """

    def __init__(self, tasks: int) -> None:
        self.tasks = tasks
        self.reason: str | None = None

    def start(self, _: int, folder: Path, environment: Mapping[str, str]) -> Process:
        return _Step(self, folder, environment)


class _Step:
    """The ranks of a job."""

    def __init__(self, allocation: Allocation, folder: Path, environment: Mapping[str, str]) -> None:
        self._allocation, self._folder, self._is_stopped = allocation, folder, False
        # Rank 0 records a config error, because its output is not read.
        variables = {**os.environ, **environment, RECORD: "1"}
        if cores := variables.get("SLURM_CPUS_PER_TASK"):
            variables["SRUN_CPUS_PER_TASK"] = cores  # srun does not inherit it since Slurm 22.05
        # --wait=60: once a rank has ended, kill the others after 60 s.
        command = ["srun", "--wait=60", f"--ntasks={allocation.tasks}", *python_module("dlopt.run.job", str(folder))]
        with os.fdopen(open_to_append(folder / OUTPUT), "ab") as output:
            self._process = subprocess.Popen(
                command, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )

    def poll(self) -> int | None:
        code = self._process.poll()
        has_limit = (RunFolder(self._folder).config() or {}).get("max_time") is not None  # the job has its own limit
        # Slurm's signals end ranks that are loading Python.
        is_signalled = code in (INTERRUPTED, 128 + signal.SIGUSR1, 128 + signal.SIGTERM)
        if is_signalled and not self._is_stopped and not has_limit:
            self._allocation.reason = "Slurm has signalled the job"
            return None  # until the element stops, to be requeued
        return code if code is None or code <= 128 else 128 - code  # srun's code for a signal

    def stop(self) -> None:
        self._is_stopped = True
        self._send(signal.SIGUSR1)  # srun passes it on to the ranks; on SIGTERM it would kill them

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
