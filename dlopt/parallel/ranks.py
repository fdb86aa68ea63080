"""The processes of a run, and the collectives among them: `Ranks` is one process, `GroupRanks` a process group."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed

from dlopt.basics.errors import UserError
from dlopt.basics.files import sha256
from dlopt.basics.interruption import Interruption
from dlopt.parallel.processes.process_group import ProcessGroup

T = TypeVar("T")

_LAG = 8  # updates after which a GPU's stop flag is read; the host seldom runs further ahead than that


def _difference(first: object, other: object) -> str | None:
    return None if other == first else f"{other}, not {first}"


class Ranks:
    """One process. All ranks call a method together."""

    rank = 0
    processes = 1
    local_processes = 1  # on this machine; they share its cores
    is_main = True  # writes files and prints
    is_counted = True  # whether sums over ranks include this rank; false if another rank has the same values

    def sum(self, values: Sequence[float]) -> Sequence[float]:
        """Returns the elementwise sums over ranks. Values that the ranks of a model group share count once."""
        return values

    def maximum(self, values: Tensor) -> Tensor:
        """Returns the elementwise maximum over ranks of a tensor on the host."""
        return values

    def gather(self, values: list[T]) -> list[T]:
        """Returns the concatenated lists of all ranks."""
        return values

    def broadcast(self, value: T) -> T:
        """Returns rank 0's value on all ranks."""
        return value

    def refuse_difference(self, what: str, value: T, difference: Callable[[T, T], str | None] = _difference) -> None:
        """Raises `UserError` on all ranks if a rank's value of `what` is not that of rank 0.

        `difference`: describes how the second of two values differs from the first; None if it does not.
        """
        first, *others = self.gather([value])
        for rank, other in enumerate(others, 1):
            if (found := difference(first, other)) is not None:
                raise UserError(f"{what}: rank {rank} differs from rank 0: {found}")

    def refuse_other_file(self, key: str, path: Path | str) -> None:
        """Raises `UserError` on all ranks if a rank reads another file at the path that a key names."""
        if self.processes > 1:
            self.refuse_difference(f"{key}={path}", f"SHA-256 {sha256(Path(path))[:12]}")

    def synchronized_stop(self, stop: T) -> T:
        """Returns a stop flag that becomes true on all ranks after the same update."""
        return stop

    def evaluation_stop(self, stop: T) -> T:
        """Returns the flag for use within an evaluation. All ranks must read it equally often."""
        return stop


class GroupRanks(Ranks):
    """The ranks of a process group."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.rank, self.processes = group.rank, group.size
        self.local_processes = group.world.local_size
        self.is_main = group.world.is_main
        self.stop = StopFlag(None)

    def sum(self, values: Sequence[float]) -> Sequence[float]:
        return self.group.sum(values if self.is_counted else [0.0] * len(values))

    def maximum(self, values: Tensor) -> Tensor:
        largest = values.clone()  # the collective writes into it
        distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
        return largest

    def gather(self, values: list[T]) -> list[T]:
        # Pickled, since the values are of any type: for evaluations and error reports, not for updates.
        lists: list[Any] = [None] * self.processes
        distributed.all_gather_object(lists, values)
        return [value for values in lists for value in values]

    def broadcast(self, value: T) -> T:
        box = [value]
        # Over gloo, because the object is in main memory: a checkpoint need not also fit on the GPU.
        distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def sum_loss(self, loss: Tensor) -> Tensor:
        """Returns the sum over the ranks that count. The stop flag is part of the same collective."""
        loss = loss if self.is_counted else torch.zeros_like(loss)
        # Added in rank order, unlike an all-reduce: ranks must agree to the last bit, since a line search branches on
        # this number.
        pair = torch.stack([loss, loss.new_full((), self.stop.flag())])
        losses, flags = self.group.all_gather(pair).sum(0).unbind()
        self.stop.take(flags)
        return losses

    def synchronized_stop(self, stop: T) -> T:
        self.stop = StopFlag(cast(Interruption, stop))
        return cast(T, self.stop)

    def evaluation_stop(self, stop: T) -> T:
        return cast(T, EvaluationStopFlag(self.stop, self.group))


class StopFlag:
    """A synchronized stop flag: true on all ranks after the same update, once any rank has received a stop request.

    Ranks that left the loop at another update would leave the others in a collective. `flag` is summed over ranks
    together with the loss, and `take` receives the sum. On a GPU it is copied asynchronously and read `_LAG` updates
    later, so the host never waits for the device.
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
        # All ranks have taken equally many flags, so they read the flag of the same update and stop together.
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
