"""Data parallelism: every rank has the whole model and a part of each batch; gradients are averaged."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol, Unpack

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from dlopt.errors import UserError
from dlopt.parallel.dropout import Place, make_global
from dlopt.parallel.group import Group, Meeting, Member, join
from dlopt.parallel.pace import Waiting
from dlopt.parallel.rendezvous import current
from dlopt.parallel.shares import PiecewiseAugment, cut, pieces, portions
from dlopt.parallel.single import Single, Whole
from dlopt.parallel.statistics import averaging
from dlopt.parallel.sync_batchnorm import synchronize
from dlopt.ranges import Positive

_KNOWS_FORWARD_SYNC = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters

Compression = Literal["none", "bf16", "fp16", "powersgd"]


def data_parallel(
    *,
    device: torch.device,
    accumulate: int,
    bucket_cap_mb: Positive,
    static_graph: bool,
    find_unused_parameters: bool,
    compression: Compression,
    sync_batchnorm: bool,
    **meeting: Unpack[Meeting],
) -> "Single | DataParallel":
    """The mode for this process, which joins its group. Raises `UserError` where the set-up cannot work."""
    if static_graph and accumulate > 1 and current() is not None:
        raise UserError(
            f"parallel.static_graph=true: not with accumulate={accumulate}, where not every backward reduces gradients"
        )
    joined = join("ddp", device, **meeting)
    if joined is None:
        return Single(device, "ddp")
    group, device = joined
    options = {"static_graph": static_graph, "find_unused_parameters": find_unused_parameters}
    return DataParallel(
        group,
        device,
        accumulate=accumulate,
        sync_batchnorm=sync_batchnorm,
        compression=compression,
        options={"bucket_cap_mb": bucket_cap_mb, **options},
    )


class DataParallel(Member, Whole):
    """See `Single` for what a mode is asked, and `dlopt.train.step` for what the step asks besides.

    A rank's mean loss counts by its share of the samples, so that the average over ranks is the global batch's mean,
    also for a rank without samples.
    """

    name = "ddp"

    def __init__(
        self,
        group: Group,
        device: torch.device,
        *,
        accumulate: int,
        sync_batchnorm: bool,
        compression: Compression,
        options: dict[str, Any],
    ) -> None:
        super().__init__(group, device)
        self.accumulate = accumulate
        self.sync_batchnorm = sync_batchnorm
        self.compression = compression
        self.options = options
        self.norm_shares = 1 if sync_batchnorm else group.size
        self.dropout = Place()
        self.waiting: Waiting | None = None  # for the others, at the end of each backward
        self.batch_total = 0  # samples of the global batch that is worked on
        self._deferred: Callable[[], AbstractContextManager[Any]] = nullcontext  # within, nothing is averaged yet

    # -- what a rank sees

    def share(self, total: int) -> slice | Tensor:
        own = pieces(total, self.accumulate, self.rank, self.processes)
        if len(own) == 1:
            return own[0]
        return torch.cat([torch.arange(piece.start, piece.stop) for piece in own])

    def share_evaluation(self, total: int) -> slice:
        return cut(0, total, self.rank, self.processes)

    def augmented(self, augment: Any) -> Any:
        return augment and PiecewiseAugment(augment, self.accumulate, self.rank, self.processes)

    def batches(self, batches: Any) -> "Batches":
        return Batches(batches, self)

    # -- the model

    def place(self, model: nn.Module, input_shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        if self.sync_batchnorm:
            synchronize(model, self.device)
        make_global(model, self.dropout)
        # Buffers need no broadcast in each forward: synchronized statistics are equal, `aligning` averages others.
        options = self.options | {"forward_sync_buffers" if _KNOWS_FORWARD_SYNC else "broadcast_buffers": False}
        placed = DistributedDataParallel(model, gradient_as_bucket_view=True, **options)
        if self.compression == "bf16":
            placed.register_comm_hook(None, default_hooks.bf16_compress_hook)
        elif self.compression == "fp16":
            placed.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif self.compression == "powersgd":
            state = powerSGD_hook.PowerSGDState(process_group=None, start_powerSGD_iter=10)
            placed.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        self._deferred = placed.no_sync
        self.waiting = Waiting(self.device)
        self.waiting.watch(model)
        return placed

    def aligning(self, model: nn.Module) -> Callable[[], None] | None:
        return averaging(model, self.processes)

    # -- one update

    def micro_batches(
        self, inputs: Tensor, targets: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, float, AbstractContextManager[Any]]]:
        """(inputs, targets, weight of their mean loss, context for forward and backward) of each micro-batch.

        The average over ranks of the weighted losses, summed over micro-batches, is the mean over the global batch.
        """
        own = portions(self.batch_total, self.accumulate, self.rank, self.processes)
        start = 0
        for number, portion in enumerate(own, 1):
            stop = start + portion.samples
            self.dropout.portion = portion
            weight = portion.samples * self.processes / self.batch_total
            context = (self.waiting or nullcontext()) if number == len(own) else self._deferred()
            yield inputs[start:stop], targets[start:stop], weight, context
            start = stop
        self.dropout.portion = None

    def mean_loss(self, loss: Tensor) -> Tensor:
        return self.summed_loss(loss) / self.processes

    def total(self, values: Sequence[float]) -> Sequence[float]:
        return self.group.total(values)

    def maximum(self, values: Tensor) -> Tensor:
        """Elementwise, over ranks; `values` lie on the host."""
        return self.group.maximum(values)


class Told(Protocol):
    batch_total: int  # samples of the global batch that is worked on


class Batches:
    """This rank's training batches; the mode is told how large the global one is that each belongs to."""

    def __init__(self, batches: Any, mode: Told) -> None:
        self.local = batches
        self.mode = mode

    def __len__(self) -> int:
        return len(self.local)

    def epoch(self, epoch: int, start: int = 0, step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        size, count = self.local.batch_size, self.local.count
        for number, batch in enumerate(self.local.epoch(epoch, start, step), start):
            self.mode.batch_total = min(size, count - number * size)
            yield batch
