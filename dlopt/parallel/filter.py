"""Model parallelism by filters: every rank has a part of each layer's filters or units, and sees the whole mini-batch.

A convolution or linear layer is split by its outputs, and its outputs stay split until a layer needs all of them. The
last layer of a residual block, and that of the net, is split by its inputs instead: a block of two convolutions costs
one sum over ranks forward and one backward (Krizhevsky 2014, "One weird trick for parallelizing convolutional neural
networks"; Shoeybi et al. 2019, "Megatron-LM", section 3).
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from dlopt.errors import UserError
from dlopt.models.alexnet import TwoColumnAlexNet
from dlopt.models.layers import ACTIVATIONS, GlobalAveragePool
from dlopt.models.locally_connected import LocallyConnected2d
from dlopt.models.mlp import ResidualPair
from dlopt.parallel.collectives import Cut, Ranks
from dlopt.parallel.mode import Mode
from dlopt.parallel.model_parallel import ModelParallel, Plan, check_precision
from dlopt.parallel.process_group import ProcessKeys, join
from dlopt.parallel.split_layers import PROJECTED, InputSplitConv2d, InputSplitLinear, become, before, behind

Layout = Literal["whole", "split"]  # of features, along dimension 1

_BY_CHANNEL = (
    *ACTIVATIONS.values(), nn.Identity, nn.Flatten, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, GlobalAveragePool,
)  # fmt: skip
_WEIGHTED = (nn.Conv2d, nn.Linear, LocallyConnected2d)


class Splitter:
    """Splits a model in place. Names of parameters and buffers stay; `cuts` says by name which part a rank has.

    `dropouts`: how those dropouts that see a part of the features know which (`dlopt.parallel.dropout`).
    Errors: UserError naming the layer that cannot be split.
    """

    def __init__(self, ranks: Ranks, mode: str = "filter") -> None:
        self.ranks = ranks
        self.mode = mode
        self.cuts: dict[str, Cut] = {}
        self.dropouts: dict[nn.Module, Callable[[Tensor], Cut]] = {}
        self._last: nn.Module | None = None

    def split(self, model: nn.Module) -> None:
        if isinstance(model, TwoColumnAlexNet):
            self._columns(model)
        elif is_chain(model):
            self.see(model)
            if self.chain(named(model), "whole") == "split":
                behind(model, self.ranks.gathered)
        else:
            self.refuse("the model", model)

    def see(self, model: nn.Module) -> None:
        """Finds the last layer, whose outputs all ranks need: it is split by its inputs."""
        weighted = [each for each in model.modules() if type(each) in _WEIGHTED]
        self._last = next((each for each in weighted[-1:] if isinstance(each, nn.Linear)), None)

    def _columns(self, model: TwoColumnAlexNet) -> None:
        """Every segment of both columns is split; between the segments, everything is whole."""
        for name, column in named(model.columns, "columns"):
            for segment_name, segment in named(column, name):
                if self.chain([(segment_name, segment)], "whole") == "split":
                    behind(segment, self.ranks.gathered)
        self.split_inputs("head", model.head, "whole")

    def chain(self, modules: Iterable[tuple[str, nn.Module]], layout: Layout) -> Layout:
        """Splits modules that follow each other. `layout`: of what the first of them gets; returns the last one's."""
        for name, module in modules:
            layout = self._next(name, module, layout)
        return layout

    def _next(self, name: str, module: nn.Module, layout: Layout) -> Layout:
        if is_chain(module):
            return self.chain(named(module, name), layout)
        if type(module) in (*PROJECTED, ResidualPair):
            if layout == "split":
                before(module, self.ranks.gathered)
            self._block(name, module)
            return "whole"
        if type(module) in _WEIGHTED:
            if module is self._last:
                self.split_inputs(name, module, layout)
                return "whole"
            self._split_outputs(name, module, layout)
            return "split"
        match module:
            case _NormBase() | nn.GroupNorm() | nn.LayerNorm() | nn.LocalResponseNorm():
                return self._norm(name, module, layout)
            case _DropoutNd():
                if layout == "split":
                    self.dropouts[module] = self.ranks.cut
                return layout
        if not isinstance(module, _BY_CHANNEL) or (isinstance(module, nn.Flatten) and module.start_dim != 1):
            self.refuse(name, module)
        return layout

    # -- layers

    def _split_outputs(self, name: str, layer: nn.Module, layout: Layout, *, copied: bool = True) -> None:
        """`copied=False`: the input is one of `Ranks.copied` already."""
        self._refuse_groups(name, layer)
        if isinstance(layer, LocallyConnected2d):
            outputs, dims = layer.weight.shape[1], (1, 0)
        else:
            key = "out_features" if isinstance(layer, nn.Linear) else "out_channels"
            outputs, dims = getattr(layer, key), (0, 0)
            setattr(layer, key, outputs // self.ranks.size)
        what = "units" if isinstance(layer, nn.Linear) else "filters"
        for tensor, dim in zip(("weight", "bias"), dims, strict=True):
            self._own(name, layer, tensor, dim, outputs, what)
        if layout == "split":
            before(layer, lambda part: self.ranks.gathered(part, copied=True))
        elif copied:
            before(layer, self.ranks.copied)

    def split_inputs(self, name: str, layer: nn.Module, layout: Layout) -> None:
        self._refuse_groups(name, layer)
        is_linear = isinstance(layer, nn.Linear)
        key = "in_features" if is_linear else "in_channels"
        inputs = getattr(layer, key)
        self._own(name, layer, "weight", 1, inputs, "inputs")
        setattr(layer, key, inputs // self.ranks.size)
        kind = InputSplitLinear if is_linear else InputSplitConv2d
        become(layer, kind, ranks=self.ranks, cuts=layout == "whole")

    def _norm(self, name: str, norm: nn.Module, layout: Layout) -> Layout:
        if layout == "whole":
            return layout
        if isinstance(norm, nn.GroupNorm) and norm.num_groups % self.ranks.size == 0:
            norm.num_groups //= self.ranks.size
            norm.num_channels //= self.ranks.size
        elif isinstance(norm, _NormBase):
            norm.num_features //= self.ranks.size
        else:  # it mixes the channels of different ranks
            before(norm, self.ranks.gathered)
            return "whole"
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            if getattr(norm, tensor, None) is not None:
                self._own(name, norm, tensor, 0, len(getattr(norm, tensor)), "channels")
        return layout

    # -- blocks

    def _block(self, name: str, block: nn.Module) -> None:
        if isinstance(block, ResidualPair):
            inner = self.chain([(f"{name}.layer1", block.layer1)], "whole")
            (first, linear), *others = named(block.layer2, f"{name}.layer2")
            self.split_inputs(first, linear, inner)
            self.chain(others, "whole")
            return
        shortcut: Any = block.shortcut
        convs = [each for each in shortcut.modules() if isinstance(each, nn.Conv2d)] if shortcut is not None else []
        projection = convs[0] if convs else None
        branch = [(n, m) for n, m in named(block, name) if m is not shortcut]
        *body, last = [number for number, (_, m) in enumerate(branch) if isinstance(m, nn.Conv2d)]
        layout: Layout = "whole"
        for number, (part_name, part) in enumerate(branch):
            if number == body[0]:
                self._split_outputs(part_name, part, layout, copied=projection is None)
                layout = "split"
            elif number == last:
                self.split_inputs(part_name, part, layout)
                layout = "whole"
            else:
                layout = self._next(part_name, part, layout)
        if projection is not None:
            place = f"{name}.shortcut" if projection is shortcut else f"{name}.shortcut.0"
            self.split_inputs(place, projection, "split")
            become(block, PROJECTED[type(block)], ranks=self.ranks)

    # -- tensors

    def _own(self, name: str, module: nn.Module, tensor: str, dim: int, size: int, what: str) -> None:
        """Replaces a parameter or buffer of `module` by the rank's equal part of it."""
        if size % self.ranks.size:
            fitting = [str(n) for n in range(2, size + 1) if size % n == 0][:5]
            raise UserError(
                f"parallel={self.mode}: {name} has {size} {what}, which {self.ranks.size} processes cannot share "
                f"evenly; use {' or '.join(fitting) or 'one'} processes"
            )
        take(module, name, tensor, Cut(dim, self.ranks.own(size), size), self.cuts)

    def _refuse_groups(self, name: str, layer: nn.Module) -> None:
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            raise UserError(f"parallel={self.mode}: {name} is a convolution in groups, which it does not split")

    def refuse(self, name: str, module: nn.Module) -> None:
        raise UserError(
            f"parallel={self.mode}: {name} is a {type(module).__name__}, which it does not know how to split; it "
            "splits residual and plain nets, VGG, AlexNet, locally connected nets and MLPs; use parallel=ddp"
        )


def split_filters(model: nn.Module, input_shape: tuple[int, ...], ranks: Ranks) -> Plan:
    splitter = Splitter(ranks)
    splitter.split(model)
    return Plan(splitter.cuts, splitter.dropouts)


def filters(
    *,
    device: torch.device,
    accumulate: int,
    precision: str,
    **keys: Unpack[ProcessKeys],
) -> Mode:
    """Builds the mode of this process, which joins its group. Raises `UserError` where the keys do not fit together."""
    check_precision("filter", precision)
    joined = join("filter", device, **keys)
    if joined is None:
        return Mode(device, "filter")
    return ModelParallel("filter", *joined, accumulate=accumulate, split=split_filters, rows=1, sync=True)


def is_chain(module: nn.Module) -> bool:
    """Whether its children are called one after the other, and nothing else happens."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def named(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """Children with their full names, in their order."""
    return [(f"{prefix}.{name}" if prefix else name, child) for name, child in module.named_children()]


@torch.no_grad()
def take(module: nn.Module, name: str, tensor: str, cut: Cut, cuts: dict[str, Cut]) -> None:
    """Replaces a parameter or buffer (None stays) by this part of it, and notes it in `cuts`."""
    whole: Tensor | None = getattr(module, tensor)
    if whole is None:
        return
    own = cut.of(whole).clone()
    is_parameter = isinstance(whole, nn.Parameter)
    setattr(module, tensor, nn.Parameter(own, requires_grad=whole.requires_grad) if is_parameter else own)
    cuts[f"{name}.{tensor}"] = cut
