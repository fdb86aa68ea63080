"""All processes of a run as one group: what they add up, tell each other, and agree on."""

from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from itertools import count
from typing import Annotated, Any, Protocol, TypedDict, TypeVar, Unpack

import torch
from annotated_types import Interval
from torch import Tensor, distributed

from dlopt.errors import UserError
from dlopt.parallel.rendezvous import World, current, join_store
from dlopt.ranges import Count, Positive

T = TypeVar("T")

_numbers = count()  # a process may be in one group after another

_LAG = 8  # updates after which a GPU's flag is looked at; the host is seldom further ahead


class Asked(Protocol):
    """Whether this process was asked to stop (`dlopt.interruption.Interruption`)."""

    reason: str | None

    def __bool__(self) -> bool: ...


class Group:
    """The process group of a world; NCCL between GPUs, gloo between CPUs and for what lives on the host."""

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
        """[size, n]: the values [n] of every rank, in the order of ranks: sums over them are equal everywhere."""
        everyones = values.new_empty(self.size * values.numel())
        distributed.all_gather_into_tensor(everyones, values.contiguous())
        return everyones.view(self.size, -1)

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums over ranks, to the last bit the same on each."""
        everyones = self.gathered(torch.tensor(values, dtype=torch.float64))
        return [float(each) for each in everyones.sum(0)]

    def maximum(self, values: Tensor) -> Tensor:
        """A new tensor on the host: the largest of all ranks' values, element by element."""
        largest = values.clone()
        distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
        return largest

    def broadcast(self, value: T) -> T:
        """Rank 0's value."""
        box: list[Any] = [value]
        distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        found: T = box[0]
        return found

    def __deepcopy__(self, memo: object) -> "Group":
        return self  # a model's copy talks to the same processes


class Meeting(TypedDict):
    """The keys of a mode that say how many processes there are, and where and how long they wait for each other."""

    processes: Count | None
    timeout_minutes: Positive
    master_addr: str | None
    master_port: Annotated[int, Interval(ge=1, le=65535)] | None


def join(mode: str, device: torch.device, **meeting: Unpack[Meeting]) -> tuple[Group, torch.device] | None:
    """The group of a mode of several processes, and this one's device; None in a process that stands alone.

    Raises `UserError` where the set-up cannot work.
    """
    world, processes = current(), meeting["processes"]
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
    address, port = meeting["master_addr"], meeting["master_port"]
    return Group(world, device, minutes=meeting["timeout_minutes"], address=address, port=port), device


class Agreement:
    """An interruption that becomes true on all ranks after the same update, as soon as one of them was asked.

    `flag` goes with the reduction of the loss, which every update needs anyway; `take` is handed what came of it. On a
    GPU it is read `_LAG` updates later, when it has long been computed, so that the host does not wait.
    """

    def __init__(self, asked: Asked | None) -> None:
        self.asked = asked
        self._agreed = False
        self._pending: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    @property
    def reason(self) -> str | None:
        own = None if self.asked is None else self.asked.reason
        return own or ("another process was asked to stop" if self._agreed else None)

    def __bool__(self) -> bool:
        return self._agreed

    def flag(self) -> float:
        return 1.0 if self.asked else 0.0

    def take(self, flags: Tensor) -> None:
        """`flags`: a scalar, the sum over ranks."""
        if flags.device.type == "cpu":
            self._agreed |= bool(flags > 0)
            return
        held = torch.empty((), dtype=flags.dtype, pin_memory=True)
        held.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((held, event))
        if len(self._pending) > _LAG:
            held, event = self._pending.popleft()
            event.synchronize()
            self._agreed |= bool(held > 0)


class Member:
    """This process as one of a group: what every mode of several processes does alike."""

    notes: tuple[str, ...] = ()
    in_flight = 1

    def __init__(self, group: Group, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.rank, self.processes = group.rank, group.size
        self.local_processes = group.world.local_size
        self.is_main = group.world.is_main
        self.agreement = Agreement(None)

    def agree(self, interruption: Any) -> Any:
        self.agreement = Agreement(interruption)
        return self.agreement

    def polled(self, interruption: Any) -> Any:
        return Polled(self.agreement, self.group)

    def broadcast(self, value: T) -> T:
        return self.group.broadcast(value)

    def everyones(self, values: list[T]) -> list[T]:
        """The lists of all ranks as one."""
        lists: list[Any] = [None] * self.processes
        distributed.all_gather_object(lists, values)
        return [value for each in lists for value in each]

    def summed_loss(self, loss: Tensor) -> Tensor:
        """The sum over ranks; whether one of them was asked to stop travels along."""
        pair = torch.stack([loss, loss.new_full((), self.agreement.flag())])
        losses, flags = self.group.gathered(pair).sum(0).unbind()
        self.agreement.take(flags)
        return losses


class Polled:
    """The same where no loss is reduced (in an evaluation): asking is a collective that every rank has to join."""

    def __init__(self, agreement: Agreement, group: Group) -> None:
        self.agreement = agreement
        self.group = group

    def __bool__(self) -> bool:
        if not self.agreement:
            [flags] = self.group.total([self.agreement.flag()])
            self.agreement.take(torch.tensor(flags))
        return bool(self.agreement)
