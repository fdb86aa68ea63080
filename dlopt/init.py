"""Weight-initialization schemes. Each overwrites the weights of a built model, drawing from `generator` alone.

A scheme sets the weights of all linear, convolution and recurrent layers and makes their biases zero; normalization
layers and embeddings stay as they were built. fan_in is the number of inputs of one unit (input channels times the
receptive field), fan_out the number of units that one input feeds.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from math import sqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from dlopt.errors import UserError
from dlopt.models.layers import ACTIVATIONS
from dlopt.models.locally_connected import LocallyConnected2d
from dlopt.ranges import Count, NonNegative, Positive

Fan = Literal["fan_in", "fan_out"]


class Weight(NamedTuple):
    """One weight of a layer: its name in the model, the layer, the tensor, and its two fans."""

    name: str
    layer: nn.Module
    tensor: Tensor
    fan_in: int
    fan_out: int


def weights(model: nn.Module) -> Iterator[Weight]:
    """The weights that a scheme sets: those of matrix or kernel shape, but for embeddings."""
    for prefix, layer in model.named_modules():
        if isinstance(layer, nn.Embedding):
            continue
        for name, tensor in layer.named_parameters(prefix, recurse=False):
            if tensor.dim() >= 2 and "weight" in name.rpartition(".")[2]:
                yield Weight(name, layer, tensor, *fans(layer, tensor))


def fans(layer: nn.Module, weight: Tensor) -> tuple[int, int]:
    """(fan_in, fan_out) of a layer's weight; of a grouped convolution those within one group."""
    if isinstance(layer, LocallyConnected2d):
        _, outputs, inputs = weight.shape
        return inputs, outputs * layer.kernel**2
    receptive_field = weight[0, 0].numel()
    first, second = weight.shape[0] * receptive_field, weight.shape[1] * receptive_field
    if isinstance(layer, _ConvTransposeNd):
        return first // layer.groups, second
    if isinstance(layer, _ConvNd):
        return second, first // layer.groups
    return second, first


def activation_gain(model: nn.Module) -> float:
    """The gain for the activation that the model has most of; 1 where it has none.

    torch's recommended value where there is one (ReLU: sqrt(2), tanh: 5/3), else 1 / sqrt(E[f(z)^2]) for a standard
    normal z: the factor that keeps the second moment from layer to layer, which is how He et al. 2015 reach sqrt(2).
    """
    kinds = tuple(kind for kind in ACTIVATIONS.values() if kind is not nn.Identity)
    found = Counter(type(module) for module in model.modules() if isinstance(module, kinds))
    if not found:
        return 1.0
    ((kind, _),) = found.most_common(1)
    match kind:
        case nn.LeakyReLU:
            return nn.init.calculate_gain("leaky_relu", nn.LeakyReLU().negative_slope)
        case nn.ReLU:
            return nn.init.calculate_gain("relu")
        case nn.Tanh:
            return nn.init.calculate_gain("tanh")
        case nn.Sigmoid:
            return nn.init.calculate_gain("sigmoid")
        case nn.SELU:
            return nn.init.calculate_gain("selu")
    z = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / sqrt(2 * torch.pi)
    return torch.trapezoid(kind()(z).square() * density, z).rsqrt().item()


def default(model: nn.Module, generator: torch.Generator, *, zero_last_gamma: bool) -> None:
    """Leaves what the layers drew when they were built (torch's own scheme, or pretrained weights)."""
    _finish(model, zero_last_gamma)


def normal(model: nn.Module, generator: torch.Generator, *, std: NonNegative, zero_last_gamma: bool) -> None:
    """The same normal distribution for all layers."""
    for weight in _zero_biases(model):
        nn.init.normal_(weight.tensor, std=std, generator=generator)
    _finish(model, zero_last_gamma)


def uniform(model: nn.Module, generator: torch.Generator, *, bound: NonNegative, zero_last_gamma: bool) -> None:
    """The same uniform distribution on [-bound, bound] for all layers."""
    for weight in _zero_biases(model):
        nn.init.uniform_(weight.tensor, -bound, bound, generator=generator)
    _finish(model, zero_last_gamma)


def fan_in_normal(model: nn.Module, generator: torch.Generator, *, zero_last_gamma: bool) -> None:
    """Variance 1 / fan_in (LeCun, Bottou, Orr & Müller 1998, section 4.6), normal."""
    _scaled_normal(model, generator, lambda weight: 1 / weight.fan_in, zero_last_gamma)


def fan_in_uniform(model: nn.Module, generator: torch.Generator, *, zero_last_gamma: bool) -> None:
    """Variance 1 / fan_in, uniform."""
    _scaled_uniform(model, generator, lambda weight: 1 / weight.fan_in, zero_last_gamma)


def fan_out_normal(model: nn.Module, generator: torch.Generator, *, zero_last_gamma: bool) -> None:
    """Variance 1 / fan_out, normal: keeps the gradients' variance in a linear net."""
    _scaled_normal(model, generator, lambda weight: 1 / weight.fan_out, zero_last_gamma)


def fan_out_uniform(model: nn.Module, generator: torch.Generator, *, zero_last_gamma: bool) -> None:
    """Variance 1 / fan_out, uniform."""
    _scaled_uniform(model, generator, lambda weight: 1 / weight.fan_out, zero_last_gamma)


def xavier_normal(model: nn.Module, generator: torch.Generator, *, gain: Positive, zero_last_gamma: bool) -> None:
    """Variance gain^2 * 2 / (fan_in + fan_out) (Glorot & Bengio 2010, equation 12), normal."""
    _scaled_normal(model, generator, lambda weight: gain**2 * 2 / (weight.fan_in + weight.fan_out), zero_last_gamma)


def xavier_uniform(model: nn.Module, generator: torch.Generator, *, gain: Positive, zero_last_gamma: bool) -> None:
    """Variance gain^2 * 2 / (fan_in + fan_out) (Glorot & Bengio 2010, equation 16), uniform."""
    _scaled_uniform(model, generator, lambda weight: gain**2 * 2 / (weight.fan_in + weight.fan_out), zero_last_gamma)


def kaiming_normal(
    model: nn.Module, generator: torch.Generator, *, mode: Fan, gain: Positive | None, zero_last_gamma: bool
) -> None:
    """Variance gain^2 / fan (He et al. 2015, equations 10 and 14), normal; gain None: that of the activation."""
    gain = activation_gain(model) if gain is None else gain
    _scaled_normal(model, generator, lambda weight: gain**2 / getattr(weight, mode), zero_last_gamma)


def kaiming_uniform(
    model: nn.Module, generator: torch.Generator, *, mode: Fan, gain: Positive | None, zero_last_gamma: bool
) -> None:
    """Variance gain^2 / fan (He et al. 2015, equations 10 and 14), uniform; gain None: that of the activation."""
    gain = activation_gain(model) if gain is None else gain
    _scaled_uniform(model, generator, lambda weight: gain**2 / getattr(weight, mode), zero_last_gamma)


def orthogonal(model: nn.Module, generator: torch.Generator, *, gain: Positive | None, zero_last_gamma: bool) -> None:
    """Orthonormal rows or columns times the gain (Saxe, McClelland & Ganguli 2014); None: that of the activation."""
    gain = activation_gain(model) if gain is None else gain
    for weight in _zero_biases(model):
        # the filters of each position by themselves
        matrices = weight.tensor if isinstance(weight.layer, LocallyConnected2d) else [weight.tensor]
        for matrix in matrices:
            nn.init.orthogonal_(matrix, gain=gain, generator=generator)
    _finish(model, zero_last_gamma)


def dirac(model: nn.Module, generator: torch.Generator, *, zero_last_gamma: bool) -> None:
    """Convolutions pass their input on (Zagoruyko & Komodakis 2017, DiracNets); channels repeat where they grow.

    Other layers get variance 1 / fan_in: an identity there would leave equal channels equal for ever.
    """
    for weight in _zero_biases(model):
        if isinstance(weight.layer, _ConvNd):
            outputs, inputs = weight.tensor.shape[:2]
            nn.init.dirac_(weight.tensor, groups=outputs // inputs if outputs % inputs == 0 else 1)
        else:
            nn.init.normal_(weight.tensor, std=weight.fan_in**-0.5, generator=generator)
    _finish(model, zero_last_gamma)


def lsuv(
    model: nn.Module,
    generator: torch.Generator,
    *,
    inputs: Tensor,
    samples: Count,
    tolerance: Positive,
    iterations: Count,
    zero_last_gamma: bool,
) -> None:
    """Layer-sequential unit-variance (Mishkin & Matas 2016, algorithm 1).

    Orthonormal weights; then, layer by layer in the order of the forward pass, each weight is divided by its output's
    standard deviation until the variance is within `tolerance` of 1, in at most `iterations` rounds. It is measured on
    `samples` of the `inputs` ([B, *shape], normalized, on the model's device).

    Errors: UserError where a layer's output on `inputs` is constant or not finite.
    """
    orthogonal(model, generator, gain=1.0, zero_last_gamma=False)
    inputs = inputs[:: max(1, len(inputs) // samples)][:samples]
    training = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    with torch.no_grad():
        for weight in _in_forward_order(model, inputs):
            for _ in range(iterations):
                variance = _output(model, weight.layer, inputs).var()
                if not (torch.isfinite(variance) and variance > 0):
                    raise UserError(
                        f"init=lsuv: the output of {weight.name.rpartition('.')[0]} is constant or not finite on the "
                        "batch it is measured on; use another init"
                    )
                if (variance - 1).abs() < tolerance:
                    break
                weight.tensor.div_(variance.sqrt())
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    for module, mode in training.items():
        module.training = mode
    _finish(model, zero_last_gamma)


def whitening(
    model: nn.Module,
    generator: torch.Generator,
    *,
    inputs: Tensor,
    epsilon: NonNegative,
    dirac: bool,
    head_std: Positive | None,
    zero_last_gamma: bool,
) -> None:
    """The first convolution whitens the patches of `inputs`; the rest stays as it was built, but for two keys.

    Filter i is the i-th eigenvector of the patches' covariance, largest eigenvalue first, divided by
    sqrt(eigenvalue + epsilon); filters beyond the patch's dimension are the negatives of the first ones (behind a
    ReLU a direction needs both signs), and what is left beyond those stays (Page 2018, "How to train your ResNet 8";
    Jordan 2024, airbench). Its bias stays as it was drawn. `inputs` is [B, C, H, W], normalized, on the model's device;
    a few thousand do.

    `dirac`: the i-th filter of every other convolution passes channel i on, as far as there are channels (the filters
    beyond stay). `head_std`: the last linear layer's weights are multiplied to have this standard deviation (both
    Jordan 2024, sections 3.2 and 3.3 and its code).

    Errors: UserError where the model has no 2-d convolution over all its input's channels.
    """
    layer = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if layer is None or layer.groups != 1 or inputs.dim() != 4 or inputs.shape[1] != layer.in_channels:
        raise UserError("init=whitening: the model's first layer is no convolution over the image; use another init")
    height, width = layer.kernel_size
    with torch.no_grad():
        moments = torch.zeros((), dtype=torch.float64, device=inputs.device)
        count = 0
        for part in inputs.split(256):  # the patches take height * width times the memory of the images
            windows = part.double().unfold(2, height, 1).unfold(3, width, 1)  # [B, C, H', W', height, width]
            patches = windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
            moments = moments + patches.T @ patches
            count += len(patches)
        eigenvalues, eigenvectors = torch.linalg.eigh(moments / count)
        directions = (eigenvectors / (eigenvalues.clamp(min=0) + epsilon).sqrt()).T.flip(0)
        filters = torch.cat([directions, -directions])[: layer.out_channels].unflatten(1, layer.weight.shape[1:])
        layer.weight[: len(filters)] = filters.to(layer.weight)
        for other in model.modules() if dirac else ():
            if isinstance(other, nn.Conv2d) and other is not layer:
                nn.init.dirac_(other.weight[: other.weight.shape[1]])
        if head_std is not None:
            heads = [each for each in model.modules() if isinstance(each, nn.Linear)]
            if not heads:
                raise UserError(f"init.head_std={head_std:g}: the model has no linear layer; set init.head_std=null")
            heads[-1].weight.mul_(head_std / heads[-1].weight.std())
    _finish(model, zero_last_gamma)


def _zero_biases(model: nn.Module) -> Iterator[Weight]:
    """The weights, whose layers' biases become zero on the way."""
    for weight in weights(model):
        for name, parameter in weight.layer.named_parameters(recurse=False):
            if "bias" in name:
                nn.init.zeros_(parameter)
        yield weight


def _scaled_normal(
    model: nn.Module, generator: torch.Generator, variance: Callable[[Weight], float], zero_last_gamma: bool
) -> None:
    for weight in _zero_biases(model):
        nn.init.normal_(weight.tensor, std=sqrt(variance(weight)), generator=generator)
    _finish(model, zero_last_gamma)


def _scaled_uniform(
    model: nn.Module, generator: torch.Generator, variance: Callable[[Weight], float], zero_last_gamma: bool
) -> None:
    for weight in _zero_biases(model):
        bound = sqrt(3 * variance(weight))
        nn.init.uniform_(weight.tensor, -bound, bound, generator=generator)
    _finish(model, zero_last_gamma)


def _finish(model: nn.Module, zero_last_gamma: bool) -> None:
    """The switch that all schemes share: residual blocks start as their shortcut."""
    if not zero_last_gamma:
        return
    # zero_init_last is also what timm calls it
    found = [getattr(module, "zero_init_last", None) for module in model.modules()]
    switches = [switch for switch in found if switch is not None]
    if not switches:
        raise UserError("init.zero_last_gamma=true: the model has no residual blocks that can start at zero")
    for switch in switches:
        switch()


class _Reached(Exception):
    pass


def _in_forward_order(model: nn.Module, inputs: Tensor) -> list[Weight]:
    """The weights in the order in which their layers are first called."""
    order: dict[nn.Module, int] = {}
    by_layer = [(weight.layer, weight) for weight in weights(model)]

    def note(module: nn.Module, arguments: object) -> None:
        order.setdefault(module, len(order))

    handles = [layer.register_forward_pre_hook(note) for layer, _ in by_layer]
    try:
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    called = [pair for pair in by_layer if pair[0] in order]
    return [weight for _, weight in sorted(called, key=lambda pair: order[pair[0]])]


def _output(model: nn.Module, layer: nn.Module, inputs: Tensor) -> Tensor:
    """What `layer` returns at its first call; the rest of the forward pass is left out."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, arguments: object, output: Tensor) -> None:
        caught.append(output)
        raise _Reached

    handle = layer.register_forward_hook(catch)
    try:
        model(inputs)
    except _Reached:
        pass
    finally:
        handle.remove()
    return caught[0]
