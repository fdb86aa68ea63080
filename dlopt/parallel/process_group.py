"""The process group of a run, and the base of modes of several processes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Annotated, TypedDict, Unpack

import torch
from annotated_types import Interval
from torch import Tensor, distributed

from dlopt.data.batches import Batch
from dlopt.errors import UserError
from dlopt.parallel.batch_shards import BatchSplit
from dlopt.parallel.dropout import CurrentShard
from dlopt.parallel.mode import Mode
from dlopt.parallel.ranks import GroupRanks
from dlopt.parallel.rendezvous import World, current, join_store
from dlopt.ranges import Count, Positive

_numbers = count()  # a process may join one group after another; each gets its own prefix in the store


class ProcessGroup:
    """The process group of a run: NCCL for tensors on GPUs, gloo for tensors on the host."""

    def __init__(
        self, world: World, device: torch.device, *, minutes: float, address: str | None = None, port: int | None = None
    ) -> None:
        store = join_store(world, minutes=minutes, address=address, port=port)
        if device.type == "cuda":
            torch.cuda.set_device(device)
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
        # Gathered and added up locally: every rank adds in rank order, which an all-reduce does not promise.
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


def join_mode(
    name: str, device: torch.device, build: Callable[[ProcessGroup, torch.device], Mode], keys: ProcessKeys
) -> Mode:
    """Joins the process group (see `join`) and builds its mode; in a single process, returns that of one process."""
    joined = join(name, device, **keys)
    return Mode(device, name) if joined is None else build(*joined)


def check_precision(mode: str, precision: str) -> None:
    """Raises `UserError` for precisions that a mode with a sharded model does not support.

    fp16: every rank has its own loss scaler, which sees the overflows of its shards only. bf16_pure: shards of fp32
    norm layers and bf16 weights do not share a buffer.
    """
    if precision == "fp16":
        raise UserError(
            f"precision=fp16: not supported with parallel={mode}, whose ranks would diverge in their loss scales; "
            "use precision=bf16"
        )
    if precision == "bf16_pure":
        raise UserError(
            f"precision=bf16_pure: not supported with parallel={mode}, which shards all layers in one dtype; "
            "use precision=bf16, or parallel=ddp"
        )


class GroupMode(Mode):
    """Base of all distributed modes: this process is one rank of a process group.

    Batches are split over `data_degree` ranks, of which this is `data_rank`: by default over all.
    """

    ranks: GroupRanks

    def __init__(
        self,
        group: ProcessGroup,
        device: torch.device,
        name: str,
        *,
        accumulate: int = 1,
        data_rank: int | None = None,
        data_degree: int | None = None,
    ) -> None:
        super().__init__(device, name)
        self.group = group
        self.ranks = GroupRanks(group)
        rank, degree = group.rank if data_rank is None else data_rank, data_degree or group.size
        self.split = BatchSplit(accumulate, rank, degree)
        self.dropout = CurrentShard()

    @contextmanager
    def micro_batch(self, micro_batch: Batch) -> Iterator[None]:
        with self.dropout.of(micro_batch):
            yield
