"""Kronecker-factored preconditioners: Shampoo, also with Adam's step lengths; SOAP, which is Adam in the basis of
Shampoo's; and Kron of PSGD.

All see a tensor along each of its modes (dimensions), as a matrix [size of the mode, everything else].
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.basics.random import generator
from dlopt.basics.ranges import Count, Fraction, NonNegative, Positive, PositiveFraction, Seed
from dlopt.optim.common import Closure, RealOptimizer, buffers, chunks, count_steps, gradients, loss_of
from dlopt.optim.hyperball import move_on_sphere, radius
from dlopt.optim.orthogonalize import QUINTIC, as_matrix, orthogonalize
from dlopt.optim.traits import (
    ELEMENTWISE,
    OptimizerTraits,
    Shape,
    StepSize,
    entrywise_growth,
    independent_growth,
)

_FLAT_UPDATES, _DECAY = 500, 0.001  # of the fraction of updates that also update Kron's preconditioner
_WHITENING_STEPS = 10  # iterations that orthogonalize an update of SOAP, as in the authors' code
_MAX_RMS = 1.1  # of an update of Kron
_RESOLUTION = 1e-10  # relative to the largest eigenvalue: closer ones in fp64 may differ by rounding alone
_ROUNDING = 1e-12  # relative to a gradient's norm: smaller coordinates in a rotated basis may be rounding alone
_BALANCE_EVERY = 100  # updates of the preconditioner between two balancings of its factors


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
    """Returns X X^T [n, n] of the tensor unfolded along a mode of size n, or its diagonal [n]."""
    unfolded = tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)
    return unfolded.square().sum(1) if diagonal else unfolded @ unfolded.T


def aligned_gradients(params: list[Tensor]) -> list[Tensor]:
    """Returns the gradients, or copies of views.

    With parallel=ddp they are views of a bucket, at addresses that differ after resuming; and a matrix product rounds
    by the alignment of its factors.
    """
    return [grad.clone() if grad.storage_offset() else grad for grad in gradients(params)]


def eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns eigenvalues (ascending) and eigenvectors, computed at least in float32.

    NaN if the products of a large gradient have overflowed: the check of the weights then reports the update.
    """
    # In float32 LAPACK may raise or return NaN for many equal eigenvalues, for example of tokens without gradients.
    for dtype in (torch.promote_types(matrix.dtype, torch.float32), torch.float64):
        try:
            values, vectors = torch.linalg.eigh(matrix.to(dtype))
        except torch.linalg.LinAlgError:
            continue
        if vectors.isfinite().all():
            return values.to(matrix.dtype), vectors.to(matrix.dtype)
    vectors = torch.full_like(matrix, torch.nan)
    return vectors[0], vectors


def eigenbasis(matrix: Tensor) -> Tensor:
    """Returns the eigenvectors of a sum of squares, largest eigenvalue first.

    Of equal eigenvalues, as the zeros of directions without gradients, eigh returns a basis that depends on rounding,
    and with it the updates of Adam in this basis: processes that sum gradients in another order would train another
    model. In fp64, eigenvalues that differ by rounding alone share a basis that depends on their space only: the QR
    decomposition of fixed vectors projected on it. In smaller types rounding decides which eigenvalues are equal.
    """
    values, vectors = eigenvectors(matrix)
    if matrix.dtype == torch.float64:
        starts = ((values.diff() > _RESOLUTION * values.max()).nonzero().flatten() + 1).tolist()
        spaces = list(vectors.tensor_split(starts, dim=1))
        draws = torch.randn(len(values), max(space.shape[1] for space in spaces), generator=generator("cpu", 0))
        for i, space in enumerate(spaces):
            if (size := space.shape[1]) > 1:
                spaces[i] = torch.linalg.qr(space @ (space.T @ draws[:, :size].to(space))).Q
        vectors = torch.cat(spaces, 1)
    return vectors.flip(1).contiguous()


def _shampoo_growth(group: Mapping[str, Any], shape: Shape, base: Shape) -> float:
    """Of U S V^T, the factors leave U V^T; the diagonal of H_i multiplies its norm by about n_i^(1/2k)."""
    now, before = (math.prod(size for size in each if size > group["max_size"]) for each in (shape, base))
    return float((now / before) ** (0.5 / max(1, len(shape))))


class Shampoo(RealOptimizer):
    """Full-matrix preconditioning of each mode of a tensor (Gupta et al. 2018, algorithm 2), with decoupled
    weight decay.

    H_i <- H_i + X_i X_i^T, from eps * I, where X_i is the gradient unfolded along mode i of k;
    theta <- theta - lr * m x_1 H_1^(-1/2k) ... x_k H_k^(-1/2k), where m averages gradients. A matrix (k = 2) is
    preconditioned by L^(-1/4) m R^(-1/4), a kernel [out, in, height, width] along its four modes, a vector by
    H^(-1/2), which is full-matrix AdaGrad, a scalar as a vector of one entry. Modes larger than `max_size` use the
    diagonal of H_i (section 4.3 of the paper). The roots are computed at the first update and then every
    `update_every` ones.
    """

    traits: ClassVar[OptimizerTraits] = replace(
        ELEMENTWISE, scope="tensor", decoupled_decay=True, step_size=StepSize(_shampoo_growth, damping="eps")
    )

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.1,
        momentum: Fraction = 0.9,
        eps: Positive = 0.0001,
        weight_decay: NonNegative = 0.0,
        update_every: Count = 10,
        max_size: Count = 1024,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "update_every": update_every, "max_size": max_size})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, averages = float(group["lr"]), buffers(self, params, "momentum_buffer")
        counts = count_steps(self, params)
        for p, grad, average, count in zip(params, aligned_gradients(params), averages, counts, strict=True):
            average.lerp_(grad, 1 - group["momentum"])
            roots = self._inverse_roots(group, p, grad, is_due=(count - 1) % group["update_every"] == 0)
            p.mul_(1 - lr * group["weight_decay"])
            p.sub_(multiply_modes(torch.atleast_1d(average), roots).view(p.shape), alpha=lr)

    def _inverse_roots(self, group: dict[str, Any], p: Tensor, grad: Tensor, *, is_due: bool) -> list[Tensor]:
        """Adds the gradient to H_1 ... H_k; returns H_i^(-1/2k), which are computed if `is_due`."""
        state, roots, grad = self.state[p], [], torch.atleast_1d(grad)
        for mode, size in enumerate(grad.shape):
            added = gram(grad, mode, diagonal=size > group["max_size"])
            name, root = f"sum{mode}", f"root{mode}"
            if name not in state:
                identity = torch.ones_like(added) if added.ndim == 1 else torch.eye(size, dtype=added.dtype).to(added)
                state[name] = group["eps"] * identity
            state[name].add_(added)
            if is_due:
                state[root] = _inverse_root(state[name], 2 * grad.ndim, group["eps"])
            roots.append(state[root])
        return roots


def _inverse_root(sums: Tensor, order: int, eps: float) -> Tensor:
    """Returns H^(-1/order) of a symmetric H >= eps * I, or of a diagonal."""
    if sums.ndim == 1:
        return sums.pow(-1 / order)
    values, vectors = eigenvectors(sums)
    # Rounding may push the smallest eigenvalues below eps.
    values = values.clamp(min=eps).masked_fill_(_is_rounding(values - eps), eps)
    return (vectors * values.pow(-1 / order)) @ vectors.T


class DistributedShampoo(RealOptimizer):
    """Shampoo with moving averages and the step lengths of Adam (Anil et al. 2020; Shi et al. 2023, algorithm 2), with
    decoupled weight decay: the winner of the AlgoPerf competition (Kasimbeg et al. 2025).

    m, v and H_i average G, G^2 and X_i X_i^T, corrected for their start at zero, where X_i is the gradient unfolded
    along mode i of k. With A = m / (sqrt(v) + graft_eps), the update of Adam, and
    U = m x_1 (H_1 + eps * I)^(-1/2k) ... x_k (H_k + eps * I)^(-1/2k):
    theta <- theta - lr * (|A| / |U| * U + weight_decay * theta). So AdamW's learning rates work well.

    The roots are computed at update `update_every` and then every `update_every` ones; the updates before are A.
    The authors' torch-shampoo also distributes the roots over processes, joins the small dimensions of a kernel, and
    splits dimensions larger than `max_size` into blocks; here these use the diagonal of H_i.
    """

    traits: ClassVar[OptimizerTraits] = replace(
        ELEMENTWISE, scope="tensor", decoupled_decay=True, step_size=StepSize(entrywise_growth)
    )

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.001,
        betas: tuple[Fraction, Fraction] = (0.9, 0.999),
        eps: Positive = 1e-12,
        graft_eps: Positive = 1e-8,
        weight_decay: NonNegative = 0.01,
        update_every: Count = 10,
        max_size: Count = 1024,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "graft_eps": graft_eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "update_every": update_every, "max_size": max_size})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        averages, squares = buffers(self, params, "exp_avg"), buffers(self, params, "exp_avg_sq")
        counts = count_steps(self, params)
        grads = aligned_gradients(params)
        for p, grad, m, v, count in zip(params, grads, averages, squares, counts, strict=True):
            m.lerp_(grad, 1 - beta1)
            v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            mean = m / (1 - beta1**count)
            update = mean / (v / (1 - beta2**count)).sqrt_().add_(group["graft_eps"])
            if roots := self._inverse_roots(group, p, grad, count):
                length = update.norm()
                update = multiply_modes(torch.atleast_1d(mean), roots).view(p.shape)
                update = update * (length / update.norm().clamp(min=torch.finfo(p.dtype).tiny))
            p.mul_(1 - lr * group["weight_decay"])
            p.sub_(update, alpha=lr)

    def _inverse_roots(self, group: dict[str, Any], p: Tensor, grad: Tensor, count: int) -> list[Tensor]:
        """Averages the gradient into H_1 ... H_k; returns (H_i + eps * I)^(-1/2k), or nothing before the first."""
        state, beta2, grad = self.state[p], group["betas"][1], torch.atleast_1d(grad)
        for mode, size in enumerate(grad.shape):
            new = gram(grad, mode, diagonal=size > group["max_size"])
            name = f"gram{mode}"
            if name not in state:
                state[name] = torch.zeros_like(new)
            average = state[name].lerp_(new, 1 - beta2)
            if count % group["update_every"] == 0:
                root = _damped_inverse_root(average / (1 - beta2**count), 2 * grad.ndim, group["eps"])
                state[f"root{mode}"] = root
        return [state[f"root{mode}"] for mode in range(grad.ndim)] if "root0" in state else []


def _damped_inverse_root(average: Tensor, order: int, eps: float) -> Tensor:
    """Returns (H + eps * I)^(-1/order) of a symmetric H >= 0, or of a diagonal."""
    if average.ndim == 1:
        return (average + eps).pow(-1 / order)
    values, vectors = eigenvectors(average)
    # Of directions without gradients, rounding makes some eigenvalues negative. Raised to eps alone, they would be
    # smaller than the positive ones by orders of magnitude, and their roots would amplify noise; so all are shifted.
    values = (values - values.min().clamp(max=0.0)).masked_fill_(_is_rounding(values), 0.0) + eps
    return (vectors * values.pow(-1 / order)) @ vectors.T


def _is_rounding(values: Tensor) -> Tensor:
    """Returns which eigenvalues [n] of a sum of squares are zeros up to rounding, in fp64.

    Inverse roots amplify what rounding adds to them, which differs between processes.
    """
    if values.dtype != torch.float64:
        return torch.zeros_like(values, dtype=torch.bool)
    return values <= 8 * len(values) * torch.finfo(values.dtype).eps * values.max()


def _soap_growth(group: Mapping[str, Any], shape: Shape, base: Shape) -> float:
    """In a basis of earlier gradients, a new one has many small entries, which Adam then brings to one size.

    Qiu et al. 2025 compute the basis from the gradient that they then rotate, which leaves few entries that are not
    zero: their steps are as long as Shampoo's.
    """
    rotated = len(shape) > 1 and max(shape) <= group["max_size"]
    if rotated or (group["orthogonalize"] and len(shape) > 1 and group.get("use_muon", True)):
        return independent_growth(group, shape, base)
    return entrywise_growth(group, shape, base)


def _rotated(tensor: Tensor, bases: Sequence[Tensor | None]) -> Tensor:
    """Returns the coordinates of the tensor in the bases.

    Along directions without gradients they are sums that rounding keeps from zero, which Adam would divide by their own
    size. In fp64 they are zero.
    """
    rotated = multiply_modes(tensor, bases, transpose=True)
    if tensor.dtype == torch.float64 and any(basis is not None for basis in bases):
        rotated.masked_fill_(rotated.abs() <= _ROUNDING * rotated.norm(), 0.0)
    return rotated


class SOAP(RealOptimizer):
    """Adam in the eigenbasis of Shampoo's preconditioners (Vyas et al. 2024, algorithm 3), with decoupled weight decay.

    For a matrix: G' = QL^T G QR; V averages G'^2; theta <- theta - lr * QL (QL^T M QR / (sqrt(V) + eps)) QR^T, with
    M, the average of G, and V corrected for their start at zero. L and R average G G^T and G^T G with `shampoo_beta`
    (null: betas[1]). Every `update_every` updates Q <- QR(L Q), one step of the power iteration (algorithm 4), with
    columns sorted by eigenvalue as in the authors' code. Where L has no full rank, QR completes Q by rounding errors;
    in fp64 Q is then an eigenbasis of L, into which V is rotated, so that all parallel modes train the same model.

    The first gradient only initializes L, R and their eigenvectors, as in the authors' code, so that no gradient is
    projected on its own eigenbasis. A kernel [out, in, height, width] has a basis for each of its four modes. Vectors,
    and modes larger than `max_size`, are not rotated: AdamW. (pytorch-optimizer's SOAP orthogonalizes in float32.)

    `orthogonalize` replaces the update of a matrix or kernel, as [out, everything else], by U V^T of it, scaled to an
    RMS of 1 (SOAP-Muon, Vyas et al. 2025, as in the authors' olmo_optimizer, which in addition multiplies the rate by
    Adam's bias corrections). `hyperball` keeps the norms of matrices (SOAP-H, Wen et al. 2026): see `move_on_sphere`.
    Both leave out groups with `use_muon=False` (`rest: true`), as is advised for embeddings and the last layer.
    """

    @property
    def traits(self) -> OptimizerTraits:
        traits = replace(ELEMENTWISE, scope="tensor", decoupled_decay=True, step_size=StepSize(_soap_growth))
        if self.defaults["hyperball"]:  # a rotated step has no known norm; it sets the norm of weights again
            traits = replace(traits, rests_at_zero_lr=False, step_size=None)
        return traits

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.003,
        betas: tuple[Fraction, Fraction] = (0.95, 0.95),
        shampoo_beta: Fraction | None = None,
        eps: Positive = 1e-8,
        weight_decay: NonNegative = 0.01,
        update_every: Count = 10,
        max_size: Count = 10_000,
        orthogonalize: bool = False,
        hyperball: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "shampoo_beta": shampoo_beta, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"update_every": update_every, "max_size": max_size}
        super().__init__(params, {**defaults, "orthogonalize": orthogonalize, "hyperball": hyperball})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        shampoo_beta = beta2 if group["shampoo_beta"] is None else group["shampoo_beta"]
        averages, squares = buffers(self, params, "exp_avg"), buffers(self, params, "exp_avg_sq")
        counts = count_steps(self, params)
        grads = aligned_gradients(params)
        for p, grad, m, v, count in zip(params, grads, averages, squares, counts, strict=True):
            state = self.state[p]
            modes = [mode for mode, size in enumerate(p.shape) if p.ndim > 1 and size <= group["max_size"]]
            if count > 1:
                # Adam's second moment averages rotated gradients, so it has to rotate with the basis; its first
                # moment stays in the coordinates of the parameters, and is rotated again in each update, exactly.
                t = count - 1  # updates, including this one
                bases = [state.get(f"basis{mode}") for mode in range(p.ndim)]
                m.lerp_(grad, 1 - beta1)
                v.mul_(beta2).add_(_rotated(grad, bases).square(), alpha=1 - beta2)
                denominator = v.sqrt().div_(math.sqrt(1 - beta2**t)).add_(group["eps"])
                normalized = _rotated(m, bases) / denominator
                p.mul_(1 - lr * group["weight_decay"])
                self._move(group, p, multiply_modes(normalized, bases), lr, 1 - beta1**t)
            for mode in modes:
                new = gram(grad, mode)
                if f"gram{mode}" not in state:
                    state[f"gram{mode}"] = torch.zeros_like(new)
                state[f"gram{mode}"].lerp_(new, 1 - shampoo_beta)
            if count == 1:
                for mode in modes:
                    state[f"basis{mode}"] = eigenbasis(state[f"gram{mode}"])
            elif (count - 1) % group["update_every"] == 0:
                self._refresh_bases(p, modes)

    def _move(self, group: dict[str, Any], p: Tensor, update: Tensor, lr: float, correction: float) -> None:
        """Moves p by the update; `correction` is the bias correction of the averaged gradients."""
        weight = p
        if p.ndim > 1 and group.get("use_muon", True):
            if group["orthogonalize"]:
                weight, matrix = as_matrix(p, p), as_matrix(update, p).unsqueeze(0)
                update = orthogonalize(matrix, QUINTIC, _WHITENING_STEPS, eps=1e-7)[0].to(p.dtype)
                update = update / update.square().mean().sqrt().clamp(min=torch.finfo(p.dtype).tiny)
                correction = 1.0  # the scale of the average does not matter any more
            if group["hyperball"]:
                move_on_sphere(weight, update, lr, radius(self, p))
                return
        weight.sub_(update, alpha=lr / correction)

    def _refresh_bases(self, p: Tensor, modes: list[int]) -> None:
        """Moves the bases one step of the power iteration towards the eigenvectors; V follows their order."""
        state = self.state[p]
        for mode in modes:
            basis = state[f"basis{mode}"]
            product = state[f"gram{mode}"] @ basis
            # Rayleigh quotients of the columns: the estimated eigenvalues. One power iteration followed by QR converges
            # to the eigenvectors column by column, largest first, if the columns come in that order. V has to follow
            # the permutation, since its entries belong to columns; it is not rotated by the small remaining change, as
            # in the paper.
            order = (basis * product).sum(0).argsort(descending=True)
            squares = state["exp_avg_sq"]
            product = product[:, order]
            wide = product if product.dtype == torch.float64 else product.float()
            new, triangle = torch.linalg.qr(wide)
            if product.dtype == torch.float64 and _is_singular(triangle):
                # QR completes the columns of a singular product by rounding. The eigenvectors do not depend on it;
                # they may be far from the previous basis, so V is rotated: as independent entries, squares move by
                # the squares of the rotation.
                new = eigenbasis(state[f"gram{mode}"])
                factors: list[Tensor | None] = [None] * squares.ndim
                factors[mode] = (new.T @ basis).square()
                squares.copy_(multiply_modes(squares, factors))
            else:
                squares.copy_(squares.index_select(mode, order))
            # Contiguous, as after loading shards: products round by the order of a matrix in memory.
            state[f"basis{mode}"] = new.to(product.dtype).contiguous()


def _is_singular(triangle: Tensor) -> bool:
    """Returns whether a column of the decomposed matrix depends on earlier columns, up to rounding."""
    lengths = triangle.diagonal().abs()
    return bool(lengths.min() <= _RESOLUTION * lengths.max())


class Kron(RealOptimizer):
    """PSGD with a Kronecker-factored whitening preconditioner (Li 2018; Pooladzandi & Li 2024), with decoupled weight
    decay. Follows Kron in the authors' psgd_torch and in kron_torch. The latter also joins the dimensions of a kernel
    into two, and adds noise, of 3e-4 of the mean gradient, to the gradients that update the preconditioner.

    P = Q^T Q with Q = Q_1 x ... x Q_k, one factor per mode of a tensor: upper triangular, or diagonal for vectors and
    for modes larger than `max_size`; a kernel [out, in, height, width] has four. P minimizes E[m^T P m + v^T P^-1 v]
    over momenta m and white noise v by steps on the Lie group: Q_i <- Q_i - precond_lr / |A_i + B_i| *
    triu(A_i - B_i) Q_i, with A_i and B_i the Gram matrices along mode i of Q m and of Q^-T v.
    theta <- theta - lr * (P m^, scaled down to an RMS of 1.1 + weight_decay * theta).

    The preconditioner is updated at every update at first, then at every n-th one, as in kron_torch: n is 1 / rate,
    rounded up, with a rate that decays from 1 to `min_update_rate` between updates 500 and about 4000. The noise v
    depends on `seed` and on the update only, which makes resumed runs exact. (pytorch-optimizer draws from NumPy's
    global generator, which a checkpoint does not hold.)
    """

    traits: ClassVar[OptimizerTraits] = replace(ELEMENTWISE, scope="tensor", separable=False, decoupled_decay=True)

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.0003,
        momentum: Fraction = 0.9,
        weight_decay: NonNegative = 0.0,
        precond_lr: PositiveFraction = 0.1,
        min_update_rate: PositiveFraction = 0.03,
        max_size: Count = 8192,
        seed: Seed = 0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "precond_lr": precond_lr}
        defaults |= {"min_update_rate": min_update_rate, "max_size": max_size, "seed": seed}
        super().__init__(params, {**defaults, "step": 0, "waited": 0, "updated": 0})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        loss = loss_of(closure)
        for number, group in enumerate(self.param_groups):
            is_due = _count_update(group)
            # Also parameters without a gradient count: a pipeline's stage must draw what one process would.
            numbers = {p: index for index, p in enumerate(group["params"])}
            for params in chunks(group["params"]):
                averages, counts = buffers(self, params, "momentum_buffer"), count_steps(self, params)
                torch._foreach_lerp_(averages, gradients(params), 1 - group["momentum"])
                means = torch._foreach_div(averages, [1 - group["momentum"] ** t for t in counts])
                for p, mean in zip(params, means, strict=True):
                    draw = generator(p.device, group["seed"], group["step"], number, numbers[p]) if is_due else None
                    self._update_one(group, p, mean, draw)
        return loss

    def _update_one(self, group: dict[str, Any], p: Tensor, mean: Tensor, draw: torch.Generator | None) -> None:
        """Updates one parameter with its average gradient; its preconditioner if there is a generator for the noise."""
        lr = float(group["lr"])
        factors, mean = self._factors(p, group["max_size"]), torch.atleast_1d(mean)
        if draw is not None:
            if p.ndim > 1 and group["updated"] % _BALANCE_EVERY == 0:
                _balance(factors)
            noise = torch.randn(mean.shape, generator=draw, dtype=p.dtype, device=p.device)
            update_factors(factors, mean, noise, group["precond_lr"])
        update = multiply_modes(multiply_modes(mean, factors), factors, transpose=True)
        update.div_((update.square().mean().sqrt() / _MAX_RMS).clamp_(min=1.0))
        p.mul_(1 - lr * group["weight_decay"])
        p.sub_(update.view(p.shape), alpha=lr)

    def _factors(self, p: Tensor, max_size: int) -> list[Tensor]:
        """Returns Q_1 ... Q_k, the identity at first; a scalar has one of size 1."""
        state, factors = self.state[p], []
        for mode, size in enumerate(p.shape or (1,)):
            if f"factor{mode}" not in state:
                ones = torch.ones(size, dtype=p.dtype, device=p.device)
                state[f"factor{mode}"] = ones if p.ndim < 2 or size > max_size else ones.diag()
            factors.append(state[f"factor{mode}"])
        return factors


def _count_update(group: dict[str, Any]) -> bool:
    """Counts an update of the group; returns whether its preconditioners are due."""
    rate = min(1.0, max(group["min_update_rate"], math.exp(-_DECAY * (group["step"] - _FLAT_UPDATES))))
    group["step"] += 1
    group["waited"] += 1
    is_due = bool(group["waited"] >= 1 / rate)
    if is_due:
        group["waited"] = 0
        group["updated"] += 1
    return is_due


def update_factors(factors: list[Tensor], gradient: Tensor, noise: Tensor, lr: float) -> None:
    """Takes one step of the factors Q_i, in place, towards the preconditioner that whitens such gradients.

    A gradient of zeros does not change them: the factors would grow by `lr` at every such step, without bound.
    """
    rate, wide = lr * gradient.any().to(gradient.dtype), torch.promote_types(gradient.dtype, torch.float32)
    # At the minimum A = B: the whitened gradients then have the covariance of white noise under the inverse. No
    # covariance is inverted: one side multiplies with the triangular factors, the other one solves with them.
    whitened = multiply_modes(gradient, factors)
    inverse = noise
    for factor in factors:  # Q^-T noise; each mode goes to the end, as in multiply_modes
        if factor.ndim == 1:
            inverse = inverse.movedim(0, -1) / factor
        else:
            unfolded = inverse.movedim(0, -1)
            rows = unfolded.reshape(-1, len(factor)).to(wide)  # torch solves no systems in bfloat16
            solved = torch.linalg.solve_triangular(factor.to(wide), rows, upper=True, left=False)
            inverse = solved.reshape(unfolded.shape).to(gradient.dtype)
    for mode, factor in enumerate(factors):
        diagonal = factor.ndim == 1
        a, b = gram(whitened, mode, diagonal=diagonal), gram(inverse, mode, diagonal=diagonal)
        tiny = torch.finfo(a.dtype).tiny
        if diagonal:
            step = rate / (a + b).max().clamp_(min=tiny)
            factor.sub_((a - b) * factor * step)
        else:
            # Relative to the spectral norm, for which one power iteration gives a bound from below in two products: the
            # step is then independent of the scale of the gradients, as the group structure asks.
            step = rate / _norm_bound(a + b).clamp_(min=tiny)
            factor.sub_((a - b).triu_() @ factor * step)


def _norm_bound(matrix: Tensor) -> Tensor:
    """Returns a lower bound of the spectral norm of a symmetric matrix, by one power iteration from a row."""
    scale = matrix.abs().max().clamp(min=torch.finfo(matrix.dtype).tiny)
    matrix = matrix / scale
    longest = matrix.square().sum(1).argmax().view(1)  # as an index tensor, on which a GPU need not wait
    start = matrix @ matrix.index_select(0, longest)[0]
    return scale * (matrix @ (start / start.norm().clamp(min=torch.finfo(matrix.dtype).tiny))).norm()


def _balance(factors: list[Tensor]) -> None:
    """Gives all factors the same largest entry, which does not change their product."""
    norms = torch.stack([factor.abs().max() for factor in factors])
    mean = norms.log().mean().exp()
    for factor, norm in zip(factors, norms, strict=True):
        factor.mul_(mean / norm)
