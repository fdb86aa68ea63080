"""What filter, columns, spatial and their hybrids with data parallelism have in common: a mesh of processes.

The ranks of a row of the mesh hold one model together and see the same samples; rows see different ones.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn

from dlopt.errors import UserError
from dlopt.parallel.collectives import Ranks
from dlopt.parallel.cuts import Cut as Part
from dlopt.parallel.ddp import Batches
from dlopt.parallel.distribution import distribute
from dlopt.parallel.dropout import Place, make_global
from dlopt.parallel.group import Group, Member
from dlopt.parallel.shards import Cut, local
from dlopt.parallel.shares import PiecewiseAugment, cut, pieces, portions
from dlopt.parallel.statistics import averaging
from dlopt.parallel.sync_batchnorm import synchronize

_BUCKET = 25 * 2**20  # bytes of gradients that are added up at once


@dataclass
class Plan:
    """What came of splitting a model in place.

    `cuts`: equal parts by name. `dropouts`: see `dlopt.parallel.dropout.make_global`. `summands`: names of parameters
    of which every rank has its summand of the gradient only.
    """

    cuts: Mapping[str, Part]
    dropouts: Mapping[nn.Module, Callable[[Tensor], Part]]
    summands: Sequence[str] = ()
    notes: Sequence[str] = field(default_factory=list)


Split = Callable[[nn.Module, tuple[int, ...], Ranks], Plan]


class ModelParallel(Cut, Member):
    """See `Single` for what a mode is asked, and `dlopt.train.step` for what the step asks besides.

    `split` changes a model in place, for samples of the given shape. `rows`: the degree of data parallelism.
    """

    compiles = False

    def __init__(
        self, name: str, group: Group, device: torch.device, *, accumulate: int, split: Split, rows: int, sync: bool
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        super().__init__(group, device)
        self.name = name
        self.accumulate = accumulate
        self.split = split
        self.mesh = init_device_mesh(device.type, (rows, group.size // rows), mesh_dim_names=("data", "model"))
        self.rows, self.row = rows, self.mesh.get_local_rank("data")
        self.ranks = Ranks(self.mesh.get_group("model"))
        self.sync_batchnorm = sync and rows > 1
        self.norm_shares = 1 if sync else rows
        self.share = self._share if rows > 1 else None
        self.share_evaluation = (lambda total: cut(0, total, self.row, rows)) if rows > 1 else None
        self.dropout = Place()
        self.batch_total = 0  # samples of the global batch that is worked on
        self._summands: list[nn.Parameter] = []
        self._parameters: list[nn.Parameter] = []

    # -- what a rank sees

    def _share(self, total: int) -> slice | Tensor:
        own = pieces(total, self.accumulate, self.row, self.rows)
        return own[0] if len(own) == 1 else torch.cat([torch.arange(piece.start, piece.stop) for piece in own])

    def augmented(self, augment: Any) -> Any:
        if self.rows == 1 or augment is None:
            return augment
        return PiecewiseAugment(augment, self.accumulate, self.row, self.rows)

    def batches(self, batches: Any) -> Any:
        return Batches(batches, self)

    # -- the model

    def place(self, model: nn.Module, input_shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        plan = self.split(model, input_shape, self.ranks)
        if self.sync_batchnorm:
            synchronize(model, self.device, self.mesh.get_group("data"))
        make_global(model, self.dropout, plan.dropouts)
        self.spread(model, plan)
        named = dict(model.named_parameters())
        self._parameters, self._summands = list(named.values()), [named[name] for name in plan.summands]
        self.notes = (self._told(named), *plan.notes)
        return model

    def spread(self, model: nn.Module, plan: Plan) -> None:
        """Parameters as the optimizer and the checkpoint see them."""
        distribute(model, self.mesh["model"], plan.cuts)

    def _told(self, named: Mapping[str, nn.Parameter]) -> str:
        total = sum(p.numel() for p in named.values())
        own = sum(local(p).numel() for p in named.values() if not p.is_meta)
        whole = sum(p.numel() for p in named.values() if not p.is_meta and local(p).numel() == p.numel())
        told = f"{self.ranks.size} processes hold the {total} parameters together; {own} are on this one"
        if self.splits == "tensors":
            told += f", of which {whole} are on each"
        return f"parallel={self.name}: {told}" + (
            f"; {self.rows} such groups share the batches" if self.rows > 1 else ""
        )

    def aligning(self, model: nn.Module) -> Callable[[], None] | None:
        return averaging(model, self.rows, self.mesh.get_group("data"))

    # -- one update

    def micro_batches(
        self, inputs: Tensor, targets: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, float, AbstractContextManager[Any]]]:
        """(inputs, targets, weight of their mean loss, context for forward and backward) of each micro-batch.

        The weighted losses, summed over the mesh's rows and over micro-batches, are the mean over the global batch.
        """
        start = 0
        for portion in portions(self.batch_total, self.accumulate, self.row, self.rows):
            stop = start + portion.samples
            self.dropout.portion = portion
            yield inputs[start:stop], targets[start:stop], portion.samples / self.batch_total, nullcontext()
            start = stop
        self.dropout.portion = None
        sum_up([local(p.grad) for p in self._summands if p.grad is not None], self.ranks.group)
        if self.rows > 1:
            gradients = [local(p.grad) for p in self._parameters if p.grad is not None]
            sum_up(gradients, self.mesh.get_group("data"))

    def mean_loss(self, loss: Tensor) -> Tensor:
        return self.summed_loss(loss if self.ranks.rank == 0 else torch.zeros_like(loss))

    def total(self, values: Sequence[float]) -> Sequence[float]:
        return self.group.total(values if self.ranks.rank == 0 else [0.0] * len(values))


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
