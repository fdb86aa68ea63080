"""The process group of a run: collectives, the synchronized stop flag, and the base of modes of several processes."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Annotated, Any, TypedDict, TypeVar, Unpack, cast

import torch
from annotated_types import Interval
from torch import Tensor, distributed, nn

from dlopt.data.batches import Batches
from dlopt.errors import UserError
from dlopt.interruption import Interruption
from dlopt.parallel import shards
from dlopt.parallel.batch_shards import ShardedAugment, local_index, local_slice, micro_batch_shards
from dlopt.parallel.dropout import CurrentShard
from dlopt.parallel.mode import BatchShard, EpochBatches, MetricRecord, MicroSteps, Mode
from dlopt.parallel.rendezvous import World, current, join_store
from dlopt.parallel.step_timing import StepTiming
from dlopt.ranges import Count, Positive

T = TypeVar("T")

_numbers = count()  # a process may join one group after another; each gets its own prefix in the store

_LAG = 8  # updates after which a GPU's stop flag is read; the host seldom runs further ahead than that


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
    """Raises `UserError` for fp16: every rank has its own loss scaler, which sees the overflows of its shards only."""
    if precision == "fp16":
        raise UserError(
            f"precision=fp16: not supported with parallel={mode}, whose ranks would diverge in their loss scales; "
            "use precision=bf16"
        )


class StopFlag:
    """A synchronized stop flag: true on all ranks after the same update, once any rank has received a stop request.

    All ranks must leave the loop at the same update, or the remaining ones would hang in a collective. `flag` is summed
    over ranks together with the loss, so it costs no collective of its own, and `take` receives the sum. On a GPU the
    sum is copied asynchronously and read `_LAG` updates later, so the host never waits for the device.
    """

    def __init__(self, request: Interruption | None) -> None:
        self.request = request
        self._is_set = False
        self._pending: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    @property
    def reason(self) -> str | None:
        reason = None if self.request is None else self.request.reason
        return reason or ("another rank received a stop request" if self._is_set else None)

    def __bool__(self) -> bool:
        return self._is_set

    def flag(self) -> float:
        return 1.0 if self.request else 0.0

    def take(self, flags: Tensor) -> None:
        """Takes the sum of all ranks' flags, a scalar."""
        if flags.device.type == "cpu":
            self._is_set |= bool(flags > 0)
            return
        on_host = torch.empty((), dtype=flags.dtype, pin_memory=True)
        on_host.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((on_host, event))
        if len(self._pending) > _LAG:
            on_host, event = self._pending.popleft()
            event.synchronize()
            self._is_set |= bool(on_host > 0)


@dataclass(frozen=True)
class EvaluationStopFlag:
    """The same flag within an evaluation, where no loss is reduced: reading it is a collective that all ranks call."""

    stop: StopFlag
    group: ProcessGroup

    def __bool__(self) -> bool:
        if not self.stop:
            [flags] = self.group.sum([self.stop.flag()])
            self.stop.take(torch.tensor(flags))
        return bool(self.stop)


class GroupMode(Mode):
    """Base of all distributed modes: this process is one rank of a process group.

    Batches are sharded over `data_degree` ranks, of which this is `data_rank`: by default over all. Each loss is
    weighted by its fraction of the samples, because shards of a batch may be unequal or empty.
    """

    is_replica = False  # with `sharding` "layers": another rank holds the same layers, which count once

    def __init__(self, group: ProcessGroup, device: torch.device, name: str, *, accumulate: int = 1) -> None:
        super().__init__(device, name)
        self.accumulate = accumulate
        self.group = group
        self.rank, self.processes = group.rank, group.size
        self.data_rank, self.data_degree = group.rank, group.size
        self.local_processes = group.world.local_size
        self.is_main = group.world.is_main
        self.counts = True  # whether sums over ranks include this one; false: another rank has the same values
        self.stop = StopFlag(None)
        self.batch_total = 0  # samples of the global batch that is being trained on
        self.dropout = CurrentShard()

    # -- sharding a batch

    @property
    def batch_shard(self) -> BatchShard | None:
        if self.data_degree == 1:
            return None
        return lambda total: local_index(total, self.accumulate, self.data_rank, self.data_degree)

    @property
    def evaluation_shard(self) -> BatchShard | None:
        return None if self.data_degree == 1 else lambda total: local_slice(0, total, self.data_rank, self.data_degree)

    def shard_augmentation(self, augment: Any) -> Any:
        if self.data_degree == 1 or augment is None:
            return augment
        return ShardedAugment(augment, self.accumulate, self.data_rank, self.data_degree)

    def run_micro_batches(
        self, step: MicroSteps, inputs: Tensor, targets: Tensor, record: MetricRecord | None, scale: int = 1
    ) -> Tensor:
        """Runs forward and backward of this rank's shards; returns the sum of their mean losses, weighted.

        The weights are fractions of the global batch, times `scale`. A rank without samples in a micro-batch takes
        part, too (`empty_micro_batch`): the others wait for it in collectives.
        """
        losses, start = [], 0
        shards = micro_batch_shards(self.batch_total, self.accumulate, self.data_rank, self.data_degree)
        try:
            for number, shard in enumerate(shards, 1):
                stop = start + shard.samples
                self.dropout.shard = shard
                x, y, weight = inputs[start:stop], targets[start:stop], shard.samples * scale / self.batch_total
                with self.backward_context(is_last=number == len(shards)):
                    losses.append(
                        step.micro_batch(x, y, weight, record) if len(y) else step.empty_micro_batch(x, record)
                    )
                start = stop
        finally:
            self.dropout.shard = None
        return torch.stack(losses).sum()

    def backward_context(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Returns the context of a micro-batch's forward and backward."""
        return nullcontext()

    # -- collectives

    def synchronized_stop(self, stop: T) -> T:
        self.stop = StopFlag(cast(Interruption, stop))
        return cast(T, self.stop)

    def evaluation_stop(self, stop: T) -> T:
        return cast(T, EvaluationStopFlag(self.stop, self.group))

    def broadcast(self, value: T) -> T:
        box = [value]
        distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather_lists(self, values: list[T]) -> list[T]:
        lists: list[Any] = [None] * self.processes
        distributed.all_gather_object(lists, values)
        return [value for values in lists for value in values]

    def sum_over_ranks(self, values: Sequence[float]) -> Sequence[float]:
        return self.group.sum(values if self.counts else [0.0] * len(values))

    def maximum_over_ranks(self, values: Tensor) -> Tensor:
        largest = values.clone()
        distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
        return largest

    def sum_loss(self, loss: Tensor) -> Tensor:
        """Returns the sum over ranks. The stop flag is part of the same collective."""
        pair = torch.stack([loss, loss.new_full((), self.stop.flag())])
        losses, flags = self.group.all_gather(pair).sum(0).unbind()
        self.stop.take(flags)
        return losses

    def track_batches(self, batches: EpochBatches) -> EpochBatches:
        return TrackedBatches(cast(Batches, batches), self)

    def differentiable_loss(self, step: MicroSteps, inputs: Tensor, targets: Tensor) -> Tensor:
        raise UserError(
            f"parallel={self.name}: {type(step.optimizer).__name__} needs Hessian-vector products, which are not "
            "averaged over ranks; use parallel=single or another optimizer"
        )

    def step_timing(self) -> StepTiming | None:
        return StepTiming(self.group, self.device)

    # -- norms and states, which depend on how the model is sharded

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        if self.sharding == "layers":
            return shards.stage_norm(tensors, self.group, self.device, is_replica=self.is_replica)
        return shards.total_norm(tensors)

    def full_state(self, state: T) -> T:
        if self.sharding == "layers":
            return shards.stage_full_state(state, self.group, is_replica=self.is_replica)
        return shards.full_state(state) if self.sharding == "tensors" else state

    def load_model(self, model: nn.Module, state: Mapping[str, Any], *, strict: bool = True) -> None:
        if self.sharding == "replicated":
            super().load_model(model, state, strict=strict)
        else:
            shards.load_model(model, state, strict=strict)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        if self.sharding == "replicated":
            super().load_optimizer(optimizer, state)
        else:
            shards.load_optimizer(optimizer, state)


@dataclass(frozen=True)
class TrackedBatches:
    """This rank's training batches; tells the mode the size of each global batch."""

    local: Batches
    mode: GroupMode

    def epoch(self, epoch: int, start: int = 0, step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        size, count = self.local.batch_size, self.local.count
        for number, batch in enumerate(self.local.epoch(epoch, start, step), start):
            # The last batch of an epoch may be smaller, and this rank's shard does not reveal by how much.
            self.mode.batch_total = min(size, count - number * size)
            yield batch
