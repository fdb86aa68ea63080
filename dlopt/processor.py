"""Device selection, CPU threads, main memory, and the memory allocator."""

import contextlib
import ctypes
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from dlopt.openmp import adapt_waiting

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_PR_SET_PDEATHSIG = 1  # sys/prctl.h
_MAX_MMAP_THRESHOLD = 32 << 20  # glibc rejects larger values
CPU_INFO = Path("/proc/cpuinfo")
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # cgroups version 2, in a container
_UNKNOWN_MEMORY = 4 << 30  # bytes assumed where the system does not report them


def choose_device(name: str) -> torch.device:
    """Returns the device; `auto` selects the available CUDA or MPS accelerator, otherwise the CPU."""
    if name != "auto":
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator if accelerator is not None and accelerator.type in ("cuda", "mps") else torch.device("cpu")


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Lists the GPUs by their names for CUDA_VISIBLE_DEVICES.

    Uses nvidia-smi, because torch would allocate memory on every GPU.
    """
    selected = environment.get("CUDA_VISIBLE_DEVICES")
    if selected is not None:
        return [name.strip() for name in selected.split(",") if name.strip() and name.strip() != "-1"]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        return [line.strip() for line in listed.splitlines() if line.strip().isdigit()]
    return []


def set_threads(threads: int | str, sharing: int = 1) -> None:
    """Sets the number of CPU threads; `auto` divides the available cores by the number of `sharing` processes.

    Also adapts the way in which they wait for each other to other processes (see `dlopt.openmp`).
    """
    number = threads if isinstance(threads, int) else max(usable_cores() // sharing, 1)
    adapt_waiting(number)
    # After torch.set_num_threads, each matrix product within a parallel kernel of torch, such as attention, starts
    # threads of its own. This slows attention by a quarter, even where the number stays the same.
    if number != torch.get_num_threads():
        torch.set_num_threads(number)


def usable_cores() -> int:
    """Returns the number of cores that this process may use: by its affinity and the CPU limit of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_LIMIT.read_text().split()  # microseconds of all cores per period, or max
        return min(cores, max(int(quota) // int(period), 1))
    except (OSError, ValueError):
        return cores


def prefers_onednn() -> bool:
    """Returns whether oneDNN multiplies fp32 matrices faster than MKL, which torch uses, on this processor.

    On AMD's processors MKL uses 256-bit instructions, oneDNN those of 512 bits. These double the speed from Zen 5
    (family 26) on; Zen 4 splits them in halves.
    """
    try:
        with CPU_INFO.open(encoding="utf-8", errors="replace") as file:
            lines = [line.partition(":") for line in itertools.takewhile(str.strip, file)]  # of the first core
    except OSError:
        return False
    values = {key.strip(): value.strip() for key, _, value in lines}
    is_zen5 = values.get("vendor_id") == "AuthenticAMD" and int(values.get("cpu family", 0)) >= 26
    return is_zen5 and torch.cpu._is_avx512_supported() and torch.backends.mkldnn.is_available()


def set_deterministic(enabled: bool, *, warn_only: bool = False) -> None:
    """Does what `torch.use_deterministic_algorithms` does.

    That function imports torch's compiler to set a flag there, which takes two seconds. Without the flag and without
    the compiler there is nothing to set: the compiler's default is off.
    """
    if enabled:  # cuBLAS reproduces its sums with a fixed workspace only, and torch refuses any other
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if enabled or "torch._inductor" in sys.modules:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    else:
        torch.set_deterministic_debug_mode("default")


def installed_memory() -> int | None:
    """Returns the bytes of main memory of this machine; None: unknown on this system."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


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


def synchronized_time(device: torch.device) -> float:
    """Returns the seconds of a clock after the work that is queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def end_with_parent() -> None:
    """Makes the kernel kill this process when its parent dies (Linux only)."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
