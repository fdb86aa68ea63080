"""The net with which Jordan 2024 ("94% on CIFAR-10 in 3.29 seconds on a single GPU", section 3.1) trains in seconds."""

from collections import OrderedDict
from typing import Unpack

from torch import Tensor, nn

from dlopt.errors import UserError
from dlopt.models.layers import Activation, Norm, NormKeys, check_instance_norm, conv, image_shape
from dlopt.models.layers import activation as make_activation
from dlopt.ranges import Count


class Divide(nn.Module):
    """x / divisor: outputs of the order of one from sums over many features."""

    def __init__(self, divisor: float) -> None:
        super().__init__()
        self.divisor = divisor

    def forward(self, features: Tensor) -> Tensor:
        return features / self.divisor

    def extra_repr(self) -> str:
        return f"divisor={self.divisor:g}"


class AirBench(nn.Sequential):
    """A small convolution that is meant to whiten (`init=whitening_dirac`), three stages, a linear head.

    The first layer has 2 * C * whiten_kernel^2 filters, two for each direction of a patch. A stage is conv, 2x2
    max-pooling, norm, activation, conv, norm, activation; the last maps are max-pooled to one pixel. The head has no
    bias, and its inputs are divided by their number. Maps of one pixel are not pooled, so that 8x8 images pass too.
    Takes images [B, C, H, W], returns [B, classes].

    Errors: UserError for data that are no images, or images smaller than the first filter.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        classes: int,
        whiten_kernel: Count,
        widths: tuple[Count, Count, Count],
        activation: Activation,
        **norm: Unpack[NormKeys],
    ) -> None:
        channels, height, width = image_shape(input_shape, "airbench94")
        if min(height, width) < whiten_kernel:
            raise UserError(
                f"model.whiten_kernel={whiten_kernel}: the images have only {height}x{width} pixels; use a smaller one"
            )
        normalize = Norm.of(**norm)
        inputs = 2 * channels * whiten_kernel**2
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        parts["whiten"] = nn.Conv2d(channels, inputs, whiten_kernel)
        parts["act"] = make_activation(activation)
        extent = [height - whiten_kernel + 1, width - whiten_kernel + 1]
        for index, outputs in enumerate(widths):
            pools = min(extent) > 1
            if pools:
                extent = [length // 2 for length in extent]
            parts[f"stage{index + 1}"] = _stage(inputs, outputs, activation, normalize, pools=pools)
            inputs = outputs
        parts["pool"] = nn.MaxPool2d((extent[0], extent[1]))
        parts["flatten"] = nn.Flatten()
        parts["scale"] = Divide(inputs)
        parts["head"] = nn.Linear(inputs, classes, bias=False)
        super().__init__(parts)
        check_instance_norm(self, input_shape, normalize)


def _stage(inputs: int, outputs: int, name: Activation, norm: Norm, *, pools: bool) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = conv(inputs, outputs, 3, bias=norm.bias)
    if pools:
        layers["pool"] = nn.MaxPool2d(2)
    layers["norm1"] = norm.maps(outputs)
    layers["act1"] = make_activation(name)
    layers["conv2"] = conv(outputs, outputs, 3, bias=norm.bias)
    layers["norm2"] = norm.maps(outputs)
    layers["act2"] = make_activation(name)
    return nn.Sequential(layers)
