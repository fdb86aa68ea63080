"""Measures communication between ranks: bytes at torch's dispatcher, and the bandwidth of an all-reduce.

Bytes cover all collectives, of DDP, FSDP and dlopt's own layers.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode

from dlopt.extend import RunError
from dlopt.instruments.profiling import tensor_bytes
from dlopt.machine.device import synchronized_time

_WARMUP = 3  # all-reduces before the timed ones: the first ones open connections
_REPEATS = 20


class Traffic(TorchDispatchMode):
    """Context manager that counts the collectives that this rank joins and the bytes that it sends for them.

    Bytes are for bandwidth-optimal algorithms: rings and direct exchange (Thakur, Rabenseifner & Gropp 2005,
    section 4). For n bytes on p ranks, each rank sends 2 (p - 1) / p n in an all-reduce, (p - 1) / p n in an all-gather
    or reduce-scatter, and n in a point-to-point message.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0.0
        self.collectives = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace in ("c10d", "_c10d_functional"):
            name = function._schema.name.partition("::")[2]
            fraction = _fraction_sent(name, _group_size(args))
            if fraction > 0:
                self.collectives += 1
                self.sent += fraction * max(map(tensor_bytes, (*args, result)))
        return result


def _fraction_sent(name: str, ranks: int) -> float:
    """Returns the bytes sent per byte of the operation's larger side; 0 for operations that only receive or wait."""
    if name == "send":
        return 1.0
    if name.strip("_").startswith(("allreduce", "all_reduce")):
        return 2 * (ranks - 1) / ranks
    moves = ("gather", "scatter", "alltoall", "all_to_all", "broadcast", "reduce")
    return (ranks - 1) / ranks if any(word in name for word in moves) else 0.0


def _group_size(args: Sequence[Any]) -> int:
    from torch._C._distributed_c10d import ProcessGroup

    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            try:
                return int(ProcessGroup.unbox(argument).size())
            except RuntimeError:  # not a process group, e.g. the reduction
                continue
        if isinstance(argument, str) and argument not in ("sum", "avg", "product", "min", "max"):
            return int(distributed.distributed_c10d._resolve_process_group(argument).size())  # type: ignore[arg-type]
    return distributed.get_world_size()


@dataclass(frozen=True)
class Bandwidth:
    """The time of an all-reduce of `size` bytes between `ranks` ranks: the median of 20."""

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


def measure_all_reduce(
    sizes: list[int], device: torch.device, clock: Callable[[torch.device], float] = synchronized_time
) -> Iterator[Bandwidth]:
    """Yields the bandwidth for each size in bytes. All ranks call this together.

    Raises `RunError` if the result of an all-reduce is wrong, or if memory does not suffice.
    """
    ranks = distributed.get_world_size()
    for size in sizes:
        try:
            values = torch.full((max(size // 4, 1),), float(distributed.get_rank() + 1), device=device)
        except RuntimeError as error:  # on a CPU, torch has no separate type for out of memory
            reason = str(error).partition("\n")[0]
            raise RunError(f"allreduce: {size / 2**20:g} MiB cannot be allocated ({reason})") from None
        distributed.all_reduce(values)
        if not bool((values == ranks * (ranks + 1) / 2).all()):
            raise RunError(f"an all-reduce of {size} bytes between {ranks} ranks returned wrong values")
        values.zero_()  # further sums stay finite
        for _ in range(_WARMUP):
            distributed.all_reduce(values)
        seconds = torch.zeros(_REPEATS, dtype=torch.float64)
        for number in range(_REPEATS):
            distributed.barrier()  # ranks that start apart would measure the wait for each other
            start = clock(device)
            distributed.all_reduce(values)
            seconds[number] = clock(device) - start
        seconds = seconds.to(device)
        distributed.all_reduce(seconds, distributed.ReduceOp.MAX)  # done when the last rank is
        yield Bandwidth(values.nbytes, ranks, statistics.median(seconds.tolist()))
