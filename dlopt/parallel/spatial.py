"""Spatial parallelism: every rank has a strip of the rows of each feature map, and sees the whole mini-batch.

Convolutions, poolings and locally connected layers exchange the rows at the strips' boundaries, once per layer. The
filters of a convolution are shared by all positions, so that their gradients are summed over ranks; those of a locally
connected layer belong to one position, and to one rank. What comes behind the maps is split by units, as in
`dlopt.parallel.filter`.
"""

from typing import Literal, Unpack

import torch
from torch import Tensor, nn
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
from dlopt.parallel.rows import (
    RowAveragePool,
    RowBatchNorm2d,
    RowConv2d,
    RowLocallyConnected2d,
    RowMaxPool2d,
    RowZeroPadShortcut,
    Span,
    Windows,
    gathered_rows,
    strips,
)
from dlopt.parallel.split_layers import PROJECTED, InputSplitLinear, become, before

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
