"""What the ranks of a run tell each other: bytes counted at torch's dispatcher, time read from its profiler.

Both see whatever a mode calls: the collectives of DDP and FSDP as well as those of dlopt's own layers.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode

Interval = tuple[float, float]


class Traffic(TorchDispatchMode):
    """Counts, within a `with` statement, the collectives that this rank joins and the bytes that it sends for them.

    Bytes are those of the algorithms that move the least: rings, and direct exchange (Thakur, Rabenseifner & Gropp
    2005, section 4). Of n bytes on p ranks an all-reduce has each send 2 (p - 1) / p n, a gathering to n bytes or a
    scattering of n bytes (p - 1) / p n, a message all of its n.
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
            share = _fraction_sent(name, _group_size(args))
            if share > 0:
                self.collectives += 1
                self.sent += share * max(_bytes(each) for each in (*args, result))
        return result


def _fraction_sent(name: str, ranks: int) -> float:
    """Bytes sent per byte of the operation's larger side; 0 for what only receives or waits."""
    if name == "send":
        return 1.0
    if name.strip("_").startswith(("allreduce", "all_reduce")):
        return 2 * (ranks - 1) / ranks
    moves = ("gather", "scatter", "alltoall", "all_to_all", "broadcast", "reduce")
    return (ranks - 1) / ranks if any(each in name for each in moves) else 0.0


def _group_size(args: Sequence[Any]) -> int:
    from torch._C._distributed_c10d import ProcessGroup

    for each in args:
        if isinstance(each, torch.ScriptObject):
            try:
                return int(ProcessGroup.unbox(each).size())
            except RuntimeError:  # another object, such as the reduction
                continue
        if isinstance(each, str) and each not in ("sum", "avg", "product", "min", "max"):
            return int(distributed.distributed_c10d._resolve_process_group(each).size())  # type: ignore[arg-type]
    return distributed.get_world_size()


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(_bytes(each) for each in value) if isinstance(value, list | tuple) else 0


def times(events: Iterable[Any], device: torch.device) -> tuple[float, float]:
    """Seconds in which a collective was under way, and those of them in which this rank computed nothing besides.

    `events`: those of a torch profiler. On a GPU its kernels count, on a CPU torch's operators and gloo's transfers.
    """
    on_gpu = device.type == "cuda"
    talking, working = [], []
    for event in events:
        interval = event.time_range.start, event.time_range.end
        if (event.device_type == torch.autograd.DeviceType.CUDA) != on_gpu:
            continue
        if ("nccl" in event.name) if on_gpu else event.name.startswith("gloo:"):
            talking.append(interval)
        elif on_gpu or event.name.startswith("aten::"):
            working.append(interval)
    talk, work = length(union(talking)), length(union(working))
    return talk * 1e-6, (length(union([*talking, *working])) - work) * 1e-6


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points in disjoint intervals, in their order."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)
