"""Tensors seen along each of their modes (dimensions), for Kronecker-factored preconditioners."""

from collections.abc import Sequence

import torch
from torch import Tensor


def multiply_modes(tensor: Tensor, factors: Sequence[Tensor | None], *, transpose: bool = False) -> Tensor:
    """Multiplies mode i of the tensor [n1, ..., nk] by factors[i]: a matrix [ni, ni], a diagonal [ni], or None.

    For a matrix this is F1 X F2^T; with `transpose`, F1^T X F2.
    """
    for factor in factors:
        if factor is None:
            tensor = tensor.movedim(0, -1)
        elif factor.ndim == 1:
            tensor = tensor.movedim(0, -1) * factor
        else:
            tensor = torch.tensordot(tensor, factor, dims=([0], [0 if transpose else 1]))  # the new mode comes last
    return tensor


def gram(tensor: Tensor, mode: int, *, diagonal: bool = False) -> Tensor:
    """Returns X X^T [n, n] of the tensor unfolded along a mode of size n, or the diagonal [n] of it."""
    unfolded = tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)
    return unfolded.square().sum(1) if diagonal else unfolded @ unfolded.T


def eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns eigenvalues (ascending) and eigenvectors, computed at least in float32.

    NaN if the products of a large gradient have overflowed: the check of the weights then reports the update.
    """
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    try:
        values, vectors = torch.linalg.eigh(wide)
    except torch.linalg.LinAlgError:
        vectors = torch.full_like(wide, torch.nan)
        values = vectors[0]
    return values.to(matrix.dtype), vectors.to(matrix.dtype)
