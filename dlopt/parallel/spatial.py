"""Spatial parallelism: every rank has a strip of the rows of each feature map, and sees the whole mini-batch.

Convolutions, poolings and locally connected layers exchange the rows at the strips' boundaries, once per layer. The
filters of a convolution are shared by all positions, so that their gradients are summed over ranks; those of a locally
connected layer belong to one position, and to one rank. What comes behind the maps is split by units, as in
`dlopt.parallel.filter`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from dlopt.errors import UserError
from dlopt.models.layers import ACTIVATIONS, GlobalAveragePool
from dlopt.models.locally_connected import LocallyConnected2d
from dlopt.models.resnet import ZeroPadShortcut
from dlopt.parallel.collectives import Cut, Ranks
from dlopt.parallel.filter import Splitter, is_chain, named, take
from dlopt.parallel.mode import Mode
from dlopt.parallel.model_parallel import ModelParallel, Plan, check_precision
from dlopt.parallel.process_group import ProcessKeys, join
from dlopt.parallel.split_layers import PROJECTED, InputSplitLinear, become, before, here
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


Layout = Literal["images", "rows", "strips", "whole", "split"]
"""Maps that all ranks have, maps in strips, flattened strips; then features as in `dlopt.parallel.filter`."""

_BY_PIXEL = (*ACTIVATIONS.values(), nn.Identity, nn.LocalResponseNorm)


class _Strips:
    """Splits a model in place, as `Splitter` does; `summands`: names of parameters whose gradients are to be summed."""

    def __init__(self, ranks: Ranks, maps: dict[nn.Module, torch.Size]) -> None:
        self.ranks = ranks
        self.maps = maps  # [B, C, H, W], which each module reads
        self.heights = {module: shape[2] for module, shape in maps.items()}
        self.features = Splitter(ranks, "spatial")
        self.summands: list[str] = []
        self._flat: Cut | None = None

    def split(self, model: nn.Module) -> None:
        if not is_chain(model):
            self.features.refuse("the model", model)
        self.features.see(model)
        layout: Layout = "images"
        for name, module in named(model):
            layout = self._next(model, name, module, layout)
        if layout != "whole":
            raise UserError("parallel=spatial: the model's outputs are feature maps; use parallel=ddp")

    def _next(self, parent: nn.Module, name: str, module: nn.Module, layout: Layout) -> Layout:
        if layout in ("whole", "split"):
            return self.features.chain([(name, module)], layout)
        if is_chain(module):
            for child_name, child in named(module, name):
                layout = self._next(module, child_name, child, layout)
            return layout
        if layout == "strips":
            return self._behind_maps(name, module)
        if isinstance(module, nn.Flatten):
            if layout == "images":
                return "whole"
            self._flat = self._features_of(self.maps[module])
            if self._flat is not None:
                return "strips"
            self._gather_before(module)
            return "whole"
        if type(module) in (nn.Conv2d, nn.MaxPool2d, LocallyConnected2d):
            self._windows(name, module, from_whole=layout == "images")
            return "rows"
        if layout == "images":
            start, stop = strips(self.heights[module], self.ranks.size)[self.ranks.rank]
            before(module, lambda images: images[:, :, start:stop])
        return self._on_rows(parent, name, module)

    def _on_rows(self, parent: nn.Module, name: str, module: nn.Module) -> Layout:
        if type(module) in PROJECTED:
            for child_name, child in named(module, name):
                self._next(module, child_name, child, "rows")
            return "rows"
        match module:
            case GlobalAveragePool():
                become(module, RowAveragePool, ranks=self.ranks, height=self.heights[module])
                return "whole"
            case nn.AdaptiveAvgPool2d():
                self._gather_before(module)
                return "whole"
            case ZeroPadShortcut():
                windows = self._read(module, 1, module.stride, 0, 1, from_whole=False)
                become(module, RowZeroPadShortcut, windows=windows)
            case nn.BatchNorm2d() if type(module) is nn.BatchNorm2d:
                self._note_summands(name, module)
                parent._modules[name.rpartition(".")[2]] = RowBatchNorm2d(module, self.ranks.group)
            case _DropoutNd():
                height = self.heights[module]
                cut = Cut(2, slice(*strips(height, self.ranks.size)[self.ranks.rank]), height)
                self.features.dropouts[module] = lambda _: cut
            case _NormBase() | nn.GroupNorm() | nn.LayerNorm():
                raise UserError(
                    f"parallel=spatial: {name} is a {type(module).__name__}, which averages over the pixels of a map, "
                    "and ranks have strips of it; use model.norm=batch (without norm_ghost_batch) or model.norm=none"
                )
            case _ if not isinstance(module, _BY_PIXEL):
                self.features.refuse(name, module)
        return "rows"

    def _features_of(self, maps: torch.Size) -> Cut | None:
        """Which of the features of flattened maps are in this rank's strip; None where strips are not equal."""
        _, channels, height, width = maps
        if height % self.ranks.size:
            return None
        start, stop = strips(height, self.ranks.size)[self.ranks.rank]
        positions = torch.arange(channels * height * width).view(channels, height, width)
        return Cut(1, positions[:, start:stop].reshape(-1), positions.numel(), pieces=channels)

    def _behind_maps(self, name: str, module: nn.Module) -> Layout:
        """The first layer behind flattened strips is split by its inputs: nothing but its outputs is exchanged."""
        cut = self._flat
        assert cut is not None
        if isinstance(module, nn.Linear):
            take(module, name, "weight", cut, self.features.cuts)
            module.in_features //= self.ranks.size
            become(module, InputSplitLinear, ranks=self.ranks, cuts=False)
            return "whole"
        if isinstance(module, _DropoutNd):
            self.features.dropouts[module] = lambda _: cut
        elif not isinstance(module, _BY_PIXEL):
            self.features.refuse(name, module)
        return "strips"

    def _windows(self, name: str, layer: nn.Module, *, from_whole: bool) -> None:
        """Makes a layer that reads windows of the whole maps one that reads strips."""
        if isinstance(layer, LocallyConnected2d):
            windows = self._read(layer, layer.kernel, layer.stride, layer.padding, 1, from_whole)
            self._own_positions(name, layer, windows.outputs[self.ranks.rank])
            become(layer, RowLocallyConnected2d, windows=windows)
            return
        assert isinstance(layer, nn.Conv2d | nn.MaxPool2d)
        odd = getattr(layer, "ceil_mode", False) or getattr(layer, "return_indices", False)
        if isinstance(layer.padding, str) or getattr(layer, "padding_mode", "zeros") != "zeros" or odd:
            self.features.refuse(name, layer)
        kernel, stride, padding, dilation = (
            each[0] if isinstance(each, tuple) else each
            for each in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        )
        windows = self._read(layer, kernel, stride, padding, dilation, from_whole)  # type: ignore[arg-type]
        if isinstance(layer, nn.Conv2d):
            self._note_summands(name, layer)
        become(layer, RowConv2d if isinstance(layer, nn.Conv2d) else RowMaxPool2d, windows=windows)

    def _read(
        self, layer: nn.Module, kernel: int, stride: int, padding: int, dilation: int, from_whole: bool
    ) -> Windows:
        return Windows(self.heights[layer], kernel, stride, padding, dilation, self.ranks, from_whole)

    def _own_positions(self, name: str, layer: LocallyConnected2d, own: Span) -> None:
        height, width = layer.extent
        if height % self.ranks.size:
            raise UserError(
                f"parallel=spatial: {name} has filters at {height} rows of positions, which {self.ranks.size} "
                "processes cannot share evenly"
            )
        (start, stop), cuts = own, self.features.cuts
        take(layer, name, "weight", Cut(0, slice(start * width, stop * width), height * width), cuts)
        take(layer, name, "bias", Cut(1, slice(start, stop), height), cuts)

    def _gather_before(self, module: nn.Module) -> None:
        height = self.heights[module]
        before(module, lambda strip: gathered_rows(strip, height, self.ranks))

    def _note_summands(self, name: str, module: nn.Module) -> None:
        self.summands += [f"{name}.{each}" for each, _ in module.named_parameters(recurse=False)]


@torch.no_grad()
def _maps(model: nn.Module, input_shape: tuple[int, ...]) -> dict[nn.Module, torch.Size]:
    """The shape of the maps that each module reads."""
    maps: dict[nn.Module, torch.Size] = {}

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].ndim == 4:
            maps[module] = inputs[0].shape

    handles = [module.register_forward_pre_hook(look) for module in model.modules()]
    modes = {module: module.training for module in model.modules()}
    like = next(model.parameters())
    try:
        model.eval()(torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return maps


def split_rows(model: nn.Module, input_shape: tuple[int, ...], ranks: Ranks) -> Plan:
    splitter = _Strips(ranks, _maps(model, input_shape))
    splitter.split(model)
    notes = []
    least = min(splitter.heights.values(), default=ranks.size)
    if least < ranks.size:
        notes.append(f"parallel=spatial: some maps have {least} rows only, so that some processes have none of them")
    return Plan(splitter.features.cuts, splitter.features.dropouts, splitter.summands, notes)


def spatial(
    *,
    device: torch.device,
    accumulate: int,
    precision: str,
    **keys: Unpack[ProcessKeys],
) -> Mode:
    """Builds the mode of this process, which joins its group. Raises `UserError` where the keys do not fit together."""
    check_precision("spatial", precision)
    joined = join("spatial", device, **keys)
    if joined is None:
        return Mode(device, "spatial")
    return ModelParallel("spatial", *joined, accumulate=accumulate, split=split_rows, rows=1, sync=True)
