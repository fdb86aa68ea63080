"""A model layer by layer: shapes, parameters, operations, memory of what the backward pass needs; and layers' times.

`summarize` counts for `dlopt summary`; `layers_of` and `timed` give the layers as a cost calculation sees them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class LayerSummary:
    """One layer that holds no other, and was called."""

    name: str
    kind: str
    output: tuple[int, ...]  # of one sample
    parameters: int
    macs: int  # multiply-accumulates of the forward pass, per sample


@dataclass(frozen=True)
class ModelSummary:
    layers: list[LayerSummary]
    parameters: int
    trainable: int
    parameter_bytes: int
    buffer_bytes: int
    forward_macs: int  # per sample
    update_flops: int  # of forward and backward, per sample: two per multiply-accumulate
    activation_bytes: int  # kept for the backward pass, for a batch
    batch: int


def summarize(module: nn.Module, inputs: Tensor) -> ModelSummary:
    """Runs `inputs` [B, ...] forward and backward on the meta device, where nothing is computed.

    Operations are those of matrix products, convolutions and attention (`torch.utils.flop_counter`), as papers count
    them; normalization and activations are left out. `module` must be on the meta device.
    """
    module.train()
    shapes: dict[str, tuple[int, ...]] = {}
    flops: dict[str, int] = {}
    batch = len(inputs)
    leaves = {name: each for name, each in module.named_modules() if not list(each.children())}
    names = {leaf: name for name, leaf in leaves.items()}
    counter = FlopCounterMode(display=False)

    def before(leaf: nn.Module, _: Any) -> None:
        flops[names[leaf]] = flops.get(names[leaf], 0) - counter.get_total_flops()

    def after(leaf: nn.Module, _: Any, output: Any) -> None:
        flops[names[leaf]] += counter.get_total_flops()
        if isinstance(output, Tensor):
            shapes.setdefault(names[leaf], tuple(output.shape[1:]))

    with ExitStack() as hooks:
        hooks.callback(module.zero_grad)
        for leaf in leaves.values():
            hooks.enter_context(leaf.register_forward_pre_hook(before))
            hooks.enter_context(leaf.register_forward_hook(after))
        with counter, kept_for_backward(module) as kept:
            outputs = module(inputs)
            forward = counter.get_total_flops()
            outputs.sum().backward()
        total = counter.get_total_flops()
    layers = [
        LayerSummary(name, type(leaves[name]).__name__, shape, _count(leaves[name]), flops[name] // 2 // batch)
        for name, shape in shapes.items()
    ]
    return ModelSummary(
        layers=layers,
        parameters=_count(module),
        trainable=sum(p.numel() for p in module.parameters() if p.requires_grad),
        parameter_bytes=sum(p.numel() * p.element_size() for p in module.parameters()),
        buffer_bytes=sum(b.numel() * b.element_size() for b in module.buffers()),
        forward_macs=forward // 2 // batch,
        update_flops=total // batch,
        activation_bytes=sum(kept.values()),
        batch=batch,
    )


@contextmanager
def kept_for_backward(module: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd saves within, but for the model's own tensors and views of one storage."""
    own = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage's address may come again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in kept:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# -- layers as a cost calculation sees them: counted on the meta device, timed on a real one

_BLOCK_CONVOLUTIONS = ("conv1", "conv2", "conv3")


@dataclass(frozen=True)
class Layer:
    """A layer without layers in it; counts are for one sample."""

    name: str
    block: str | None  # the residual block that it belongs to
    role: Literal["first", "inner", "last", "alone"]  # first and last convolution of a block; alone: outside of blocks
    kind: Literal["convolution", "linear", "other"]
    operations: float  # of the forward; a multiplication and an addition are two
    parameters: int
    inputs: int
    outputs: int
    units: int  # output channels or features
    rows: int  # of the output map; 1 without one
    halo: int  # input values that a strip of rows needs from a neighbour, at one boundary
    forward: float = 0.0  # seconds, where it was timed
    backward: float = 0.0


def layers_of(make: Callable[[], nn.Module], input_shape: Sequence[int]) -> list[Layer]:
    """The layers in the order in which they are used. `make` builds the model; `input_shape`: of one sample."""
    with torch.device("meta"):
        module = make().eval()
        return [layer for layer, _, _ in _traced(module, torch.zeros(1, *input_shape))]


def timed(module: nn.Module, inputs: Tensor, *, rounds: int = 3) -> list[Layer]:
    """The same, with the seconds that each layer alone takes for this batch, forward and backward.

    Layers of the same kind with the same sizes are timed once.
    """
    times: dict[str, tuple[float, float]] = {}
    layers, count = [], len(inputs)
    with torch.no_grad():
        traced = _traced(module.train(), inputs)
    for layer, part, shape in traced:
        key = f"{part} {shape}"
        if key not in times:
            times[key] = _seconds(part, shape, inputs, rounds)
        forward, backward = times[key]
        counts = {name: getattr(layer, name) // count for name in ("inputs", "outputs", "halo")}
        operations = layer.operations / count
        layers.append(replace(layer, **counts, operations=operations, forward=forward, backward=backward))
    return layers


def _traced(module: nn.Module, inputs: Tensor) -> list[tuple[Layer, nn.Module, tuple[int, ...]]]:
    found: list[tuple[Layer, nn.Module, tuple[int, ...]]] = []

    def watch(name: str, block: str | None, role: Any) -> Callable[..., None]:
        def hook(part: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            found.append((_layer(name, block, role, part, args[0], output), part, tuple(args[0].shape)))

        return hook

    blocks = {name: each for name, each in module.named_modules() if hasattr(each, "conv1") and hasattr(each, "conv2")}
    with ExitStack() as hooks:
        for name, part in module.named_modules():
            if not list(part.children()) and not isinstance(part, nn.Identity):
                block = next((each for each in blocks if name.startswith(f"{each}.")), None)
                hooks.enter_context(part.register_forward_hook(watch(name, block, _role(name, block, blocks))))
        module(inputs)
    return found


def _role(name: str, block: str | None, blocks: dict[str, nn.Module]) -> str:
    if block is None:
        return "alone"
    own = [each for each in _BLOCK_CONVOLUTIONS if hasattr(blocks[block], each)]
    short = name.removeprefix(f"{block}.")
    return {own[0]: "first", own[-1]: "last"}.get(short, "alone" if short.startswith("shortcut") else "inner")


def _layer(name: str, block: str | None, role: Any, part: nn.Module, inputs: Tensor, outputs: Tensor) -> Layer:
    kind: Literal["convolution", "linear", "other"] = "other"
    operations, halo, units = float(outputs.numel()), 0, outputs.shape[1]
    if isinstance(part, nn.Conv2d):
        kind = "convolution"
        operations = 2.0 * outputs.numel() * part.weight[0].numel()
        halo = part.kernel_size[0] // 2 * inputs[0, :, 0].numel()
    elif isinstance(part, nn.Linear):
        kind = "linear"
        operations = 2.0 * outputs.numel() * part.in_features
    elif isinstance(part, nn.MaxPool2d | nn.AvgPool2d):
        size = part.kernel_size
        halo = ((size if isinstance(size, int) else size[0]) - 1) // 2 * inputs[0, :, 0].numel()
    return Layer(
        name=name,
        block=block,
        role=role,
        kind=kind,
        operations=operations,
        parameters=_count(part),
        inputs=inputs.numel(),
        outputs=outputs.numel(),
        units=units,
        rows=outputs.shape[2] if outputs.ndim == 4 else 1,
        halo=halo * len(inputs),
    )


def _seconds(part: nn.Module, shape: tuple[int, ...], like: Tensor, rounds: int) -> tuple[float, float]:
    """The least times of one call: other processes only make it longer."""
    inputs = torch.randn(shape, device=like.device, dtype=like.dtype)
    if inputs.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        inputs = inputs.to(memory_format=torch.channels_last)
    inputs.requires_grad_()
    wanted = [inputs, *part.parameters()]
    forward, backward = float("inf"), float("inf")
    for _ in range(rounds + 1):
        start = _now(inputs.device)
        outputs = part(inputs * 1)  # a layer that works in place may not touch a leaf
        middle = _now(inputs.device)
        torch.autograd.grad(outputs, wanted, torch.ones_like(outputs), allow_unused=True)
        end = _now(inputs.device)
        forward, backward = min(forward, middle - start), min(backward, end - middle)
    return forward, backward


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def parameters(layers: Sequence[Layer]) -> int:
    return sum(layer.parameters for layer in layers)


def operations(layers: Sequence[Layer]) -> float:
    """Of a forward of one sample."""
    return sum(layer.operations for layer in layers)
