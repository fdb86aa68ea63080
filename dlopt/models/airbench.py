"""The network of airbench (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU", section 3.1)."""

from collections import OrderedDict
from typing import Unpack

from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Count
from dlopt.models.layers import Activation, Norm, NormKeys, check_instance_norm, conv, image_shape
from dlopt.models.layers import activation as make_activation


class Divide(nn.Module):
    """x / divisor: keeps sums over many features at the order of one."""

    def __init__(self, divisor: float) -> None:
        super().__init__()
        self.divisor = divisor

    def forward(self, features: Tensor) -> Tensor:
        return features / self.divisor

    def extra_repr(self) -> str:
        return f"divisor={self.divisor:g}"


class AirBench(nn.Sequential):
    """A small whitening convolution (see `init=whitening_dirac`), three stages, and a linear head.

    The first layer has 2 * C * whiten_kernel^2 filters, two for each direction of a patch. A stage is conv, 2x2
    max-pooling, norm, activation, conv, norm, activation; the last maps are max-pooled to one pixel. The head has no
    bias, and its inputs are divided by their number. Maps of one pixel are not pooled, so that 8x8 images work too.
    Images [B, C, H, W] -> [B, classes].

    Errors: UserError for samples that are not images, or images smaller than the first filter.
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
                f"model.whiten_kernel={whiten_kernel}: the images have only {height}x{width} pixels; use at most "
                f"{min(height, width)}"
            )
        normalize = Norm(**norm)
        inputs = 2 * channels * whiten_kernel**2
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        modules["whiten"] = nn.Conv2d(channels, inputs, whiten_kernel)
        modules["act"] = make_activation(activation)
        size = [height - whiten_kernel + 1, width - whiten_kernel + 1]
        for index, outputs in enumerate(widths):
            pool = min(size) > 1
            if pool:
                size = [length // 2 for length in size]
            modules[f"stage{index + 1}"] = _stage(inputs, outputs, activation, normalize, pool=pool)
            inputs = outputs
        modules.update(pool=nn.MaxPool2d((size[0], size[1])), flatten=nn.Flatten(), scale=Divide(inputs))
        modules["head"] = nn.Linear(inputs, classes, bias=False)
        super().__init__(modules)
        check_instance_norm(self, input_shape, norm["norm"])


def _stage(inputs: int, outputs: int, name: Activation, norm: Norm, *, pool: bool) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = conv(inputs, outputs, 3, bias=norm.bias)
    if pool:
        layers["pool"] = nn.MaxPool2d(2)
    layers["norm1"] = norm.maps(outputs)
    layers["act1"] = make_activation(name)
    layers["conv2"] = conv(outputs, outputs, 3, bias=norm.bias)
    layers["norm2"] = norm.maps(outputs)
    layers["act2"] = make_activation(name)
    return nn.Sequential(layers)
