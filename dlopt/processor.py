"""What a run computes on: the device, its threads, and the memory that each step takes and gives back."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Mapping

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_PR_SET_PDEATHSIG = 1  # sys/prctl.h
_LARGEST_HEAP_BLOCK = 32 << 20  # glibc takes no larger threshold


def choose_device(name: str) -> torch.device:
    """`auto` takes the accelerator that torch finds, else the CPU."""
    if name != "auto":
        return torch.device(name)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found if found is not None and found.type in ("cuda", "mps") else torch.device("cpu")


def set_threads(threads: int | str, sharing: int = 1) -> None:
    """`auto`: the cores that this process may use; `sharing`: processes that share the machine's cores."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads if isinstance(threads, int) else max(cores // sharing, 1))


def keep_freed_memory() -> None:
    """Has glibc keep what is freed: every step needs the same large blocks again.

    By default it gives them back to the system and takes them anew, page by page, zeroed: 5 to 10 % of a ResNet-20
    step on two cores.
    """
    set_malloc({M_MMAP_THRESHOLD: _LARGEST_HEAP_BLOCK, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 << 20})


def set_malloc(options: Mapping[int, int]) -> None:
    """Sets options of glibc's malloc, such as `M_MMAP_THRESHOLD`, in bytes; leaves other C libraries alone."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        for option, value in options.items():
            library.mallopt(option, value)


def end_with_parent() -> None:
    """Has the system kill this process when its parent is killed (Linux only)."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
