"""The process group of a run, and how a process joins it."""

from collections.abc import Sequence
from datetime import timedelta
from itertools import count
from typing import Annotated, TypedDict, Unpack

import torch
from annotated_types import Interval
from torch import Tensor, distributed

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Count, Positive
from dlopt.machine.world import World, current
from dlopt.parallel.processes.rendezvous import join_store

_numbers = count()  # a process may join one group after another; each gets its own prefix in the store


class ProcessGroup:
    """The process group of a run: NCCL for tensors on GPUs, gloo for tensors on the host."""

    def __init__(
        self, world: World, device: torch.device, *, minutes: float, address: str | None = None, port: int | None = None
    ) -> None:
        store = join_store(world, minutes=minutes, address=address, port=port)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Every rank waits here until all have joined, for at most `minutes`.
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=distributed.PrefixStore(f"group{next(_numbers)}", store),
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(minutes=minutes),
        )
        self.world = world
        self.minutes = minutes
        self.rank = world.rank
        self.size = world.size

    def all_gather(self, values: Tensor) -> Tensor:
        """Returns the values [n] of all ranks as [size, n], in rank order."""
        gathered = values.new_empty(self.size * values.numel())
        distributed.all_gather_into_tensor(gathered, values.contiguous())
        return gathered.view(self.size, -1)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Returns the sums over ranks, bitwise equal on each."""
        # Every rank adds in rank order, which an all-reduce does not promise.
        gathered = self.all_gather(torch.tensor(values, dtype=torch.float64))
        return [float(total) for total in gathered.sum(0)]

    def __deepcopy__(self, memo: object) -> "ProcessGroup":
        return self  # copies of a model communicate over the same processes


class ProcessKeys(TypedDict):
    """Config keys of every distributed mode: number of processes, rendezvous and timeout."""

    processes: Count | None
    timeout_minutes: Positive
    master_addr: str | None
    master_port: Annotated[int, Interval(ge=1, le=65535)] | None


def join(mode: str, device: torch.device, **keys: Unpack[ProcessKeys]) -> tuple[ProcessGroup, torch.device] | None:
    """Joins the process group and returns it with this rank's device; None in a single process.

    Raises `UserError` where launcher, keys and device contradict each other.
    """
    world, processes = current(), keys["processes"]
    if world is None:
        if processes is not None and processes > 1:
            raise UserError(f"parallel.processes={processes}: only `dlopt train` starts processes")
        return None
    if processes not in (None, world.size):
        raise UserError(
            f"parallel.processes={processes}: {world.launcher} started {world.size} processes; "
            "set both to the same number, or remove parallel.processes"
        )
    if device.type == "cuda":
        if world.local_size > torch.cuda.device_count():
            raise UserError(
                f"parallel={mode}: {world.local_size} processes on this machine, which has {torch.cuda.device_count()} "
                "GPUs; start fewer processes, or set device=cpu"
            )
        device = torch.device("cuda", world.local_rank)
    elif device.type != "cpu":
        raise UserError(f"parallel={mode}: device={device.type} is not supported; set device=cpu")
    address, port = keys["master_addr"], keys["master_port"]
    return ProcessGroup(world, device, minutes=keys["timeout_minutes"], address=address, port=port), device
