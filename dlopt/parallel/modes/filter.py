"""Tensor parallelism over channels (`parallel=filter`): each layer's filters or units are sharded over ranks.

Every rank processes the whole mini-batch. A layer is split by its outputs (column-parallel in Megatron's terms), and
features stay sharded until a layer needs all of them. The last layer of a residual block, and of the model, is split by
its inputs (row-parallel): a block of two convolutions then needs one all-reduce in forward and one in backward. A GPT
is split by attention heads and hidden features of its MLPs.

Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks"; Shoeybi et al. 2019, "Megatron-LM",
section 3.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from dlopt.basics.errors import UserError
from dlopt.models.alexnet import TwoColumnAlexNet
from dlopt.models.gpt import GPT, GPTBlock
from dlopt.models.layers import ACTIVATIONS, GlobalAveragePool
from dlopt.models.linear import Linear
from dlopt.models.locally_connected import LocallyConnected2d
from dlopt.models.mlp import ResidualPair
from dlopt.parallel.collectives import ModelGroup, ShardSpec
from dlopt.parallel.mode import Mode, join_mode
from dlopt.parallel.modes.chain import is_sequential
from dlopt.parallel.modes.model_parallel import ModelParallel, ShardingPlan
from dlopt.parallel.modes.split_layers import (
    PROJECTED,
    InputSplitConv2d,
    InputSplitLinear,
    convert,
    transform_input,
    transform_output,
)
from dlopt.parallel.processes.process_group import ProcessKeys

Layout = Literal["replicated", "sharded"]  # of features along dimension 1

_CHANNELWISE = (
    *ACTIVATIONS.values(), nn.Identity, nn.Flatten, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, GlobalAveragePool,
)  # fmt: skip
_WEIGHTED = (nn.Conv2d, nn.Linear, Linear, LocallyConnected2d)


@dataclass
class Splitter:
    """Splits a model in place, layer by layer, following the layout of the features from layer to layer.

    `shard_specs`: of sharded parameters and buffers, by name. `dropouts`: feature specs of dropouts with sharded inputs
    (`dlopt.parallel.dropout`). Raises `UserError` naming a layer that cannot be split.
    """

    model_group: ModelGroup
    mode: str = "filter"
    shard_specs: dict[str, ShardSpec] = field(default_factory=dict)
    dropouts: dict[nn.Module, Callable[[Tensor], ShardSpec]] = field(default_factory=dict)
    _last: nn.Module | None = field(default=None, init=False)

    def split(self, model: nn.Module) -> None:
        if isinstance(model, TwoColumnAlexNet):
            self._split_columns(model)
        elif isinstance(model, GPT):
            self._split_gpt(model)
        elif is_sequential(model):
            self.find_last_layer(model)
            if self.split_sequence(named_children(model), "replicated") == "sharded":
                # Every rank computes the loss, for which it needs all outputs.
                transform_output(model, self.model_group.gather)
        else:
            self.refuse("the model", model)

    def find_last_layer(self, model: nn.Module) -> None:
        """Finds the last layer; all ranks need its outputs, so it is split by its inputs."""
        weighted = [module for module in model.modules() if type(module) in _WEIGHTED]
        self._last = next((module for module in weighted[-1:] if isinstance(module, nn.Linear)), None)

    def _split_columns(self, model: TwoColumnAlexNet) -> None:
        # Columns exchange features between segments: there everything is replicated.
        for name, column in named_children(model.columns, "columns"):
            for segment_name, segment in named_children(column, name):
                if self.split_sequence([(segment_name, segment)], "replicated") == "sharded":
                    transform_output(segment, self.model_group.gather)
        self.split_inputs("head", model.head, "replicated")

    def _split_gpt(self, model: GPT) -> None:
        """Splits attention by heads and the MLPs by hidden features: two all-reduces per block in each direction.

        The embedding and the last layer, which may share weights, are replicated.
        """
        for name, block in named_children(model):
            if isinstance(block, GPTBlock):
                attention, mlp = block.attention, block.mlp
                heads = attention.qkv.out_features // (3 * attention.head_width)
                if heads % self.model_group.size:
                    raise UserError(
                        f"parallel={self.mode}: model.heads={heads} cannot be divided evenly among "
                        f"{self.model_group.size} processes; use fewer processes or other heads"
                    )
                # The rows of qkv are ordered by head.
                self._split_outputs(f"{name}.attention.qkv", attention.qkv, "replicated")
                self.split_inputs(f"{name}.attention.project", attention.project, "sharded")
                transform_input(mlp, self.model_group.copy)
                for key, layer in (("up", mlp.up), ("gate", mlp.gate)):
                    if layer is not None:
                        self._split_outputs(f"{name}.mlp.{key}", layer, "replicated", copy_input=False)
                self.split_inputs(f"{name}.mlp.down", mlp.down, "sharded")

    def split_sequence(self, modules: Iterable[tuple[str, nn.Module]], layout: Layout) -> Layout:
        """Splits modules called in sequence. Takes the first input's layout; returns the last output's layout."""
        for name, module in modules:
            layout = self._split_module(name, module, layout)
        return layout

    def _split_module(self, name: str, module: nn.Module, layout: Layout) -> Layout:
        if is_sequential(module):
            return self.split_sequence(named_children(module, name), layout)
        if type(module) in (*PROJECTED, ResidualPair):
            if layout == "sharded":
                # A block adds its input to its output, which is replicated.
                transform_input(module, self.model_group.gather)
            self._split_block(name, module)
            return "replicated"
        if type(module) in _WEIGHTED:
            if module is self._last:
                self.split_inputs(name, module, layout)
                return "replicated"
            self._split_outputs(name, module, layout)
            return "sharded"
        match module:
            case _NormBase() | nn.GroupNorm() | nn.LayerNorm() | nn.LocalResponseNorm():
                return self._split_norm(name, module, layout)
            case _DropoutNd():
                if layout == "sharded":
                    self.dropouts[module] = self.model_group.shard_spec
                return layout
        if not isinstance(module, _CHANNELWISE) or (isinstance(module, nn.Flatten) and module.start_dim != 1):
            self.refuse(name, module)
        return layout

    # -- layers

    def _split_outputs(self, name: str, layer: nn.Module, layout: Layout, *, copy_input: bool = True) -> None:
        """`copy_input=False`: the block applies `ModelGroup.copy` to the input."""
        self._refuse_groups(name, layer)
        if isinstance(layer, LocallyConnected2d):
            outputs, dims = layer.weight.shape[1], (1, 0)
        else:
            key = "out_features" if isinstance(layer, nn.Linear) else "out_channels"
            outputs, dims = getattr(layer, key), (0, 0)
            setattr(layer, key, outputs // self.model_group.size)
        what = "units" if isinstance(layer, nn.Linear) else "filters"
        for tensor, dim in zip(("weight", "bias"), dims, strict=True):
            self._shard(name, layer, tensor, dim, outputs, what)
        # Every filter reads all features: backward sums the gradients of the features over the ranks.
        if layout == "sharded":
            transform_input(layer, lambda shard: self.model_group.gather(shard, reduce_grad=True))
        elif copy_input:
            transform_input(layer, self.model_group.copy)

    def split_inputs(self, name: str, layer: nn.Module, layout: Layout) -> None:
        self._refuse_groups(name, layer)
        is_linear = isinstance(layer, nn.Linear)
        key = "in_features" if is_linear else "in_channels"
        inputs = getattr(layer, key)
        self._shard(name, layer, "weight", 1, inputs, "inputs")
        setattr(layer, key, inputs // self.model_group.size)
        kind = InputSplitLinear if is_linear else InputSplitConv2d
        convert(layer, kind, model_group=self.model_group, scatter_input=layout == "replicated")

    def _split_norm(self, name: str, norm: nn.Module, layout: Layout) -> Layout:
        if layout == "replicated":
            return layout
        if isinstance(norm, nn.GroupNorm) and norm.num_groups % self.model_group.size == 0:
            norm.num_groups //= self.model_group.size
            norm.num_channels //= self.model_group.size
        elif isinstance(norm, _NormBase):
            norm.num_features //= self.model_group.size
        else:  # it normalizes over channels of several ranks
            transform_input(norm, self.model_group.gather)
            return "replicated"
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            if getattr(norm, tensor, None) is not None:
                self._shard(name, norm, tensor, 0, len(getattr(norm, tensor)), "channels")
        return layout

    # -- blocks

    def _split_block(self, name: str, block: nn.Module) -> None:
        if isinstance(block, ResidualPair):
            inner = self.split_sequence([(f"{name}.layer1", block.layer1)], "replicated")
            (first, linear), *others = named_children(block.layer2, f"{name}.layer2")
            self.split_inputs(first, linear, inner)
            self.split_sequence(others, "replicated")
            return
        shortcut: Any = block.shortcut
        convs = [m for m in shortcut.modules() if isinstance(m, nn.Conv2d)] if shortcut is not None else []
        projection = convs[0] if convs else None
        branch = [(n, m) for n, m in named_children(block, name) if m is not shortcut]
        *body, last = [number for number, (_, m) in enumerate(branch) if isinstance(m, nn.Conv2d)]
        layout: Layout = "replicated"
        for number, (layer_name, layer) in enumerate(branch):
            if number == body[0]:
                self._split_outputs(layer_name, layer, layout, copy_input=projection is None)
                layout = "sharded"
            elif number == last:
                self.split_inputs(layer_name, layer, layout)
                layout = "replicated"
            else:
                layout = self._split_module(layer_name, layer, layout)
        if projection is not None:
            projection_name = f"{name}.shortcut" if projection is shortcut else f"{name}.shortcut.0"
            self.split_inputs(projection_name, projection, "sharded")
            convert(block, PROJECTED[type(block)], model_group=self.model_group)

    # -- tensors

    def _shard(self, name: str, module: nn.Module, tensor: str, dim: int, size: int, what: str) -> None:
        """Replaces a parameter or buffer of `module` by this rank's equal shard. `what`: for the error message."""
        if size % self.model_group.size:
            divisors = [str(n) for n in range(2, size + 1) if size % n == 0][:5]
            raise UserError(
                f"parallel={self.mode}: the {size} {what} of {name} cannot be divided evenly among "
                f"{self.model_group.size} processes; use {' or '.join(divisors) or 'one'} processes"
            )
        spec = ShardSpec(dim, self.model_group.local_slice(size), size)
        replace_by_shard(module, name, tensor, spec, self.shard_specs)

    def _refuse_groups(self, name: str, layer: nn.Module) -> None:
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            raise UserError(
                f"parallel={self.mode}: {name} is a grouped convolution, which is not supported; use parallel=ddp"
            )

    def refuse(self, name: str, module: nn.Module) -> None:
        raise UserError(
            f"parallel={self.mode}: {name} is a {type(module).__name__}, which is not supported; use parallel=ddp, or "
            "a residual or plain net, VGG, AlexNet, a locally connected net, an MLP or a GPT"
        )


def split_filters(model: nn.Module, input_shape: tuple[int, ...], model_group: ModelGroup) -> ShardingPlan:
    splitter = Splitter(model_group)
    splitter.split(model)
    return ShardingPlan(splitter.shard_specs, splitter.dropouts)


def filters(*, device: torch.device, accumulate: int, **keys: Unpack[ProcessKeys]) -> Mode:
    """Joins the process group and builds the mode."""
    build = partial(ModelParallel, name="filter", accumulate=accumulate, split=split_filters)
    return join_mode("filter", device, build, keys)


def named_children(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """Returns the children with their full names, in order."""
    return [(f"{prefix}.{name}" if prefix else name, child) for name, child in module.named_children()]


@torch.no_grad()
def replace_by_shard(
    module: nn.Module, name: str, tensor: str, spec: ShardSpec, shard_specs: dict[str, ShardSpec]
) -> None:
    """Replaces a parameter or buffer by its shard and adds it to `shard_specs`. None stays None."""
    full: Tensor | None = getattr(module, tensor)
    if full is None:
        return
    shard = spec.select(full).clone()  # a copy: a view would keep the full tensor in memory
    is_parameter = isinstance(full, nn.Parameter)
    setattr(module, tensor, nn.Parameter(shard, requires_grad=full.requires_grad) if is_parameter else shard)
    shard_specs[f"{name}.{tensor}"] = spec
