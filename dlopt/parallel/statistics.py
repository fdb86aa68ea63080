"""Running statistics of batch norms that are not synchronized: each process moves them by its own samples."""

from collections.abc import Callable

import torch
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dlopt.parallel.shards import local
from dlopt.parallel.sync_batchnorm import SyncBatchNorm


def averaging(model: nn.Module, size: int, group: distributed.ProcessGroup | None = None) -> Callable[[], None] | None:
    """What makes these statistics of `model` their averages over the `size` processes of the group; None: there are
    none.

    To be called after every update: they move linearly with the batches' statistics, so that only rounding tells how
    often this is done; but done at some moments only, a run that was interrupted between two of them would differ from
    one that was not. (DistributedDataParallel by itself sends rank 0's statistics to all before each forward.)
    """
    synchronized = (SyncBatchNorm, nn.SyncBatchNorm)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and not isinstance(m, synchronized)]
    both = [b for norm in norms if norm.track_running_stats for b in (norm.running_mean, norm.running_var)]
    buffers = [local(b) for b in both if b is not None]
    if not buffers or size == 1:
        return None
    sizes = [b.numel() for b in buffers]

    @torch.no_grad()
    def average() -> None:
        flat = torch.cat(buffers)
        distributed.all_reduce(flat, group=group)
        flat /= size
        torch._foreach_copy_(buffers, flat.split(sizes))

    return average
