"""Summarizes a model layer by layer: shapes, parameters, operations, activation memory."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class LayerSummary:
    """A leaf module that the forward pass calls."""

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
    update_flops: int  # of forward and backward, per sample; two per multiply-accumulate
    activation_bytes: int  # saved for the backward pass, per batch
    batch: int


def summarize(module: nn.Module, inputs: Tensor) -> ModelSummary:
    """Runs `inputs` [B, ...] forward and backward on the meta device, without computing values.

    Counts the operations of matrix products, convolutions and attention (`torch.utils.flop_counter`), as papers do, and
    not those of normalization and activations. `module` must be on the meta device.
    """
    module.train()
    shapes: dict[nn.Module, tuple[int, ...]] = {}
    flops: dict[nn.Module, int] = defaultdict(int)
    batch = len(inputs)
    leaves = {leaf: name for name, leaf in module.named_modules() if not list(leaf.children())}
    counter = FlopCounterMode(display=False)

    def before(each: nn.Module, _: Any) -> None:
        flops[each] -= counter.get_total_flops()

    def after(each: nn.Module, _: Any, output: Any) -> None:
        flops[each] += counter.get_total_flops()
        if each in leaves and isinstance(output, Tensor):
            shapes.setdefault(each, tuple(output.shape[1:]))

    with (
        register_module_forward_pre_hook(before),
        register_module_forward_hook(after),
        counter,
        kept_for_backward(module) as kept,
    ):
        outputs = module(inputs)
        forward = counter.get_total_flops()
        outputs.sum().backward()
    total = counter.get_total_flops()
    module.zero_grad()
    layers = [
        LayerSummary(leaves[leaf], type(leaf).__name__, shape, _count(leaf), flops[leaf] // 2 // batch)
        for leaf, shape in shapes.items()
    ]
    return ModelSummary(
        layers=layers,
        parameters=_count(module),
        trainable=sum(p.numel() for p in module.parameters() if p.requires_grad),
        parameter_bytes=sum(p.nbytes for p in module.parameters()),
        buffer_bytes=sum(b.nbytes for b in module.buffers()),
        forward_macs=forward // 2 // batch,
        update_flops=total // batch,
        activation_bytes=sum(kept.values()),
        batch=batch,
    )


@contextmanager
def kept_for_backward(module: nn.Module) -> Iterator[dict[int, int]]:
    """Context that collects the bytes of each storage that autograd saves, except parameters and buffers.

    Counts tensors that share a storage once.
    """
    excluded = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    saved: dict[int, int] = {}
    alive: list[Tensor] = []  # keeps storages alive: the address of a freed one could be reused

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in excluded and storage._cdata not in saved:
            saved[storage._cdata] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
