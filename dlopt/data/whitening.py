"""Input normalization by linear maps of the whole sample: decorrelation and whitening.

Images are scaled to 0..1 and taken as vectors of C*H*W values; the result has the shape of the sample again. The
statistics (float64) come from the training split and live in buffers.
"""

import math

import torch
from torch import Tensor, nn

from dlopt.data.loading import chunks
from dlopt.data.samples import Samples
from dlopt.errors import UserError
from dlopt.ranges import Positive

_MOST_FEATURES = 8192  # the covariance takes 0.5 GB, its decomposition minutes


class PCA(nn.Module):
    """Decorrelated: coordinates along the principal components, by falling variance.

    The component's sign, which the decomposition leaves open, makes its largest entry positive.
    """

    matrix: Tensor
    shift: Tensor
    _name = "pca"

    def __init__(self, *, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        features = math.prod(input_shape)
        if features > _MOST_FEATURES:
            raise UserError(
                f"normalize={self._name}: needs the covariance of all {features} values of a sample; at most "
                f"{_MOST_FEATURES} are possible; use normalize=standardize or a smaller data.image_size"
            )
        self.register_buffer("matrix", torch.eye(features))
        self.register_buffer("shift", torch.zeros(features))

    def fit(self, samples: Samples) -> None:
        """Computes mean and covariance of the training samples (on the GPU where the buffers are on one)."""
        mean, covariance = mean_and_covariance(samples, self.matrix.device)
        variances, components = torch.linalg.eigh(covariance)
        variances, components = variances.flip(0).clamp(min=0), components.flip(1)
        largest = components.gather(0, components.abs().argmax(0, keepdim=True))
        matrix = self._map(variances, components * largest.sign())
        self.shift.copy_(-(mean @ matrix))
        # images come as 0..255; the statistics are those of 0..1
        is_image = samples.fetch(torch.tensor([0])).dtype == torch.uint8
        self.matrix.copy_(matrix / 255 if is_image else matrix)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.addmm(self.shift, inputs.flatten(1).to(self.matrix.dtype), self.matrix).view(inputs.shape)

    def _map(self, variances: Tensor, components: Tensor) -> Tensor:
        """The matrix [D, D] that a centred row vector is multiplied with, from eigenvalues and eigenvectors."""
        return components


class PCAWhiten(PCA):
    """Principal components, each divided by sqrt(variance + epsilon).

    `epsilon`: in units of the variance (images: of values 0..1); it keeps directions that hardly vary from exploding.
    """

    _name = "pca_whiten"

    def __init__(self, *, epsilon: Positive, input_shape: tuple[int, ...]) -> None:
        super().__init__(input_shape=input_shape)
        self._epsilon = epsilon

    def _map(self, variances: Tensor, components: Tensor) -> Tensor:
        return components / (variances + self._epsilon).sqrt()


class ZCAWhiten(PCAWhiten):
    """Whitened and turned back, as close to the input as whitening allows (Bell & Sejnowski 1997)."""

    _name = "zca_whiten"

    def _map(self, variances: Tensor, components: Tensor) -> Tensor:
        return super()._map(variances, components) @ components.T


def mean_and_covariance(samples: Samples, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] (divided by N) of the flattened samples, images as 0..1, in float64."""
    device = device if device.type == "cuda" else torch.device("cpu")  # not every accelerator has float64
    features = math.prod(samples.shape)
    start: Tensor | None = None
    total = torch.zeros(features, dtype=torch.float64, device=device)
    products = torch.zeros(features, features, dtype=torch.float64, device=device)
    for chunk in chunks(samples):
        rows = chunk.flatten(1).to(device).to(torch.float64)
        if chunk.dtype == torch.uint8:
            rows /= 255
        if start is None:
            start = rows.mean(0)  # sums about a value near the mean do not cancel
        rows -= start
        total += rows.sum(0)
        products.addmm_(rows.T, rows)
    assert start is not None  # no dataset is empty
    offset = total / len(samples)
    return start + offset, products.div_(len(samples)).sub_(torch.outer(offset, offset))
