"""Matrix-free Hessian: products, largest eigenvalues, curvature along a step. And gradient noise of mini-batches."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dlopt.instruments.layers import norms
from dlopt.optim.common import flat

Product = Callable[[Tensor], Tensor]
"""v [n] -> H v [n]."""


class Spectrum(NamedTuple):
    """Approximations of the largest eigenvalues, from below: value i never exceeds the i-th largest one."""

    eigenvalues: Tensor  # [k], descending, float64
    residuals: Tensor  # [k]: ||H v - w v|| bounds the distance of w to an eigenvalue, the i-th one after convergence
    vectors: Tensor  # [k, n]


def hessian_product(loss: Tensor, parameters: Sequence[Tensor]) -> Product:
    """Returns the Hessian-vector product of `loss`: differentiates <gradient, v> (Pearlmutter 1994).

    Keeps the graph of the gradient as long as the returned function lives. Does not change `.grad`.
    """
    parameters = list(parameters)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    used = [i for i, gradient in enumerate(gradients) if gradient.requires_grad]
    sizes = [p.numel() for p in parameters]

    def product(vector: Tensor) -> Tensor:
        if not used:
            return torch.zeros_like(vector)
        slices = vector.split(sizes)
        first, directions = [gradients[i] for i in used], [slices[i].view_as(parameters[i]) for i in used]
        second = torch.autograd.grad(first, parameters, directions, retain_graph=True, materialize_grads=True)
        return flat(second).detach()

    return product


def lanczos(product: Product, start: Tensor, iterations: int, count: int) -> Spectrum:
    """Computes the `count` algebraically largest eigenvalues of a symmetric operator on vectors like `start` [n].

    Lanczos with full reorthogonalization (Golub & Van Loan 2013, section 10.3): at most `iterations` products, fewer
    if the Krylov space is exhausted. Memory: `iterations` vectors.
    """
    basis = [start / start.norm()]
    diagonal: list[float] = []
    off: list[float] = []
    for _ in range(min(iterations, start.numel())):
        vector = product(basis[-1])
        diagonal.append(float(vector.double() @ basis[-1].double()))
        stacked = torch.stack(basis)
        scale = float(vector.norm())
        for _ in range(2):  # twice is enough (Parlett)
            vector = vector - (stacked @ vector) @ stacked
        off.append(float(vector.norm()))
        # The basis spans the Krylov space if the remainder vanishes; the rest would be rounding errors.
        if not math.isfinite(off[-1]) or off[-1] <= 1e-6 * max(scale, 1e-30):
            off[-1] = 0.0 if math.isfinite(off[-1]) else math.nan
            break
        basis.append(vector / off[-1])
    size = len(diagonal)
    if not all(map(math.isfinite, diagonal + off)):
        nan = torch.full((1,), math.nan, dtype=torch.float64)
        return Spectrum(nan, nan, start[None])
    main, beside = (torch.tensor(values, dtype=torch.float64) for values in (diagonal, off[: size - 1]))
    matrix = torch.diag(main) + torch.diag(beside, 1) + torch.diag(beside, -1)
    values, coordinates = torch.linalg.eigh(matrix)
    chosen = torch.arange(size - 1, max(size - 1 - count, -1), -1)
    residuals = (coordinates[-1, chosen] * off[-1]).abs()
    vectors = coordinates[:, chosen].T.to(start) @ torch.stack(basis[:size])
    return Spectrum(values[chosen], residuals, vectors)


def largest_eigenvalues(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], *, count: int, iterations: int
) -> Spectrum:
    """Computes the largest eigenvalues of the Hessian of `loss()` by `parameters`: `lanczos` from `random_vector`."""
    with torch.enable_grad():
        return lanczos(hessian_product(loss(), parameters), random_vector(parameters), iterations, count)


def random_vector(parameters: Sequence[Tensor]) -> Tensor:
    """Returns a fixed random vector [n] on the device and in the type of the parameters, by a generator of its own."""
    count = sum(p.numel() for p in parameters)
    return torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(parameters[0])


def curvature_along(product: Product, direction: Tensor) -> float:
    """Computes d'Hd / d'd: the second derivative of the loss along `direction` d [n], per unit length squared."""
    square = float(direction.double() @ direction.double())
    return float(direction.double() @ product(direction).double()) / square if square > 0 else math.nan


@contextlib.contextmanager
def restoring(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yields copies of the parameters, and restores their values on exit."""
    originals = [p.detach().clone() for p in parameters]
    try:
        yield originals
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, originals, strict=True):
                p.copy_(value)


@torch.no_grad()
def losses_along(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], steps: Sequence[Tensor], fractions: Sequence[float]
) -> list[float]:
    """Evaluates the loss at `parameters` + fraction * `steps` for each fraction, and restores the parameters."""
    losses = []
    with restoring(parameters) as originals:
        for fraction in fractions:
            for p, start, step in zip(parameters, originals, steps, strict=True):
                p.copy_(start + fraction * step)
            losses.append(float(loss()))
    return losses


# -- noise of the gradient


class GradientSpread:
    """Accumulates gradients of equal mini-batches at the same weights: norms, and the gradient noise scale.

    The simple noise scale tr(Sigma) / |G|^2 is the batch size at which noise and gradient are equally large: above it,
    larger batches help little (McCandlish, Kaplan et al. 2018, equation 2.9).
    """

    def __init__(self) -> None:
        self.batches = 0
        self._sums: list[list[Tensor]] = []
        self._norms: list[Tensor] = []

    def add(self, gradients: Sequence[Sequence[Tensor]]) -> None:
        """Adds one mini-batch. `gradients`: one list of tensors per group."""
        self._norms.append(norms(gradients))
        if not self._sums:
            self._sums = [[torch.zeros_like(g) for g in group] for group in gradients]
        for sums, group in zip(self._sums, gradients, strict=True):
            torch._foreach_add_(sums, [g.detach() for g in group])
        self.batches += 1

    def norms(self) -> Tensor:
        """Returns the 2-norms [batches, groups]."""
        return torch.stack(self._norms).cpu()

    def noise_scale(self, batch_size: int) -> tuple[float, list[float]]:
        """Returns the noise scale of all gradients, and by group, in samples; NaN for fewer than two batches."""
        if self.batches < 2:
            return math.nan, [math.nan] * len(self._sums)
        small = torch.stack(self._norms).double().square().mean(0)
        large = (norms(self._sums) / self.batches).double().square()
        total, *by_group = (
            noise_scale(float(a), float(b), batch_size, self.batches)
            for a, b in zip([small.sum(), *small], [large.sum(), *large], strict=True)
        )
        return total, by_group


def noise_scale(small: float, large: float, batch_size: int, batches: int) -> float:
    """Estimates tr(Sigma) / |G|^2 from the mean squared norm `small` of gradients of `batch_size` samples, and the
    squared norm `large` of the mean of `batches` such gradients; infinite if the estimated gradient is zero. Numerator
    and denominator are unbiased (McCandlish et al. 2018, equations A.2 and A.3)."""
    total = batch_size * batches
    square = (total * large - batch_size * small) / (total - batch_size)
    trace = (small - large) / (1 / batch_size - 1 / total)
    if math.isnan(square) or math.isnan(trace):
        return math.nan
    return math.inf if square <= 0 else max(trace, 0.0) / square
