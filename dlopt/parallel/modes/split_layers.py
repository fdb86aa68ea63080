"""Layers split by their inputs (Megatron's row-parallel layers), and residual blocks that share one reduction."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dlopt.models.preact import PreActBlock, PreActBottleneck
from dlopt.models.resnet import BasicBlock, Bottleneck
from dlopt.parallel.collectives import ModelGroup, ShardSpec


def distribute(model: nn.Module, mesh: Any, shard_specs: Mapping[str, ShardSpec]) -> None:
    """Replaces every parameter, and every sharded buffer, by a DTensor on the one-dimensional `mesh`.

    `shard_specs`: the sharded tensors by name; all others are replicated.

    Optimizer, clipping and checkpoints see DTensors, with full shapes. Hooks swap in the local shards for each forward:
    layers here choose their collectives themselves, and DTensor's dispatcher would insert others.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    def placement(spec: ShardSpec | None) -> Any:
        if spec is None:
            return Replicate()
        return Shard(spec.dim) if spec.split_factor == 1 else _StridedShard(spec.dim, split_factor=spec.split_factor)

    def to_dtensor(name: str, tensor: Tensor) -> Any:
        return DTensor.from_local(tensor.detach(), mesh, [placement(shard_specs.get(name))], run_check=False)

    replaced: dict[nn.Parameter, nn.Parameter] = {}  # layers that share a parameter continue to share it
    for prefix, module in model.named_modules():
        has_dtensors = False
        for key, parameter in module.named_parameters(prefix, recurse=False):
            name, has_dtensors = key.rpartition(".")[2], True
            if parameter not in replaced:
                dtensor = to_dtensor(key, parameter)
                replaced[parameter] = nn.Parameter(dtensor, requires_grad=parameter.requires_grad)
            setattr(module, name, replaced[parameter])
        for key, buffer in module.named_buffers(prefix, recurse=False):
            if key in shard_specs:
                module._buffers[key.rpartition(".")[2]], has_dtensors = to_dtensor(key, buffer), True
        if has_dtensors:
            module.register_forward_pre_hook(_swap_in_local)
            module.register_forward_hook(_restore_dtensors, always_call=True)


def to_local(tensor: Tensor) -> Tensor:
    """Returns this rank's shard, differentiably (`shards.local` detaches it)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _swap_in_local(module: nn.Module, inputs: object) -> None:
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and hasattr(tensor, "to_local"):
                kept.append((tensors, name, tensor))
                tensors[name] = to_local(tensor)  # type: ignore[assignment]
    module.__dict__["_dtensors"] = kept


def _restore_dtensors(module: nn.Module, inputs: object, output: object) -> None:
    for tensors, name, tensor in module.__dict__.pop("_dtensors", ()):
        tensors[name] = tensor


class InputSplitLayer(nn.Module):
    """A layer with sharded input features: sums the partial outputs of all ranks, then adds the bias once.

    `scatter_input`: the input is replicated, and each rank selects its features first.
    """

    model_group: ModelGroup
    scatter_input: bool
    bias: Any

    def forward(self, inputs: Tensor) -> Tensor:
        shard = self.model_group.scatter(inputs) if self.scatter_input else inputs
        # After the sum: a bias in each rank's term would be added once per rank.
        return self.add_bias(self.model_group.reduce(self.partial_output(shard)))

    def partial_output(self, shard: Tensor) -> Tensor:
        """Returns this rank's term of the sum, without bias."""
        raise NotImplementedError

    def add_bias(self, total: Tensor) -> Tensor:
        return total if self.bias is None else total + to_local(self.bias).view(-1, *(1 for _ in total.shape[2:]))


class InputSplitConv2d(InputSplitLayer, nn.Conv2d):
    def partial_output(self, shard: Tensor) -> Tensor:
        return self._conv_forward(shard, to_local(self.weight), None)


class InputSplitLinear(InputSplitLayer, nn.Linear):
    def partial_output(self, shard: Tensor) -> Tensor:
        return nn.functional.linear(shard, to_local(self.weight))

    def add_bias(self, total: Tensor) -> Tensor:
        return total if self.bias is None else total + to_local(self.bias)


# -- blocks with a projection shortcut, which is split by inputs, too, and reduced together with the last convolution of
#    the branch.


class ProjectedBasicBlock(BasicBlock):
    model_group: ModelGroup

    def forward(self, maps: Tensor) -> Tensor:
        shared = self.model_group.copy(maps)
        branch = self.act1(self.norm1(self.conv1(shared)))
        branch, skip = _reduce_both(self.model_group, self.conv2, branch, self.shortcut, shared)
        return self.act2(self.norm2(branch) + skip)


class ProjectedBottleneck(Bottleneck):
    model_group: ModelGroup

    def forward(self, maps: Tensor) -> Tensor:
        shared = self.model_group.copy(maps)
        branch = self.act1(self.norm1(self.conv1(shared)))
        branch = self.act2(self.norm2(self.conv2(branch)))
        branch, skip = _reduce_both(self.model_group, self.conv3, branch, self.shortcut, shared)
        return self.act3(self.norm3(branch) + skip)


class ProjectedPreActBlock(PreActBlock):
    model_group: ModelGroup

    def forward(self, maps: Tensor) -> Tensor:
        shared = self.model_group.copy(self.act1(self.norm1(maps)))
        branch = self.dropout(self.act2(self.norm2(self.conv1(shared))))
        return _reduce_sum(self.model_group, self.conv2, branch, self.shortcut, shared)


class ProjectedPreActBottleneck(PreActBottleneck):
    model_group: ModelGroup

    def forward(self, maps: Tensor) -> Tensor:
        shared = self.model_group.copy(self.act1(self.norm1(maps)))
        branch = self.act2(self.norm2(self.conv1(shared)))
        branch = self.dropout(self.act3(self.norm3(self.conv2(branch))))
        return _reduce_sum(self.model_group, self.conv3, branch, self.shortcut, shared)


def _reduce_both(
    model_group: ModelGroup, conv: nn.Module, branch: Tensor, shortcut: nn.Module | None, shared: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the outputs of `conv` and of the shortcut (a convolution and its norm), with one all-reduce for both."""
    assert shortcut is not None
    projection, norm = shortcut.children()
    assert isinstance(conv, InputSplitConv2d) and isinstance(projection, InputSplitConv2d)
    # Concatenated, not added: the norm of the shortcut needs the projection's output separately.
    both = torch.cat(_partial_outputs(model_group, conv, branch, projection, shared), dim=1)
    total, skip = model_group.reduce(both).chunk(2, dim=1)
    return conv.add_bias(total), norm(projection.add_bias(skip))


def _reduce_sum(
    model_group: ModelGroup, conv: nn.Module, branch: Tensor, projection: nn.Module, shared: Tensor
) -> Tensor:
    assert isinstance(conv, InputSplitConv2d) and isinstance(projection, InputSplitConv2d)
    total, skip = _partial_outputs(model_group, conv, branch, projection, shared)
    return projection.add_bias(conv.add_bias(model_group.reduce(total + skip)))


def _partial_outputs(
    model_group: ModelGroup, conv: InputSplitConv2d, branch: Tensor, projection: InputSplitConv2d, shared: Tensor
) -> tuple[Tensor, Tensor]:
    # A plain slice, not `scatter`: `ModelGroup.copy` before it sums the gradients of all ranks already.
    local_slice = shared[:, model_group.local_slice(shared.shape[1])]
    shard = model_group.scatter(branch) if conv.scatter_input else branch
    return conv.partial_output(shard), projection.partial_output(local_slice)


PROJECTED: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: ProjectedBasicBlock,
    Bottleneck: ProjectedBottleneck,
    PreActBlock: ProjectedPreActBlock,
    PreActBottleneck: ProjectedPreActBottleneck,
}


def convert(module: nn.Module, kind: type[nn.Module], **attributes: object) -> None:
    """Turns `module` into an instance of a subclass in place; tensors, names and hooks stay."""
    for name, value in attributes.items():
        setattr(module, name, value)
    # Not replaced by another module: blocks, optimizer groups and hooks keep their references to this one.
    module.__class__ = kind


def transform_input(module: nn.Module, action: Callable[[Tensor], Tensor]) -> None:
    """Applies `action` to the input of every forward of `module`."""
    module.register_forward_pre_hook(lambda _, inputs: (action(inputs[0]),))


def transform_output(module: nn.Module, action: Callable[[Tensor], Tensor]) -> None:
    """Applies `action` to the output of every forward of `module`."""
    module.register_forward_hook(lambda _, __, output: action(output))
