"""Residual networks for images (He, Zhang, Ren & Sun 2016, "Deep Residual Learning for Image Recognition")."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Count, Depth, Fraction, layers
from dlopt.models.layers import (
    GlobalAveragePool,
    Norm,
    NormKeys,
    check_instance_norm,
    conv,
    conv_norm_relu,
    image_shape,
    zero_branch,
)

ShortcutPadding = Literal["end", "both"]
_LAYERS = layers(6, 2)


class ZeroPadShortcut(nn.Module):
    """Option A of the paper: subsampling by `stride`, and zeros for the additional channels. No parameters.

    `padding=end` appends the zero channels, as in fb.resnet.torch; `both` prepends half of them, as other
    implementations do, whose weights therefore need it.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, padding: ShortcutPadding = "end") -> None:
        super().__init__()
        extra = outputs - inputs
        front = extra // 2 if padding == "both" else 0
        self.extra = (front, extra - front)  # zero channels before and after
        self.stride = stride

    def forward(self, maps: Tensor) -> Tensor:
        return F.pad(maps[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.extra))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, extra_channels={self.extra}"


class BasicBlock(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)); without shortcut, two layers of a plain network."""

    expansion = 1

    def __init__(self, inputs: int, outputs: int, stride: int, *, shortcut: nn.Module | None, norm: Norm) -> None:
        super().__init__()
        self.conv1, self.norm1, self.act1 = conv_norm_relu(inputs, outputs, 3, norm, stride=stride)
        self.conv2, self.norm2, self.act2 = conv_norm_relu(outputs, outputs, 3, norm)
        self.shortcut = shortcut

    def forward(self, maps: Tensor) -> Tensor:
        branch = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(maps)))))
        return self.act2(branch if self.shortcut is None else branch + self.shortcut(maps))

    def zero_init_last(self) -> None:
        """Makes the block start as its shortcut."""
        if self.shortcut is None:
            raise UserError("init.zero_last_gamma=true: a plain network would output zero; use a residual model")
        zero_branch(self.norm2, self.conv2)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last with 4x the channels; the 3x3 convolution has the stride.

    In the paper the first convolution has the stride; torchvision and others moved it (ResNet v1.5), which is slightly
    more accurate.
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, *, shortcut: nn.Module, norm: Norm) -> None:
        super().__init__()
        self.conv1, self.norm1, self.act1 = conv_norm_relu(inputs, width, 1, norm)
        self.conv2, self.norm2, self.act2 = conv_norm_relu(width, width, 3, norm, stride=stride)
        self.conv3, self.norm3, self.act3 = conv_norm_relu(width, width * self.expansion, 1, norm)
        self.shortcut = shortcut

    def forward(self, maps: Tensor) -> Tensor:
        branch = self.act1(self.norm1(self.conv1(maps)))
        branch = self.act2(self.norm2(self.conv2(branch)))
        return self.act3(self.norm3(self.conv3(branch)) + self.shortcut(maps))

    def zero_init_last(self) -> None:
        """Makes the block start as its shortcut."""
        zero_branch(self.norm3, self.conv3)


def add_stages(
    modules: OrderedDict[str, nn.Module],
    block: Callable[[int, int, int], nn.Module],
    inputs: int,
    width: int,
    counts: Sequence[int],
    expansion: int = 1,
) -> int:
    """Adds stage1, stage2, ... with `counts` blocks each to `modules`; returns the number of output channels.

    The width doubles from stage to stage; the first block of all stages but the first has stride 2.

    Args:
        block: builds a block from (input channels, width, stride).
        expansion: output channels of a block / its width.
    """
    for stage, count in enumerate(counts):
        blocks = []
        for index in range(count):
            blocks.append(block(inputs, width * 2**stage, 2 if stage > 0 and index == 0 else 1))
            inputs = width * 2**stage * expansion
        modules[f"stage{stage + 1}"] = nn.Sequential(*blocks)
    return inputs


class CifarResNet(nn.Sequential):
    """The paper's networks for CIFAR-10 (section 4.2): 6n+2 layers, three stages of n blocks with 16, 32, 64 channels.

    Where the channels double, the shortcut is option A: stride 2 and zero channels. `residual=false` gives the plain
    networks with the same layers. Images [B, C, H, W] of any size -> [B, classes].

    Errors: UserError for a depth other than 6n+2, `shortcut_padding` without shortcuts, or samples that are not images.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        classes: int,
        depth: Annotated[Depth, _LAYERS],
        width: Count,
        residual: bool,
        shortcut_padding: ShortcutPadding,
        dropout: Fraction,
        **norm: Unpack[NormKeys],
    ) -> None:
        channels, _, _ = image_shape(input_shape, "a ResNet")
        if not residual and shortcut_padding != "end":
            raise UserError(
                f"model.shortcut_padding={shortcut_padding}: a plain network has no shortcuts; set model.residual=true"
            )
        _LAYERS.require("model.depth", depth)
        normalize = Norm(**norm)

        def block(inputs: int, outputs: int, stride: int) -> BasicBlock:
            shortcut: nn.Module | None = None
            if residual:
                same = inputs == outputs and stride == 1
                shortcut = nn.Identity() if same else ZeroPadShortcut(inputs, outputs, stride, shortcut_padding)
            return BasicBlock(inputs, outputs, stride, shortcut=shortcut, norm=normalize)

        modules: OrderedDict[str, nn.Module] = OrderedDict()
        modules["stem"] = nn.Sequential(*conv_norm_relu(channels, width, 3, normalize))
        outputs = add_stages(modules, block, width, width, [(depth - 2) // 6] * 3)
        modules.update(pool=GlobalAveragePool(), dropout=nn.Dropout(dropout), head=nn.Linear(outputs, classes))
        super().__init__(modules)
        check_instance_norm(self, input_shape, norm["norm"])


_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class ResNet(nn.Sequential):
    """ResNet-18, 34 (basic blocks), 50 and 101 (bottlenecks) with projection shortcuts (option B; table 1).

    `stem=imagenet` is a 7x7 convolution of stride 2 and a 3x3 max-pooling of stride 2; `stem=small` is one 3x3
    convolution of stride 1 without pooling, for images of about 32 pixels. Images [B, C, H, W] -> [B, classes].

    Errors: UserError for samples that are not images.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        classes: int,
        depth: Literal[18, 34, 50, 101],
        stem: Literal["small", "imagenet"],
        dropout: Fraction,
        **norm: Unpack[NormKeys],
    ) -> None:
        channels, _, _ = image_shape(input_shape, "a ResNet")
        normalize = Norm(**norm)
        kind = BasicBlock if depth < 50 else Bottleneck

        def block(inputs: int, width: int, stride: int) -> nn.Module:
            outputs = width * kind.expansion
            shortcut: nn.Module = nn.Identity()
            if stride != 1 or inputs != outputs:
                shortcut = nn.Sequential(
                    conv(inputs, outputs, 1, stride=stride, bias=normalize.bias), normalize.maps(outputs)
                )
            return kind(inputs, width, stride, shortcut=shortcut, norm=normalize)

        modules: OrderedDict[str, nn.Module] = OrderedDict()
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        pool = [nn.MaxPool2d(3, stride=2, padding=1)] if stem == "imagenet" else []
        modules["stem"] = nn.Sequential(*conv_norm_relu(channels, 64, kernel, normalize, stride=stride), *pool)
        outputs = add_stages(modules, block, 64, 64, _BLOCKS[depth], kind.expansion)
        modules.update(pool=GlobalAveragePool(), dropout=nn.Dropout(dropout), head=nn.Linear(outputs, classes))
        super().__init__(modules)
        check_instance_norm(self, input_shape, norm["norm"])
