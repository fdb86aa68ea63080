"""AlexNet (Krizhevsky, Sutskever & Hinton 2012): with one column, and with the paper's two columns."""

from collections import OrderedDict
from typing import Literal, Unpack

import torch
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Count, Fraction
from dlopt.models.layers import Norm, NormKeys, check_instance_norm, image_shape
from dlopt.models.linear import Linear


class AlexNetKeys(NormKeys):
    """The keys of both networks."""

    stem: Literal["small", "imagenet"]
    hidden: Count
    local_response: bool
    dropout: Fraction


class AlexNet(nn.Sequential):
    """AlexNet with one column: every layer reads all features of the previous one.

    `stem=imagenet` is the paper's, for 224x224 images: an 11x11 convolution of stride 4. `stem=small` starts with a
    5x5 convolution of stride 1 and pads its poolings, for images of 8 to about 64 pixels. Images [B, C, H, W] ->
    [B, classes].

    Errors: UserError for samples that are not images, or too small.
    """

    def __init__(self, *, input_shape: tuple[int, ...], classes: int, **keys: Unpack[AlexNetKeys]) -> None:
        modules = _segments(input_shape, 1, **keys)
        modules["head"] = Linear(keys["hidden"], classes)
        super().__init__(modules)
        check_instance_norm(self, input_shape, keys["norm"])


class TwoColumnAlexNet(nn.Module):
    """The paper's AlexNet (figure 2): two columns of half the channels, connected only in a few layers.

    A column has four segments (convolutions 1 and 2; convolutions 3 to 5; each of the two fully connected layers).
    Within a segment, a column reads its own features only. Between segments, the outputs of both columns are
    concatenated along the channels and both columns read all of them; so the cross connections are before the third
    convolution and before the fully connected layers. With one column per process, one all-gather after each of the
    four segments is the only communication. Images [B, C, H, W] -> [B, classes].

    Errors: UserError for an odd number of hidden features, and for samples that are not images, or too small.
    """

    def __init__(self, *, input_shape: tuple[int, ...], classes: int, **keys: Unpack[AlexNetKeys]) -> None:
        super().__init__()
        hidden = keys["hidden"]
        if hidden % 2:
            raise UserError(f"model.hidden={hidden}: the features are split between two columns; use an even number")
        self.columns = nn.ModuleList(nn.Sequential(_segments(input_shape, 2, **keys)) for _ in range(2))
        self.head = Linear(hidden, classes)
        check_instance_norm(self, input_shape, keys["norm"])

    def forward(self, images: Tensor) -> Tensor:
        features = images
        for segments in zip(*self.columns, strict=True):
            features = torch.cat([segment(features) for segment in segments], dim=1)
        return self.head(features)


def _segments(
    input_shape: tuple[int, ...],
    columns: int,
    *,
    stem: Literal["small", "imagenet"],
    hidden: int,
    local_response: bool,
    dropout: float,
    **norm: Unpack[NormKeys],
) -> OrderedDict[str, nn.Module]:
    """Builds the segments of one of `columns` columns."""
    normalize = Norm(**norm)
    channels, height, width = image_shape(input_shape, "an AlexNet")
    kernel, stride, padding = (11, 4, 2) if stem == "imagenet" else (5, 1, 2)
    pool_padding = 0 if stem == "imagenet" else 1

    def output_size(pixels: int) -> int:
        pixels = (pixels + 2 * padding - kernel) // stride + 1
        for _ in range(3):
            pixels = (pixels + 2 * pool_padding - 3) // 2 + 1
        return pixels

    pixels = output_size(height) * output_size(width)
    if min(output_size(height), output_size(width)) < 1:
        raise UserError(
            f"model.stem={stem}: images of {height}x{width} are too small for this stem; use model.stem=small "
            "or data.image_size=63 or larger"
        )

    def layer(inputs: int, outputs: int, kernel: int, *, stride: int = 1, padding: int) -> list[nn.Module]:
        outputs //= columns
        convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=normalize.bias)
        return [convolution, normalize.maps(outputs), nn.ReLU()]

    def response_norm() -> list[nn.Module]:
        # Section 3.3: k=2, n=5, alpha=1e-4, beta=0.75; torch divides alpha by n.
        return [nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)] if local_response else []

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, stride=2, padding=pool_padding)

    front = [
        *layer(channels, 96, kernel, stride=stride, padding=padding),
        *response_norm(),
        pool(),
        *layer(96 // columns, 256, 5, padding=2),
        *response_norm(),
        pool(),
    ]
    back = [
        *layer(256, 384, 3, padding=1),
        *layer(384 // columns, 384, 3, padding=1),
        *layer(384 // columns, 256, 3, padding=1),
        pool(),
    ]
    outputs = hidden // columns
    return OrderedDict(
        front=nn.Sequential(*front),
        back=nn.Sequential(*back),
        hidden1=nn.Sequential(nn.Flatten(), Linear(256 * pixels, outputs), nn.ReLU(), nn.Dropout(dropout)),
        hidden2=nn.Sequential(Linear(hidden, outputs), nn.ReLU(), nn.Dropout(dropout)),
    )
