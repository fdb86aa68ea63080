"""Pre-activation residual networks (He et al. 2016b, "Identity Mappings in Deep Residual Networks"), wide ones too.

The sum of branch and shortcut stays as it is; normalization and ReLU stand in front of each convolution.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Literal, Unpack

from torch import Tensor, nn

from dlopt.errors import UserError
from dlopt.models.layers import GlobalAveragePool, Norm, NormKeys, check_instance_norm, conv, image_shape, zero_branch
from dlopt.models.resnet import ZeroPadShortcut
from dlopt.ranges import Count, Fraction


class PreActBlock(nn.Module):
    """shortcut(x) + conv(dropout(relu(norm(conv(relu(norm(x))))))) with 3x3 convolutions.

    A projection reads the activated input, as in the authors' code; zero padding (option A) reads the input itself.
    """

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, *, projection: bool, dropout: float, norm: Norm) -> None:
        super().__init__()
        self.norm1 = norm.maps(inputs)
        self.act1 = nn.ReLU()
        self.conv1 = conv(inputs, width, 3, stride=stride, bias=norm.bias)
        self.norm2 = norm.maps(width)
        self.act2 = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(width, width, 3, bias=norm.bias)
        self.shortcut = _shortcut(inputs, width, stride, projection, norm)

    def forward(self, maps: Tensor) -> Tensor:
        active = self.act1(self.norm1(maps))
        branch = self.conv2(self.dropout(self.act2(self.norm2(self.conv1(active)))))
        return branch + self.shortcut(active if isinstance(self.shortcut, nn.Conv2d) else maps)

    def zero_init_last(self) -> None:
        """Makes the block start as its shortcut: no normalization follows the last convolution, so that is zero."""
        zero_branch(nn.Identity(), self.conv2)


class PreActBottleneck(nn.Module):
    """shortcut(x) + three times (norm, relu, convolution): 1x1, 3x3 with the stride, 1x1 to four times the channels."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, *, projection: bool, dropout: float, norm: Norm) -> None:
        super().__init__()
        self.norm1 = norm.maps(inputs)
        self.act1 = nn.ReLU()
        self.conv1 = conv(inputs, width, 1, bias=norm.bias)
        self.norm2 = norm.maps(width)
        self.act2 = nn.ReLU()
        self.conv2 = conv(width, width, 3, stride=stride, bias=norm.bias)
        self.norm3 = norm.maps(width)
        self.act3 = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.conv3 = conv(width, width * self.expansion, 1, bias=norm.bias)
        self.shortcut = _shortcut(inputs, width * self.expansion, stride, projection, norm)

    def forward(self, maps: Tensor) -> Tensor:
        active = self.act1(self.norm1(maps))
        branch = self.act2(self.norm2(self.conv1(active)))
        branch = self.conv3(self.dropout(self.act3(self.norm3(self.conv2(branch)))))
        return branch + self.shortcut(active if isinstance(self.shortcut, nn.Conv2d) else maps)

    def zero_init_last(self) -> None:
        """Makes the block start as its shortcut: no normalization follows the last convolution, so that is zero."""
        zero_branch(nn.Identity(), self.conv3)


def _shortcut(inputs: int, outputs: int, stride: int, projection: bool, norm: Norm) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    if projection:
        return conv(inputs, outputs, 1, stride=stride, bias=norm.bias)
    return ZeroPadShortcut(inputs, outputs, stride)


def _parts(
    channels: int,
    classes: int,
    count: int,
    width: int,
    block: Callable[[int, int, int], PreActBlock | PreActBottleneck],
    norm: Norm,
) -> OrderedDict[str, nn.Module]:
    """A 3x3 convolution to 16 channels, three stages of `count` blocks, the last normalization, and the classifier."""
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=conv(channels, 16, 3, bias=norm.bias))
    inputs = 16
    for stage in range(3):
        blocks = []
        for index in range(count):
            blocks.append(block(inputs, width * 2**stage, 2 if stage > 0 and index == 0 else 1))
            inputs = width * 2**stage * blocks[-1].expansion
        parts[f"stage{stage + 1}"] = nn.Sequential(*blocks)
    parts["norm"] = norm.maps(inputs)
    parts["activation"] = nn.ReLU()
    parts["pool"] = GlobalAveragePool()
    parts["head"] = nn.Linear(inputs, classes)
    return parts


class PreActResNet(nn.Sequential):
    """The paper's nets for CIFAR: `basic` blocks of 6n+2 layers (110) or `bottleneck` ones of 9n+2 (164, 1001).

    Basic blocks have the parameter-free shortcut (option A), bottlenecks project where the shape changes. `dropout`
    acts in front of the last convolution of each block. Takes images [B, C, H, W], returns [B, classes].

    Errors: UserError for a depth that the blocks do not make up, or data that are no images.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        classes: int,
        depth: Count,
        block: Literal["basic", "bottleneck"],
        dropout: Fraction,
        **norm: Unpack[NormKeys],
    ) -> None:
        channels, _, _ = image_shape(input_shape, "a ResNet")
        layers = 6 if block == "basic" else 9
        if depth < layers + 2 or (depth - 2) % layers:
            raise UserError(
                f"model.depth={depth}: with model.block={block} there are {layers}n+2 layers; "
                f"use {', '.join(str(layers * n + 2) for n in (2, 3, 9, 18, 111))} or the like"
            )
        normalize = Norm.of(**norm)
        kind = PreActBlock if block == "basic" else PreActBottleneck

        def make(inputs: int, width: int, stride: int) -> PreActBlock | PreActBottleneck:
            return kind(inputs, width, stride, projection=block == "bottleneck", dropout=dropout, norm=normalize)

        super().__init__(_parts(channels, classes, (depth - 2) // layers, 16, make, normalize))
        check_instance_norm(self, input_shape, normalize)


class WideResNet(nn.Sequential):
    """WRN-depth-widen of Zagoruyko & Komodakis 2016 ("Wide Residual Networks", table 1): 6n+4 layers.

    The three stages have 16, 32, 64 times `widen` channels. `dropout` acts between the convolutions of each block
    (section 2.4). Takes images [B, C, H, W], returns [B, classes].

    Errors: UserError for a depth other than 6n+4, or data that are no images.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        classes: int,
        depth: Count,
        widen: Count,
        dropout: Fraction,
        **norm: Unpack[NormKeys],
    ) -> None:
        channels, _, _ = image_shape(input_shape, "a wide ResNet")
        if depth < 10 or depth % 6 != 4:
            raise UserError(f"model.depth={depth}: wide ResNets have 6n+4 layers; use 10, 16, 22, 28, 34 or 40")
        normalize = Norm.of(**norm)

        def make(inputs: int, width: int, stride: int) -> PreActBlock:
            return PreActBlock(inputs, width, stride, projection=True, dropout=dropout, norm=normalize)

        super().__init__(_parts(channels, classes, (depth - 4) // 6, 16 * widen, make, normalize))
        check_instance_norm(self, input_shape, normalize)
