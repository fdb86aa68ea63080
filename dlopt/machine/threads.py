"""CPU threads: how many, and which cores this process may use."""

import os
from pathlib import Path

import torch

from dlopt.machine.openmp import adapt_waiting

CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # cgroups version 2, in a container


def set_threads(threads: int | str, sharing: int = 1) -> None:
    """Sets the number of CPU threads; `auto` divides the available cores by the number of `sharing` processes.

    Also adapts the way in which they wait for each other to other processes (see `dlopt.machine.openmp`).
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
