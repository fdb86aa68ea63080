"""What goes forward and backward through the layers of a model, seen by hooks while it computes.

A layer is one that has a weight of two dimensions or more, together with the activation that follows it before the
next such layer runs: linear, norm, tanh is one layer; so is convolution, norm, sum with the shortcut, ReLU.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dlopt.analysis.diagnosis.moments import Moments

SATURATED_SLOPE = 0.05
"""A tanh or sigmoid unit counts as saturated where its slope is below this share of the largest slope."""

# |tanh| beyond which 1 - tanh^2 < 0.05, and |2 sigmoid - 1| beyond which 4 sigmoid (1 - sigmoid) < 0.05: the same.
_SATURATED = (1 - SATURATED_SLOPE) ** 0.5

_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
    nn.Softsign, nn.Tanh, nn.Hardtanh, nn.Sigmoid, nn.Hardsigmoid, nn.Hardswish,
)  # fmt: skip


@dataclass
class LayerStatistics:
    """Statistics of one layer over all calls and batches that were watched.

    `inputs`: of the activation, or the layer's plain output where no activation follows. `outputs`: of the activation.
    `gradients`: of the mean loss of a batch with respect to `inputs`: the back-propagated gradients of Glorot & Bengio
    2010. Calls with equal names of several batches are taken together.
    """

    name: str
    kind: str  # the class of the weight layer: Linear, Conv2d, ...
    keep: int = 0
    activation: str | None = None
    calls: int = 0
    _plain: tuple[Moments, Moments] = field(init=False)  # of the output of the weight layer: values, gradients
    _active: tuple[Moments, Moments, Moments] = field(init=False)  # activation: inputs, gradients of these, outputs
    _saturated: Tensor | None = None  # number of saturated values
    _peak: Tensor | None = None  # [units]: largest output

    def __post_init__(self) -> None:
        self._plain = Moments(self.keep), Moments(self.keep)
        self._active = Moments(self.keep), Moments(self.keep), Moments(self.keep)

    @property
    def inputs(self) -> Moments:
        return self._plain[0] if self.activation is None else self._active[0]

    @property
    def outputs(self) -> Moments:
        return self._plain[0] if self.activation is None else self._active[2]

    @property
    def gradients(self) -> Moments:
        return self._plain[1] if self.activation is None else self._active[1]

    @property
    def saturated(self) -> float | None:
        """Share of the values of tanh or sigmoid whose slope is below `SATURATED_SLOPE` of the largest."""
        return None if self._saturated is None else float(self._saturated) / self._active[2].count

    @property
    def dead(self) -> float | None:
        """Share of the ReLU units (features, channels) that were zero for every sample, position and call."""
        return None if self._peak is None else float((self._peak <= 0).float().mean())

    @torch.no_grad()
    def add_activation(self, module: nn.Module, output: Tensor) -> None:
        self.activation = type(module).__name__
        output = output.detach()
        self._active[2].add(output)
        if isinstance(module, nn.Tanh | nn.Sigmoid):
            centred = output if isinstance(module, nn.Tanh) else 2 * output - 1
            number = (centred.abs() > _SATURATED).sum()
            self._saturated = number if self._saturated is None else self._saturated + number
        if isinstance(module, nn.ReLU | nn.ReLU6) and output.ndim > 1:
            unit = 1 if output.ndim != 3 else 2  # [B, F], [B, C, H, W], or tokens [B, T, F]
            peak = output.amax([axis for axis in range(output.ndim) if axis != unit])
            self._peak = peak if self._peak is None else torch.maximum(self._peak, peak)


class LayerProbe:
    """Watches a model: within `watching()` every forward and backward in training mode adds to `layers`.

    Without `gradients` only what goes forward is seen. `keep`: so many values of each tensor stay for histograms. The
    model computes what it would compute without; a model in evaluation mode is not watched.
    """

    def __init__(self, module: nn.Module, *, activations: bool = True, gradients: bool = True, keep: int = 0) -> None:
        self.module = module
        self.with_activations = activations
        self.with_gradients = gradients
        self._known = {name: LayerStatistics(name, type(layer).__name__, keep) for name, layer in weight_layers(module)}
        self._order: list[str] = []
        self._latest: LayerStatistics | None = None

    @property
    def layers(self) -> list[LayerStatistics]:
        """Those that were called, in the order of their first call."""
        return [self._known[name] for name in self._order]

    @contextmanager
    def watching(self) -> Iterator["LayerProbe"]:
        handles: list[RemovableHandle] = []
        for name, layer in weight_layers(self.module):
            handles.append(layer.register_forward_hook(self._weight_hook(self._known[name])))
        for module in self.module.modules():
            if isinstance(module, _ACTIVATIONS):
                handles.append(module.register_forward_pre_hook(self._before_activation))
                handles.append(module.register_forward_hook(self._after_activation))
        self._latest = None
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _weight_hook(self, layer: LayerStatistics) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = _first_tensor(output)
            if not module.training or tensor is None:
                return
            if not layer.calls:
                self._order.append(layer.name)
            layer.calls += 1
            self._latest = layer
            if layer.activation is None:  # else the activation's values count
                self._see(tensor, *layer._plain)

        return hook

    def _before_activation(self, module: nn.Module, inputs: Any) -> None:
        tensor = _first_tensor(inputs)
        if module.training and tensor is not None and self._latest is not None:
            self._see(tensor, *self._latest._active[:2])

    def _after_activation(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if module.training and isinstance(output, Tensor) and self._latest is not None:
            if self.with_activations:
                self._latest.add_activation(module, output)
            else:
                self._latest.activation = type(module).__name__

    def _see(self, tensor: Tensor, values: Moments, gradients: Moments) -> None:
        if self.with_activations:
            values.add(tensor)
        if self.with_gradients and tensor.requires_grad:
            tensor.register_hook(gradients.add)


def weight_layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that hold a weight of two dimensions or more themselves, by name; the model itself is `model`."""
    found = []
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Embedding) and any(p.ndim > 1 for p in layer.parameters(recurse=False)):
            found.append((name or "model", layer))
    return found


def layer_parameters(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trainable weights of two dimensions or more by their layer, and the biases that stand beside them."""
    return {
        name: parameters
        for name, layer in weight_layers(module)
        if (parameters := [p for p in layer.parameters(recurse=False) if p.requires_grad])
    }


@torch.no_grad()
def norms(tensors: Sequence[Sequence[Tensor]]) -> Tensor:
    """[n] of the 2-norms of n lists of tensors, each list as one vector; no host synchronization."""
    flat = [tensor for each in tensors for tensor in each]
    if not flat:
        return torch.zeros(len(tensors))
    squares = torch.stack([value.float().square() for value in torch._foreach_norm(flat)])
    owner = torch.repeat_interleave(torch.tensor([len(each) for each in tensors])).to(squares.device)
    return squares.new_zeros(len(tensors)).index_add_(0, owner, squares).sqrt()


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
        return value[0]
    return None
