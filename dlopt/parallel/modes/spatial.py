"""Spatial parallelism: each rank holds a strip of rows of every feature map and processes the whole mini-batch.

Convolutions, poolings and locally connected layers exchange boundary rows (the halo) with the neighbouring ranks.
Convolutions are replicated, so their gradients are summed over ranks; a locally connected layer has filters for each
position, which are sharded with the rows. The layers after the feature maps are sharded as in `filter.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_pre_hook

from dlopt.basics.errors import UserError
from dlopt.models.layers import ACTIVATIONS, GlobalAveragePool, evaluation_mode
from dlopt.models.locally_connected import LocallyConnected2d
from dlopt.models.resnet import ZeroPadShortcut
from dlopt.parallel.collectives import ModelGroup, ShardSpec, is_channels_last, with_adjoint
from dlopt.parallel.mode import Mode, join_mode
from dlopt.parallel.modes.chain import is_sequential
from dlopt.parallel.modes.filter import Splitter, named_children, replace_by_shard
from dlopt.parallel.modes.model_parallel import ModelParallel, ShardingPlan
from dlopt.parallel.modes.split_layers import PROJECTED, InputSplitLinear, convert, transform_input
from dlopt.parallel.modes.sync_batchnorm import SyncBatchNorm, moments
from dlopt.parallel.processes.process_group import ProcessKeys

RowRange = tuple[int, int]  # first row, and the row after the last


def row_strips(height: int, ranks: int) -> list[RowRange]:
    """Returns the rows of each rank: ceil(height / ranks) each; the last ranks may have fewer rows, or none."""
    rows = -(-height // ranks)
    return [(min(rank * rows, height), min((rank + 1) * rows, height)) for rank in range(ranks)]


def local_strip(height: int, model_group: ModelGroup) -> RowRange:
    """Returns the rows of this rank."""
    return row_strips(height, model_group.size)[model_group.rank]


@dataclass(frozen=True)
class RowWindows:
    """Which input rows each rank needs for its output rows, in a layer that slides windows over feature maps.

    `kernel`, `stride`, `padding` and `dilation` are the layer's along the rows; `height` is the height of its input.
    """

    height: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    model_group: ModelGroup
    replicated_input: bool  # all ranks have the full maps; otherwise each has its strip

    @property
    def reach(self) -> int:
        """Rows of a window."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def output_rows(self) -> list[RowRange]:
        return row_strips((self.height + 2 * self.padding - self.reach) // self.stride + 1, self.model_group.size)

    def input_rows(self) -> list[RowRange]:
        """Returns the rows that each rank's windows read; rows < 0 and >= `height` are padding."""
        return [
            (start * self.stride - self.padding, (stop - 1) * self.stride - self.padding + self.reach)
            if stop > start
            else (0, 0)
            for start, stop in self.output_rows
        ]

    def with_halo(self, maps: Tensor, padding: float) -> Tensor:
        """Returns the rows that this rank's windows read: its strip and the halo, with `padding` beyond the maps."""
        input_rows = self.input_rows()
        # All ranks compute the ranges of all ranks, so no messages are needed to agree on them.
        needed = [(max(start, 0), max(min(stop, self.height), 0)) for start, stop in input_rows]
        first, last = input_rows[self.model_group.rank]
        start, stop = needed[self.model_group.rank]
        if self.replicated_input:
            rows = maps[:, :, start:stop]
        else:
            held, group = row_strips(self.height, self.model_group.size), self.model_group
            rows = with_adjoint(
                maps,
                lambda strip: _redistribute_rows(strip, held, needed, group),
                # A row that several ranks need: its gradients are summed on the rank that holds it.
                lambda gradient: _redistribute_rows(gradient, needed, held, group),
            )
        above, below = start - first, last - stop
        return F.pad(rows, (0, 0, above, below), value=padding) if above or below else rows

    def slide(self, layer: Callable[[Tensor], Tensor], maps: Tensor, padding: float) -> Tensor:
        """Returns this rank's rows of the output. `layer` pads the columns only."""
        rows = self.with_halo(maps, padding)
        start, stop = self.output_rows[self.model_group.rank]
        if stop > start:
            return layer(rows)
        # A window of padding connects the empty output with the input: backward must reach all earlier collectives.
        return layer(F.pad(rows, (0, 0, 0, self.reach), value=padding))[:, :, :0]


def _redistribute_rows(
    rows: Tensor, source: Sequence[RowRange], target: Sequence[RowRange], model_group: ModelGroup
) -> Tensor:
    """Moves rows from the ranges `source` to the ranges `target`, both by rank, and sums rows where sources overlap.

    Strips are disjoint, and overlap in the halos: forward the targets, backward the sources.
    """
    (source_start, source_stop), (start, stop) = source[model_group.rank], target[model_group.rank]
    shape = (*rows.shape[:2], stop - start, rows.shape[3])
    memory_format = torch.channels_last if is_channels_last(rows) else torch.contiguous_format
    result = torch.zeros(shape, dtype=rows.dtype, device=rows.device).contiguous(memory_format=memory_format)
    kept = _intersection((source_start, source_stop), (start, stop))
    if kept is not None:
        result[:, :, kept[0] - start : kept[1] - start] = rows[:, :, kept[0] - source_start : kept[1] - source_start]
    operations, received = [], []

    def add_operation(kind: Any, buffer: Tensor, peer: int) -> None:
        peer = model_group.global_rank(peer)
        operations.append(distributed.P2POp(kind, buffer, peer, model_group.process_group))

    for peer in range(model_group.size):
        if peer == model_group.rank:
            continue
        sent = _intersection(source[model_group.rank], target[peer])
        if sent is not None and rows.numel():
            buffer = rows[:, :, sent[0] - source_start : sent[1] - source_start].contiguous()
            add_operation(distributed.isend, buffer, peer)
        span = _intersection(source[peer], target[model_group.rank])
        if span is not None and result.numel():
            buffer = torch.empty(*shape[:2], span[1] - span[0], shape[3], dtype=rows.dtype, device=rows.device)
            add_operation(distributed.irecv, buffer, peer)
            received.append((span, buffer))
    # One batch of sends and receives: two neighbours that both began with a blocking send would deadlock.
    for work in distributed.batch_isend_irecv(operations) if operations else ():
        work.wait()
    # Added in rank order, not in order of arrival: sums are the same in every run.
    for span, buffer in received:
        result[:, :, span[0] - start : span[1] - start] += buffer
    return result


def _intersection(one: RowRange, other: RowRange) -> RowRange | None:
    start, stop = max(one[0], other[0]), min(one[1], other[1])
    return (start, stop) if start < stop else None


# -- layers on strips. `split_layers.convert` changes the class of the original layer; its tensors and names stay.


class RowConv2d(nn.Conv2d):
    windows: RowWindows

    def forward(self, maps: Tensor) -> Tensor:
        padding = 0, int(self.padding[1])
        options = self.stride, padding, self.dilation, self.groups
        return self.windows.slide(lambda rows: F.conv2d(rows, self.weight, self.bias, *options), maps, 0.0)


class RowMaxPool2d(nn.MaxPool2d):
    windows: RowWindows

    def forward(self, maps: Tensor) -> Tensor:
        padding = 0, self.padding[1] if isinstance(self.padding, tuple) else self.padding
        options = self.kernel_size, self.stride, padding, self.dilation
        return self.windows.slide(lambda rows: F.max_pool2d(rows, *options), maps, float("-inf"))


class RowLocallyConnected2d(LocallyConnected2d):
    windows: RowWindows

    def forward(self, maps: Tensor) -> Tensor:
        rows = self.windows.with_halo(maps, 0.0)
        patches = F.unfold(rows, self.kernel, padding=(0, self.padding), stride=self.stride)
        output = torch.einsum("bip,poi->bop", patches, self.weight).unflatten(2, (-1, self.extent[1]))
        return output if self.bias is None else output + self.bias


class RowBatchNorm2d(SyncBatchNorm):
    def moments(self, strip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns mean, variance and count over all strips; called for exact statistics, also in evaluation."""
        return moments(strip, self.group)


class RowZeroPadShortcut(ZeroPadShortcut):
    windows: RowWindows

    def forward(self, maps: Tensor) -> Tensor:
        rows = self.windows.with_halo(maps, 0.0)
        return F.pad(rows[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.extra))


class RowAveragePool(GlobalAveragePool):
    model_group: ModelGroup
    height: int

    def forward(self, maps: Tensor) -> Tensor:
        # Each rank adds the rows of its strip, divided by the size of the full map; a rank without rows adds zeros.
        return self.model_group.reduce(maps.sum((2, 3)) / (self.height * maps.shape[3]))


Layout = Literal["images", "rows", "flattened", "replicated", "sharded"]
"""images: full maps on all ranks; rows: strips of maps; flattened: flattened strips; others as in `filter.py`."""

_POINTWISE = (*ACTIVATIONS.values(), nn.Identity, nn.LocalResponseNorm)


class SpatialSplitter:
    """Splits a model in place: maps by rows, and the features after them with `filter.Splitter`.

    `partial_grads`: names of replicated parameters whose gradients must be summed over ranks.
    """

    def __init__(self, model_group: ModelGroup, maps: dict[nn.Module, torch.Size]) -> None:
        self.model_group = model_group
        self.maps = maps  # input shape [B, C, H, W] by module
        self.heights = {module: shape[2] for module, shape in maps.items()}
        self.features = Splitter(model_group, "spatial")
        self.partial_grads: list[str] = []
        self._flattened_spec: ShardSpec | None = None

    def split(self, model: nn.Module) -> None:
        if not is_sequential(model):
            self.features.refuse("the model", model)
        self.features.find_last_layer(model)
        layout: Layout = "images"
        for name, module in named_children(model):
            layout = self._split_module(model, name, module, layout)
        if layout != "replicated":
            raise UserError("parallel=spatial: the model's outputs are feature maps; use parallel=ddp")

    def _split_module(self, parent: nn.Module, name: str, module: nn.Module, layout: Layout) -> Layout:
        if layout in ("replicated", "sharded"):
            return self.features.split_sequence([(name, module)], layout)
        if is_sequential(module):
            for child_name, child in named_children(module, name):
                layout = self._split_module(module, child_name, child, layout)
            return layout
        if layout == "flattened":
            return self._split_after_flatten(name, module)
        if isinstance(module, nn.Flatten):
            if layout == "images":
                return "replicated"
            self._flattened_spec = self._spec_of_flattened(self.maps[module])
            if self._flattened_spec is not None:
                return "flattened"
            self._gather_before(module)
            return "replicated"
        if type(module) in (nn.Conv2d, nn.MaxPool2d, LocallyConnected2d):
            self._split_windowed(name, module, replicated_input=layout == "images")
            return "rows"
        if layout == "images":
            start, stop = local_strip(self.heights[module], self.model_group)
            transform_input(module, lambda images: images[:, :, start:stop])
        return self._split_rowwise(parent, name, module)

    def _split_rowwise(self, parent: nn.Module, name: str, module: nn.Module) -> Layout:
        if type(module) in PROJECTED:
            for child_name, child in named_children(module, name):
                self._split_module(module, child_name, child, "rows")
            return "rows"
        match module:
            case GlobalAveragePool():
                convert(module, RowAveragePool, model_group=self.model_group, height=self.heights[module])
                return "replicated"
            case nn.AdaptiveAvgPool2d():
                self._gather_before(module)
                return "replicated"
            case ZeroPadShortcut():
                windows = RowWindows(self.heights[module], 1, module.stride, 0, 1, self.model_group, False)
                convert(module, RowZeroPadShortcut, windows=windows)
            case nn.BatchNorm2d() if type(module) is nn.BatchNorm2d:
                self._mark_partial_grads(name, module)
                parent._modules[name.rpartition(".")[2]] = RowBatchNorm2d(module, self.model_group.process_group)
            case _DropoutNd():
                height = self.heights[module]
                spec = ShardSpec(2, slice(*local_strip(height, self.model_group)), height)
                self.features.dropouts[module] = lambda _: spec
            case _NormBase() | nn.GroupNorm() | nn.LayerNorm():
                raise UserError(
                    f"parallel=spatial: {name} is a {type(module).__name__}, which averages over all pixels of a map, "
                    "but each rank has a strip; use model.norm=batch (without norm_ghost_batch) or model.norm=none"
                )
            case _ if not isinstance(module, _POINTWISE):
                self.features.refuse(name, module)
        return "rows"

    def _spec_of_flattened(self, maps: torch.Size) -> ShardSpec | None:
        """Returns which features of flattened maps are in this rank's strip; None if strips are unequal."""
        _, channels, height, width = maps
        if height % self.model_group.size:
            return None
        start, stop = local_strip(height, self.model_group)
        positions = torch.arange(channels * height * width).view(channels, height, width)
        return ShardSpec(1, positions[:, start:stop].reshape(-1), positions.numel(), split_factor=channels)

    def _split_after_flatten(self, name: str, module: nn.Module) -> Layout:
        # The first layer is split by its inputs: it reads the unchanged strip, and only its outputs are exchanged.
        spec = self._flattened_spec
        assert spec is not None
        if isinstance(module, nn.Linear):
            replace_by_shard(module, name, "weight", spec, self.features.shard_specs)
            module.in_features //= self.model_group.size
            convert(module, InputSplitLinear, model_group=self.model_group, scatter_input=False)
            return "replicated"
        if isinstance(module, _DropoutNd):
            self.features.dropouts[module] = lambda _: spec
        elif not isinstance(module, _POINTWISE):
            self.features.refuse(name, module)
        return "flattened"

    def _split_windowed(self, name: str, layer: nn.Module, *, replicated_input: bool) -> None:
        """Converts a layer that slides windows over full maps: it then reads a strip with its halo."""
        build = partial(
            RowWindows, self.heights[layer], model_group=self.model_group, replicated_input=replicated_input
        )
        if isinstance(layer, LocallyConnected2d):
            windows = build(kernel=layer.kernel, stride=layer.stride, padding=layer.padding, dilation=1)
            self._shard_positions(name, layer, *windows.output_rows[self.model_group.rank])
            convert(layer, RowLocallyConnected2d, windows=windows)
            return
        assert isinstance(layer, nn.Conv2d | nn.MaxPool2d)
        unsupported = getattr(layer, "ceil_mode", False) or getattr(layer, "return_indices", False)
        if unsupported or isinstance(layer.padding, str) or getattr(layer, "padding_mode", "zeros") != "zeros":
            self.features.refuse(name, layer)
        kernel, stride, padding, dilation = (
            value[0] if isinstance(value, tuple) else value  # along the rows
            for value in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        )
        windows = build(kernel=kernel, stride=stride, padding=padding, dilation=dilation)  # type: ignore[arg-type]
        if isinstance(layer, nn.Conv2d):
            self._mark_partial_grads(name, layer)
        convert(layer, RowConv2d if isinstance(layer, nn.Conv2d) else RowMaxPool2d, windows=windows)

    def _shard_positions(self, name: str, layer: LocallyConnected2d, start: int, stop: int) -> None:
        height, width = layer.extent
        if height % self.model_group.size:
            raise UserError(
                f"parallel=spatial: the {height} rows of filters of {name} cannot be divided evenly among "
                f"{self.model_group.size} processes"
            )
        positions = ShardSpec(0, slice(start * width, stop * width), height * width)  # in row order
        replace_by_shard(layer, name, "weight", positions, self.features.shard_specs)
        replace_by_shard(layer, name, "bias", ShardSpec(1, slice(start, stop), height), self.features.shard_specs)

    def _gather_before(self, module: nn.Module) -> None:
        """Gathers the full maps on all ranks. Their gradient is equal on all ranks: backward only slices it."""
        height, group = self.heights[module], self.model_group
        held = row_strips(height, group.size)
        start, stop = held[group.rank]

        def gather_rows(strip: Tensor) -> Tensor:
            return _redistribute_rows(strip, held, [(0, height)] * group.size, group)

        transform_input(
            module, lambda strip: with_adjoint(strip, gather_rows, lambda gradient: gradient[:, :, start:stop])
        )

    def _mark_partial_grads(self, name: str, module: nn.Module) -> None:
        self.partial_grads += [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]


@torch.no_grad()
def _input_shapes(model: nn.Module, input_shape: tuple[int, ...]) -> dict[nn.Module, torch.Size]:
    """Returns the shape of the feature maps that each module reads, from one forward."""
    shapes: dict[nn.Module, torch.Size] = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].ndim == 4:
            shapes[module] = inputs[0].shape

    like = next(model.parameters())
    with evaluation_mode(model), register_module_forward_pre_hook(record):
        model(torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device))
    return shapes


def split_rows(model: nn.Module, input_shape: tuple[int, ...], model_group: ModelGroup) -> ShardingPlan:
    if len(input_shape) != 3:
        raise UserError(
            f"parallel=spatial: splits images by rows, but the inputs have the shape {list(input_shape)}; "
            "use parallel=ddp"
        )
    splitter = SpatialSplitter(model_group, _input_shapes(model, input_shape))
    splitter.split(model)
    notes = []
    smallest = min(splitter.heights.values(), default=model_group.size)
    if smallest < model_group.size:
        notes.append(f"parallel=spatial: some maps have only {smallest} rows, fewer than processes; some will be idle")
    return ShardingPlan(splitter.features.shard_specs, splitter.features.dropouts, splitter.partial_grads, notes)


def spatial(*, device: torch.device, accumulate: int, **keys: Unpack[ProcessKeys]) -> Mode:
    """Joins the process group and builds the mode."""
    build = partial(ModelParallel, name="spatial", accumulate=accumulate, split=split_rows)
    return join_mode("spatial", device, build, keys)
