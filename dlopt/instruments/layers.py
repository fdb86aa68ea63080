"""Hooks that record statistics of activations and back-propagated gradients, layer by layer.

A layer is a module with a weight of two or more dimensions together with the activation that follows it before the next
such module: linear, norm, tanh is one layer; so is convolution, norm, sum with the shortcut, ReLU.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from dlopt.models.layers import SquaredReLU
from dlopt.optim.parameters import real_views
from dlopt.training.builders.recompute import is_recomputing


@dataclass
class Moments:
    """Running moments of all values of many tensors, and a sample of `keep` values per tensor for a histogram.

    Merges count, mean and sum of squared deviations as in Chan, Golub & LeVeque 1983. Synchronizes with the device only
    when a statistic is read. 20,000 sampled values give practically the histogram of all.
    """

    keep: int = 0
    count: int = 0
    _mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    _deviations: Tensor = field(default_factory=lambda: torch.zeros(()))
    _kept: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def add(self, tensor: Tensor) -> None:
        values = tensor.detach()
        count = values.numel()
        if not count:
            return
        variance, mean = torch.var_mean(values.to(_wide(values.device)), correction=0)
        total = self.count + count
        if self.count:
            delta = mean - self._mean
            self._deviations = self._deviations + variance * count + delta.square() * (self.count * count / total)
            self._mean = self._mean + delta * (count / total)
        else:
            self._deviations, self._mean = variance * count, mean
        self.count = total
        if self.keep:
            kept = values.flatten().clone()
            if count > self.keep:
                generator = torch.Generator(kept.device).manual_seed(0)
                kept = kept[torch.randint(count, (self.keep,), generator=generator, device=kept.device)]
            self._kept.append(kept.cpu().to(torch.promote_types(kept.dtype, torch.float32)))

    @property
    def mean(self) -> float:
        return float(self._mean) if self.count else math.nan

    @property
    def variance(self) -> float:
        """Biased: divided by the count."""
        return float(self._deviations) / self.count if self.count else math.nan

    @property
    def std(self) -> float:
        return math.sqrt(self.variance) if self.variance >= 0 else math.nan

    @property
    def rms(self) -> float:
        square = self.variance + self.mean**2
        return math.sqrt(square) if square >= 0 else math.nan

    @property
    def norm(self) -> float:
        """2-norm of all values."""
        return self.rms * math.sqrt(self.count)

    @property
    def values(self) -> Tensor:
        """Sampled values [n], on the CPU."""
        return torch.cat(self._kept) if self._kept else torch.empty(0)


def moments_of(inputs: Sequence[Any]) -> Moments | None:
    """Returns the moments of a model's inputs, a tensor per batch; None if they are no real numbers."""
    moments = Moments()
    for each in inputs:
        if not isinstance(each, Tensor) or not each.is_floating_point():
            return None
        moments.add(each)
    return moments


def is_off_scale(inputs: Moments) -> bool:
    """Whether inputs are far from mean 0 and standard deviation 1, for which initializations are derived."""
    # Images in [0, 1] are not: their standard deviation may be 0.1.
    return abs(inputs.mean) > 2 or not 0.05 < inputs.std < 3


def _wide(device: torch.device) -> torch.dtype:
    # Squares in float32 overflow above 1e19 and vanish below 1e-23: gradients of deep networks reach both.
    return torch.float32 if device.type == "mps" else torch.float64


SATURATED_SLOPE = 0.05
"""A tanh or sigmoid unit is saturated if its slope is below this fraction of the largest slope."""

# 1 - tanh^2 < 0.05 above this |tanh|, and 4 sigmoid (1 - sigmoid) < 0.05 above the same |2 sigmoid - 1|.
_SATURATED = (1 - SATURATED_SLOPE) ** 0.5

_ACTIVATIONS = (
    nn.ReLU, SquaredReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Softplus, nn.Softsign, nn.Tanh, nn.Hardtanh, nn.Sigmoid, nn.Hardsigmoid, nn.Hardswish,
)  # fmt: skip


@dataclass
class LayerStatistics:
    """Statistics of one layer over all recorded calls and batches."""

    name: str
    kind: str  # the class of the weight layer: Linear, Conv2d, ...
    keep: int = 0
    activation: str | None = None
    calls: int = 0
    batches: int = 0
    inputs: Moments = field(init=False)  # of the activation, or the layer's outputs if none follows
    outputs: Moments = field(init=False)  # of the activation
    gradients: Moments = field(init=False)  # of a batch's mean loss by `inputs`: back-propagated (Glorot & Bengio 2010)
    _saturated: Tensor | None = None  # number of saturated values
    _peak: Tensor | None = None  # [units]: largest output

    def __post_init__(self) -> None:
        self.inputs = self.outputs = Moments(self.keep)
        self.gradients = Moments(self.keep)

    def start_activation(self, module: nn.Module) -> None:
        """Switches to the activation's values; discards those of the layer."""
        if self.activation is None:
            self.inputs, self.outputs, self.gradients = (Moments(self.keep) for _ in range(3))
        self.activation = type(module).__name__

    @property
    def gradient_norm(self) -> float:
        """2-norm of the gradients of one batch; the root mean square over batches."""
        return self.gradients.norm / math.sqrt(self.batches)

    @property
    def saturated(self) -> float | None:
        """Fraction of tanh or sigmoid values with a slope below `SATURATED_SLOPE`; else None."""
        return None if self._saturated is None else float(self._saturated) / self.outputs.count

    @property
    def dead(self) -> float | None:
        """Fraction of ReLU units (features, channels) that are zero for all samples and positions; else None."""
        return None if self._peak is None else float((self._peak <= 0).float().mean())

    @property
    def inactive(self) -> float | None:
        """Fraction of saturated values, or else of dead units."""
        return self.dead if self.saturated is None else self.saturated

    @torch.no_grad()
    def add_activation(self, module: nn.Module, output: Tensor) -> None:
        output = output.detach()
        self.outputs.add(output)
        if isinstance(module, nn.Tanh | nn.Sigmoid):
            centred = output if isinstance(module, nn.Tanh) else 2 * output - 1
            count = (centred.abs() > _SATURATED).sum()
            self._saturated = count if self._saturated is None else self._saturated + count
        if isinstance(module, nn.ReLU | nn.ReLU6) and output.ndim > 1:
            unit = 1 if output.ndim != 3 else 2  # [B, F], [B, C, H, W], or tokens [B, T, F]
            peak = output.amax([axis for axis in range(output.ndim) if axis != unit])
            self._peak = peak if self._peak is None else torch.maximum(self._peak, peak)


class LayerProbe:
    """Records statistics of every forward and backward in training mode within `recording()`: see `Moments`."""

    def __init__(self, module: nn.Module, *, activations: bool = True, gradients: bool = True, keep: int = 0) -> None:
        self.with_activations, self.with_gradients = activations, gradients
        self._known = {
            layer: LayerStatistics(name, type(layer).__name__, keep) for name, layer in weight_layers(module)
        }
        self._activations = {each for each in module.modules() if isinstance(each, _ACTIVATIONS)}
        self.layers: list[LayerStatistics] = []  # called layers, in the order of their first call
        self._latest: LayerStatistics | None = None

    @contextmanager
    def recording(self) -> Iterator["LayerProbe"]:
        """Records one batch, which may be several calls."""
        self._latest = None
        for layer in self._known.values():
            layer.batches += 1
        with register_module_forward_pre_hook(self._before), register_module_forward_hook(self._after):
            yield self

    def _before(self, module: nn.Module, inputs: Any) -> None:
        tensor, latest = _first_tensor(inputs), self._latest
        if is_recomputing():  # activation checkpointing: the same values again
            return
        if module in self._activations and module.training and tensor is not None and latest is not None:
            latest.start_activation(module)
            self._record(tensor, latest)

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        tensor = _first_tensor(output)
        if not module.training or tensor is None or is_recomputing():
            return
        if layer := self._known.get(module):
            if not layer.calls:
                self.layers.append(layer)
            layer.calls += 1
            self._latest = layer
            if layer.activation is None:  # else only the activation's values are recorded
                self._record(tensor, layer)
        elif module in self._activations and self._latest is not None and self.with_activations:
            self._latest.add_activation(module, tensor)

    def _record(self, tensor: Tensor, layer: LayerStatistics) -> None:
        if self.with_activations:
            layer.inputs.add(tensor)
        if self.with_gradients and tensor.requires_grad:
            tensor.register_hook(layer.gradients.add)


def weight_layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns (name, module) of modules with a weight of two or more dimensions; the root's name is `model`."""
    return [
        (name or "model", layer)
        for name, layer in module.named_modules()
        if not isinstance(layer, nn.Embedding) and any(p.ndim > 1 for p in layer.parameters(recurse=False))
    ]


def layer_parameters(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Returns layer name -> trainable parameters of `weight_layers`."""
    return {
        name: parameters
        for name, layer in weight_layers(module)
        if (parameters := [p for p in layer.parameters(recurse=False) if p.requires_grad])
    }


@torch.no_grad()
def norms(tensors: Sequence[Sequence[Tensor]]) -> Tensor:
    """Returns the 2-norms [n] of n lists of tensors, each list as one vector, without host synchronization."""
    flat = real_views(tensor for group in tensors for tensor in group)
    if not flat:
        return torch.zeros(len(tensors))
    squares = torch.stack(torch._foreach_norm(flat, dtype=_wide(flat[0].device))).square()
    owner = torch.repeat_interleave(torch.tensor([len(group) for group in tensors])).to(squares.device)
    return squares.new_zeros(len(tensors)).index_add_(0, owner, squares).sqrt()


def norms_by_layer(layers: Mapping[str, Sequence[nn.Parameter]], values: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """Returns the norm [layers] of the values of each layer's parameters, of those that have one."""
    return norms([[values[p] for p in group if p in values] for group in layers.values()])


def _first_tensor(value: Any) -> Tensor | None:
    first = value[0] if isinstance(value, tuple | list) and value else value
    return first if isinstance(first, Tensor) else None
