"""AlexNet (Krizhevsky, Sutskever & Hinton 2012) as one column, and as the paper's two columns."""

from collections import OrderedDict
from typing import Literal, Unpack

import torch
from torch import Tensor, nn

from dlopt.errors import UserError
from dlopt.models.layers import Norm, NormKeys, check_instance_norm, image_shape
from dlopt.ranges import Count, Fraction

Stem = Literal["small", "imagenet"]


class AlexNet(nn.Sequential):
    """The net as one column: every layer sees all features of the one before.

    `stem=imagenet` is the paper's, for 224x224 images: an 11x11 convolution of stride 4. `stem=small` starts with a
    5x5 convolution of stride 1 and pads its poolings, so that images of 8 to some 64 pixels pass. Takes images
    [B, C, H, W], returns [B, classes].

    Errors: UserError where the data are no images, or images too small.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        classes: int,
        stem: Stem,
        hidden: Count,
        local_response: bool,
        dropout: Fraction,
        **norm: Unpack[NormKeys],
    ) -> None:
        normalize = Norm.of(**norm)
        segments = _segments(input_shape, 1, stem, hidden, local_response, dropout, normalize)
        super().__init__(OrderedDict([*segments.items(), ("head", nn.Linear(hidden, classes))]))
        check_instance_norm(self, input_shape, normalize)


class TwoColumnAlexNet(nn.Module):
    """The paper's net (figure 2): two columns of half the channels, meeting in a few layers only.

    Each column is four segments (convolutions 1 and 2; convolutions 3 to 5; the two fully connected layers). Within
    a segment a column sees its own features alone; between segments the columns' outputs are joined along the
    channels and every column reads both: the cross connections stand in front of the third convolution and of the
    fully connected layers. One column per process therefore needs one gathering behind each of the four segments and
    nothing else. Takes images [B, C, H, W], returns [B, classes].

    Errors: UserError for an odd number of hidden features, data that are no images, or images too small.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        classes: int,
        stem: Stem,
        hidden: Count,
        local_response: bool,
        dropout: Fraction,
        **norm: Unpack[NormKeys],
    ) -> None:
        super().__init__()
        if hidden % 2:
            raise UserError(f"model.hidden={hidden}: two columns share these features; use an even number")
        normalize = Norm.of(**norm)
        self.columns = nn.ModuleList(
            nn.Sequential(_segments(input_shape, 2, stem, hidden, local_response, dropout, normalize)) for _ in range(2)
        )
        self.head = nn.Linear(hidden, classes)
        check_instance_norm(self, input_shape, normalize)

    def forward(self, images: Tensor) -> Tensor:
        joined = images
        for segments in zip(*self.columns, strict=True):
            joined = torch.cat([segment(joined) for segment in segments], dim=1)
        return self.head(joined)


def _segments(
    input_shape: tuple[int, ...],
    columns: int,
    stem: Stem,
    hidden: int,
    local_response: bool,
    dropout: float,
    norm: Norm,
) -> OrderedDict[str, nn.Module]:
    """One of `columns` columns, cut where the columns meet."""
    channels, height, width = image_shape(input_shape, "an AlexNet")
    kernel, stride, padding = (11, 4, 2) if stem == "imagenet" else (5, 1, 2)
    pool_padding = 0 if stem == "imagenet" else 1

    def extent(pixels: int) -> int:
        pixels = (pixels + 2 * padding - kernel) // stride + 1
        for _ in range(3):
            pixels = (pixels + 2 * pool_padding - 3) // 2 + 1
        return pixels

    pixels = extent(height) * extent(width)
    if min(extent(height), extent(width)) < 1:
        raise UserError(
            f"model.stem={stem}: images of {height}x{width} are too small for this stem; use model.stem=small "
            "or a larger data.image_size (63 at least)"
        )

    def layer(inputs: int, outputs: int, kernel: int, *, stride: int = 1, padding: int) -> list[nn.Module]:
        outputs //= columns
        convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=norm.bias)
        return [convolution, norm.maps(outputs), nn.ReLU()]

    def respond() -> list[nn.Module]:
        # Section 3.3: k=2, n=5, alpha=1e-4, beta=0.75; torch divides alpha by n.
        return [nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)] if local_response else []

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, stride=2, padding=pool_padding)

    front = [
        *layer(channels, 96, kernel, stride=stride, padding=padding),
        *respond(),
        pool(),
        *layer(96 // columns, 256, 5, padding=2),
        *respond(),
        pool(),
    ]
    back = [
        *layer(256, 384, 3, padding=1),
        *layer(384 // columns, 384, 3, padding=1),
        *layer(384 // columns, 256, 3, padding=1),
        pool(),
    ]
    share = hidden // columns
    return OrderedDict(
        front=nn.Sequential(*front),
        back=nn.Sequential(*back),
        hidden1=nn.Sequential(nn.Flatten(), nn.Linear(256 * pixels, share), nn.ReLU(), nn.Dropout(dropout)),
        hidden2=nn.Sequential(nn.Linear(hidden, share), nn.ReLU(), nn.Dropout(dropout)),
    )
