"""What the ranks that hold one model together send each other within forward and backward.

A tensor within a split model is either whole, the same on all ranks, or a part. The gradient of a whole tensor is
whole and the same on all ranks, too, where nothing else is said. These functions come in conjugate pairs (Shoeybi et
al. 2019, "Megatron-LM", section 3): what is a sum forward is a copy backward, and the other way round.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Cut:
    """The positions `index` of `size` along dimension `dim`: one part of the whole, or of each of so many `pieces`."""

    dim: int
    index: slice | Tensor
    size: int
    pieces: int = 1

    def of(self, whole: Tensor) -> Tensor:
        """The part of a whole tensor."""
        if isinstance(self.index, slice):
            return whole[(slice(None),) * self.dim + (self.index,)]
        return whole.index_select(self.dim, self.index.to(whole.device))

    def put(self, whole: Tensor, part: Tensor) -> Tensor:
        """The whole tensor with this part in its place."""
        positions = torch.arange(self.size)[self.index] if isinstance(self.index, slice) else self.index
        return whole.index_copy(self.dim, positions.to(whole.device), part)


class Ranks:
    """The ranks that hold one model together, as a process group; None: all processes there are."""

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = distributed.get_rank(group)
        self.size = distributed.get_world_size(group)

    def __deepcopy__(self, memo: object) -> "Ranks":
        return self  # a model's copy talks to the same processes

    def copied(self, whole: Tensor) -> Tensor:
        """A whole tensor of which every rank makes something else: the ranks' gradients are added up."""
        copied: Tensor = _Copied.apply(whole, self)
        return copied

    def summed(self, part: Tensor) -> Tensor:
        """The sum over ranks, whole."""
        summed: Tensor = _Summed.apply(part, self)
        return summed

    def gathered(self, part: Tensor, dim: int = 1, *, copied: bool = False) -> Tensor:
        """The ranks' equal parts side by side along `dim`, whole. `copied`: as if `Ranks.copied` followed."""
        gathered: Tensor = _Gathered.apply(part, dim, copied, self)
        return gathered

    def part(self, whole: Tensor, dim: int = 1) -> Tensor:
        """The rank's of equal parts along `dim`."""
        part: Tensor = _Part.apply(whole, dim, self)
        return part

    def own(self, size: int) -> slice:
        """Where the rank's of equal parts of `size` things is."""
        each = size // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def place(self, rank: int) -> int:
        """What all processes call this rank."""
        return rank if self.group is None else distributed.get_global_rank(self.group, rank)

    def cut(self, part: Tensor) -> Cut:
        """Which part of the features [B, F, ...] this one is."""
        size = part.shape[1] * self.size
        return Cut(1, self.own(size), size)


def all_reduced(tensor: Tensor, ranks: Ranks) -> Tensor:
    """A new tensor with the sum."""
    total = tensor.detach().clone() if _is_channels_last(tensor) else tensor.detach().clone().contiguous()
    if total.numel():
        distributed.all_reduce(total, group=ranks.group)
    return total


def all_gathered(part: Tensor, dim: int, ranks: Ranks) -> Tensor:
    """Equal parts side by side, in the memory format of the part."""
    part, dim, back = _in_memory_order(part.detach(), dim)
    parts = part.new_empty(ranks.size, *part.shape)
    if part.numel():
        distributed.all_gather_into_tensor(parts.view(-1), part.reshape(-1), group=ranks.group)
    return parts.movedim(0, dim).flatten(dim, dim + 1).permute(back)


def reduce_scattered(whole: Tensor, dim: int, ranks: Ranks) -> Tensor:
    """The rank's part of the sum."""
    whole, dim, back = _in_memory_order(whole.detach(), dim)
    parts = whole.unflatten(dim, (ranks.size, -1)).movedim(dim, 0).contiguous()
    own = torch.empty_like(parts[0])
    if own.numel():
        distributed.reduce_scatter_tensor(own.view(-1), parts.view(-1), group=ranks.group)
    return own.permute(back)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _in_memory_order(tensor: Tensor, dim: int) -> tuple[Tensor, int, tuple[int, ...]]:
    """A contiguous view or copy, where `dim` is in it, and the permutation that leads back."""
    if _is_channels_last(tensor):
        return tensor.permute(0, 2, 3, 1), (0, 3, 1, 2)[dim], (0, 3, 1, 2)
    return tensor.contiguous(), dim, tuple(range(tensor.ndim))


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return whole.view_as(whole)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduced(gradient, ctx.ranks), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        return all_reduced(part, ranks)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, copied: bool, ranks: Ranks) -> Tensor:
        ctx.dim, ctx.copied, ctx.ranks = dim, copied, ranks
        return all_gathered(part, dim, ranks)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.copied:
            return reduce_scattered(gradient, ctx.dim, ctx.ranks), None, None, None
        return gradient.tensor_split(ctx.ranks.size, ctx.dim)[ctx.ranks.rank], None, None, None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, dim: int, ranks: Ranks) -> Tensor:
        ctx.dim, ctx.ranks = dim, ranks
        return whole.tensor_split(ranks.size, dim)[ranks.rank].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return all_gathered(gradient, ctx.dim, ctx.ranks), None, None
