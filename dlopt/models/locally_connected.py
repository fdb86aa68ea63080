"""A network of locally connected layers: convolutions with separate filters at every position."""

from collections import OrderedDict
from typing import Annotated, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlopt.basics.ranges import ODD, Count, Fraction
from dlopt.models.layers import Activation, Norm, NormKeys, check_instance_norm, image_shape
from dlopt.models.layers import activation as make_activation


class LocallyConnected2d(nn.Module):
    """[B, inputs, H, W] -> [B, outputs, H', W'] with unshared filters (LeCun 1989); padding kernel // 2.

    `weight` is [H'*W', outputs, inputs*kernel*kernel], `bias` [outputs, H', W'] or None. Initialized as torch's
    convolutions: uniform within 1 / sqrt(fan_in).
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, extent: tuple[int, int], stride: int, bias: bool
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, kernel // 2
        height, width = ((pixels + 2 * self.padding - kernel) // stride + 1 for pixels in extent)
        self.extent = (height, width)
        self.weight = nn.Parameter(torch.empty(height * width, outputs, inputs * kernel**2))
        self.bias = nn.Parameter(torch.empty(outputs, height, width)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[2] ** -0.5
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, maps: Tensor) -> Tensor:
        patches = F.unfold(maps, self.kernel, padding=self.padding, stride=self.stride)  # [B, inputs*k*k, positions]
        output = torch.einsum("bip,poi->bop", patches, self.weight).unflatten(2, self.extent)
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        positions, outputs, fan_in = self.weight.shape
        return f"fan_in={fan_in}, outputs={outputs}, positions={positions}, kernel={self.kernel}, stride={self.stride}"


class LocallyConnectedNet(nn.Sequential):
    """Locally connected layers of the given `channels`, each with normalization and activation, and a classifier.

    Compare it with a convolutional network of the same connections to measure the effect of weight sharing. Images
    [B, C, H, W] of one fixed size -> [B, classes].
    Errors: UserError for samples that are not images.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        classes: int,
        channels: tuple[Count, ...],
        kernel: Annotated[Count, ODD],
        stride: Count,
        activation: Activation,
        dropout: Fraction,
        **norm: Unpack[NormKeys],
    ) -> None:
        inputs, height, width = image_shape(input_shape, "a locally connected net")
        normalize = Norm(**norm)
        extent = (height, width)
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        for index, outputs in enumerate(channels):
            layer = LocallyConnected2d(inputs, outputs, kernel, extent=extent, stride=stride, bias=normalize.bias)
            modules[f"layer{index + 1}"] = nn.Sequential(layer, normalize.maps(outputs), make_activation(activation))
            inputs, extent = outputs, layer.extent
        head = nn.Linear(inputs * extent[0] * extent[1], classes)
        modules.update(flatten=nn.Flatten(), dropout=nn.Dropout(dropout), head=head)
        super().__init__(modules)
        check_instance_norm(self, input_shape, norm["norm"])
