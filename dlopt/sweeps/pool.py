"""The worker pool of a sweep: one process per job, one job per slot; a failed job does not affect the others.

Local jobs are forked from a server process (`multiprocessing`'s forkserver) that has already imported their modules:
imports take 3 s of a short job's 4 s. The server starts no thread and uses no GPU, so a forked job is equivalent to a
fresh process: bitwise identical results, and killing it affects no other job.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar

from annotated_types import Ge

from dlopt.basics.errors import FAILED, INTERRUPTED, USER_ERROR, UserError
from dlopt.basics.files import NewLines, open_to_append
from dlopt.basics.folders import RunFolder
from dlopt.basics.formats import format_count
from dlopt.basics.interruption import GRACE, SIGNALS, Interruption, block_signals, ignore_hangup, signals_deferred
from dlopt.basics.ranges import Count
from dlopt.basics.scratch import own_multiprocessing_folder
from dlopt.sweeps.array import STOP_RUN, stop_reason
from dlopt.sweeps.jobs import ELSEWHERE, OUTPUT, Job, JobResult, failed, prepare, record_pruned, result_of
from dlopt.tracking.metrics import METRICS, parse_metrics

if TYPE_CHECKING:
    from dlopt.tracking.overview import Overview

Launcher = TypeVar("Launcher")
PRELOADED = ["dlopt.sweeps.preload"]
"""Modules that the server imports."""
Returned = Literal["returned"]
"""In place of an exit code: the process has ended without the job, which is to be started again if it is not done."""


class Process(Protocol):
    """A started job."""

    def poll(self) -> int | Returned | None:
        """Returns its exit code or "returned"; None while it runs."""

    def stop(self) -> None:
        """Requests a checkpoint and the end of the process."""

    def kill(self) -> None:
        """Kills the process."""


@dataclass(frozen=True)
class Pool:
    """Where jobs run. `start` (slot, folder, environment) runs the job that the folder describes."""

    slots: int
    start: Callable[[int, Path, Mapping[str, str]], Process]
    find: Callable[[Path], Process | None]  # the job that a killed sweep left running in a folder
    stop_on_failure: bool = False  # a failed job stops the sweep
    stop_reason: Callable[[], str | None] = lambda: None  # why the sweep must stop; None to continue
    poll_seconds: float = 0.2


of_worker: ContextVar[Pool | None] = ContextVar("of_worker", default=None)
"""In a worker of a submitted search, benchmark or ladder: runs its jobs, whichever launcher its command names."""


class JobSource:
    """Supplies the jobs of a sweep and receives their results."""

    is_stopping = False  # the pool has stopped the jobs whose results it reports
    series: Path | None = None  # the folder of the series, in which its end may be requested

    def next(self) -> Job | None:
        """Returns a job for a free slot; None if there is none now. `ended` receives its result."""
        raise NotImplementedError

    def is_exhausted(self) -> bool:
        """Returns whether no job will follow, after `next` returned None and with no job running."""
        return True

    def should_stop(self, job: Job, metrics: Mapping[str, Any]) -> bool:
        """Receives a new line of a running job's metrics; returns whether to stop the job."""
        return False

    def ended(self, job: Job, result: JobResult) -> None:
        raise NotImplementedError


# -- the loop


def run(source: JobSource, pool: Pool, overview: "Overview") -> str | None:
    """Runs the jobs of `source`; returns why it stopped early, or None.

    On a signal, or if the end of the series is requested, stops the running ones with checkpoints, then raises
    KeyboardInterrupt.
    """
    workers = _Workers(source, pool, overview)

    def request() -> str | None:
        return interruption.reason or (None if source.series is None else stop_reason(source.series))

    with Interruption() as interruption, _suspended_together(workers):
        try:
            while (reason := request() or workers.stop_reason()) is None and workers.update():
                workers.wait()
            if reason is not None:
                workers.stop(reason)
            if request() is not None:
                raise KeyboardInterrupt
        except BaseException:
            for worker in workers.active.values():
                worker.process.kill()
            raise
        finally:
            overview.close()
    return reason


@contextlib.contextmanager
def _suspended_together(workers: "_Workers") -> Iterator[None]:
    """Context in which Ctrl-Z also suspends the jobs: their process groups are not that of the terminal."""

    def suspend(*_: object) -> None:
        jobs = [worker.process for worker in workers.active.values() if isinstance(worker.process, Forked)]
        for job in jobs:
            job.send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)  # until the shell continues this process
        for job in jobs:
            job.send(signal.SIGCONT)

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTSTP) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTSTP, suspend)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)


def run_jobs(jobs: Iterable[Job], total: int, pool: Pool, series: Path | None = None) -> dict[int, str]:
    """Runs jobs and returns their status by number."""
    from dlopt.tracking.overview import Overview

    source = _JobList(iter(jobs), series)
    run(source, pool, Overview(total))
    return source.statuses


@dataclass
class _JobList(JobSource):
    jobs: Iterator[Job]
    series: Path | None
    statuses: dict[int, str] = field(default_factory=dict)

    def next(self) -> Job | None:
        return next(self.jobs, None)

    def ended(self, job: Job, result: JobResult) -> None:
        self.statuses[job.number] = result.status


class _Worker:
    """A running job. `is_adopted`: its process was started by an earlier sweep, which was killed."""

    def __init__(self, job: Job, process: Process, *, is_adopted: bool = False) -> None:
        self.job, self.process, self.is_adopted = job, process, is_adopted
        self.pruned_at: int | None = None
        self._is_stopped = False  # by request
        self._lines = NewLines(job.folder.path / METRICS)  # a resumed job removes the lines after its checkpoint

    def stop_on_request(self) -> None:
        if not self._is_stopped and (self.job.folder.path / STOP_RUN).exists():
            self._is_stopped = True
            self.process.stop()

    def new_metrics(self) -> list[dict[str, Any]]:
        with contextlib.suppress(OSError):
            return parse_metrics(self._lines.read())
        return []


class _Workers:
    def __init__(self, source: JobSource, pool: Pool, overview: "Overview") -> None:
        self._source, self._pool, self._overview = source, pool, overview
        self.active: dict[int, _Worker] = {}  # by slot
        self._failed: int | None = None  # a job
        self._has_started = False  # a process

    def stop_reason(self) -> str | None:
        """Returns why the sweep must stop; None to continue."""
        if self._pool.stop_on_failure and self._failed is not None:
            return f"job {self._failed} failed"
        return self._pool.stop_reason()

    def update(self) -> bool:
        """Collects the jobs that have ended and fills free slots; returns False when all jobs are done."""
        for worker in self.active.values():
            self._read_metrics(worker)
            worker.stop_on_request()
        for slot, worker, code in self._take_ended():
            self._collect(slot, worker, code)
        try:
            for slot in range(self._pool.slots):
                while slot not in self.active:
                    if self.stop_reason() is not None:  # by a job that has failed just now
                        return True
                    job = self._source.next()
                    if job is None:
                        return bool(self.active) or not self._source.is_exhausted()
                    self._prepare(slot, job)
            return True
        finally:
            self._overview.refresh()

    def _take_ended(self) -> Iterator[tuple[int, _Worker, int | Returned]]:
        """Removes the workers that have ended and yields them with their slots and exit codes."""
        for slot, worker in list(self.active.items()):
            if (code := worker.process.poll()) is not None:
                del self.active[slot]
                yield slot, worker, code

    def wait(self) -> None:
        """Waits for the end of a job, but not longer than until the metrics are to be read again."""
        processes = [worker.process for worker in self.active.values()]
        ends = [process.sentinel for process in processes if isinstance(process, Forked)]
        connection.wait(ends, self._pool.poll_seconds)

    def _prepare(self, slot: int, job: Job) -> None:
        """Starts a job, unless it is done, cannot run, or still runs in a process of an earlier sweep."""
        if (running := self._pool.find(job.folder.path)) is not None:
            self._overview.started(job.number, job.label)
            self.active[slot] = _Worker(job, running, is_adopted=True)
        else:
            self._start(slot, job)

    def _start(self, slot: int, job: Job, *, again: bool = False) -> None:
        """Starts a job, unless it is done or cannot run. `again`: another process ran it and may have finished it."""
        try:
            done, known = prepare(job), not again
        except UserError as error:
            done, known = failed(job.folder, str(error)), False
        if done is not None:
            self._ended(job, done, known=known)
            return
        if not again:
            self._overview.started(job.number, job.label)
            self._overview.note = "" if self._has_started else "loading PyTorch ..."  # in the server: takes seconds
            self._overview.refresh()
        try:
            process = self._pool.start(slot, job.folder.path, job.checked.environment)
            if isinstance(process, Forked) and not again:
                self._overview.forked(job.number)
            self._has_started = True
        except OSError as error:
            self._ended(job, failed(job.folder, f"the process could not be started: {error}", died=True))
        else:
            self.active[slot] = _Worker(job, process)
        finally:
            self._overview.note = ""

    def _read_metrics(self, worker: _Worker) -> None:
        for metrics in worker.new_metrics():
            self._overview.progress(worker.job.number, metrics)
            if worker.pruned_at is None and not worker.is_adopted and self._source.should_stop(worker.job, metrics):
                worker.pruned_at = int(metrics.get("epoch", 0))
                worker.process.stop()

    def _collect(self, slot: int, worker: _Worker, code: int | Returned) -> None:
        job = worker.job
        self._read_metrics(worker)
        if worker.is_adopted or code == "returned":
            self._start(slot, job, again=True)
            return
        if worker.pruned_at is not None and code == -signal.SIGTERM and job.folder.summary() is None:
            code = INTERRUPTED  # the signal came before the job's handler was installed
        is_refused = code == USER_ERROR and (job.folder.is_live() or job.folder.has_ended())
        # Another process has locked the folder first; its files must not change.
        result = JobResult("interrupted", {}, ELSEWHERE) if is_refused else result_of(job.folder, code)
        if worker.pruned_at is not None and result.status == "interrupted":
            result = record_pruned(job.folder, worker.pruned_at)
        self._ended(job, result)

    def _ended(self, job: Job, result: JobResult, *, known: bool = False) -> None:
        self._source.ended(job, result)
        if result.status == "failed" and not known:
            self._failed = job.number
        self._overview.ended(job.number, job.label, result.status, result.metrics, result.reason, known)

    def stop(self, reason: str) -> None:
        """Stops all jobs with a checkpoint and waits for them; a second Ctrl-C ends the wait.

        Kills jobs that still run after `GRACE` seconds: they may hang in C code, where signals are not handled.
        """
        jobs = format_count("jobs", len(self.active))
        what = f"stopping {jobs}" if self.active else "stopped"
        self._overview.message(f"{reason}: {what}; resume with resume=auto")
        self._source.is_stopping = True
        for worker in self.active.values():
            worker.process.stop()
        deadline = time.monotonic() + GRACE
        while self.active:
            if time.monotonic() > deadline:
                deadline = float("inf")
                self._kill_hung()
            for _, worker, code in self._take_ended():
                folder = worker.job.folder
                # Without a summary, the signal came before the job had started or installed its handler.
                if code == "returned" or folder.summary() is None:
                    code = INTERRUPTED
                if not worker.is_adopted:
                    self._ended(worker.job, result_of(folder, code))
            self.wait()

    def _kill_hung(self) -> None:
        """Kills the running jobs, and stops waiting for jobs of an earlier sweep."""
        jobs = format_count("jobs", len(self.active))
        self._overview.message(f"killed {jobs} that still ran {GRACE:g} s after the signal")
        for slot, worker in list(self.active.items()):
            worker.process.kill()
            if worker.is_adopted:
                del self.active[slot]


# -- launchers


def build_checked(launcher: Callable[..., Launcher], settings: Mapping[str, Any]) -> Launcher:
    """Checks the settings of hydra.launcher and builds the pool or `Slurm`. Raises `UserError`."""
    from omegaconf import OmegaConf

    from dlopt.config.schema import check_arguments

    plain = {
        key: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for key, v in settings.items()
    }
    return launcher(**check_arguments("hydra.launcher", launcher, plain))


def local(*, n_jobs: Annotated[int, Ge(-1)], stop_on_failure: bool) -> Pool:
    """Runs `n_jobs` processes (-1: one per core) on this machine, each on an equal share of the cores, at least one."""
    if n_jobs == 0:
        raise UserError("hydra.launcher.n_jobs=0: must be the number of jobs to run at once (>= 1), or -1")
    # Other systems than Linux do not bind processes to cores.
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    slots = (len(cores) or os.cpu_count() or 1) if n_jobs == -1 else n_jobs

    def start(slot: int, folder: Path, environment: Mapping[str, str]) -> Process:
        slot_cores = None if slots == 1 or not cores else set(cores[slot::slots]) or {cores[slot % len(cores)]}
        return spawn(folder, environment, slot_cores)

    return Pool(slots, start, find_local, stop_on_failure)


def gpus(
    *, gpus: Literal["auto"] | list[Annotated[int, Ge(0)] | str], jobs_per_gpu: Count, stop_on_failure: bool
) -> Pool:
    """Runs `jobs_per_gpu` processes per GPU, each of which sees only that GPU."""
    from dlopt.machine.device import visible_gpus

    names = visible_gpus() if gpus == "auto" else [str(name) for name in gpus]
    if not names:
        raise UserError("hydra.launcher.gpus=auto: no GPU is visible; name them: hydra.launcher.gpus=[0,1]")
    if len(set(names)) < len(names):
        raise UserError(f"hydra.launcher.gpus={names}: duplicate GPU; to share one, set hydra.launcher.jobs_per_gpu")

    def start(slot: int, folder: Path, environment: Mapping[str, str]) -> Process:
        return spawn(folder, {**environment, "CUDA_VISIBLE_DEVICES": names[slot % len(names)]}, None)

    return Pool(jobs_per_gpu * len(names), start, find_local, stop_on_failure)


# -- processes on this machine


def find_local(folder: Path) -> Process | None:
    return _Adopted(folder) if RunFolder(folder).is_live() else None


@dataclass
class _Adopted:
    """A job of a sweep that was killed; the job is still writing its last checkpoint."""

    folder: Path

    def poll(self) -> Returned | None:
        return None if RunFolder(self.folder).is_live() else "returned"

    def stop(self) -> None:
        pass

    kill = stop


class Forked:
    """A job that the server has forked; only the server, its parent, knows the exit code.

    If the server is killed (out of memory), `process` reports 255 at once and sends no more signals, but the job keeps
    running. Waiting and signals therefore use a file descriptor of the job's process (Linux), which never refers to
    another process with the same number.
    """

    def __init__(self, process: BaseProcess) -> None:
        self._process, self._server = process, _server_pid()
        self._handle = None
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(ProcessLookupError):  # it has already ended, and the server has its exit code
                self._handle = os.pidfd_open(process.pid or 0)
        self.sentinel = process.sentinel if self._handle is None else self._handle  # ready when the process has ended

    def __del__(self) -> None:
        if self._handle is not None:
            os.close(self._handle)

    def poll(self) -> int | Returned | None:
        if self._handle is not None and not connection.wait([self._handle], 0):
            return None
        code = self._process.exitcode
        if code is not None:
            _end_group(self._process.pid or 0)
        return "returned" if code == _UNKNOWN and _has_died(self._server) else code

    def stop(self) -> None:
        self.send(signal.SIGTERM)
        self.send(signal.SIGCONT)  # a job that is stopped (SIGSTOP) would not end

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._handle is not None:
                signal.pidfd_send_signal(self._handle, number)
            elif self._process.exitcode is None:
                os.kill(self._process.pid or 0, number)


def _end_group(job: int) -> None:
    """Kills the processes that a job has left: they would use the machine, and write into its folder."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if job > 1:
            os.killpg(job, signal.SIGKILL)


_UNKNOWN = 255  # multiprocessing's exit code of a process whose server has died
_DEATH_SECONDS = 1.0  # from closing its connections until the kernel reports the death of the server


def _server_pid() -> int:
    return int(forkserver._forkserver._forkserver_pid)  # type: ignore[attr-defined]


def _has_died(server: int) -> bool:
    """Returns whether the server, a child of this process, has ended; leaves its exit code to multiprocessing."""
    deadline = time.monotonic() + _DEATH_SECONDS
    while time.monotonic() < deadline:
        try:
            if os.waitid(os.P_PID, server, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return True
        except ChildProcessError:  # multiprocessing has started another server
            return True
        time.sleep(0.05)
    return False


def spawn(folder: Path, environment: Mapping[str, str], cores: set[int] | None) -> Forked:
    """Starts the job in `folder` on these cores (None for all), adding `environment` to this process's environment."""
    arguments = (str(folder), os.getcwd(), {**os.environ, **environment}, cores)
    process = warm_up().Process(target=_run, args=arguments, daemon=False)
    with signals_deferred():  # else a process without arguments could remain, which fails with a traceback
        process.start()
        return Forked(process)


def warm_up() -> ForkServerContext:
    """Starts the server, unless it runs. A call before the first `spawn` hides the time of its imports.

    The server inherits the blocked signals, which reach all processes of a terminal or a Slurm step and would end the
    server with a traceback. The server exits when the sweep does.
    """
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    own_multiprocessing_folder()
    with _safe_path():
        with block_signals():
            resource_tracker.ensure_running()  # unblocks some signals in this process, so start it first
        with block_signals():
            ensure_running()
    return context


@contextlib.contextmanager
def _safe_path() -> Iterator[None]:
    """Context in which `python -c`, which starts the server, does not import a user's random.py from the folder."""
    name = "PYTHONSAFEPATH"
    former = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if former is None:
            del os.environ[name]
        else:
            os.environ[name] = former


def _run(folder: str, cwd: str, environment: Mapping[str, str], cores: set[int] | None) -> None:
    """Runs in the forked process, whose working directory, environment and streams are the server's at first."""
    os.setpgid(0, 0)  # the job and its children are one group, which ends with the job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep forwards it as SIGTERM
    ignore_hangup()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked in the server, see `warm_up`
    try:
        output = open_to_append(Path(folder, OUTPUT))
    except FileNotFoundError:  # the command was interrupted, and has removed its temporary folder
        sys.exit(FAILED)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # the job's own children must not be forked from the server
    if cores is not None:
        os.sched_setaffinity(0, cores)
    import numpy as np

    from dlopt.run import job

    np.random.seed()  # torch and random reseed after a fork; NumPy's global generator would be the same in all jobs
    threading.Thread(target=_stop_with_sweep, name="sweep", daemon=True).start()
    job.redact_output()
    sys.argv = ["dlopt.run.job", folder]
    code = job.main()
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)  # its children, also if the sweep has died
    sys.exit(code)


def _stop_with_sweep() -> None:
    """Stops this job with a checkpoint when the sweep's process dies.

    It waits for the sweep itself: the job's parent, the server, outlives the sweep until all jobs have ended.
    """
    sweep = multiprocessing.parent_process()
    assert sweep is not None
    sweep.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)  # the thread ends with the process
    os.killpg(0, signal.SIGKILL)
