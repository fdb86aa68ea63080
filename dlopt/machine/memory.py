"""Main memory, the memory allocator, and Python's garbage collector."""

import contextlib
import ctypes
import gc
import os
import resource
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_MAX_MMAP_THRESHOLD = 32 << 20  # glibc rejects larger values
_UNKNOWN_MEMORY = 4 << 30  # bytes assumed where the system does not report them


def installed_memory() -> int | None:
    """Returns the bytes of main memory of this machine; None if unknown on this system."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def process_memory(name: str) -> int:
    """Returns the bytes in a line of /proc/self/status: VmRSS, or VmHWM, the peak. Without /proc, always the peak."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def available_memory() -> int:
    """Returns the bytes of main memory that this process can still allocate, within a container's limit."""
    free = [installed_memory() or _UNKNOWN_MEMORY]
    with contextlib.suppress(OSError, ValueError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(int(lines["MemAvailable"].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # ValueError for "max": no limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free.append(limit - used)
    return min(free)


@contextlib.contextmanager
def half_of_memory() -> Iterator[int]:
    """Within the context, this process allocates at most half of the memory that is available now; yields these bytes.

    An allocation beyond that raises MemoryError. For files of strangers: a few bytes may expand to any size, whatever
    the file says about itself. Without /proc, there is no limit.
    """
    most = available_memory() // 2
    former = resource.getrlimit(resource.RLIMIT_DATA)
    with contextlib.suppress(OSError, ValueError, KeyError):  # no /proc, another one, or a hard limit below it
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        limit = int(status["VmData"].split()[0]) * 1024 + most
        if former[0] == resource.RLIM_INFINITY or limit < former[0]:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, former[1]))
    try:
        yield most
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, former)


def keep_freed_memory() -> None:
    """Makes glibc's malloc keep freed memory, because every step needs the same large blocks again.

    By default glibc returns large blocks to the system and maps them again page by page, zeroed. This takes 5 to 10 %
    of a ResNet-20 step on two cores.
    """
    set_malloc({M_MMAP_THRESHOLD: _MAX_MMAP_THRESHOLD, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 << 20})


def set_malloc(options: Mapping[int, int]) -> None:
    """Sets options of glibc's malloc, such as `M_MMAP_THRESHOLD`, in bytes. No effect with other C libraries."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        for option, value in options.items():
            library.mallopt(option, value)


@contextlib.contextmanager
def frozen_objects(*, collect_first: bool) -> Iterator[Callable[[], object]]:
    """Hides all present objects from Python's garbage collector; yields a function that collects the latest ones.

    A full collection passes through all objects, 400,000 after the imports of a run: 0.2 s. It would come at any
    update. The newer objects take 0.3 ms. They are still collected automatically, so that reference cycles of the
    updates do not fill the memory; that takes 0.02 % of a short run, and would gain nothing from being disabled.

    If the caller has frozen objects, neither the context nor the function does anything: `gc` cannot tell which objects
    they are, to leave them frozen afterwards.

    Args:
        collect_first: also collect what is garbage now. Otherwise it stays until after the context.
    """
    if gc.get_freeze_count():
        yield lambda: None
        return
    if collect_first:
        gc.collect()
    gc.freeze()
    try:
        # Not a full collection: Python would take the newer objects for all there are, and, when the others return
        # after the context, soon collect all of them.
        yield partial(gc.collect, 1)
    finally:
        gc.unfreeze()
