"""Data parallelism: every rank holds the whole model and a shard of each batch; gradients are averaged."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from dlopt.errors import UserError
from dlopt.parallel.dropout import Place, make_global
from dlopt.parallel.mode import BatchShard, MetricRecord, MicroSteps, Mode
from dlopt.parallel.pace import StepTiming, Waiting
from dlopt.parallel.process_group import Group, GroupMode, ProcessKeys, join
from dlopt.parallel.rendezvous import current
from dlopt.parallel.shares import PiecewiseAugment, cut, portions, positions
from dlopt.parallel.sync_batchnorm import buffer_averaging, synchronize
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
    **keys: Unpack[ProcessKeys],
) -> Mode:
    """Builds the mode of this process, which joins its group. Raises `UserError` where the keys do not fit together."""
    if static_graph and accumulate > 1 and current() is not None:
        raise UserError(
            f"parallel.static_graph=true: not with accumulate={accumulate}, where not every backward reduces gradients"
        )
    joined = join("ddp", device, **keys)
    if joined is None:
        return Mode(device, "ddp")
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


class DataParallel(GroupMode):
    """A rank's mean loss is weighted by its share of the samples, so that the average over ranks is the global batch's
    mean, also where a rank has no samples.
    """

    def __init__(
        self,
        group: Group,
        device: torch.device,
        *,
        accumulate: int,
        sync_batchnorm: bool,
        compression: Compression,
        options: dict[str, Any],
        name: str = "ddp",
    ) -> None:
        super().__init__(group, device, name)
        self.accumulate = accumulate
        self.sync_batchnorm = sync_batchnorm
        self.compression = compression
        self.options = options
        self.batch_norm_shards = 1 if sync_batchnorm else group.size
        self.dropout = Place()
        self._waiting: Waiting | None = None  # for the others, at the end of each backward
        self._no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext  # within, gradients are not averaged

    # -- sharing a batch

    @property
    def batch_shard(self) -> BatchShard:
        return lambda total: positions(total, self.accumulate, self.rank, self.processes)

    @property
    def evaluation_shard(self) -> BatchShard:
        return lambda total: cut(0, total, self.rank, self.processes)

    def shard_augmentation(self, augment: Any) -> Any:
        return augment and PiecewiseAugment(augment, self.accumulate, self.rank, self.processes)

    # -- the model

    def place(self, model: nn.Module, input_shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        if self.sync_batchnorm:
            synchronize(model, self.device)
        make_global(model, self.dropout)
        # Without a broadcast of buffers in each forward: synchronized statistics are equal anyway, and
        # `buffer_synchronization` averages others.
        options = self.options | {"forward_sync_buffers" if _KNOWS_FORWARD_SYNC else "broadcast_buffers": False}
        placed = DistributedDataParallel(model, gradient_as_bucket_view=True, **options)
        if self.compression == "bf16":
            placed.register_comm_hook(None, default_hooks.bf16_compress_hook)
        elif self.compression == "fp16":
            placed.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif self.compression == "powersgd":
            state = powerSGD_hook.PowerSGDState(process_group=None, start_powerSGD_iter=10)
            placed.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        self._no_sync = placed.no_sync
        self._waiting = Waiting(self.device)
        self._waiting.watch(model)
        return placed

    def buffer_synchronization(self, model: nn.Module) -> Callable[[], None] | None:
        return buffer_averaging(model, self.processes)

    # -- one update

    def forward_backward(
        self, step: MicroSteps, inputs: Tensor, targets: Tensor, record: MetricRecord | None
    ) -> Tensor:
        losses = []
        for x, y, weight, context in self._micro_batches(inputs, targets):
            with context:
                losses.append(step.micro_batch(x, y, weight, record) if len(y) else step.empty_micro_batch(x, record))
        return self.sum_loss(torch.stack(losses).sum()) / self.processes

    def _micro_batches(
        self, inputs: Tensor, targets: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, float, AbstractContextManager[Any]]]:
        """Yields inputs and targets of each micro-batch, the weight of their mean loss, and a context to compute in.

        The average over ranks of the weighted losses, summed over micro-batches, is the mean over the global batch.
        Gradients are averaged in the last backward only.
        """
        own = portions(self.batch_total, self.accumulate, self.rank, self.processes)
        start = 0
        for number, portion in enumerate(own, 1):
            stop = start + portion.samples
            self.dropout.portion = portion
            weight = portion.samples * self.processes / self.batch_total
            context = (self._waiting or nullcontext()) if number == len(own) else self._no_sync()
            yield inputs[start:stop], targets[start:stop], weight, context
            start = stop
        self.dropout.portion = None

    def maximum_over_ranks(self, values: Tensor) -> Tensor:
        return self.group.maximum(values)

    def step_timing(self) -> StepTiming:
        return StepTiming(self.group, self.device, self._waiting)
