"""Pre-activation residual networks (He et al. 2016b, "Identity Mappings in Deep Residual Networks") and wide ones.

Normalization and ReLU precede each convolution; nothing follows the sum of branch and shortcut.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated, Literal, Unpack

from torch import Tensor, nn

from dlopt.basics.ranges import Count, Depth, Fraction, layers
from dlopt.models.layers import GlobalAveragePool, Norm, NormKeys, check_instance_norm, conv, image_shape, zero_branch
from dlopt.models.resnet import ZeroPadShortcut, add_stages

_LAYERS = layers(6, 4)  # of a wide network


class PreActBlock(nn.Module):
    """shortcut(x) + conv(dropout(relu(norm(conv(relu(norm(x))))))) with 3x3 convolutions.

    A projection shortcut takes the activated input, as in the authors' code; zero padding (option A) takes x.
    """

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, *, projection: bool, dropout: float, norm: Norm) -> None:
        super().__init__()
        self.norm1, self.act1 = norm.maps(inputs), nn.ReLU()
        self.conv1 = conv(inputs, width, 3, stride=stride, bias=norm.bias)
        self.norm2, self.act2, self.dropout = norm.maps(width), nn.ReLU(), nn.Dropout(dropout)
        self.conv2 = conv(width, width, 3, bias=norm.bias)
        self.shortcut = _shortcut(inputs, width, stride, projection, norm)

    def forward(self, maps: Tensor) -> Tensor:
        active = self.act1(self.norm1(maps))
        branch = self.conv2(self.dropout(self.act2(self.norm2(self.conv1(active)))))
        return branch + self.shortcut(active if isinstance(self.shortcut, nn.Conv2d) else maps)

    def zero_init_last(self) -> None:
        """Makes the block start as its shortcut. No normalization follows the last convolution, so that is zeroed."""
        zero_branch(nn.Identity(), self.conv2)


class PreActBottleneck(nn.Module):
    """shortcut(x) + three times (norm, relu, convolution): 1x1, 3x3 with the stride, 1x1 to 4x the channels."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, *, projection: bool, dropout: float, norm: Norm) -> None:
        super().__init__()
        self.norm1, self.act1 = norm.maps(inputs), nn.ReLU()
        self.conv1 = conv(inputs, width, 1, bias=norm.bias)
        self.norm2, self.act2 = norm.maps(width), nn.ReLU()
        self.conv2 = conv(width, width, 3, stride=stride, bias=norm.bias)
        self.norm3, self.act3, self.dropout = norm.maps(width), nn.ReLU(), nn.Dropout(dropout)
        self.conv3 = conv(width, width * self.expansion, 1, bias=norm.bias)
        self.shortcut = _shortcut(inputs, width * self.expansion, stride, projection, norm)

    def forward(self, maps: Tensor) -> Tensor:
        active = self.act1(self.norm1(maps))
        branch = self.act2(self.norm2(self.conv1(active)))
        branch = self.conv3(self.dropout(self.act3(self.norm3(self.conv2(branch)))))
        return branch + self.shortcut(active if isinstance(self.shortcut, nn.Conv2d) else maps)

    def zero_init_last(self) -> None:
        """Makes the block start as its shortcut. No normalization follows the last convolution, so that is zeroed."""
        zero_branch(nn.Identity(), self.conv3)


def _shortcut(inputs: int, outputs: int, stride: int, projection: bool, norm: Norm) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    if projection:
        return conv(inputs, outputs, 1, stride=stride, bias=norm.bias)
    return ZeroPadShortcut(inputs, outputs, stride)


def _network(
    channels: int,
    classes: int,
    count: int,
    width: int,
    block: Callable[[int, int, int], PreActBlock | PreActBottleneck],
    expansion: int,
    norm: Norm,
) -> OrderedDict[str, nn.Module]:
    """Builds a 3x3 convolution to 16 channels, three stages of `count` blocks, a final norm, and the classifier."""
    modules: OrderedDict[str, nn.Module] = OrderedDict(stem=conv(channels, 16, 3, bias=norm.bias))
    outputs = add_stages(modules, block, 16, width, [count] * 3, expansion)
    modules.update(norm=norm.maps(outputs), activation=nn.ReLU(), pool=GlobalAveragePool())
    modules["head"] = nn.Linear(outputs, classes)
    return modules


class PreActResNet(nn.Sequential):
    """The paper's networks for CIFAR: 6n+2 layers in `basic` blocks (110) or 9n+2 in `bottleneck` blocks (164, 1001).

    Basic blocks have the parameter-free shortcut (option A); bottlenecks use a projection if the shape changes.
    `dropout` is applied before the last convolution of each block. Images [B, C, H, W] -> [B, classes].

    Errors: UserError for an invalid depth, or samples that are not images.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        classes: int,
        depth: Depth,
        block: Literal["basic", "bottleneck"],
        dropout: Fraction,
        **norm: Unpack[NormKeys],
    ) -> None:
        channels, _, _ = image_shape(input_shape, "a ResNet")
        per_block = 6 if block == "basic" else 9
        layers(per_block, 2).require(f"model.block={block}, model.depth", depth)
        normalize = Norm(**norm)
        kind = PreActBlock if block == "basic" else PreActBottleneck

        def build(inputs: int, width: int, stride: int) -> PreActBlock | PreActBottleneck:
            return kind(inputs, width, stride, projection=block == "bottleneck", dropout=dropout, norm=normalize)

        super().__init__(_network(channels, classes, (depth - 2) // per_block, 16, build, kind.expansion, normalize))
        check_instance_norm(self, input_shape, norm["norm"])


class WideResNet(nn.Sequential):
    """WRN-depth-widen of Zagoruyko & Komodakis 2016 ("Wide Residual Networks", table 1): 6n+4 layers.

    The three stages have 16, 32, 64 times `widen` channels. `dropout` is applied between the convolutions of each block
    (section 2.4). Images [B, C, H, W] -> [B, classes].

    Errors: UserError for a depth other than 6n+4, or samples that are not images.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        classes: int,
        depth: Annotated[Depth, _LAYERS],
        widen: Count,
        dropout: Fraction,
        **norm: Unpack[NormKeys],
    ) -> None:
        channels, _, _ = image_shape(input_shape, "a wide ResNet")
        _LAYERS.require("model.depth", depth)
        normalize = Norm(**norm)

        def build(inputs: int, width: int, stride: int) -> PreActBlock:
            return PreActBlock(inputs, width, stride, projection=True, dropout=dropout, norm=normalize)

        super().__init__(_network(channels, classes, (depth - 4) // 6, 16 * widen, build, 1, normalize))
        check_instance_norm(self, input_shape, norm["norm"])
