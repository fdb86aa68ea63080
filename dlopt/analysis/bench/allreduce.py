"""Measures the bandwidth of an all-reduce between the ranks of a process group."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import distributed

from dlopt.errors import RunError
from dlopt.processor import synchronized_time

_WARMUP = 3  # all-reduces before the timed ones: the first ones open connections


@dataclass(frozen=True)
class Bandwidth:
    """The time of an all-reduce of `size` bytes between `ranks` ranks: the median over repetitions."""

    size: int
    ranks: int
    seconds: float  # of the slowest rank

    @property
    def algorithm(self) -> float:
        """Bytes of the result per second."""
        return self.size / self.seconds

    @property
    def bus(self) -> float:
        """Bytes that each rank sends per second in a ring, 2 (p - 1) / p of the size; comparable to a link's speed.

        The definition of NVIDIA's nccl-tests.
        """
        return 2 * (self.ranks - 1) / self.ranks * self.algorithm


def measure(
    sizes: list[int], repeats: int, device: torch.device, clock: Callable[[torch.device], float] = synchronized_time
) -> Iterator[Bandwidth]:
    """Yields the bandwidth for each size in bytes. All ranks call this together.

    Raises `RunError` if the result of an all-reduce is wrong, or if memory does not suffice.
    """
    ranks = distributed.get_world_size()
    for size in sizes:
        try:
            values = torch.full((max(size // 4, 1),), float(distributed.get_rank() + 1), device=device)
        except RuntimeError as error:  # on a CPU, torch has no type of its own for too little memory
            reason = str(error).partition("\n")[0]
            raise RunError(f"allreduce: {size / 2**20:g} MiB cannot be allocated ({reason})") from None
        distributed.all_reduce(values)
        if not bool((values == ranks * (ranks + 1) / 2).all()):
            raise RunError(f"an all-reduce of {size} bytes between {ranks} ranks returned wrong values")
        values.zero_()  # further sums stay finite
        for _ in range(_WARMUP):
            distributed.all_reduce(values)
        seconds = torch.zeros(repeats, dtype=torch.float64)
        for number in range(repeats):
            distributed.barrier()
            start = clock(device)
            distributed.all_reduce(values)
            seconds[number] = clock(device) - start
        seconds = seconds.to(device)
        distributed.all_reduce(seconds, distributed.ReduceOp.MAX)
        yield Bandwidth(values.nbytes, ranks, statistics.median(seconds.tolist()))
