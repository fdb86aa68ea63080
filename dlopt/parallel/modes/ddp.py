"""Data parallelism (DDP): every rank holds the full model and a shard of each batch; gradients are averaged."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Positive
from dlopt.data.batches import Batch
from dlopt.parallel.dropout import convert_dropout
from dlopt.parallel.mode import GroupMode, Mode, ModeTraits, Placed, join_mode
from dlopt.parallel.modes.sync_batchnorm import buffer_averaging, synchronize
from dlopt.parallel.processes.process_group import ProcessGroup, ProcessKeys
from dlopt.parallel.step_timing import StepTiming, SyncWaitTimer

_HAS_FORWARD_SYNC_BUFFERS = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters

Compression = Literal["none", "bf16", "fp16", "powersgd"]
_COMPRESSION_HOOKS = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}


class DataParallelKeys(ProcessKeys):
    """Config keys of the mode."""

    bucket_cap_mb: Positive
    static_graph: bool
    find_unused_parameters: bool
    compression: Compression
    sync_batchnorm: bool


def data_parallel(*, device: torch.device, accumulate: int, **keys: Unpack[DataParallelKeys]) -> Mode:
    """Joins the process group and builds the mode."""
    options: dict[str, Any] = {key: value for key, value in keys.items() if key not in ProcessKeys.__annotations__}
    return join_mode("ddp", device, partial(DataParallel, accumulate=accumulate, **options), keys)


class DataParallel(GroupMode):
    """Data parallelism with PyTorch's DistributedDataParallel.

    DDP averages gradients with equal weights. Each rank therefore weights its mean loss by its fraction of the samples
    times the number of ranks (`BatchSplit.scale`): the average over ranks is the mean over the global batch.
    """

    def __init__(
        self,
        group: ProcessGroup,
        device: torch.device,
        *,
        accumulate: int,
        sync_batchnorm: bool,
        name: str = "ddp",
        compression: Compression = "none",
        **options: Any,
    ) -> None:
        super().__init__(group, device, name, accumulate=accumulate)
        self.sync_batchnorm = sync_batchnorm
        self.compression = compression
        self.options: Mapping[str, Any] = options  # of DistributedDataParallel
        self.split = replace(self.split, scale=group.size)
        self.traits = ModeTraits(batch_norm_shards=1 if sync_batchnorm else group.size)
        self._wait_timer: SyncWaitTimer | None = None
        self._no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext  # backward without gradient averaging

    def place(self, model: nn.Module, input_shape: tuple[int, ...]) -> Placed:
        if self.sync_batchnorm:
            synchronize(model, self.device)
        convert_dropout(model, self.dropout)
        # No broadcast of buffers in each forward: synchronized batch-norm statistics are equal anyway, and
        # `Placed.synchronize_buffers` averages the others.
        broadcast = "forward_sync_buffers" if _HAS_FORWARD_SYNC_BUFFERS else "broadcast_buffers"
        # A collective: DDP compares the shapes of the parameters, and sends the values of rank 0 to all ranks.
        placed = DistributedDataParallel(model, gradient_as_bucket_view=True, **{**self.options, broadcast: False})
        if self.compression == "powersgd":
            state = powerSGD_hook.PowerSGDState(process_group=None, start_powerSGD_iter=10)
            placed.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        elif self.compression != "none":
            placed.register_comm_hook(None, _COMPRESSION_HOOKS[self.compression])
        self._no_sync = placed.no_sync
        self._wait_timer = SyncWaitTimer(self.device)
        self._wait_timer.attach(model)
        timing = StepTiming(self.group, self.device, self._wait_timer)
        return Placed(placed, buffer_averaging(model, self.group.size), timing=timing)

    def around(self, placed: Placed, loss: nn.Module) -> Callable[..., Any]:
        # DDP prepares to average the gradients once per forward pass; a loss may call the model several times.
        if isinstance(placed.model, DistributedDataParallel):
            placed.model.module = loss
            return placed.model
        return loss

    @contextmanager
    def micro_batch(self, micro_batch: Batch) -> Iterator[None]:
        # Only the last backward averages gradients: it waits for the other ranks, the earlier ones accumulate locally.
        waits = (self._wait_timer or nullcontext()) if micro_batch.is_last else self._no_sync()
        try:
            with self.dropout.of(micro_batch), waits:
                yield
        except RuntimeError as error:
            # torch has no exception type for this.
            if not str(error).startswith("Expected to have finished reduction"):
                raise
            raise UserError(
                "parallel.find_unused_parameters=false: the model did not use all parameters in the previous update; "
                "set parallel.find_unused_parameters=true, or freeze these parameters (optimizer.groups)"
            ) from None

    def finish_backward(self, loss: Tensor) -> Tensor:
        return self.ranks.sum_loss(loss) / self.group.size  # the gradients are averaged
