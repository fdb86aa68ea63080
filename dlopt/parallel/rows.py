"""Feature maps [B, C, H, W] in strips of rows: each rank has one, and gets the rows beyond it that its windows see."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from dlopt.models.layers import GlobalAveragePool
from dlopt.models.locally_connected import LocallyConnected2d
from dlopt.models.resnet import ZeroPadShortcut
from dlopt.parallel.collectives import Ranks
from dlopt.parallel.distribution import here
from dlopt.parallel.sync_batchnorm import SyncBatchNorm, moments

Span = tuple[int, int]  # rows from, to


def strips(height: int, ranks: int) -> list[Span]:
    """The rows of each rank: equally many as far as they go. The last ranks may have fewer, or none."""
    each = -(-height // ranks)
    return [(min(rank * each, height), min((rank + 1) * each, height)) for rank in range(ranks)]


@dataclass(frozen=True)
class Windows:
    """What windows of `kernel` rows, `stride` apart, read of maps of `height` rows with `padding` above and below."""

    height: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    ranks: Ranks
    from_whole: bool  # the input is no strip: all ranks have the whole maps

    @property
    def outputs(self) -> list[Span]:
        reach = self.dilation * (self.kernel - 1) + 1
        return strips((self.height + 2 * self.padding - reach) // self.stride + 1, self.ranks.size)

    def reads(self) -> list[Span]:
        """The rows that each rank's windows see; those below 0 and from `height` on are padding."""
        reach = self.dilation * (self.kernel - 1) + 1
        return [
            (start * self.stride - self.padding, (stop - 1) * self.stride - self.padding + reach)
            if stop > start
            else (0, 0)
            for start, stop in self.outputs
        ]

    def seen(self, maps: Tensor, padding: float) -> Tensor:
        """What this rank's windows see, of their strip (or of the whole maps), filled up with `padding`."""
        reads = self.reads()
        needed = [(max(start, 0), max(min(stop, self.height), 0)) for start, stop in reads]
        first, last = reads[self.ranks.rank]
        start, stop = needed[self.ranks.rank]
        if self.from_whole:
            rows = maps[:, :, start:stop]
        else:
            rows = exchanged(maps, strips(self.height, self.ranks.size), needed, self.ranks)
        above, below = start - first, last - stop
        return F.pad(rows, (0, 0, above, below), value=padding) if above or below else rows

    @property
    def is_idle(self) -> bool:
        """Whether this rank has no rows of the output."""
        start, stop = self.outputs[self.ranks.rank]
        return start == stop


def exchanged(strip: Tensor, held: Sequence[Span], needed: Sequence[Span], ranks: Ranks) -> Tensor:
    """The rows that this rank needs, from the ranks that hold them. Gradients go the way back and are added up."""
    rows: Tensor = _Exchanged.apply(strip, held, needed, ranks)
    return rows


def gathered_rows(strip: Tensor, height: int, ranks: Ranks) -> Tensor:
    """The whole maps, on all ranks, whose gradient is whole on all ranks, too."""
    whole: Tensor = _GatheredRows.apply(strip, height, ranks)
    return whole


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, strip: Tensor, held: Sequence[Span], needed: Sequence[Span], ranks: Ranks) -> Tensor:
        ctx.held, ctx.needed, ctx.ranks = held, needed, ranks
        return _moved(strip.detach(), held, needed, ranks)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _moved(gradient, ctx.needed, ctx.held, ctx.ranks), None, None, None


class _GatheredRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, strip: Tensor, height: int, ranks: Ranks) -> Tensor:
        held = strips(height, ranks.size)
        ctx.own = held[ranks.rank]
        return _moved(strip.detach(), held, [(0, height)] * ranks.size, ranks)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        start, stop = ctx.own
        return gradient[:, :, start:stop], None, None


def _moved(rows: Tensor, held: Sequence[Span], wanted: Sequence[Span], ranks: Ranks) -> Tensor:
    """The sum of all ranks' rows, where they hold some, over the rows that this rank wants."""
    (own_start, own_stop), (start, stop) = held[ranks.rank], wanted[ranks.rank]
    shape = (*rows.shape[:2], stop - start, rows.shape[3])
    is_last = rows.is_contiguous(memory_format=torch.channels_last) and not rows.is_contiguous()
    order = torch.channels_last if is_last else torch.contiguous_format
    result = torch.zeros(shape, dtype=rows.dtype, device=rows.device).contiguous(memory_format=order)
    kept = _overlap((own_start, own_stop), (start, stop))
    if kept is not None:
        result[:, :, kept[0] - start : kept[1] - start] = rows[:, :, kept[0] - own_start : kept[1] - own_start]
    operations, received = [], []
    for peer in range(ranks.size):
        if peer == ranks.rank or rows.numel() + result.numel() == 0:
            continue
        sent = _overlap(held[ranks.rank], wanted[peer])
        if sent is not None and rows.numel():
            part = rows[:, :, sent[0] - own_start : sent[1] - own_start].contiguous()
            operations.append(distributed.P2POp(distributed.isend, part, ranks.place(peer), ranks.group))
        got = _overlap(held[peer], wanted[ranks.rank])
        if got is not None and result.numel():
            part = torch.empty(*shape[:2], got[1] - got[0], shape[3], dtype=rows.dtype, device=rows.device)
            operations.append(distributed.P2POp(distributed.irecv, part, ranks.place(peer), ranks.group))
            received.append((got, part))
    for work in distributed.batch_isend_irecv(operations) if operations else ():
        work.wait()
    for got, part in received:
        result[:, :, got[0] - start : got[1] - start] += part
    return result


def _overlap(one: Span, other: Span) -> Span | None:
    start, stop = max(one[0], other[0]), min(one[1], other[1])
    return (start, stop) if start < stop else None


# -- layers on strips. They take the place of a whole layer by `__class__`: its tensors and names stay.


class RowConv2d(nn.Conv2d):
    windows: Windows

    def forward(self, maps: Tensor) -> Tensor:
        rows = self.windows.seen(maps, 0.0)
        if self.windows.is_idle:
            return _nothing(rows, self, self.out_channels, _width(rows, self))
        across = int(self.padding[1])
        return F.conv2d(rows, self.weight, self.bias, self.stride, (0, across), self.dilation, self.groups)


class RowMaxPool2d(nn.MaxPool2d):
    windows: Windows

    def forward(self, maps: Tensor) -> Tensor:
        rows = self.windows.seen(maps, float("-inf"))
        if self.windows.is_idle:
            return _nothing(rows, self, maps.shape[1], _width(rows, self))
        _, across = _pair(self.padding)
        return F.max_pool2d(rows, self.kernel_size, self.stride, (0, across), self.dilation)


class RowLocallyConnected2d(LocallyConnected2d):
    windows: Windows

    def forward(self, maps: Tensor) -> Tensor:
        rows = self.windows.seen(maps, 0.0)
        patches = F.unfold(rows, self.kernel, padding=(0, self.padding), stride=self.stride)
        output = torch.einsum("bip,poi->bop", patches, self.weight).unflatten(2, (-1, self.extent[1]))
        return output if self.bias is None else output + self.bias


class RowBatchNorm2d(SyncBatchNorm):
    """Its inputs are strips of the maps, in training and in evaluation."""

    def moments(self, strip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and count of the whole maps."""
        return moments(strip, self.group)


class RowZeroPadShortcut(ZeroPadShortcut):
    windows: Windows

    def forward(self, maps: Tensor) -> Tensor:
        rows = self.windows.seen(maps, 0.0)
        return F.pad(rows[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


class RowAveragePool(GlobalAveragePool):
    ranks: Ranks
    height: int

    def forward(self, maps: Tensor) -> Tensor:
        return self.ranks.summed(maps.sum((2, 3)) / (self.height * maps.shape[3]))


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _width(rows: Tensor, layer: nn.Conv2d | nn.MaxPool2d) -> int:
    kernel, stride = _pair(layer.kernel_size)[1], _pair(layer.stride)[1]  # type: ignore[arg-type]
    padding, dilation = _pair(layer.padding)[1], _pair(layer.dilation)[1]  # type: ignore[arg-type]
    return (rows.shape[3] + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _nothing(rows: Tensor, layer: nn.Module, channels: int, width: int) -> Tensor:
    """Maps without rows that are a part of the graph, so that backward passes here on this rank as on the others."""
    zero = rows.sum() * 0.0
    for parameter in layer.parameters():
        zero = zero + here(parameter).sum() * 0.0
    return rows.new_zeros(len(rows), channels, 0, width) + zero
