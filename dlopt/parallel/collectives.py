"""Differentiable collectives among the ranks that hold one model (Shoeybi et al. 2019, "Megatron-LM", section 3).

An activation is replicated (equal on all ranks) or sharded. Backward runs the adjoint of forward:

    copy    forward: identity                          backward: all-reduce          (Megatron's f)
    reduce  forward: all-reduce                        backward: identity            (Megatron's g)
    gather  forward: all-gather                        backward: this rank's slice, or reduce-scatter
    scatter forward: this rank's slice                 backward: all-gather
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class ShardSpec:
    """Which part of a tensor a rank holds: the positions `index` of `size` along dimension `dim`.

    `split_factor`: the index has that many equal blocks, one in each block of the full tensor (DTensor's
    `_StridedShard`): a strip of rows of every channel of flattened maps.
    """

    dim: int
    index: slice | Tensor
    size: int
    split_factor: int = 1

    def select(self, full: Tensor) -> Tensor:
        """Returns the shard of a full tensor."""
        if isinstance(self.index, slice):
            return full[(slice(None),) * self.dim + (self.index,)]
        return full.index_select(self.dim, self.index.to(full.device))

    def insert(self, full: Tensor, shard: Tensor) -> Tensor:
        """Returns a copy of the full tensor with `shard` at its positions."""
        positions = torch.arange(self.size)[self.index] if isinstance(self.index, slice) else self.index
        return full.index_copy(self.dim, positions.to(full.device), shard)


class ModelGroup:
    """The ranks that hold one model together, as a process group (None for all processes of the run)."""

    def __init__(self, process_group: distributed.ProcessGroup | None = None) -> None:
        self.process_group = process_group
        self.rank = distributed.get_rank(process_group)
        self.size = distributed.get_world_size(process_group)

    def __deepcopy__(self, memo: object) -> "ModelGroup":
        return self  # copies of a model communicate over the same processes

    def copy(self, full: Tensor) -> Tensor:
        """Returns a replicated tensor that the ranks use differently: backward sums their gradients."""
        return with_adjoint(full, lambda full: full.view_as(full), lambda gradient: all_reduce(gradient, self))

    def reduce(self, partial: Tensor) -> Tensor:
        """Returns the sum over ranks, replicated."""
        return with_adjoint(partial, lambda partial: all_reduce(partial, self), lambda gradient: gradient)

    def gather(self, shard: Tensor, dim: int = 1, *, reduce_grad: bool = False) -> Tensor:
        """Concatenates the equal shards of all ranks along `dim`, replicated.

        `reduce_grad`: the ranks use the result differently, as if `copy` followed; backward is one reduce-scatter.
        """

        # If all ranks continue alike, each has the whole gradient and needs its slice: a sum would count it once per
        # rank. If they continue differently, backward needs the sum.
        def backward(gradient: Tensor) -> Tensor:
            return reduce_scatter(gradient, dim, self) if reduce_grad else self._equal_shard(gradient, dim)

        return with_adjoint(shard, lambda shard: all_gather(shard, dim, self), backward)

    def scatter(self, full: Tensor, dim: int = 1) -> Tensor:
        """Returns this rank's equal shard of a replicated tensor, without communication."""
        # A copy: a view returned by a custom Function must not be modified in place, as an in-place ReLU would.
        return with_adjoint(
            full, lambda full: self._equal_shard(full, dim).clone(), lambda gradient: all_gather(gradient, dim, self)
        )

    def _equal_shard(self, full: Tensor, dim: int) -> Tensor:
        return full.tensor_split(self.size, dim)[self.rank]

    def local_slice(self, size: int) -> slice:
        """Returns the positions of this rank's equal shard of `size` entries."""
        length = size // self.size
        return slice(self.rank * length, (self.rank + 1) * length)

    def global_rank(self, rank: int) -> int:
        """Returns the rank among all processes of the run, which point-to-point operations expect."""
        return rank if self.process_group is None else distributed.get_global_rank(self.process_group, rank)

    def shard_spec(self, shard: Tensor) -> ShardSpec:
        """Returns the position of features [B, F, ...] that are sharded over the ranks."""
        size = shard.shape[1] * self.size
        return ShardSpec(1, self.local_slice(size), size)


def with_adjoint(tensor: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns `forward(tensor)`; `backward`, its adjoint, maps the gradient. Neither records a graph."""
    return _WithAdjoint.apply(tensor, forward, backward)


class _WithAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.adjoint = backward
        return forward(tensor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.adjoint(gradient), None, None


# Plain collectives. They neither write to their input nor record a graph. Backends never see empty messages: the shapes
# are equal on all ranks.


def all_reduce(partial: Tensor, model_group: ModelGroup) -> Tensor:
    """Returns the sum over ranks as a new tensor."""
    total = partial.detach().clone() if is_channels_last(partial) else partial.detach().clone().contiguous()
    if total.numel():
        distributed.all_reduce(total, group=model_group.process_group)
    return total


def all_gather(shard: Tensor, dim: int, model_group: ModelGroup) -> Tensor:
    """Concatenates equal shards along `dim`, in the shard's memory format."""
    shard, dim, inverse = _in_memory_order(shard.detach(), dim)
    shards = shard.new_empty(model_group.size, *shard.shape)
    if shard.numel():
        distributed.all_gather_into_tensor(shards.view(-1), shard.reshape(-1), group=model_group.process_group)
    return shards.movedim(0, dim).flatten(dim, dim + 1).permute(inverse)


def reduce_scatter(partial: Tensor, dim: int, model_group: ModelGroup) -> Tensor:
    """Returns this rank's shard of the sum over ranks."""
    partial, dim, inverse = _in_memory_order(partial.detach(), dim)
    shards = partial.unflatten(dim, (model_group.size, -1)).movedim(dim, 0).contiguous()
    shard = torch.empty_like(shards[0])
    if shard.numel():
        distributed.reduce_scatter_tensor(shard.view(-1), shards.view(-1), group=model_group.process_group)
    return shard.permute(inverse)


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _in_memory_order(tensor: Tensor, dim: int) -> tuple[Tensor, int, tuple[int, ...]]:
    """Returns a contiguous view or copy, the position of `dim` in it, and the inverse permutation.

    Channels-last maps are permuted instead of copied, and stay channels-last.
    """
    if is_channels_last(tensor):
        return tensor.permute(0, 2, 3, 1), (0, 3, 1, 2)[dim], (0, 3, 1, 2)
    return tensor.contiguous(), dim, tuple(range(tensor.ndim))
