"""The base of filter, columns, spatial and their hybrids with data parallelism: a mesh of processes.

The ranks of a row of the mesh hold one model together and see the same samples; rows see different samples.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from dlopt.errors import UserError
from dlopt.parallel.collectives import Cut, Ranks
from dlopt.parallel.dropout import Place, make_global
from dlopt.parallel.mode import BatchShard, MetricRecord, MicroSteps
from dlopt.parallel.process_group import Group, GroupMode
from dlopt.parallel.shards import local
from dlopt.parallel.shares import PiecewiseAugment, cut, portions, positions
from dlopt.parallel.split_layers import distribute
from dlopt.parallel.sync_batchnorm import buffer_averaging, synchronize

_BUCKET = 25 * 2**20  # bytes of gradients that are added up at once


@dataclass
class Plan:
    """What came of splitting a model in place.

    `cuts`: equal parts by name. `dropouts`: see `dlopt.parallel.dropout.make_global`. `summands`: names of parameters
    of which every rank has its summand of the gradient only.
    """

    cuts: Mapping[str, Cut]
    dropouts: Mapping[nn.Module, Callable[[Tensor], Cut]]
    summands: Sequence[str] = ()
    notes: Sequence[str] = field(default_factory=list)


Split = Callable[[nn.Module, tuple[int, ...], Ranks], Plan]


class ModelParallel(GroupMode):
    """`split` changes a model in place, for samples of the given shape. `rows`: the degree of data parallelism."""

    sharding: Literal["replicated", "tensors", "layers"] = "tensors"
    compiles = False
    supports_loss_aware_samplers = False

    def __init__(
        self, name: str, group: Group, device: torch.device, *, accumulate: int, split: Split, rows: int, sync: bool
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        super().__init__(group, device, name)
        self.accumulate = accumulate
        self.split = split
        self.mesh = init_device_mesh(device.type, (rows, group.size // rows), mesh_dim_names=("data", "model"))
        self.rows, self.row = rows, self.mesh.get_local_rank("data")
        self.ranks = Ranks(self.mesh.get_group("model"))
        self.sync_batchnorm = sync and rows > 1
        self.batch_norm_shards = 1 if sync else rows
        self.dropout = Place()
        self._summands: list[nn.Parameter] = []
        self._parameters: list[nn.Parameter] = []

    # -- sharing a batch

    @property
    def batch_shard(self) -> BatchShard | None:
        return None if self.rows == 1 else lambda total: positions(total, self.accumulate, self.row, self.rows)

    @property
    def evaluation_shard(self) -> BatchShard | None:
        return None if self.rows == 1 else lambda total: cut(0, total, self.row, self.rows)

    def shard_augmentation(self, augment: Any) -> Any:
        if self.rows == 1 or augment is None:
            return augment
        return PiecewiseAugment(augment, self.accumulate, self.row, self.rows)

    # -- the model

    def place(self, model: nn.Module, input_shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        plan = self.split(model, input_shape, self.ranks)
        if self.sync_batchnorm:
            synchronize(model, self.device, self.mesh.get_group("data"))
        make_global(model, self.dropout, plan.dropouts)
        self.spread(model, plan)
        named = dict(model.named_parameters())
        self._parameters, self._summands = list(named.values()), [named[name] for name in plan.summands]
        self.notes = (self._placement(named), *plan.notes)
        return model

    def spread(self, model: nn.Module, plan: Plan) -> None:
        """Turns the parameters into what the optimizer and the checkpoint see."""
        distribute(model, self.mesh["model"], plan.cuts)

    def _placement(self, named: Mapping[str, nn.Parameter]) -> str:
        total = sum(p.numel() for p in named.values())
        own = sum(local(p).numel() for p in named.values() if not p.is_meta)
        replicated = sum(p.numel() for p in named.values() if not p.is_meta and local(p).numel() == p.numel())
        line = f"{self.ranks.size} processes hold the {total} parameters together; {own} are on this one"
        if self.sharding == "tensors":
            line += f", of which {replicated} are on each"
        return f"parallel={self.name}: {line}" + (
            f"; {self.rows} such groups share the batches" if self.rows > 1 else ""
        )

    def buffer_synchronization(self, model: nn.Module) -> Callable[[], None] | None:
        return buffer_averaging(model, self.rows, self.mesh.get_group("data"))

    # -- one update

    def forward_backward(
        self, step: MicroSteps, inputs: Tensor, targets: Tensor, record: MetricRecord | None
    ) -> Tensor:
        """The weighted losses, summed over rows and micro-batches, are the mean over the global batch."""
        losses, start = [], 0
        for portion in portions(self.batch_total, self.accumulate, self.row, self.rows):
            stop = start + portion.samples
            self.dropout.portion = portion
            x, y, weight = inputs[start:stop], targets[start:stop], portion.samples / self.batch_total
            losses.append(step.micro_batch(x, y, weight, record) if len(y) else step.empty_micro_batch(x, record))
            start = stop
        self.dropout.portion = None
        # Within a row first: the rows then add up gradients that are complete.
        sum_up([local(p.grad) for p in self._summands if p.grad is not None], self.ranks.group)
        if self.rows > 1:
            gradients = [local(p.grad) for p in self._parameters if p.grad is not None]
            sum_up(gradients, self.mesh.get_group("data"))
        loss = torch.stack(losses).sum()
        return self.sum_loss(loss if self.ranks.rank == 0 else torch.zeros_like(loss))  # once per row

    def sum_over_ranks(self, values: Sequence[float]) -> Sequence[float]:
        return self.group.sum(values if self.ranks.rank == 0 else [0.0] * len(values))


def check_precision(name: str, precision: str) -> None:
    if precision == "fp16":
        raise UserError(
            f"precision=fp16: not with parallel={name}, whose ranks would scale losses apart; use precision=bf16"
        )


@torch.no_grad()
def sum_up(tensors: Sequence[Tensor], group: distributed.ProcessGroup | None) -> None:
    """Replaces tensors by their sums over the group, many at once."""
    bucket: list[Tensor] = []
    for number, tensor in enumerate(tensors, 1):
        bucket.append(tensor)
        if number == len(tensors) or sum(t.numel() * t.element_size() for t in bucket) >= _BUCKET:
            flat = torch.cat([t.reshape(-1) for t in bucket])
            distributed.all_reduce(flat, group=group)
            for each, values in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                each.copy_(values.view(each.shape))
            bucket = []
