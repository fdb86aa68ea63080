"""Weight initialization schemes. Each overwrites the weights of a built model, with random numbers from `generator`.

A scheme sets the weights of all linear, convolution and recurrent layers and zeroes their biases; it does not change
normalization layers and, except for gpt2 and mup, embeddings. fan_in is the number of inputs of a unit (input channels
x receptive field), fan_out the number of units that read an input.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from math import sqrt
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Count, NonNegative, Positive
from dlopt.models.alexnet import AlexNet, TwoColumnAlexNet
from dlopt.models.layers import ACTIVATIONS, evaluation_mode
from dlopt.models.locally_connected import LocallyConnected2d
from dlopt.models.order import forward_order, output_layer
from dlopt.optim.parameters import NORMS

Fan = Literal["fan_in", "fan_out"]
_TORCH_GAINS: dict[type[nn.Module], Any] = {
    nn.LeakyReLU: "leaky_relu", nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.SELU: "selu",
}  # fmt: skip
# Also activations that only models of other packages have: ReLU6 and Hardswish (MobileNet), CELU, PReLU.
_ACTIVATIONS = (
    *(kind for kind in ACTIVATIONS.values() if kind is not nn.Identity), nn.ReLU6, nn.Hardswish, nn.CELU, nn.PReLU,
)  # fmt: skip


class Weight(NamedTuple):
    """A weight of a layer: its name in the model, the layer, the tensor, fan_in and fan_out."""

    name: str
    layer: nn.Module
    tensor: Tensor
    fan_in: int
    fan_out: int


def weights(model: nn.Module) -> Iterator[Weight]:
    """Yields the weights that a scheme sets: matrices and kernels, except embeddings and normalization layers.

    Errors: UserError for weights that the layer computes from other parameters.
    """
    _refuse_computed_weights(model)
    for prefix, layer in model.named_modules():
        if isinstance(layer, (nn.Embedding, *NORMS)):
            continue
        for name, tensor in layer.named_parameters(prefix, recurse=False):
            if tensor.dim() >= 2 and "weight" in name.rpartition(".")[2]:
                yield Weight(name, layer, tensor, *fans(layer, tensor))


def _refuse_computed_weights(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if is_parametrized(layer) or hasattr(layer, "weight_g"):  # torch's older weight_norm is a hook
            raise UserError(
                f"init: {name or type(layer).__name__} computes its weights from other parameters, as weight_norm and "
                "spectral_norm do, which no scheme sets; use init=default"
            )


def fans(layer: nn.Module, weight: Tensor) -> tuple[int, int]:
    """Returns (fan_in, fan_out) of a layer's weight; for grouped convolutions, within one group."""
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
    """Returns the gain for the model's most frequent activation; 1 if it has none (functions are not found).

    torch's recommended value if there is one (ReLU: sqrt(2), tanh: 5/3; PReLU: of its mean slope), else
    1 / sqrt(E[f(z)^2]) for a standard normal z: the factor that preserves the second moment from layer to
    layer, as He et al. 2015 derive sqrt(2).
    """
    counts = Counter(type(module) for module in model.modules() if isinstance(module, _ACTIVATIONS))
    if not counts:
        return 1.0
    ((kind, _),) = counts.most_common(1)
    activation = next(module for module in model.modules() if type(module) is kind)
    if kind in _TORCH_GAINS:
        return nn.init.calculate_gain(_TORCH_GAINS[kind], getattr(activation, "negative_slope", None))
    if isinstance(activation, nn.PReLU):
        return nn.init.calculate_gain("leaky_relu", activation.weight.mean().item())
    z = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / sqrt(2 * torch.pi)
    return torch.trapezoid(activation(z.clone()).square() * density, z).rsqrt().item()


def default(model: nn.Module, generator: torch.Generator, *, zero_last_gamma: bool) -> None:
    """Keeps the weights of the built model (torch's default scheme, or pretrained weights)."""
    _finish(model, zero_last_gamma)


def normal(model: nn.Module, generator: torch.Generator, *, std: NonNegative, zero_last_gamma: bool) -> None:
    """Normal with the same standard deviation for all layers."""
    for weight in _zero_biases(model):
        nn.init.normal_(weight.tensor, std=std, generator=generator)
    _finish(model, zero_last_gamma)


def alexnet(model: nn.Module, generator: torch.Generator, *, std: NonNegative, zero_last_gamma: bool) -> None:
    """Normal with the same standard deviation for all layers, and some biases of 1 (Krizhevsky et al. 2012, section 5).

    Convolutions 2, 4 and 5 and the hidden fully connected layers start with biases of 1, which give ReLUs positive
    inputs; all other biases start at 0.

    Errors: UserError for another model than AlexNet.
    """
    if not isinstance(model, AlexNet | TwoColumnAlexNet):
        raise UserError("init=alexnet: sets the biases of certain layers of AlexNet; use model=alexnet, or init=normal")
    normal(model, generator, std=std, zero_last_gamma=zero_last_gamma)
    for column in model.columns if isinstance(model, TwoColumnAlexNet) else [model]:
        layers = [module for module in column.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        for number in (1, 3, 4, 5, 6):
            bias = layers[number].bias
            if bias is not None:  # batch norm has its own
                nn.init.ones_(bias)


def uniform(model: nn.Module, generator: torch.Generator, *, bound: NonNegative, zero_last_gamma: bool) -> None:
    """Uniform on [-bound, bound] for all layers."""
    for weight in _zero_biases(model):
        nn.init.uniform_(weight.tensor, -bound, bound, generator=generator)
    _finish(model, zero_last_gamma)


def fan_in_normal(model: nn.Module, generator: torch.Generator, *, zero_last_gamma: bool) -> None:
    """Normal with variance 1 / fan_in (LeCun, Bottou, Orr & Müller 1998, section 4.6)."""
    _scaled_normal(model, generator, lambda weight: 1 / weight.fan_in, zero_last_gamma)


def fan_in_uniform(model: nn.Module, generator: torch.Generator, *, zero_last_gamma: bool) -> None:
    """Uniform with variance 1 / fan_in."""
    _scaled_uniform(model, generator, lambda weight: 1 / weight.fan_in, zero_last_gamma)


def fan_out_normal(model: nn.Module, generator: torch.Generator, *, zero_last_gamma: bool) -> None:
    """Normal with variance 1 / fan_out, which preserves the gradients' variance in a linear network."""
    _scaled_normal(model, generator, lambda weight: 1 / weight.fan_out, zero_last_gamma)


def fan_out_uniform(model: nn.Module, generator: torch.Generator, *, zero_last_gamma: bool) -> None:
    """Uniform with variance 1 / fan_out."""
    _scaled_uniform(model, generator, lambda weight: 1 / weight.fan_out, zero_last_gamma)


def xavier_normal(model: nn.Module, generator: torch.Generator, *, gain: Positive, zero_last_gamma: bool) -> None:
    """Normal with variance gain^2 * 2 / (fan_in + fan_out) (Glorot & Bengio 2010, equation 12)."""
    _scaled_normal(model, generator, lambda weight: gain**2 * 2 / (weight.fan_in + weight.fan_out), zero_last_gamma)


def xavier_uniform(model: nn.Module, generator: torch.Generator, *, gain: Positive, zero_last_gamma: bool) -> None:
    """Uniform with variance gain^2 * 2 / (fan_in + fan_out) (Glorot & Bengio 2010, equation 16)."""
    _scaled_uniform(model, generator, lambda weight: gain**2 * 2 / (weight.fan_in + weight.fan_out), zero_last_gamma)


def kaiming_normal(
    model: nn.Module, generator: torch.Generator, *, mode: Fan, gain: Positive | None, zero_last_gamma: bool
) -> None:
    """Normal with variance gain^2 / fan (He et al. 2015, equations 10 and 14); gain None: see `activation_gain`."""
    gain = activation_gain(model) if gain is None else gain
    _scaled_normal(model, generator, lambda weight: gain**2 / getattr(weight, mode), zero_last_gamma)


def kaiming_uniform(
    model: nn.Module, generator: torch.Generator, *, mode: Fan, gain: Positive | None, zero_last_gamma: bool
) -> None:
    """Uniform with variance gain^2 / fan (He et al. 2015, equations 10 and 14); gain None: see `activation_gain`."""
    gain = activation_gain(model) if gain is None else gain
    _scaled_uniform(model, generator, lambda weight: gain**2 / getattr(weight, mode), zero_last_gamma)


def orthogonal(model: nn.Module, generator: torch.Generator, *, gain: Positive | None, zero_last_gamma: bool) -> None:
    """Orthonormal rows or columns times `gain` (Saxe, McClelland & Ganguli 2014); None: see `activation_gain`.

    A grouped convolution has a matrix per group, a locally connected layer one per position.
    """
    gain = activation_gain(model) if gain is None else gain
    for weight in _zero_biases(model):
        layer, tensor = weight.layer, weight.tensor.detach()
        for matrix in tensor if isinstance(layer, LocallyConnected2d) else tensor.chunk(getattr(layer, "groups", 1)):
            nn.init.orthogonal_(matrix, gain=gain, generator=generator)
    _finish(model, zero_last_gamma)


def dirac(model: nn.Module, generator: torch.Generator, *, zero_last_gamma: bool) -> None:
    """Identity convolutions (Zagoruyko & Komodakis 2017, DiracNets); additional output channels repeat the inputs.

    Other layers are normal with variance 1 / fan_in: identities there would keep repeated channels equal forever.
    """
    for weight in _zero_biases(model):
        if isinstance(weight.layer, _ConvNd):
            for group in weight.tensor.detach().chunk(weight.layer.groups):
                for copies in group.split(group.shape[1]):
                    nn.init.dirac_(copies)
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

    Starts from orthonormal weights. Then, in the order of the forward pass, divides each weight by the standard
    deviation of its output until the variance is within `tolerance` of 1, for at most `iterations` rounds. The variance
    is measured on `samples` of the `inputs` ([B, *shape], normalized, on the model's device).

    Errors: UserError if a layer's output on `inputs` is constant, not finite or not a tensor.
    """
    orthogonal(model, generator, gain=1.0, zero_last_gamma=False)
    inputs = inputs[:: max(1, len(inputs) // samples)][:samples]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with evaluation_mode(model), torch.no_grad():
        # Batch statistics as in training, but no dropout; the running statistics are restored below.
        model.train()
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        for weight in _in_forward_order(model, inputs):
            for _ in range(iterations):
                output = _output(model, weight.layer, inputs)
                if not isinstance(output, Tensor):
                    raise UserError(
                        f"init=lsuv: {type(weight.layer).__name__} returns more than one tensor; use another init"
                    )
                variance = output.var()
                if not (torch.isfinite(variance) and variance > 0):
                    raise UserError(
                        f"init=lsuv: the output of {weight.name.rpartition('.')[0]} is constant or not finite on "
                        "training data; use another init"
                    )
                if (variance - 1).abs() < tolerance:
                    break
                weight.tensor.div_(variance.sqrt())
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
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
    """Makes the first convolution whiten the patches of `inputs`; other layers change only by `dirac` and `head_std`.

    Filter i is the i-th eigenvector of the patches' covariance (largest eigenvalue first), divided by
    sqrt(eigenvalue + epsilon). Filters beyond the patch's dimension are the negatives of the first ones (before a ReLU,
    a direction needs both signs); any further filters, and the bias, are not changed (Page 2018, "How to train your
    ResNet 8"; Jordan 2024, airbench).

    Args:
        inputs: [B, C, H, W], normalized, on the model's device; a few thousand suffice.
        dirac: filter i of every other convolution copies input channel i (of each group separately); filters beyond
            the number of input channels are not changed.
        head_std: rescales the weights of the last layer (`output_layer`) to this standard deviation (both: Jordan 2024,
            sections 3.2 and 3.3, and its code).

    Errors: UserError if the model has no 2-d convolution over all channels of its input, or see `weights`.
    """
    _refuse_computed_weights(model)
    try:
        uses = forward_order(model, inputs[:2])
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"init=whitening: the model fails on training data: {reason}; use another init") from None
    modules = dict(model.named_modules())
    layer = next((modules[path] for path in uses if isinstance(modules.get(path), nn.Conv2d)), None)
    if layer is None or layer.groups != 1 or inputs.dim() != 4 or inputs.shape[1] != layer.in_channels:
        raise UserError("init=whitening: the model does not start with a convolution of the image; use another init")
    height, width = layer.kernel_size
    with torch.no_grad():
        moments = torch.zeros((), dtype=torch.float64, device=inputs.device)
        rows, columns = inputs.shape[2] - height + 1, inputs.shape[3] - width + 1  # of patches in an image
        offsets = list(itertools.product(range(height), range(width)))
        # A component of all patches of an image is a shifted image, which is copied row by row, and not patch by patch.
        # So few images at a time that they stay in a processor's cache.
        for batch in inputs.split(32):
            shifted = [batch[:, :, top : top + rows, left : left + columns].double() for top, left in offsets]
            patches = torch.stack(shifted, 2).flatten(3).flatten(1, 2)  # [B, C * height * width, rows * columns]
            moments = moments + (patches @ patches.mT).sum(0)
        eigenvalues, eigenvectors = torch.linalg.eigh(moments / (len(inputs) * rows * columns))
        directions = (eigenvectors / (eigenvalues.clamp(min=0) + epsilon).sqrt()).T.flip(0)
        filters = torch.cat([directions, -directions])[: layer.out_channels].unflatten(1, layer.weight.shape[1:])
        layer.weight[: len(filters)] = filters.to(layer.weight)
        for other in model.modules() if dirac else ():
            if isinstance(other, nn.Conv2d) and other is not layer:
                for group in other.weight.chunk(other.groups):
                    nn.init.dirac_(group[: group.shape[1]])
        if head_std is not None:
            head: Any = output_layer(model, uses)
            if head is layer:
                raise UserError(f"init.head_std={head_std:g}: the model has one layer only; set init.head_std=null")
            head.weight.mul_(head_std / head.weight.std())
    _finish(model, zero_last_gamma)


def gpt2(model: nn.Module, generator: torch.Generator, *, std: NonNegative, zero_last_gamma: bool) -> None:
    """Normal with standard deviation `std`, embeddings included (Radford et al. 2019, section 2.3).

    The last layer of each residual branch gets std / sqrt(number of branches): two branches per block.
    """
    projections = [layer for module in model.modules() for layer in getattr(module, "residual_projections", ())]
    for weight in _zero_biases(model):
        scale = len(projections) ** -0.5 if weight.layer in projections else 1.0
        nn.init.normal_(weight.tensor, std=std * scale, generator=generator)
    _normal_embeddings(model, generator, std)
    _finish(model, zero_last_gamma)


class WidthGrowth(NamedTuple):
    """Names of the parameters that grow with the width of the model, which is now `width`.

    Those of neither set have outputs that grow: input weights, embeddings, biases and gains.
    """

    width: int
    hidden: frozenset[str]  # weights whose inputs and outputs grow
    outputs: frozenset[str]  # weights of which only the inputs grow
    dimensions: Mapping[str, tuple[int, ...]] = MappingProxyType({})  # that grow, by name


def mup(
    model: nn.Module,
    generator: torch.Generator,
    *,
    growth: WidthGrowth,
    std: NonNegative,
    base_width: Count,
    zero_last_gamma: bool,
) -> None:
    """muP (Yang et al. 2022, table 3): initial weights for which the best learning rate does not depend on the width.

    With m = width / base_width: N(0, std^2) for input weights and embeddings, N(0, std^2 / m) for hidden weights, whose
    inputs and outputs grow with the width, and N(0, std^2 / m^2) for output weights, of which only the inputs grow. The
    learning rates follow from the optimizer (`dlopt.training.builders.mup`): Adam's are divided by m for hidden and
    output weights. Where the features per head grow, divide attention scores by their number
    (`model.attention_scale=linear` of GPT); without this key (ViT), let the number of heads grow with the width.

    Errors: UserError if the output layer shares its weights with the embedding.
    """
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    m = growth.width / base_width
    for weight in _zero_biases(model):
        if weight.tensor in embeddings:
            raise UserError("init=mup: scales the output layer, not the embedding; set model.tied_embeddings=false")
        scale = 1 / m if weight.name in growth.outputs else m**-0.5 if weight.name in growth.hidden else 1.0
        nn.init.normal_(weight.tensor, std=std * scale, generator=generator)
    _normal_embeddings(model, generator, std)
    _finish(model, zero_last_gamma)


def _normal_embeddings(model: nn.Module, generator: torch.Generator, std: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std, generator=generator)


def _zero_biases(model: nn.Module) -> Iterator[Weight]:
    """Yields the weights and zeroes the biases of their layers."""
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
    """Applies zero_last_gamma: makes residual blocks start as their shortcut."""
    if not zero_last_gamma:
        return
    # timm's models have methods of the same name.
    methods = [method for module in model.modules() if (method := getattr(module, "zero_init_last", None))]
    if not methods:
        raise UserError("init.zero_last_gamma=true: the model has no residual blocks that can start at zero")
    for zero_init_last in methods:
        zero_init_last()


class _StopForward(Exception):
    pass


def _in_forward_order(model: nn.Module, inputs: Tensor) -> list[Weight]:
    """Returns the weights in the order in which their layers are first called."""
    order: dict[nn.Module, int] = {}
    all_weights = list(weights(model))

    def record(module: nn.Module, arguments: object) -> None:
        order.setdefault(module, len(order))

    with ExitStack() as hooks:
        for weight in all_weights:
            hooks.enter_context(weight.layer.register_forward_pre_hook(record))
        model(inputs)
    return sorted((weight for weight in all_weights if weight.layer in order), key=lambda weight: order[weight.layer])


def _output(model: nn.Module, layer: nn.Module, inputs: Tensor) -> object:
    """Returns the output of the first call of `layer`; skips the rest of the forward pass."""
    outputs: list[object] = []

    def capture(module: nn.Module, arguments: object, output: object) -> None:
        outputs.append(output)
        raise _StopForward

    with layer.register_forward_hook(capture), suppress(_StopForward):
        model(inputs)
    return outputs[0]
