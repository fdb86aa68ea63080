"""Summarizes a model layer by layer: shapes, parameters, operations, activation memory."""

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from dlopt.basics.errors import UserError
from dlopt.basics.formats import format_bytes
from dlopt.config.run_config import RunConfig
from dlopt.tasks.task import Task
from dlopt.tracking.terminal_text import plain_table, show_table
from dlopt.training.builders.model_check import model_on_meta
from dlopt.training.builders.precision import Precision

_UNKNOWN_BATCH = 2  # data.batch_size=full without data; batch norm does not support a batch of one


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

    Counts the operations of matrix products, convolutions and attention, as papers do, and not those of normalization
    and activations. `module` must be on the meta device.
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


def summarize_run(run_config: RunConfig, shape: tuple[int, ...], task: Task, samples: int | None) -> ModelSummary:
    """Summarizes the model of a config for inputs of `shape`. Raises `UserError` if it does not support them.

    `samples`: of the training set, None if it is unknown.
    """
    batch_size = run_config.data_settings.batch_size
    batch = _UNKNOWN_BATCH if samples is None else samples
    if batch_size != "full":
        batch = batch_size if samples is None else min(batch_size, samples)
    dtype = Precision(run_config.settings.precision, torch.device("meta")).dtype
    module = model_on_meta(run_config.model, task.model_arguments(shape)).to(dtype)
    try:
        return summarize(module, torch.empty(batch, *shape, device="meta", dtype=task.input_dtype(dtype)))
    except ValueError as error:
        raise UserError(f"data.batch_size={batch}: the model does not support this size: {error}") from None
    except (RuntimeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"input_shape={list(shape)}: the model does not support this shape: {reason}") from None


@contextmanager
def kept_for_backward(module: nn.Module) -> Iterator[dict[int, int]]:
    """Context that collects the bytes of each storage that autograd saves, except parameters and buffers."""
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


def show_summary(name: str, shape: tuple[int, ...], summary: ModelSummary) -> None:
    """Prints the layers and the totals of the model `name`, for inputs of `shape`."""
    table = plain_table(left=["layer", "kind"], right=["output", "parameters", "MACs"])
    for layer in summary.layers:
        if layer.kind not in ("Identity", "Dropout") or layer.parameters:
            output = "x".join(map(str, layer.output))
            numbers = (f"{number:,}" if number else "" for number in (layer.parameters, layer.macs))
            table.add_row(layer.name, layer.kind, output, *numbers)
    show_table(table)
    frozen = summary.parameters - summary.trainable
    lines = {
        "model": f"{name}, input {'x'.join(map(str, shape))}",
        "parameters": f"{summary.parameters:,}" + (f" ({frozen:,} frozen)" if frozen else ""),
        "forward": f"{_scaled(summary.forward_macs)}MACs per sample",
        "forward and backward": f"{_scaled(summary.update_flops)}FLOPs per sample",
        "weights": f"{format_bytes(summary.parameter_bytes)}, buffers {format_bytes(summary.buffer_bytes)}",
        "activations for backward": f"{format_bytes(summary.activation_bytes)}, batch size {summary.batch}",
    }
    print("\n".join(f"{key}: {value}" for key, value in lines.items()))


def _scaled(number: float) -> str:
    if number < 1000:
        return f"{number:g} "
    power = min(int(math.log10(number)) // 3, 4)
    return f"{number / 1000**power:.3g} {('', 'k', 'M', 'G', 'T')[power]}"
