"""Measures communication between ranks: bytes at torch's dispatcher, time from torch's profiler.

Both cover all collectives: those of DDP and FSDP as well as those of dlopt's own layers.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode

Interval = tuple[float, float]


class Traffic(TorchDispatchMode):
    """Context manager that counts the collectives that this rank joins and the bytes that it sends for them.

    Bytes are those of bandwidth-optimal algorithms: rings and direct exchange (Thakur, Rabenseifner & Gropp 2005,
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
                self.sent += fraction * max(_bytes(value) for value in (*args, result))
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


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(_bytes(item) for item in value) if isinstance(value, list | tuple) else 0


def collective_times(events: Iterable[Any], device: torch.device) -> tuple[float, float]:
    """Returns the seconds with a collective in flight, and those of them in which this rank computed nothing.

    `events`: from a torch profiler. Counts kernels on a GPU, and torch's operators and gloo's transfers on a CPU.
    """
    on_gpu = device.type == "cuda"
    communicating, computing = [], []
    for event in events:
        interval = event.time_range.start, event.time_range.end
        if (event.device_type == torch.autograd.DeviceType.CUDA) != on_gpu:
            continue
        if ("nccl" in event.name) if on_gpu else event.name.startswith("gloo:"):
            communicating.append(interval)
        elif on_gpu or event.name.startswith("aten::"):
            computing.append(interval)
    waiting = covered([*communicating, *computing]) - covered(computing)
    return covered(communicating) * 1e-6, waiting * 1e-6


def covered(intervals: Iterable[Interval]) -> float:
    """Returns the length of the union of intervals."""
    total, end = 0.0, -math.inf
    for start, stop in sorted(intervals):
        total += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return total
