"""Model parallelism by columns: each rank holds one column of the two-column AlexNet.

Every rank processes the whole mini-batch. The columns exchange features before the third convolution and before the
fully connected layers (Krizhevsky, Sutskever & Hinton 2012, section 3.5). Rank 0 holds the classifier.
"""

from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, distributed, nn

from dlopt.basics.errors import UserError
from dlopt.models.alexnet import TwoColumnAlexNet
from dlopt.parallel.collectives import ModelGroup, with_adjoint
from dlopt.parallel.dropout import CurrentShard, GlobalDropout, convert_dropout
from dlopt.parallel.mode import Mode, join_mode
from dlopt.parallel.modes.model_parallel import ModelParallel, ShardingPlan
from dlopt.parallel.modes.split_layers import convert
from dlopt.parallel.processes.process_group import ProcessGroup, ProcessKeys
from dlopt.parallel.shards import LayerShards


class ColumnParallel(ModelParallel):
    """Each rank of a model group holds one column; the other column is on the meta device."""

    def __init__(self, group: ProcessGroup, device: torch.device, **options: Any) -> None:
        super().__init__(group, device, split=split_columns, **options)
        self.sharding = LayerShards(group, device, is_replica=self.split.rank > 0)  # group 0 holds the same layers

    def distribute_parameters(self, model: nn.Module, plan: ShardingPlan) -> None:
        """Keeps plain parameters: every tensor is on exactly one rank of a model group."""


class OneColumnAlexNet(TwoColumnAlexNet):
    """The forward of the rank that holds one column. Returns the same logits on all ranks."""

    model_group: ModelGroup

    def forward(self, images: Tensor) -> Tensor:
        column = self.columns[self.model_group.rank]
        maps = images
        if torch.is_grad_enabled() and not all(p.requires_grad for p in column.parameters()):
            # The backward of each exchange needs all ranks, also those whose backward would stop at frozen layers.
            maps = images.detach().requires_grad_()
        for segment in column.children():
            maps = self.model_group.gather(segment(maps), reduce_grad=True)
        # The other rank's outputs are empty, but part of the graph: its backward must also reach the exchanges.
        outputs = self.head(maps) if self.model_group.rank == 0 else maps[:, :0]
        return broadcast_from_first(outputs, (len(images), self.head.out_features), self.model_group)


class ColumnDropout(nn.Module):
    """Dropout of one column. Draws for all columns in order, as a single process does."""

    def __init__(self, dropout: GlobalDropout, model_group: ModelGroup) -> None:
        super().__init__()
        self.dropout = dropout
        self.model_group = model_group

    def forward(self, inputs: Tensor) -> Tensor:
        for _ in range(self.model_group.rank):
            self.dropout.discard(inputs.shape, inputs.device)
        outputs: Tensor = self.dropout(inputs)
        for _ in range(self.model_group.rank + 1, self.model_group.size):
            self.dropout.discard(inputs.shape, inputs.device)
        return outputs


def broadcast_from_first(outputs: Tensor, shape: tuple[int, int], model_group: ModelGroup) -> Tensor:
    """Broadcasts rank 0's outputs of the given shape. Backward sends nothing: all ranks compute the same gradient."""

    def forward(outputs: Tensor) -> Tensor:
        logits = outputs.detach().clone() if model_group.rank == 0 else outputs.new_empty(shape)
        if logits.numel():
            distributed.broadcast(logits, model_group.global_rank(0), group=model_group.process_group)
        return logits

    return with_adjoint(outputs, forward, lambda grad: grad if model_group.rank == 0 else torch.zeros_like(outputs))


def split_columns(model: nn.Module, input_shape: tuple[int, ...], model_group: ModelGroup) -> ShardingPlan:
    if not isinstance(model, TwoColumnAlexNet):
        raise UserError(
            f"parallel=columns: {type(model).__name__} has no columns; use model=two_column_alexnet or parallel=filter"
        )
    if model_group.size != len(model.columns):
        raise UserError(
            f"parallel=columns: {len(model.columns)} columns need as many processes, but there are "
            f"{model_group.size}; start {len(model.columns)} processes, or use parallel=hybrid"
        )
    for rank, column in enumerate(model.columns.children()):
        if rank != model_group.rank:
            column.to("meta")
    if model_group.rank > 0:
        model.head.to("meta")
    convert_dropout(model, CurrentShard())
    for parent in list(model.columns[model_group.rank].modules()):
        for name, child in parent._modules.items():
            if isinstance(child, GlobalDropout):
                parent._modules[name] = ColumnDropout(child, model_group)
    convert(model, OneColumnAlexNet, model_group=model_group)
    return ShardingPlan({}, {})


def columns(*, device: torch.device, accumulate: int, **keys: Unpack[ProcessKeys]) -> Mode:
    """Joins the process group and builds the mode."""
    return join_mode("columns", device, partial(ColumnParallel, name="columns", accumulate=accumulate), keys)
