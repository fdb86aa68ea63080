"""Model parallelism by columns: each rank has one column of the two-column AlexNet, and sees the whole mini-batch.

The columns exchange features where the net lets them (Krizhevsky, Sutskever & Hinton 2012, section 3.5): in front of
the third convolution and of the fully connected layers. The classifier is the first column's rank's.
"""

from typing import Any, Literal, Unpack

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.dropout import _DropoutNd

from dlopt.errors import UserError
from dlopt.models.alexnet import TwoColumnAlexNet
from dlopt.parallel.collectives import Ranks
from dlopt.parallel.filter import named
from dlopt.parallel.mode import Mode
from dlopt.parallel.model_parallel import ModelParallel, Plan, check_precision
from dlopt.parallel.process_group import Group, ProcessKeys, join
from dlopt.parallel.split_layers import become


class ColumnParallel(ModelParallel):
    """Each rank keeps its column; the other's layers are on the meta device."""

    sharding: Literal["replicated", "tensors", "layers"] = "layers"

    def __init__(
        self, name: str, group: Group, device: torch.device, *, accumulate: int, rows: int, sync: bool
    ) -> None:
        super().__init__(name, group, device, accumulate=accumulate, split=split_columns, rows=rows, sync=sync)
        self.is_copy = self.row > 0  # the first row holds the same layers

    def spread(self, model: nn.Module, plan: Plan) -> None:
        """Leaves the parameters plain: every tensor is on one rank of a row."""


class OneColumnAlexNet(TwoColumnAlexNet):
    """The net as the rank of one column computes it: with the same outputs on all ranks."""

    ranks: Ranks

    def forward(self, images: Tensor) -> Tensor:
        segments = list(self.columns[self.ranks.rank].children())
        joined = images
        for segment in segments[:-1]:
            joined = self.ranks.gathered(segment(joined), copied=True)
        features: Tensor = _ToFirst.apply(segments[-1](joined), self.ranks)
        outputs = self.head(features) if self.ranks.rank == 0 else features
        shape = (len(images), self.head.out_features)
        logits: Tensor = _FromFirst.apply(outputs, shape, self.ranks)
        return logits


class ColumnDropout(nn.Module):
    """A dropout of one column, which draws for all columns in turn, as one process does, and keeps its own."""

    def __init__(self, dropout: _DropoutNd, ranks: Ranks) -> None:
        super().__init__()
        self.dropout = dropout
        self.ranks = ranks

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return inputs
        drawn = [
            self.dropout(inputs if rank == self.ranks.rank else torch.zeros_like(inputs))
            for rank in range(self.ranks.size)
        ]
        own: Tensor = drawn[self.ranks.rank]
        return own


class _ToFirst(torch.autograd.Function):
    """The ranks' features [B, F] side by side on the first of them; [B, 0] on the others."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.shape = ranks, part.shape
        part = part.detach().contiguous()
        if ranks.rank > 0:
            if part.numel():
                distributed.send(part, ranks.place(0), group=ranks.group)
            return part[:, :0].clone()
        parts = [part, *(torch.empty_like(part) for _ in range(1, ranks.size))]
        for rank in range(1, ranks.size) if part.numel() else ():
            distributed.recv(parts[rank], ranks.place(rank), group=ranks.group)
        return torch.cat(parts, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ranks = ctx.ranks
        if ranks.rank > 0:
            own = gradient.new_empty(ctx.shape)
            if own.numel():
                distributed.recv(own, ranks.place(0), group=ranks.group)
            return own, None
        parts = [part.contiguous() for part in gradient.tensor_split(ranks.size, dim=1)]
        for rank in range(1, ranks.size) if gradient.numel() else ():
            distributed.send(parts[rank], ranks.place(rank), group=ranks.group)
        return parts[0], None


class _FromFirst(torch.autograd.Function):
    """The first rank's outputs of this shape, on all ranks. The gradient stays where it is: all have the same."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, shape: tuple[int, int], ranks: Ranks) -> Tensor:
        ctx.like, ctx.is_first = outputs, ranks.rank == 0
        logits = outputs.detach().clone() if ranks.rank == 0 else outputs.new_empty(shape)
        if logits.numel():
            distributed.broadcast(logits, ranks.place(0), group=ranks.group)
        return logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient if ctx.is_first else torch.zeros_like(ctx.like), None, None


def split_columns(model: nn.Module, input_shape: tuple[int, ...], ranks: Ranks) -> Plan:
    if not isinstance(model, TwoColumnAlexNet):
        raise UserError(
            f"parallel=columns: the model is a {type(model).__name__}, which has no columns; use "
            "model=two_column_alexnet or parallel=filter"
        )
    if ranks.size != len(model.columns):
        raise UserError(
            f"parallel=columns: the model has {len(model.columns)} columns, one for each process, and there are "
            f"{ranks.size} processes; start {len(model.columns)}, or use parallel=hybrid"
        )
    for rank, (_, column) in enumerate(named(model.columns)):
        if rank != ranks.rank:
            column.to("meta")
    if ranks.rank > 0:
        model.head.to("meta")
    for parent in list(model.columns[ranks.rank].modules()):
        for name, child in parent._modules.items():
            if isinstance(child, _DropoutNd):
                parent._modules[name] = ColumnDropout(child, ranks)
    become(model, OneColumnAlexNet, ranks=ranks)
    return Plan({}, {})


def columns(
    *,
    device: torch.device,
    accumulate: int,
    precision: str,
    **keys: Unpack[ProcessKeys],
) -> Mode:
    """Builds the mode of this process, which joins its group. Raises `UserError` where the keys do not fit together."""
    check_precision("columns", precision)
    joined = join("columns", device, **keys)
    if joined is None:
        return Mode(device, "columns")
    return ColumnParallel("columns", *joined, accumulate=accumulate, rows=1, sync=True)
