"""A model layer by layer: shapes, parameters, operations, memory of what the backward pass needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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
    leaves = [(name, each) for name, each in module.named_modules() if not list(each.children())]
    counter = FlopCounterMode(display=False)
    handles = []
    for name, leaf in leaves:
        handles.append(leaf.register_forward_pre_hook(_before(name, flops, counter)))
        handles.append(leaf.register_forward_hook(_after(name, flops, shapes, counter)))
    try:
        with counter, kept_for_backward(module) as kept:
            outputs = module(inputs)
            forward = counter.get_total_flops()
            outputs.sum().backward()
        total = counter.get_total_flops()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in module.parameters():
            parameter.grad = None
    kinds = dict(leaves)
    layers = [
        LayerSummary(name, type(kinds[name]).__name__, shape, _count(kinds[name]), flops.get(name, 0) // 2 // batch)
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


def _before(name: str, flops: dict[str, int], counter: FlopCounterMode) -> Any:
    def hook(*_: Any) -> None:
        flops[name] = flops.get(name, 0) - counter.get_total_flops()

    return hook


def _after(name: str, flops: dict[str, int], shapes: dict[str, tuple[int, ...]], counter: FlopCounterMode) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        flops[name] += counter.get_total_flops()
        if isinstance(output, Tensor):
            shapes.setdefault(name, tuple(output.shape[1:]))

    return hook


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
