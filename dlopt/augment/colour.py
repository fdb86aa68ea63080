"""Colour operations that are affine in the channels. Adjacent ones in a pipeline are composed to one transform.

Values are in 0..255 and are clamped once, after the composed transform.
"""

import functools
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from dlopt.augment.operation import DrawnStep, Draws, Operation, PixelStep, Shape, image_shape
from dlopt.basics.ranges import NonNegative, Probability
from dlopt.data.normalization import covariance
from dlopt.data.samples import Samples


@dataclass
class Colour(PixelStep):
    """Maps the channels x of each pixel to matrix x + mean m + offset, where m is the mean of x over the image.

    `matrix` and `mean` are [n, C, C], `offset` is [n, C, 1]. The term `mean` makes contrast composable: m follows the
    preceding transform, so the image's mean need not be computed again.
    """

    matrix: Tensor
    mean: Tensor | None = None
    offset: Tensor | None = None

    def masked(self, mask: Tensor) -> Self:
        mask = mask[:, None, None]
        identity = torch.eye(self.matrix.shape[-1], device=self.matrix.device)
        return replace(
            self,
            matrix=torch.where(mask, self.matrix, identity),
            mean=None if self.mean is None else self.mean * mask,
            offset=None if self.offset is None else self.offset * mask,
        )

    def compose(self, second: "Colour") -> "Colour":
        """Returns the transform that applies this one, then `second`."""
        mean = None if self.mean is None else _product(second.matrix, self.mean)
        offset = None if self.offset is None else _product(second.matrix, self.offset)
        if second.mean is not None:
            # The mean after this transform is (matrix + mean) m + offset.
            of_mean = self.matrix if self.mean is None else self.matrix + self.mean
            mean = _sum(mean, _product(second.mean, of_mean))
            if self.offset is not None:
                offset = _sum(offset, _product(second.mean, self.offset))
        return Colour(_product(second.matrix, self.matrix), mean, _sum(offset, second.offset))

    def apply(self, images: Tensor) -> Tensor:
        flat = images.flatten(2)
        offset = self.offset
        if self.mean is not None:
            offset = _sum(offset, _product(self.mean, flat.mean(2, keepdim=True)))
        # Elementwise sums of products: a batched matrix product would run in the training's TF32 or bf16.
        out = self.matrix[:, :, :1] * flat[:, :1]
        for c in range(1, flat.shape[1]):
            out.addcmul_(self.matrix[:, :, c : c + 1], flat[:, c : c + 1])
        if offset is not None:
            out.add_(offset)
        return out.clamp_(0, 255).view(images.shape)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Returns a @ b for batches of small matrices [n, i, j] and [n, j, k], float32."""
    if a.device.type == "mps":  # no float64
        return (a[..., None] * b[:, None]).sum(2)
    # Autocast and TF32 do not apply to float64. In bf16 a value of 200 would be off by half a grey level.
    return (a.double() @ b.double()).float()


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a + b


@functools.cache
def grey_weights(channels: int, device: torch.device) -> Tensor:
    """Returns [C]: ITU-R 601 luminance for three channels, as torchvision; else equal weights."""
    if channels == 3:
        return torch.tensor([0.2989, 0.587, 0.114], device=device)
    return torch.full((channels,), 1.0 / channels, device=device)


class FactorOperation(Operation):
    """Base of operations with a factor of 1 - limit .. 1 + limit."""

    in_grey_levels = True

    def __init__(self, *, limit: Probability) -> None:
        self.limit = limit


class Brightness(FactorOperation):
    """Multiplies by a factor of 1 - limit .. 1 + limit."""

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        factor = 1.0 + draws.symmetric(self.limit)
        return [Colour(torch.eye(shape[0], device=draws.device) * factor[:, None, None])]


class Contrast(FactorOperation):
    """Scales the distance of all values from the image's mean grey by a factor of 1 - limit .. 1 + limit."""

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        factor = 1.0 + draws.symmetric(self.limit)[:, None, None]
        grey = grey_weights(shape[0], draws.device).expand(shape[0], -1)
        return [Colour(torch.eye(shape[0], device=draws.device) * factor, mean=grey * (1.0 - factor))]


class Saturation(FactorOperation):
    """Scales the distance of the channels from the pixel's grey by a factor of 1 - limit .. 1 + limit.

    Grey images are not changed.
    """

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        factor = 1.0 + draws.symmetric(self.limit)[:, None, None]
        if shape[0] == 1:
            return []
        grey = grey_weights(shape[0], draws.device).expand(shape[0], -1)
        return [Colour(torch.eye(shape[0], device=draws.device) * factor + grey * (1.0 - factor))]


class PCAColour(Operation):
    """Adds to each image a random multiple of the principal components of the training set's colours.

    The offset is sum_i p_i lambda_i a_i with a_i ~ N(0, std) per image; p_i and lambda_i are the eigenvectors and
    eigenvalues of the covariance of pixel values (Krizhevsky et al. 2012, section 4.1). The paper does not state the
    range of the values; it is 0..1 here, because the offsets would not make sense on 0..255.
    """

    in_grey_levels = True

    def __init__(self, *, std: NonNegative, train: Samples) -> None:
        self.std = std
        values, vectors = torch.linalg.eigh(colour_statistics(train)[1])
        self.components = (vectors * values * 255.0).float()
        """[C, C], one column per component, in 0..255."""

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        amounts = draws.normal(shape[0])[:, :, None] * self.std
        identity = torch.eye(shape[0], device=draws.device).expand(draws.total, -1, -1)
        self.components = self.components.to(draws.device)  # kept: a copy from the host in every step synchronizes
        return [Colour(identity, offset=_product(self.components.expand(draws.total, -1, -1), amounts))]


def colour_statistics(train: Samples) -> tuple[Tensor, Tensor]:
    """Returns mean [C] and covariance [C, C] of the pixels' channels, float64, in 0..1, in one pass over the images.

    For large datasets (over 2^26 pixels and over 10,000 images) uses an evenly spaced subset of the images.
    """
    _, height, width = image_shape(train.shape)
    stride = -(-len(train) // max(10_000, 2**26 // (height * width)))
    batches = torch.arange(0, len(train), stride).split(512)
    return covariance(train.fetch(indices).cpu().movedim(1, -1).flatten(0, 2).double() / 255.0 for indices in batches)
