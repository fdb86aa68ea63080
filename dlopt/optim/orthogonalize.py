"""Orthogonalization of matrices: the factor U V^T of U S V^T, by iterations that use matrix products only."""

from collections.abc import Sequence
from itertools import chain, repeat
from typing import Annotated, Literal

import torch
from annotated_types import MinLen
from torch import Tensor

Triple = tuple[float, float, float]
Coefficients = Triple | Annotated[list[Triple], MinLen(1)] | Literal["polar_express"]
"""One triple for all iterations; a triple for each iteration, the last one repeated; or `POLAR_EXPRESS`."""

QUINTIC: Triple = (3.4445, -4.775, 2.0315)  # of Jordan et al. 2024

_TINY = 1e-10  # added to what NorMuon divides by
_SAFETY = 1.01  # keeps singular values below the bound of an iteration, although bfloat16 rounds
_OPTIMAL: list[Triple] = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
]
POLAR_EXPRESS: list[Triple] = [*((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _OPTIMAL)]
POLAR_EXPRESS.append((1.875, -1.25, 0.375))  # Newton-Schulz: the limit of the optimal coefficients


def orthogonalize(matrices: Tensor, coefficients: Coefficients, steps: int, eps: float) -> Tensor:
    """Approximates U V^T for each of the matrices U S V^T [n, rows, columns], in bfloat16.

    An iteration is X <- a X + (b X X^T + c (X X^T)^2) X, which maps each singular value s to a s + b s^3 + c s^5.

    `QUINTIC` is chosen for few steps, not for convergence: of a random matrix, eight or nine of ten singular values end
    between 0.7 and 1.2, and the smallest ones below. `polar_express` (Amsel et al. 2025, algorithm 1) has the best
    triple for each iteration, given the range of singular values that the previous ones leave of [0.001, 1], and
    converges.
    """
    if matrices.dtype == torch.float64 and len(matrices) > 1:
        # A product in bfloat16 may round otherwise in a stack of another size, as each process of parallel=fsdp has.
        # This shows in fp64 only, in which all modes have the same losses.
        each = (orthogonalize(matrix, coefficients, steps, eps) for matrix in matrices.split(1))
        return torch.cat(list(each))
    x = matrices.to(torch.bfloat16)
    # The coefficients are chosen for singular values in (0, 1]. The Frobenius norm, which is cheap, bounds the largest
    # one, so that all of them start there.
    norm = x.norm(dim=(1, 2), keepdim=True)
    if coefficients == "polar_express":
        norm = norm * _SAFETY
    return iterate(x / norm.clamp(min=eps), triples(coefficients, steps))


def triples(coefficients: Coefficients, steps: int) -> list[Triple]:
    """Returns (a, b, c) of each iteration."""
    if coefficients == "polar_express":
        coefficients = POLAR_EXPRESS
    if isinstance(coefficients[0], float | int):
        return [coefficients] * steps
    each: Sequence[Triple] = coefficients
    return [triple for triple, _ in zip(chain(each, repeat(each[-1])), range(steps), strict=False)]


def iterate(x: Tensor, coefficients: list[Triple]) -> Tensor:
    """Maps the singular values of the matrices [n, rows, columns] by the quintic of each iteration, in their dtype."""
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:  # the Gram matrix is smaller
        x = x.mT
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def normalize_rows(matrices: Tensor, averages: list[Tensor], beta: float) -> Tensor:
    """Divides each row by the root of the average of its mean square (NorMuon, Li et al. 2025, algorithm 1).

    `matrices` [n, rows, columns] keep their Frobenius norms. `averages`, n of [rows, 1], are updated with decay `beta`.
    """
    for average, square in zip(averages, matrices.square().mean(2, keepdim=True), strict=True):
        average.lerp_(square.to(average.dtype), 1 - beta)
    normalized = matrices / (torch.stack(averages).sqrt() + _TINY)
    norms, new_norms = (each.norm(dim=(1, 2), keepdim=True) for each in (matrices, normalized))
    return normalized * (norms / (new_norms + _TINY))


def as_matrix(t: Tensor, like: Tensor) -> Tensor:
    """Reshapes t to [out, everything else]; a view if t has the memory format of `like`.

    Columns are in memory order, which is another for channels-last kernels. Orthogonalization does not depend on it.
    """
    if like.ndim == 2:
        return t
    if not like.is_contiguous():
        order = sorted(range(1, like.ndim), key=like.stride, reverse=True)
        t = t.permute(0, *order)
    return t.reshape(len(t), -1)
