"""Device selection, CPU threads, and the memory allocator."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Mapping

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_PR_SET_PDEATHSIG = 1  # sys/prctl.h
_MAX_MMAP_THRESHOLD = 32 << 20  # glibc rejects larger values


def choose_device(name: str) -> torch.device:
    """Returns the device; `auto` selects the available CUDA or MPS accelerator, otherwise the CPU."""
    if name != "auto":
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator if accelerator is not None and accelerator.type in ("cuda", "mps") else torch.device("cpu")


def set_threads(threads: int | str, sharing: int = 1) -> None:
    """Sets the number of CPU threads; `auto` divides the available cores by the number of `sharing` processes."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads if isinstance(threads, int) else max(cores // sharing, 1))


def set_deterministic(enabled: bool, *, warn_only: bool = False) -> None:
    """Does what `torch.use_deterministic_algorithms` does.

    That function imports torch's compiler to set a flag there, which takes two seconds. Without the flag and without
    the compiler there is nothing to set: the compiler's default is off.
    """
    if enabled or "torch._inductor" in sys.modules:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    else:
        torch.set_deterministic_debug_mode("default")


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


def end_with_parent() -> None:
    """Makes the kernel kill this process when its parent dies (Linux only)."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
