"""The layers of a model for cost models: counted on the meta device, timed on a real one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from dlopt.machine.device import synchronized_time

_BLOCK_CONVOLUTIONS = ("conv1", "conv2", "conv3")


Kind = Literal["convolution", "linear", "other"]


@dataclass(frozen=True)
class Layer:
    """A leaf module with its costs; counts are per sample."""

    name: str
    block: str | None  # the residual block that it belongs to
    role: Literal["first", "inner", "last", "alone"]  # first and last convolution of a block; alone: outside of blocks
    kind: Kind
    operations: float  # of the forward; a multiplication and an addition are two
    parameters: int
    inputs: int
    outputs: int
    units: int  # output channels or features
    rows: int  # of the output map; 1 without one
    halo: int  # input values that a strip of rows needs from the neighbour at one boundary
    forward: float = 0.0  # seconds, of a batch or a sample; 0 if not timed
    backward: float = 0.0


def layers_of(make: Callable[[], nn.Module], input_shape: Sequence[int]) -> list[Layer]:
    """Returns the layers in the order of execution. `make` builds the model; `input_shape`: of one sample."""
    with torch.device("meta"):
        module = make().eval()
        return [layer for layer, _, _ in _traced(module, torch.zeros(1, *input_shape))]


def timed(module: nn.Module, inputs: Tensor) -> list[Layer]:
    """Returns the layers with the seconds that each takes alone for this batch, forward and backward.

    Times layers of the same kind and sizes once.
    """
    times: dict[str, tuple[float, float]] = {}
    layers = []
    with torch.no_grad():
        traced = _traced(module.train(), inputs)
    for layer, leaf, shape in traced:
        key = f"{leaf} {shape}"
        if key not in times:
            times[key] = _seconds(leaf, shape, inputs)
        forward, backward = times[key]
        layers.append(replace(layer, forward=forward, backward=backward))
    return layers


def _traced(module: nn.Module, inputs: Tensor) -> list[tuple[Layer, nn.Module, tuple[int, ...]]]:
    traced: list[tuple[Layer, nn.Module, tuple[int, ...]]] = []

    modules = dict(module.named_modules())
    blocks = {name: block for name, block in modules.items() if hasattr(block, "conv1") and hasattr(block, "conv2")}
    leaves = {
        leaf: name for name, leaf in modules.items() if not list(leaf.children()) and not isinstance(leaf, nn.Identity)
    }

    def record(leaf: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if leaf in leaves:
            block = next((prefix for prefix in blocks if leaves[leaf].startswith(f"{prefix}.")), None)
            role = _role(leaves[leaf], block, blocks)
            layer = _layer(leaves[leaf], block, role, leaf, args[0], output, len(inputs))
            traced.append((layer, leaf, tuple(args[0].shape)))

    with register_module_forward_hook(record):
        module(inputs)
    return traced


def _role(name: str, block: str | None, blocks: dict[str, nn.Module]) -> str:
    if block is None:
        return "alone"
    convolutions = [conv for conv in _BLOCK_CONVOLUTIONS if hasattr(blocks[block], conv)]
    short = name.removeprefix(f"{block}.")
    other = "alone" if short.startswith("shortcut") else "inner"
    return {convolutions[0]: "first", convolutions[-1]: "last"}.get(short, other)


def _layer(
    name: str, block: str | None, role: Any, leaf: nn.Module, inputs: Tensor, outputs: Tensor, batch: int
) -> Layer:
    kind: Kind = "other"
    operations, halo, units = float(outputs.numel()), 0, outputs.shape[1]
    if isinstance(leaf, nn.Conv2d):
        kind = "convolution"
        operations = 2.0 * outputs.numel() * leaf.weight[0].numel()
        halo = leaf.kernel_size[0] // 2 * inputs[0, :, 0].numel()
    elif isinstance(leaf, nn.Linear):
        kind = "linear"
        operations = 2.0 * outputs.numel() * leaf.in_features
    elif isinstance(leaf, nn.MaxPool2d | nn.AvgPool2d):
        size = leaf.kernel_size
        halo = ((size if isinstance(size, int) else size[0]) - 1) // 2 * inputs[0, :, 0].numel()
    return Layer(
        name=name,
        block=block,
        role=role,
        kind=kind,
        operations=operations / batch,
        parameters=sum(p.numel() for p in leaf.parameters()),
        inputs=inputs.numel() // batch,
        outputs=outputs.numel() // batch,
        units=units,
        rows=outputs.shape[2] if outputs.ndim == 4 else 1,
        halo=halo * len(inputs) // batch,
    )


def _seconds(leaf: nn.Module, shape: tuple[int, ...], like: Tensor) -> tuple[float, float]:
    """Returns the minimum times of one call, as other processes can only slow it down."""
    inputs = torch.randn(shape, device=like.device, dtype=like.dtype)
    if inputs.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        inputs = inputs.to(memory_format=torch.channels_last)
    inputs.requires_grad_()
    differentiable = [inputs, *leaf.parameters()]
    forward, backward = float("inf"), float("inf")
    for _ in range(4):
        start = synchronized_time(inputs.device)
        outputs = leaf(inputs * 1)  # "* 1": an in-place layer must not modify a leaf tensor
        forward_end = synchronized_time(inputs.device)
        torch.autograd.grad(outputs, differentiable, torch.ones_like(outputs), allow_unused=True)
        end = synchronized_time(inputs.device)
        forward, backward = min(forward, forward_end - start), min(backward, end - forward_end)
    return forward, backward


def parameters(layers: Sequence[Layer]) -> int:
    return sum(layer.parameters for layer in layers)


def operations(layers: Sequence[Layer]) -> float:
    """Returns the operations of the forward pass of one sample."""
    return sum(layer.operations for layer in layers)
