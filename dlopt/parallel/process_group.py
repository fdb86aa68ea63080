"""The process group of a run: collectives, the synchronized stop flag, and the base of modes of several processes."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import count
from typing import Annotated, Any, Protocol, TypedDict, TypeVar, Unpack, cast

import torch
from annotated_types import Interval
from torch import Tensor, distributed, nn

from dlopt.errors import UserError
from dlopt.parallel import shards
from dlopt.parallel.mode import EpochBatches, MicroSteps, Mode
from dlopt.parallel.pace import StepTiming
from dlopt.parallel.rendezvous import World, current, join_store
from dlopt.ranges import Count, Positive

T = TypeVar("T")

_numbers = count()  # a process may be in one group after another

_LAG = 8  # updates after which a GPU's stop flag is read; the host is seldom further ahead


class StopRequest(Protocol):
    """Whether this process was requested to stop (`dlopt.interruption.Interruption`)."""

    reason: str | None

    def __bool__(self) -> bool: ...


class Group:
    """The processes of a run: NCCL between GPUs, gloo between CPUs and for tensors on the host."""

    def __init__(
        self,
        world: World,
        device: torch.device,
        *,
        minutes: float,
        address: str | None = None,
        port: int | None = None,
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

    def gathered(self, values: Tensor) -> Tensor:
        """Returns the values [n] of every rank as [size, n], in rank order: sums over them are equal everywhere."""
        gathered = values.new_empty(self.size * values.numel())
        distributed.all_gather_into_tensor(gathered, values.contiguous())
        return gathered.view(self.size, -1)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Returns the sums over ranks, bitwise equal on each."""
        gathered = self.gathered(torch.tensor(values, dtype=torch.float64))
        return [float(each) for each in gathered.sum(0)]

    def maximum(self, values: Tensor) -> Tensor:
        """Returns a new tensor on the host: the elementwise maximum over ranks."""
        largest = values.clone()
        distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
        return largest

    def broadcast(self, value: T) -> T:
        """Returns rank 0's value."""
        box: list[Any] = [value]
        distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        received: T = box[0]
        return received

    def __deepcopy__(self, memo: object) -> "Group":
        return self  # a copied model uses the same processes


class ProcessKeys(TypedDict):
    """The keys of every mode of several processes: how many, where they meet, and how long they wait for each other."""

    processes: Count | None
    timeout_minutes: Positive
    master_addr: str | None
    master_port: Annotated[int, Interval(ge=1, le=65535)] | None


def join(mode: str, device: torch.device, **keys: Unpack[ProcessKeys]) -> tuple[Group, torch.device] | None:
    """Joins the process group; returns it with this rank's device, or None in a process that is alone.

    Raises `UserError` where launcher, keys and device do not fit together.
    """
    world, processes = current(), keys["processes"]
    if world is None:
        if processes is not None and processes > 1:
            raise UserError(f"parallel.processes={processes}: these are started by `dlopt train`")
        return None
    if processes not in (None, world.size):
        raise UserError(
            f"parallel.processes={processes}: {world.launcher} started {world.size} processes; "
            "let them be equal, or leave parallel.processes out"
        )
    if device.type == "cuda":
        if world.local_size > torch.cuda.device_count():
            raise UserError(
                f"parallel={mode}: {world.local_size} processes on this machine, which has {torch.cuda.device_count()} "
                "GPUs; start fewer, or set device=cpu"
            )
        device = torch.device("cuda", world.local_rank)
    elif device.type != "cpu":
        raise UserError(f"parallel={mode}: not on {device.type}; set device=cpu")
    address, port = keys["master_addr"], keys["master_port"]
    return Group(world, device, minutes=keys["timeout_minutes"], address=address, port=port), device


class StopFlag:
    """A stop request that becomes true on all ranks after the same update, as soon as one of them has received it.

    `flag` travels with the reduction of the loss, which every update needs anyway; `take` receives the sum. On a GPU
    the sum is read `_LAG` updates later, when it has long been computed, so that the host does not wait.
    """

    def __init__(self, request: StopRequest | None) -> None:
        self.request = request
        self._is_set = False
        self._pending: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    @property
    def reason(self) -> str | None:
        own = None if self.request is None else self.request.reason
        return own or ("another process was asked to stop" if self._is_set else None)

    def __bool__(self) -> bool:
        return self._is_set

    def flag(self) -> float:
        return 1.0 if self.request else 0.0

    def take(self, flags: Tensor) -> None:
        """`flags`: a scalar, the sum over ranks."""
        if flags.device.type == "cpu":
            self._is_set |= bool(flags > 0)
            return
        held = torch.empty((), dtype=flags.dtype, pin_memory=True)
        held.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((held, event))
        if len(self._pending) > _LAG:
            held, event = self._pending.popleft()
            event.synchronize()
            self._is_set |= bool(held > 0)


class PolledStopFlag:
    """The same flag where no loss is reduced (in an evaluation): reading it is a collective that every rank joins."""

    def __init__(self, stop: StopFlag, group: Group) -> None:
        self.stop = stop
        self.group = group

    def __bool__(self) -> bool:
        if not self.stop:
            [flags] = self.group.sum([self.stop.flag()])
            self.stop.take(torch.tensor(flags))
        return bool(self.stop)


class GroupMode(Mode):
    """This process as one rank of a group: what every mode of several processes shares."""

    is_copy = False  # with `sharding` "layers": another rank holds the same ones, which count once

    def __init__(self, group: Group, device: torch.device, name: str) -> None:
        super().__init__(device, name)
        self.group = group
        self.rank, self.processes = group.rank, group.size
        self.local_processes = group.world.local_size
        self.is_main = group.world.is_main
        self.stop = StopFlag(None)
        self.batch_total = 0  # samples of the global batch that is being trained on

    def synchronized_stop(self, stop: T) -> T:
        self.stop = StopFlag(cast(StopRequest, stop))
        return cast(T, self.stop)

    def evaluation_stop(self, stop: T) -> T:
        return cast(T, PolledStopFlag(self.stop, self.group))

    def broadcast(self, value: T) -> T:
        return self.group.broadcast(value)

    def gather_lists(self, values: list[T]) -> list[T]:
        lists: list[Any] = [None] * self.processes
        distributed.all_gather_object(lists, values)
        return [value for each in lists for value in each]

    def sum_over_ranks(self, values: Sequence[float]) -> Sequence[float]:
        return self.group.sum(values)

    def sum_loss(self, loss: Tensor) -> Tensor:
        """Returns the sum over ranks. The stop flag travels along: one collective serves both."""
        pair = torch.stack([loss, loss.new_full((), self.stop.flag())])
        losses, flags = self.group.gathered(pair).sum(0).unbind()
        self.stop.take(flags)
        return losses

    def track_batches(self, batches: EpochBatches) -> EpochBatches:
        return TrackedBatches(cast(SizedBatches, batches), self)

    def differentiable_loss(self, step: MicroSteps, inputs: Tensor, targets: Tensor) -> Tensor:
        raise UserError(
            f"parallel={self.name}: {type(step.optimizer).__name__} needs Hessian-vector products, which are not "
            "averaged over processes; use parallel=single or another optimizer"
        )

    def step_timing(self) -> StepTiming | None:
        return StepTiming(self.group, self.device)

    # -- norms and states follow from how the model is sharded

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        if self.sharding == "layers":
            return shards.stage_norm(tensors, self.group, self.device, is_copy=self.is_copy)
        return shards.total_norm(tensors)

    def full_state(self, state: T) -> T:
        if self.sharding == "layers":
            return shards.stage_full_state(state, self.group, is_copy=self.is_copy)
        return shards.full_state(state) if self.sharding == "tensors" else state

    def load_model(self, model: nn.Module, state: Mapping[str, Any], *, strict: bool = True) -> None:
        load = {"replicated": super().load_model, "tensors": shards.load_model, "layers": shards.load_stage_model}
        load[self.sharding](model, state, strict=strict)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        load = {
            "replicated": super().load_optimizer,
            "tensors": shards.load_optimizer,
            "layers": shards.load_stage_optimizer,
        }
        load[self.sharding](optimizer, state)


class SizedBatches(EpochBatches, Protocol):
    batch_size: int  # of the global batches
    count: int  # samples of an epoch


class TrackedBatches:
    """This rank's training batches; the mode is informed of the size of the global batch that each belongs to."""

    def __init__(self, batches: SizedBatches, mode: GroupMode) -> None:
        self.local = batches
        self.mode = mode

    def __len__(self) -> int:
        return len(self.local)

    def epoch(self, epoch: int, start: int = 0, step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        size, count = self.local.batch_size, self.local.count
        for number, batch in enumerate(self.local.epoch(epoch, start, step), start):
            self.mode.batch_total = min(size, count - number * size)
            yield batch
