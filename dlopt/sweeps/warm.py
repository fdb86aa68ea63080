"""Jobs as processes forked from one that has imported what they need: three of a short job's four seconds are imports.

The server only imports: it starts no thread and touches no GPU, so that a job finds what a fresh process would find,
ends alone when it is killed, and computes the same bits. `multiprocessing` provides it.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path

from dlopt.sweeps.jobs import OUTPUT

_MODULES = ["dlopt.job", "dlopt.train.trainer", "dlopt.config.compose", "torch._dynamo", "torch.utils.tensorboard"]


def spawn(folder: Path, environment: Mapping[str, str], cores: set[int] | None) -> "Forked":
    """Runs what `folder` describes, on these cores, with `environment` besides this process's own."""
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_MODULES)
    process = context.Process(
        target=_run, args=(str(folder), os.getcwd(), {**os.environ, **environment}, cores), daemon=False
    )
    process.start()
    return Forked(process)


def heat() -> None:
    """Has the server begin to import, while the sweep still composes its jobs."""
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_MODULES)
    ensure_running()


class Forked:
    def __init__(self, process: BaseProcess) -> None:
        self._process = process

    def poll(self) -> int | None:
        return self._process.exitcode

    def stop(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def _run(folder: str, place: str, environment: Mapping[str, str], cores: set[int] | None) -> None:
    """In the forked process."""
    output = os.open(os.path.join(folder, OUTPUT), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    os.chdir(place)
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
