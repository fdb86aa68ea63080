"""The worker pool of a sweep: jobs in processes of their own, one per slot; a failed job does not affect the others.

Local jobs are forked from a server process that has imported what they need: three of a short job's four seconds are
imports. The server only imports: it starts no thread and touches no GPU, so that a job starts like a fresh process,
dies alone when it is killed, and computes the same bits. `multiprocessing` provides it.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from annotated_types import Ge
from omegaconf import OmegaConf

from dlopt.config.schema import check_arguments
from dlopt.errors import DONE, INTERRUPTED, UserError
from dlopt.folders import RunFolder
from dlopt.interruption import Interruption
from dlopt.ranges import Count
from dlopt.sweeps.jobs import OUTPUT, Job, Result, begin, record_failure, record_pruned, result_of
from dlopt.tracking.metrics import METRICS, parse_metrics
from dlopt.tracking.overview import Overview

_MODULES = ["dlopt.job", "dlopt.training.trainer", "dlopt.config.compose", "torch._dynamo", "torch.utils.tensorboard"]
_MODULES += [__name__]


class Process(Protocol):
    """A job that has been started."""

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""

    def stop(self) -> None:
        """Has it write a checkpoint and end."""

    def kill(self) -> None:
        """Ends it at once."""


@dataclass(frozen=True)
class Pool:
    """Where jobs run. `start` (slot, folder, environment) runs what the folder describes."""

    slots: int
    start: Callable[[int, Path, Mapping[str, str]], Process]
    find: Callable[[Path], Process | None]  # the job that a killed sweep has left running in a folder, if any
    seconds: float = 0.2  # between two looks at the jobs
    is_local: bool = True  # whether jobs are processes of this machine


class Source:
    """What hands out the jobs."""

    def next(self) -> Job | None:
        """A job for a free slot; None where there is none now."""
        raise NotImplementedError

    def is_over(self) -> bool:
        """Whether no job will come any more, after `next` returned None and once none is running."""
        return True

    def stops(self, job: Job, line: Mapping[str, Any]) -> bool:
        """Takes a new line of a running job's metrics; whether the job is to be stopped."""
        return False

    def ended(self, job: Job, result: Result) -> None:
        """Takes how a job ended."""
        raise NotImplementedError


# -- the loop


def run(source: Source, pool: Pool, overview: Overview) -> None:
    """Runs what `source` hands out. Raises KeyboardInterrupt once a signal has come and the jobs have stopped."""
    workers = _Workers(source, pool, overview)
    with Interruption() as interruption:
        try:
            while not interruption and workers.update():
                time.sleep(pool.seconds)
            if interruption:
                workers.stop(interruption)
                raise KeyboardInterrupt
        except BaseException:
            workers.kill()
            raise
        finally:
            overview.close()


@dataclass
class _Worker:
    job: Job
    process: Process
    is_adopted: bool  # its process was started by a sweep that was killed
    position: int = 0  # up to which its metrics.jsonl has been read
    pruned_at: int | None = None

    def new_metrics(self) -> list[dict[str, Any]]:
        with contextlib.suppress(OSError), (self.job.folder.path / METRICS).open("rb") as file:
            if os.fstat(file.fileno()).st_size < self.position:  # a resumed job cuts what lies beyond its checkpoint
                self.position = 0
            file.seek(self.position)
            whole, newline, _ = file.read().rpartition(b"\n")
            self.position += len(whole + newline)
            return parse_metrics(whole)
        return []


class _Workers:
    def __init__(self, source: Source, pool: Pool, overview: Overview) -> None:
        self._source, self._pool, self._overview = source, pool, overview
        self._at: dict[int, _Worker] = {}  # by slot

    def update(self) -> bool:
        """Takes what has ended, fills free slots; False when all is over."""
        for slot, worker in list(self._at.items()):
            self._follow(worker)
            code = worker.process.poll()
            if code is not None:
                del self._at[slot]
                self._end(slot, worker, code)
        try:
            for slot in range(self._pool.slots):
                while slot not in self._at:
                    job = self._source.next()
                    if job is None:
                        return bool(self._at) or not self._source.is_over()
                    self._begin(slot, job)
            return True
        finally:
            self._overview.refresh()

    def _begin(self, slot: int, job: Job) -> None:
        if (running := self._pool.find(job.folder.path)) is not None:
            self._overview.started(job.number, job.label)
            self._at[slot] = _Worker(job, running, is_adopted=True)
            return
        try:
            if job.error:
                raise UserError(job.error)
            result = begin(job)
        except UserError as error:
            self._ended(job, record_failure(job.folder, str(error)))
            return
        if result is not None:
            self._ended(job, result, known=True)
            return
        self._overview.started(job.number, job.label)
        self._start(slot, job)

    def _start(self, slot: int, job: Job) -> None:
        try:
            process = self._pool.start(slot, job.folder.path, job.environment)
        except OSError as error:
            self._ended(job, record_failure(job.folder, f"its process could not be started: {error}"))
        else:
            self._at[slot] = _Worker(job, process, is_adopted=False)

    def _follow(self, worker: _Worker) -> None:
        for line in worker.new_metrics():
            self._overview.progress(worker.job.number, line)
            if worker.pruned_at is None and not worker.is_adopted and self._source.stops(worker.job, line):
                worker.pruned_at = int(line.get("epoch", 0))
                worker.process.stop()

    def _end(self, slot: int, worker: _Worker, code: int) -> None:
        job = worker.job
        self._follow(worker)
        if worker.is_adopted:
            result = begin(job)
            if result is None:
                self._start(slot, job)
                return
        elif worker.pruned_at is not None and code == -signal.SIGTERM and job.folder.summary() is None:
            result = record_pruned(job.folder, worker.pruned_at)  # the signal came when nothing could catch it
        else:
            result = result_of(job.folder, code)
        if worker.pruned_at is not None and result.status == "interrupted":
            result = record_pruned(job.folder, worker.pruned_at)
        self._ended(job, result)

    def _ended(self, job: Job, result: Result, *, known: bool = False) -> None:
        self._source.ended(job, result)
        self._overview.ended(job.number, job.label, result.status, result.metrics, result.reason, known)

    def stop(self, interruption: Interruption) -> None:
        """Has the jobs end with a checkpoint, and waits for them; a second Ctrl-C ends the waiting."""
        self._overview.message(f"{interruption.reason}: stopping {len(self._at)} jobs; go on with resume=auto")
        for worker in self._at.values():
            worker.process.stop()
        while self._at:
            for slot, worker in list(self._at.items()):
                code = worker.process.poll()
                if code is not None:
                    del self._at[slot]
                    if not worker.is_adopted:  # the signal may have come before the job could catch it
                        is_silent = worker.job.folder.summary() is None
                        self._ended(worker.job, result_of(worker.job.folder, INTERRUPTED if is_silent else code))
            time.sleep(self._pool.seconds)

    def kill(self) -> None:
        for worker in self._at.values():
            worker.process.kill()


# -- launchers


def checked(launcher: Callable[..., Pool], settings: Mapping[str, Any]) -> Pool:
    """The pool of a launcher with these settings of hydra.launcher. Raises `UserError`."""
    plain = {
        key: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for key, v in settings.items()
    }
    return launcher(**check_arguments("hydra.launcher", launcher, plain))


def local(*, n_jobs: Annotated[int, Ge(-1)]) -> Pool:
    """`n_jobs` processes on this machine, with equal shares of the cores that this process may use; -1: one per core.

    With more slots than cores, cores are shared.
    """
    if n_jobs == 0:
        raise UserError("hydra.launcher.n_jobs=0: how many jobs run at once; allowed: a whole number >= 1, or -1")
    cores = sorted(os.sched_getaffinity(0))
    slots = len(cores) if n_jobs == -1 else n_jobs

    def start(slot: int, folder: Path, environment: Mapping[str, str]) -> Process:
        share = None if slots == 1 else set(cores[slot::slots]) or {cores[slot % len(cores)]}
        return spawn(folder, environment, share)

    return Pool(slots, start, find_local)


def gpus(*, gpus: Literal["auto"] | list[Annotated[int, Ge(0)] | str], jobs_per_gpu: Count) -> Pool:
    """One process per GPU (or `jobs_per_gpu`), which sees no other."""
    names = visible_gpus() if gpus == "auto" else [str(each) for each in gpus]
    if not names:
        raise UserError("hydra.launcher.gpus=auto: no GPU is visible here; name them: hydra.launcher.gpus=[0,1]")
    if len(set(names)) < len(names):
        raise UserError(f"hydra.launcher.gpus={names}: a GPU stands twice; hydra.launcher.jobs_per_gpu shares them")

    def start(slot: int, folder: Path, environment: Mapping[str, str]) -> Process:
        return spawn(folder, {**environment, "CUDA_VISIBLE_DEVICES": names[slot % len(names)]}, None)

    return Pool(jobs_per_gpu * len(names), start, find_local)


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Names of the GPUs, for CUDA_VISIBLE_DEVICES; from the driver, so that no memory is taken on them."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() and name.strip() != "-1"]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        return [line.strip() for line in listed.splitlines() if line.strip().isdigit()]
    return []


# -- processes on this machine


def find_local(folder: Path) -> Process | None:
    return _Adopted(folder) if RunFolder(folder).is_live() else None


class _Adopted:
    """A job of a sweep that was killed, still writing its last checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._folder = RunFolder(folder)

    def poll(self) -> int | None:
        return None if self._folder.is_live() else DONE

    def stop(self) -> None:
        pass

    kill = stop


class Forked:
    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        self.stop, self.kill = process.terminate, process.kill

    def poll(self) -> int | None:
        return self._process.exitcode


def spawn(folder: Path, environment: Mapping[str, str], cores: set[int] | None) -> Forked:
    """Runs what `folder` describes, on these cores, with `environment` added to this process's own."""
    process = _server().Process(
        target=_run, args=(str(folder), os.getcwd(), {**os.environ, **environment}, cores), daemon=False
    )
    process.start()
    return Forked(process)


def warm_up() -> None:
    """Has the server begin to import, while the sweep still composes its jobs."""
    _server()
    ensure_running()


def _server() -> ForkServerContext:
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_MODULES)
    return context


def _run(folder: str, cwd: str, environment: Mapping[str, str], cores: set[int] | None) -> None:
    """In the forked process."""
    output = os.open(os.path.join(folder, OUTPUT), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # what the job starts in turn is not the server's business
    if cores is not None:
        os.sched_setaffinity(0, cores)
    import numpy as np

    from dlopt import job

    np.random.seed()  # torch and random are fresh after a fork, NumPy's global generator is the server's
    threading.Thread(target=_end_with_sweep, name="sweep", daemon=True).start()
    sys.argv = ["dlopt.job", folder]
    code = job.main()
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def _end_with_sweep() -> None:
    """Where the sweep is killed, the job writes a checkpoint and ends. (The server outlives the sweep: it waits for the
    jobs.)"""
    sweep = multiprocessing.parent_process()
    assert sweep is not None
    sweep.join()
    os.kill(os.getpid(), signal.SIGTERM)
