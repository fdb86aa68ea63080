"""What goes forward and backward through the layers of a model, recorded by hooks while it computes.

A layer is one that has a weight of two dimensions or more, together with the activation that follows it before the
next such layer runs: linear, norm, tanh is one layer; so is convolution, norm, sum with the shortcut, ReLU.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Moments:
    """Statistics of many tensors taken together, and a few of their values for a histogram.

    Count, mean and sum of squared deviations of all values added (merged as in Chan, Golub & LeVeque 1983).

    Nothing waits for the device before a figure is read. `keep`: so many values of each tensor, drawn evenly at random
    from a generator of their own, stay for `values`; 20,000 look in a histogram like all of them.
    """

    keep: int = 0
    count: int = 0
    _mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    _deviations: Tensor = field(default_factory=lambda: torch.zeros(()))
    _kept: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def add(self, tensor: Tensor) -> None:
        values = tensor.detach()
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        count = values.numel()
        if not count:
            return
        variance, mean = torch.var_mean(values, correction=0)
        total = self.count + count
        if self.count:
            delta = mean - self._mean
            self._deviations = self._deviations + variance * count + delta.square() * (self.count * count / total)
            self._mean = self._mean + delta * (count / total)
        else:
            self._deviations, self._mean = variance * count, mean
        self.count = total
        if self.keep:
            self._kept.append(_some(values, self.keep).cpu())

    @property
    def mean(self) -> float:
        return float(self._mean) if self.count else math.nan

    @property
    def variance(self) -> float:
        """Divided by the count, not by one less."""
        return float(self._deviations) / self.count if self.count else math.nan

    @property
    def std(self) -> float:
        return math.sqrt(self.variance) if self.variance >= 0 else math.nan

    @property
    def rms(self) -> float:
        """Root of the mean square."""
        square = self.variance + self.mean**2
        return math.sqrt(square) if square >= 0 else math.nan

    @property
    def norm(self) -> float:
        """The 2-norm of all values added, as one vector."""
        return self.rms * math.sqrt(self.count)

    @property
    def values(self) -> Tensor:
        """[n] of the values, on the CPU."""
        return torch.cat(self._kept) if self._kept else torch.empty(0)


def _some(values: Tensor, number: int) -> Tensor:
    flat = values.flatten()
    if flat.numel() <= number:
        return flat.clone()
    generator = torch.Generator(flat.device).manual_seed(0)
    return flat[torch.randint(flat.numel(), (number,), generator=generator, device=flat.device)]


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
    inputs: Moments = field(init=False)
    outputs: Moments = field(init=False)
    gradients: Moments = field(init=False)
    _saturated: Tensor | None = None  # number of saturated values
    _peak: Tensor | None = None  # [units]: largest output

    def __post_init__(self) -> None:
        self.inputs = self.outputs = Moments(self.keep)
        self.gradients = Moments(self.keep)

    def start_activation(self, module: nn.Module) -> None:
        """From the first activation on its values count, and not those of the plain layer."""
        if self.activation is None:
            self.inputs, self.outputs, self.gradients = (Moments(self.keep) for _ in range(3))
        self.activation = type(module).__name__

    @property
    def saturated(self) -> float | None:
        """Fraction of the values of tanh or sigmoid whose slope is below `SATURATED_SLOPE` of the largest."""
        return None if self._saturated is None else float(self._saturated) / self.outputs.count

    @property
    def dead(self) -> float | None:
        """Fraction of the ReLU units (features, channels) that were zero for every sample, position and call."""
        return None if self._peak is None else float((self._peak <= 0).float().mean())

    @torch.no_grad()
    def add_activation(self, module: nn.Module, output: Tensor) -> None:
        output = output.detach()
        self.outputs.add(output)
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
        self.layers: list[LayerStatistics] = []  # those that were called, in the order of their first call
        self._latest: LayerStatistics | None = None

    @contextmanager
    def watching(self) -> Iterator["LayerProbe"]:
        self._latest = None
        with ExitStack() as hooks:
            for name, layer in weight_layers(self.module):
                hooks.enter_context(layer.register_forward_hook(self._weight_hook(self._known[name])))
            for module in self.module.modules():
                if isinstance(module, _ACTIVATIONS):
                    hooks.enter_context(module.register_forward_pre_hook(self._before_activation))
                    hooks.enter_context(module.register_forward_hook(self._after_activation))
            yield self

    def _weight_hook(self, layer: LayerStatistics) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = _first_tensor(output)
            if not module.training or tensor is None:
                return
            if not layer.calls:
                self.layers.append(layer)
            layer.calls += 1
            self._latest = layer
            if layer.activation is None:  # else the activation's values count
                self._see(tensor, layer)

        return hook

    def _before_activation(self, module: nn.Module, inputs: Any) -> None:
        tensor = _first_tensor(inputs)
        if module.training and tensor is not None and self._latest is not None:
            self._latest.start_activation(module)
            self._see(tensor, self._latest)

    def _after_activation(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if module.training and isinstance(output, Tensor) and self._latest is not None and self.with_activations:
            self._latest.add_activation(module, output)

    def _see(self, tensor: Tensor, layer: LayerStatistics) -> None:
        if self.with_activations:
            layer.inputs.add(tensor)
        if self.with_gradients and tensor.requires_grad:
            tensor.register_hook(layer.gradients.add)


def weight_layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that hold a weight of two dimensions or more themselves, by name; the model itself is `model`."""
    return [
        (name or "model", layer)
        for name, layer in module.named_modules()
        if not isinstance(layer, nn.Embedding) and any(p.ndim > 1 for p in layer.parameters(recurse=False))
    ]


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


# -- recurrent layers: how far back in time the gradient reaches (Bengio, Simard & Frasconi 1994; Pascanu et al. 2013)


@dataclass(frozen=True)
class TimeLag:
    """One recurrent layer. Index i stands for the state i steps before the last one.

    `states[i]`: norm of the gradient of the loss with respect to the state, over the whole batch.
    `contributions[i]`: norm of what the step that reads this state adds to the gradient of the recurrent weight, which
    is the sum over steps. A clip by norm multiplies all of them by one factor.
    """

    name: str
    states: list[float]
    contributions: list[float]


class TimeLagProbe:
    """Watches linear layers that run several times in one forward pass: the recurrent ones."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._states: dict[str, list[list[Tensor]]] = defaultdict(list)
        self._inputs: dict[str, list[Tensor]] = defaultdict(list)
        self._deltas: dict[str, list[list[Tensor]]] = defaultdict(list)

    @contextmanager
    def watching(self) -> Iterator["TimeLagProbe"]:
        """Within, one forward and one backward pass."""
        with ExitStack() as hooks:
            for name, layer in self.module.named_modules():
                if isinstance(layer, nn.Linear):
                    hooks.enter_context(layer.register_forward_hook(self._hook(name)))
            yield self

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            state = inputs[0]
            if not module.training or not output.requires_grad:
                return
            seen: tuple[list[Tensor], list[Tensor]] = ([], [])
            if state.requires_grad:
                state.register_hook(seen[0].append)
            output.register_hook(seen[1].append)
            self._states[name].append(seen[0])
            self._inputs[name].append(state.detach())
            self._deltas[name].append(seen[1])

        return hook

    def lags(self) -> list[TimeLag]:
        """One per recurrent layer; none where every layer ran once."""
        return [self._lag(name) for name, inputs in self._inputs.items() if len(inputs) > 1]

    def _lag(self, name: str) -> TimeLag:
        states = [_norm(each) for each in self._states[name]]
        contributions = []
        for delta, state in zip(self._deltas[name], self._inputs[name], strict=True):
            step = delta[0].flatten(0, -2).T @ state.flatten(0, -2) if delta else torch.zeros(())
            contributions.append(float(step.norm()))
        # The first state is a constant zero, to which no gradient goes.
        return TimeLag(name, states[:0:-1], contributions[::-1])


def _norm(gradients: list[Tensor]) -> float:
    return float(torch.stack(gradients).sum(0).norm()) if gradients else 0.0
