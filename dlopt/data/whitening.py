"""Input normalization by linear maps of whole samples: decorrelation and whitening.

Images are scaled to 0..1 and flattened to vectors of C*H*W values; outputs have the shape of the sample. The statistics
(float64) are computed on the training split and kept in buffers.
"""

import math

import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Positive
from dlopt.data.normalization import Centring, covariance, finite_chunks
from dlopt.data.samples import Samples

_MAX_FEATURES = 8192  # the covariance takes 0.5 GB and its decomposition minutes


class PCA(Centring):
    """Decorrelates: coordinates along the principal components, by decreasing variance.

    The sign of a component, which the decomposition does not determine, makes its largest entry positive.
    """

    matrix: Tensor
    shift: Tensor
    _name = "pca"

    def __init__(self, *, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        features = math.prod(input_shape)
        if features > _MAX_FEATURES:
            raise UserError(
                f"normalize={self._name}: needs the covariance of all {features} values of a sample; at most "
                f"{_MAX_FEATURES} are allowed; use normalize=standardize or a smaller data.image_size"
            )
        self.register_buffer("matrix", torch.eye(features))
        self.register_buffer("shift", torch.zeros(features))

    def fit(self, samples: Samples) -> None:
        """Computes mean and covariance of the training samples (on the GPU if the buffers are there)."""
        mean, covariance = mean_and_covariance(samples, self.matrix.device)
        variances, components = torch.linalg.eigh(covariance)
        variances, components = variances.flip(0).clamp(min=0), components.flip(1)
        largest = components.gather(0, components.abs().argmax(0, keepdim=True))
        matrix = self._map(variances, components * largest.sign())
        # forward() receives images in 0..255; the statistics refer to 0..1.
        white = 255 if samples.fetch(torch.tensor([0])).dtype == torch.uint8 else 1
        self._set(matrix / white, -(mean @ matrix), mean * white)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = self.centred(inputs.flatten(1).to(self.matrix.dtype))
        return torch.addmm(self.shift, rows, self.matrix).view(inputs.shape)

    def _set(self, matrix: Tensor, shift: Tensor, mean: Tensor | None = None) -> None:  # type: ignore[override]
        mean = -torch.linalg.solve(matrix.T, shift) if mean is None else mean
        center = self._centre(mean, matrix.norm(dim=1), self.matrix)
        self.matrix.copy_(matrix)
        self.shift.copy_(shift + center @ matrix if self.center is not None else shift)

    def _map(self, variances: Tensor, components: Tensor) -> Tensor:
        """Returns the matrix [D, D] for centred row vectors, given eigenvalues and eigenvectors (columns)."""
        return components


class PCAWhiten(PCA):
    """Principal components, each divided by sqrt(variance + epsilon).

    `epsilon`: in units of the variance (images: of values 0..1); bounds the scale of directions with little variance.
    """

    _name = "pca_whiten"

    def __init__(self, *, epsilon: Positive, input_shape: tuple[int, ...]) -> None:
        super().__init__(input_shape=input_shape)
        self._epsilon = epsilon

    def _map(self, variances: Tensor, components: Tensor) -> Tensor:
        return components / (variances + self._epsilon).sqrt()


class ZCAWhiten(PCAWhiten):
    """Whitens and rotates back: the whitened data closest to the input (Bell & Sejnowski 1997)."""

    _name = "zca_whiten"

    def _map(self, variances: Tensor, components: Tensor) -> Tensor:
        return super()._map(variances, components) @ components.T


def mean_and_covariance(samples: Samples, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns mean [D] and covariance [D, D] (divided by N) of the flattened samples (images in 0..1), in float64."""
    device = device if device.type == "cuda" else torch.device("cpu")  # not every accelerator has float64
    return covariance(
        chunk.flatten(1).to(device).double() / (255 if chunk.dtype == torch.uint8 else 1)
        for chunk in finite_chunks(samples)
    )
