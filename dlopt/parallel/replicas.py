"""Several processes that evaluate one model, each on its shard of the samples."""

from typing import Unpack

import torch

from dlopt.parallel.batch_shards import local_slice
from dlopt.parallel.mode import BatchShard, Mode
from dlopt.parallel.process_group import GroupMode, ProcessKeys, join


class Replicas(GroupMode):
    """Every process holds the whole model and evaluates a contiguous slice of each batch. It cannot train."""

    @property
    def evaluation_shard(self) -> BatchShard:
        return lambda total: local_slice(0, total, self.rank, self.processes)


def replicas(*, device: torch.device, **keys: Unpack[ProcessKeys]) -> Mode:
    """Joins the process group, if there is one. Raises `UserError` where launcher, keys and device do not agree."""
    joined = join("ddp", device, **keys)
    return Mode(device) if joined is None else Replicas(*joined, "ddp")
