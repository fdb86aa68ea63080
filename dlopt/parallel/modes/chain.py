"""A model as a chain of layers for pipeline parallelism: activation specs, timing, and partitioning into stages."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from dlopt.basics.errors import UserError
from dlopt.machine.device import synchronized_time
from dlopt.models.layers import evaluation_mode, without_fused_layers
from dlopt.parallel.dropout import GlobalDropout

_REPETITIONS = 3

ForwardContext = Callable[[], AbstractContextManager[Any]]
"""Returns the context in which layers run (autocast or none)."""


@dataclass(frozen=True)
class ActivationSpec:
    """Shape, dtype and memory order of an activation [B, ...], for any B."""

    shape: tuple[int, ...]  # of one sample
    dtype: torch.dtype
    order: tuple[int, ...]  # dimensions from the outermost in memory to the innermost

    @classmethod
    def of(cls, tensor: Tensor) -> "ActivationSpec":
        strides = tensor.stride()
        order = range(tensor.ndim) if tensor.is_contiguous() else sorted(range(tensor.ndim), key=lambda d: -strides[d])
        return cls(tuple(tensor.shape[1:]), tensor.dtype, tuple(order))

    def restore_order(self, tensor: Tensor) -> Tensor:
        """Returns the tensor in this memory order, which contiguous pipeline messages lose."""
        inverse = sorted(range(tensor.ndim), key=lambda d: self.order[d])
        return tensor.permute(self.order).contiguous().permute(inverse)

    def empty(self, samples: int, device: torch.device) -> Tensor:
        """Returns a contiguous buffer for a message of `samples` samples."""
        return torch.empty(samples, *self.shape, dtype=self.dtype, device=device)


@dataclass
class ChainLayer:
    """One layer of the chain."""

    name: str
    module: nn.Module
    output: ActivationSpec | None = None  # None before `trace`
    # In the order of the calls, with the shape of one sample.
    dropouts: list[tuple[GlobalDropout, tuple[int, ...]]] = field(default_factory=list)


def flatten(model: nn.Module, stages: int) -> list[ChainLayer]:
    """Returns the layers that `model` calls in sequence; nested `nn.Sequential`s are flattened.

    Raises `UserError` for other models, and for fewer layers than stages.
    """
    if not is_sequential(model):
        raise UserError(
            f"parallel=pipeline: {type(model).__name__} is not a sequence of layers and cannot be split into stages; "
            "use parallel=ddp, parallel=fsdp, or a model such as resnet20"
        )
    chain = [ChainLayer(name, layer) for name, layer in _flatten(model, "")]
    if stages > len(chain):
        raise UserError(
            f"parallel=pipeline: {stages} processes, but the model has only {len(chain)} layers; start fewer processes"
        )
    return chain


def is_sequential(module: nn.Module) -> bool:
    """Whether the module only calls its children in order."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _flatten(sequence: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in sequence._modules.items():
        if child is None:
            continue
        if is_sequential(child):
            yield from _flatten(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def trace(chain: Sequence[ChainLayer], inputs: Tensor, context: ForwardContext) -> None:
    """Records output specs and dropouts of all layers in one forward.

    The layers run in evaluation mode: batch-norm statistics and random generators stay untouched. Raises `UserError`
    for a layer that does not return a tensor.
    """

    def record(layer: ChainLayer, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, GlobalDropout):
            layer.dropouts.append((module, tuple(inputs[0].shape[1:])))

    with torch.no_grad(), without_fused_layers(), context():
        values = inputs
        for layer in chain:
            with evaluation_mode(layer.module), register_module_forward_pre_hook(partial(record, layer)):
                values = layer.module(values)
            if not isinstance(values, Tensor):
                raise UserError(f"parallel=pipeline: layer {layer.name} does not return a single tensor")
            layer.output = ActivationSpec.of(values)


def time_layers(chain: Sequence[ChainLayer], inputs: Tensor, context: ForwardContext) -> list[float]:
    """Returns the seconds of forward and backward of each layer on these inputs, measured on copies of the layers."""
    outputs, times = inputs, []
    for layer in chain:
        module = copy.deepcopy(layer.module).train()
        values, seconds = outputs.detach(), []
        with context():
            for _ in range(1 + _REPETITIONS):
                inputs = values.detach().requires_grad_(values.is_floating_point())
                start = synchronized_time(inputs.device)
                outputs = module(inputs)
                outputs.sum().backward()
                seconds.append(synchronized_time(inputs.device) - start)
        times.append(min(seconds[1:]))  # the first one warms up; contention with other processes only adds time
    return times


def balance(seconds: Sequence[float], stages: int) -> list[int]:
    """Returns the first layer of each stage, such that the slowest stage is as fast as possible; no stage is empty."""
    until = [0.0, *accumulate(seconds)]
    # Dynamic programming: best[j] = (time of the slowest stage, first layer of the last stage) over all partitions of
    # the first j layers into the stages so far.
    best = [(0.0, 0)] + [(math.inf, 0)] * len(seconds)
    history = []
    for _ in range(stages):
        best = [
            min(((max(best[i][0], until[j] - until[i]), i) for i in range(j)), default=(math.inf, 0))
            for j in range(len(until))
        ]
        history.append(best)
    starts, stop = [], len(seconds)
    for best in reversed(history):
        stop = best[stop][1]
        starts.append(stop)
    return starts[::-1]


def divide_cores(cores: int, fractions: Sequence[float]) -> list[int]:
    """Divides cores in proportion to the fractions. Every stage gets at least one, even with too few cores."""
    counts = [1] * len(fractions)
    for _ in range(cores - len(fractions)):  # give the next core to the stage with the most work per core
        busiest = max(range(len(fractions)), key=lambda i: fractions[i] / counts[i])
        counts[busiest] += 1
    return counts


def named_starts(split: Sequence[str], chain: Sequence[ChainLayer], stages: int) -> list[int]:
    """Returns the first layer of each stage from the names in `parallel.split`. Raises `UserError`."""
    key = f"parallel.split=[{','.join(split)}]"
    if len(split) != stages - 1:
        raise UserError(f"{key}: {stages} processes need {stages - 1} names, the first layers of stages 2 to {stages}")
    starts = [0]
    for name in split:
        start = next((i for i, layer in enumerate(chain) if f"{layer.name}.".startswith(f"{name}.")), None)
        if start is None:
            raise UserError(f"{key}: no layer {name}; allowed: {', '.join(layer.name for layer in chain[1:])}")
        if start <= starts[-1]:
            raise UserError(f"{key}: {name} must come after the first layer of the previous stage")
        starts.append(start)
    return starts


def check_tied_weights(stages: Iterable[Sequence[ChainLayer]]) -> None:
    """Raises `UserError` for layers or parameters that two stages share."""
    owners: dict[object, int] = {}
    for number, stage in enumerate(stages):
        for layer in stage:
            for tensor in [*layer.module.parameters(), *layer.module.buffers()]:
                if owners.setdefault(tensor, number) != number:
                    raise UserError(
                        f"parallel=pipeline: {layer.name} shares weights with a layer of another stage; set "
                        "parallel.split so that both are in one stage, set model.tied_embeddings=false for a GPT, or "
                        "use parallel=ddp"
                    )
