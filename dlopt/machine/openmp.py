"""Adapts the waiting of OpenMP's threads to other processes on the same cores.

PyTorch runs every operation as a parallel region, at whose end the threads wait for each other: some 400 regions in an
update of a ResNet-20. libgomp's threads wait by spinning for milliseconds. That is fastest while each thread has a core
of its own. If another process takes one of the cores, the other threads spin until the scheduler resumes the missing
thread: a region of microseconds takes up to two time slices (8 ms), and an update of 30 ms takes seconds.

libgomp spins only 100 times, and then sleeps, while the process has more OpenMP threads than there are cores (see
GOMP_SPINCOUNT in its manual). `Watch` measures how long the threads of this process wait for a core. If they do, it
opens a second team of sleeping threads, which raises the number of threads above the number of cores; when the cores
are free again, it ends that team. The number of threads that compute, hence every result, stays the same.
"""

import contextlib
import ctypes
import logging
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_PERIOD = 0.25  # seconds between two measurements
_WAITING = 0.1  # seconds that the threads wait for a core, per second, above which they sleep
_FREE = 0.04  # below which the cores are free
_OTHERS = 0.2  # cores in use by other processes, below which the threads of this process can only wait for each other
_PATIENCE = 4  # periods in a row with free cores, because every change costs a team of threads
_REPORTED = 20  # periods with shared cores before a log message: a few seconds change little

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Usage:
    """Clocks of the cores that this process may use, in seconds."""

    wall: float
    busy: float  # processor time of all processes on these cores
    own: float  # processor time of this process
    waits: Mapping[str, float]  # thread -> time that it has waited for a core

    def since(self, earlier: "Usage") -> tuple[float, float]:
        """Returns the cores in use by other processes, and the seconds per second that the threads have waited."""
        seconds = max(self.wall - earlier.wall, 1e-9)
        others = (self.busy - earlier.busy) - (self.own - earlier.own)
        waited = sum(self.waits[thread] - earlier.waits[thread] for thread in self.waits.keys() & earlier.waits.keys())
        return others / seconds, waited / seconds


def measure() -> Usage | None:
    """Reads the clocks; None where the system does not have them, such as outside Linux."""
    try:
        cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        tasks = list(Path("/proc/self/task").iterdir())
    except (OSError, AttributeError):
        return None
    # user, nice, system, (idle, iowait,) irq, softirq, steal; guests count as user
    ticks = sum(sum(map(int, [*line[1:4], *line[6:9]])) for line in lines if line[0] in cores)
    waits = {}
    for task in tasks:
        with contextlib.suppress(OSError, ValueError, IndexError):  # the thread has ended
            waits[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
    busy = ticks / os.sysconf("SC_CLK_TCK")
    return Usage(time.perf_counter(), busy, time.process_time(), waits) if waits else None


class Contention:
    """Decides whether the threads wait for other processes. Starts with free cores."""

    def __init__(self) -> None:
        self.is_shared = False
        self._quiet = 0  # periods in a row with free cores

    def update(self, others: float, waited: float) -> bool:
        """Adds the result of `Usage.since` for a period; returns `is_shared`.

        Sleeping threads may wait although the other cores are idle, because the scheduler wakes them on one core.
        """
        if waited > _WAITING and others > _OTHERS:
            self.is_shared, self._quiet = True, 0
        else:
            self._quiet = self._quiet + 1 if waited < _FREE or others < _OTHERS else 0
            self.is_shared = self.is_shared and self._quiet < _PATIENCE
        return self.is_shared


class Team:
    """A team of sleeping OpenMP threads, which makes all other teams of the process sleep soon when they wait."""

    def __init__(self, libraries: Iterable[ctypes.CDLL], size: int) -> None:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._open, args=(libraries, size), daemon=True, name="dlopt-openmp")
        self._thread.start()

    def _open(self, libraries: Iterable[ctypes.CDLL], size: int) -> None:
        # free(NULL) does nothing. A Python function would need the interpreter's lock in each thread.
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)
        for library in libraries:
            library.GOMP_parallel(nothing, None, size, 0)
        self._end.wait()  # libgomp keeps the team until the thread that opened it ends

    def close(self) -> None:
        self._end.set()
        self._thread.join()


class Watch:
    """Measures in the background, and opens and closes the team. One per process, as libgomp is."""

    def __init__(self, libraries: list[ctypes.CDLL], threads: int) -> None:
        self._libraries = libraries
        # With the threads that compute, one more than there are cores. libgomp does not count the thread that opens it.
        self._size = max((os.cpu_count() or 1) - threads, 0) + 2
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="dlopt-contention")
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        contention, team = Contention(), None
        shared, has_reported = 0, False  # periods with shared cores
        before = measure()
        while not self._end.wait(_PERIOD) and before is not None and (after := measure()) is not None:
            others, waited = after.since(before)
            before = after
            if contention.update(others, waited):
                team = team or Team(self._libraries, self._size)
                shared += 1
                if shared >= _REPORTED and not has_reported and log.hasHandlers():  # those of a run's tracking
                    log.warning(_REPORT, others, extra={"at_end": True})  # not among the epochs
                    has_reported = True
            elif team is not None:
                team.close()
                team = None
        if team is not None:
            team.close()


_REPORT = (
    "busy machine: other programs used %.1f of the processor cores of this run, which slowed it down; "
    "threads=1 loses less"
)
_watch: Watch | None = None


def adapt_waiting(threads: int) -> None:
    """Starts the watch of this process, or, for one thread, which waits for no other, stops it.

    Does nothing where Linux does not show how long threads wait, or where PyTorch uses another OpenMP than libgomp.
    """
    global _watch
    if _watch is not None and threads == 1:
        _watch.stop()
        _watch = None
    if _watch is None and threads > 1 and measure() and (libraries := libgomp()):
        _watch = Watch(libraries, threads)


def libgomp() -> list[ctypes.CDLL]:
    """Returns the loaded copies of libgomp: PyTorch's, and perhaps other packages' copies."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    paths = sorted(set(re.findall(r"/\S*libgomp[^/\s]*\.so[.\d]*$", maps, flags=re.MULTILINE)))
    libraries = []
    for path in paths:
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(path)
            library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
            libraries.append(library)
    return libraries


def _forget() -> None:
    """Forgets the watch in a forked process, which has none of its threads."""
    global _watch
    _watch = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
