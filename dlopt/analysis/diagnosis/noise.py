"""How much the gradient differs from mini-batch to mini-batch."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dlopt.analysis.diagnosis.layers import norms


class GradientSpread:
    """Gradients of several mini-batches of equal size at the same weights: their mean, spread and noise scale.

    The simple noise scale tr(Sigma) / |G|^2 is the batch size at which noise and gradient are equally large: larger
    batches soon stop to help, smaller ones cost little (McCandlish, Kaplan et al. 2018, equation 2.9). Estimated
    without bias from batches of b samples and their mean over m batches (appendix A.1).
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.batches = 0
        self._sums: list[list[Tensor]] = []
        self._norms: list[Tensor] = []

    def add(self, gradients: Sequence[Sequence[Tensor]]) -> None:
        """`gradients`: one list of tensors per name."""
        self._norms.append(norms(gradients))
        if not self._sums:
            self._sums = [[g.detach().clone() for g in each] for each in gradients]
        else:
            for kept, each in zip(self._sums, gradients, strict=True):
                torch._foreach_add_(kept, [g.detach() for g in each])
        self.batches += 1

    def norms(self) -> Tensor:
        """[batches, names]: the 2-norms of each batch."""
        return torch.stack(self._norms).cpu()

    def noise_scale(self, batch_size: int) -> tuple[float, list[float]]:
        """Of all gradients together, and by name; in samples. NaN where one batch tells nothing, infinite where the
        estimated gradient is zero."""
        if self.batches < 2:
            return math.nan, [math.nan] * len(self.names)
        small = torch.stack(self._norms).double().square().mean(0)
        large = (norms(self._sums) / self.batches).double().square()
        by_name = [
            noise_scale(*pair, batch_size, self.batches) for pair in zip(small.tolist(), large.tolist(), strict=True)
        ]
        return noise_scale(float(small.sum()), float(large.sum()), batch_size, self.batches), by_name


def noise_scale(small: float, large: float, batch_size: int, batches: int) -> float:
    """tr(Sigma) / |G|^2 from the mean squared norm `small` of gradients of `batch_size` samples, and the squared norm
    `large` of the mean of so many of them (McCandlish et al. 2018, equations A.2 and A.3)."""
    total = batch_size * batches
    square = (total * large - batch_size * small) / (total - batch_size)
    trace = (small - large) / (1 / batch_size - 1 / total)
    if math.isnan(square) or math.isnan(trace):
        return math.nan
    return math.inf if square <= 0 else max(trace, 0.0) / square
