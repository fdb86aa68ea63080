"""Data parallelism (DDP): every rank holds the full model and a shard of each batch; gradients are averaged."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from dlopt.errors import UserError
from dlopt.parallel.batch_shards import ShardedAugment, local_index, local_slice, micro_batch_shards
from dlopt.parallel.dropout import CurrentShard, replace_dropout
from dlopt.parallel.mode import BatchShard, MetricRecord, MicroSteps, Mode
from dlopt.parallel.process_group import Group, GroupMode, ProcessKeys, join
from dlopt.parallel.rendezvous import current
from dlopt.parallel.step_timing import StepTiming, SyncWaitTimer
from dlopt.parallel.sync_batchnorm import buffer_averaging, synchronize
from dlopt.ranges import Positive

_HAS_FORWARD_SYNC_BUFFERS = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters

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
    """Joins the process group and builds the mode. Raises `UserError` for keys that contradict each other."""
    if static_graph and accumulate > 1 and current() is not None:
        raise UserError(
            f"parallel.static_graph=true: not supported with accumulate={accumulate}, where only the last backward "
            "averages gradients; set parallel.static_graph=false"
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
    """Data parallelism with PyTorch's DistributedDataParallel.

    DDP averages gradients with equal weights, but shards of a batch may be unequal or empty. Each rank therefore
    weights its mean loss by its fraction of the samples: the average over ranks is the mean over the global batch.
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
        self.dropout = CurrentShard()
        self._wait_timer: SyncWaitTimer | None = None
        self._no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext  # backward without gradient averaging

    # -- sharding a batch

    @property
    def batch_shard(self) -> BatchShard:
        return lambda total: local_index(total, self.accumulate, self.rank, self.processes)

    @property
    def evaluation_shard(self) -> BatchShard:
        return lambda total: local_slice(0, total, self.rank, self.processes)

    def shard_augmentation(self, augment: Any) -> Any:
        return augment and ShardedAugment(augment, self.accumulate, self.rank, self.processes)

    # -- the model

    def place(self, model: nn.Module, input_shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        if self.sync_batchnorm:
            synchronize(model, self.device)
        replace_dropout(model, self.dropout)
        # No broadcast of buffers in each forward: synchronized batch-norm statistics are equal anyway, and
        # `buffer_synchronization` averages the others.
        options = self.options | {"forward_sync_buffers" if _HAS_FORWARD_SYNC_BUFFERS else "broadcast_buffers": False}
        placed = DistributedDataParallel(model, gradient_as_bucket_view=True, **options)
        if self.compression == "bf16":
            placed.register_comm_hook(None, default_hooks.bf16_compress_hook)
        elif self.compression == "fp16":
            placed.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif self.compression == "powersgd":
            state = powerSGD_hook.PowerSGDState(process_group=None, start_powerSGD_iter=10)
            placed.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        self._no_sync = placed.no_sync
        self._wait_timer = SyncWaitTimer(self.device)
        self._wait_timer.attach(model)
        return placed

    def buffer_synchronization(self, model: nn.Module) -> Callable[[], None] | None:
        return buffer_averaging(model, self.processes)

    # -- one update

    def forward_backward(
        self, step: MicroSteps, inputs: Tensor, targets: Tensor, record: MetricRecord | None
    ) -> Tensor:
        losses = []
        try:
            for x, y, weight, context in self._micro_batches(inputs, targets):
                with context:
                    loss = step.micro_batch(x, y, weight, record) if len(y) else step.empty_micro_batch(x, record)
                losses.append(loss)
        except RuntimeError as error:
            # torch has no exception type for this.
            if not str(error).startswith("Expected to have finished reduction"):
                raise
            raise UserError(
                "parallel.find_unused_parameters=false: the model did not use all parameters in the previous update; "
                "set parallel.find_unused_parameters=true, or freeze these parameters (optimizer.groups)"
            ) from None
        return self.sum_loss(torch.stack(losses).sum()) / self.processes

    def _micro_batches(
        self, inputs: Tensor, targets: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, float, AbstractContextManager[Any]]]:
        """Yields (inputs, targets, weight of the mean loss, context of the backward) of each micro-batch.

        Summed over micro-batches and averaged over ranks, the weighted losses are the mean over the global batch.
        Only the last backward averages gradients: it waits for the other ranks, the earlier ones accumulate locally.
        """
        shards = micro_batch_shards(self.batch_total, self.accumulate, self.rank, self.processes)
        start = 0
        for number, shard in enumerate(shards, 1):
            stop = start + shard.samples
            self.dropout.shard = shard
            weight = shard.samples * self.processes / self.batch_total
            context = (self._wait_timer or nullcontext()) if number == len(shards) else self._no_sync()
            # A rank without samples takes part, too (`empty_micro_batch`): the others wait for it in the all-reduce.
            yield inputs[start:stop], targets[start:stop], weight, context
            start = stop
        self.dropout.shard = None

    def maximum_over_ranks(self, values: Tensor) -> Tensor:
        return self.group.maximum(values)

    def step_timing(self) -> StepTiming:
        return StepTiming(self.group, self.device, self._wait_timer)
