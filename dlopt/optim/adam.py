"""Variants of Adam."""

import math
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Le
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.basics.ranges import Count, Fraction, NonNegative, OpenFraction, Positive
from dlopt.optim.common import (
    RealOptimizer,
    Tensors,
    buffers,
    count_steps,
    fill_defaults,
    gradients,
    make_cautious,
    move,
    refuse_complex,
)
from dlopt.optim.hyperball import keeps_norm, move_on_sphere, radius, refuse_with_hyperball
from dlopt.optim.traits import ADAPTIVE, AS_ADAMW, DECOUPLED, ELEMENTWISE, OptimizerTraits, is_decoupled


def adamw(
    params: ParamsT,
    *,
    lr: Positive = 0.001,
    betas: tuple[Fraction, Fraction] = (0.9, 0.999),
    eps: NonNegative = 1e-8,
    weight_decay: NonNegative = 0.01,
    amsgrad: bool = False,
    cautious: bool = False,
    hyperball: bool = False,
    fused: bool | None = None,
) -> torch.optim.Optimizer:
    """Builds torch's AdamW (Loshchilov & Hutter 2019), or a variant for which torch has no kernel: cautious, hyperball.

    `fused` is passed at run time: whether torch's fused kernel fits the parameters.
    """
    if hyperball:
        refuse_with_hyperball(cautious=cautious)
    if hyperball or cautious:
        kind = HyperballAdamW if hyperball else CautiousAdamW
        return kind(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)
    return torch.optim.AdamW(params, lr, betas, eps, weight_decay, amsgrad, fused=fused)


class _OwnAdamW(RealOptimizer):
    """AdamW by torch's foreach functions, for the variants that change its update."""

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.001,
        betas: tuple[Fraction, Fraction] = (0.9, 0.999),
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.01,
        amsgrad: bool = False,
        **variant: bool,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, {**defaults, **variant})

    def _updates(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """Returns m^ / (sqrt(v^) + eps) for the parameters, after adding the gradients to m and v."""
        counts = count_steps(self, params)
        averages, squares = moments(self, params, grads, group["betas"])
        if group["amsgrad"]:
            maxima = buffers(self, params, "max_exp_avg_sq")
            torch._foreach_maximum_(maxima, squares)
            squares = maxima
        return adam_updates(averages, squares, counts, group["betas"], group["eps"])


class HyperballAdamW(_OwnAdamW):
    """AdamW whose matrices keep their norms (AdamH, Wen et al. 2026): see `move_on_sphere`.

    Vectors, and groups with `use_muon=False` (`rest: true`), as is advised for embeddings and the last layer, are
    updated by AdamW.
    """

    traits: ClassVar[OptimizerTraits] = replace(DECOUPLED, scope="tensor", rests_at_zero_lr=False)

    def __init__(self, params: ParamsT, **keys: Any) -> None:
        super().__init__(params, **keys, hyperball=True)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        others: list[Tensor] = []
        updates: list[Tensor] = []
        for p, update in zip(params, self._updates(group, params, gradients(params)), strict=True):
            if keeps_norm(group, p):
                move_on_sphere(p, update, float(group["lr"]), radius(self, p))
            else:
                others.append(p)
                updates.append(update)
        if others:
            move(group, others, updates)


class CautiousAdamW(_OwnAdamW):
    """AdamW whose update moves no weight against its gradient (C-AdamW, Liang et al. 2024, algorithm 1).

    u = m^ / (sqrt(v^) + eps); theta <- (1 - lr * weight_decay) theta - lr * d / (nnz + 1) * mask * u, where the mask
    u * g > 0 keeps nnz of a tensor's d entries. The weight decay is not masked. The factor is the
    paper's; the authors' present code has d / nnz.
    """

    # The number of kept entries is counted over the whole tensor.
    traits: ClassVar[OptimizerTraits] = replace(AS_ADAMW, scope="tensor")

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = gradients(params)
        updates = self._updates(group, params, grads)
        make_cautious(updates, grads)
        move(group, params, updates)


def moments(
    optimizer: torch.optim.Optimizer, params: list[Tensor], grads: Tensors, betas: tuple[float, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """Updates and returns the averages of the gradients and of their squares, m and v."""
    averages, squares = buffers(optimizer, params, "exp_avg"), buffers(optimizer, params, "exp_avg_sq")
    torch._foreach_lerp_(averages, grads, 1 - betas[0])
    torch._foreach_mul_(squares, betas[1])
    torch._foreach_addcmul_(squares, grads, grads, 1 - betas[1])
    return averages, squares


def adam_updates(
    averages: Tensors,
    squares: list[Tensor],
    counts: list[int],
    betas: tuple[float, ...],
    eps: float,
    *,
    bias_correction: bool = True,
) -> list[Tensor]:
    """Returns m^ / (sqrt(v^) + eps), with both averages corrected for their start at zero, or m / (sqrt(v) + eps)."""
    updates = torch._foreach_sqrt(squares)  # in place from here: a second temporary costs more than the arithmetic
    if bias_correction:
        torch._foreach_div_(updates, [math.sqrt(1 - betas[1] ** t) for t in counts])
    torch._foreach_add_(updates, eps)
    torch._foreach_reciprocal_(updates)
    torch._foreach_mul_(updates, averages)
    if bias_correction:
        torch._foreach_div_(updates, [1 - betas[0] ** t for t in counts])
    return list(updates)


def _gradient_changes(
    optimizer: torch.optim.Optimizer, params: list[Tensor], grads: list[Tensor], counts: list[int]
) -> list[Tensor]:
    """Returns the changes of the gradients since the previous update, zero at the first, and keeps the gradients."""
    previous = buffers(optimizer, params, "previous_grad")
    changes = torch._foreach_sub(grads, previous)
    for change, old, grad, count in zip(changes, previous, grads, counts, strict=True):
        if count == 1:
            change.zero_()  # otherwise it would be the whole gradient
        old.copy_(grad)  # one by one: FSDP's tensors have no foreach copy
    return list(changes)


class AdaBelief(RealOptimizer):
    """Adam with the variance of the gradient around its average in place of its square (Zhuang et al. 2020,
    algorithm 2), with decoupled weight decay.

    s <- beta2 * s + (1 - beta2) * (g - m)^2 + eps; theta <- theta - lr * m^ / (sqrt(s^) + eps). As in the algorithm,
    eps is added twice; the first one accumulates to eps / (1 - beta2) in s. The default is from the authors' code.
    With their 1e-8 for image classification, sqrt(s) is at least 0.003, often more than the gradients.
    """

    traits: ClassVar[OptimizerTraits] = AS_ADAMW

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.001,
        betas: tuple[Fraction, Fraction] = (0.9, 0.999),
        eps: NonNegative = 1e-16,
        weight_decay: NonNegative = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        (beta1, beta2), eps = group["betas"], group["eps"]
        grads, counts = gradients(params), count_steps(self, params)
        averages, variances = buffers(self, params, "exp_avg"), buffers(self, params, "exp_avg_var")
        torch._foreach_lerp_(averages, grads, 1 - beta1)
        differences = torch._foreach_sub(grads, averages)
        torch._foreach_mul_(variances, beta2)
        torch._foreach_addcmul_(variances, differences, differences, 1 - beta2)
        torch._foreach_add_(variances, eps)
        move(group, params, adam_updates(averages, variances, counts, (beta1, beta2), eps))


class LAMB(RealOptimizer):
    """Adam for large batches: scales the update of each tensor to the tensor's norm (You et al. 2020, algorithm 2).

    u = m^ / (sqrt(v^) + eps) + weight_decay * theta; theta <- theta - lr * min(|theta|, max_weight_norm) / |u| * u.
    The decay is not part of the moments; in this sense it is decoupled. The ratio is 1 if a norm is zero.
    `bias_correction=False` corresponds to the authors' code.
    """

    traits: ClassVar[OptimizerTraits] = replace(ELEMENTWISE, scope="tensor")

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.001,
        betas: tuple[Fraction, Fraction] = (0.9, 0.999),
        eps: Positive = 1e-6,
        weight_decay: NonNegative = 0.01,
        bias_correction: bool = True,
        max_weight_norm: Positive | None = 10.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "bias_correction": bias_correction, "max_weight_norm": max_weight_norm})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, betas, counts = float(group["lr"]), group["betas"], count_steps(self, params)
        averages, squares = moments(self, params, gradients(params), betas)
        updates = adam_updates(averages, squares, counts, betas, group["eps"], bias_correction=group["bias_correction"])
        torch._foreach_add_(updates, params, alpha=group["weight_decay"])
        weights = torch.stack(torch._foreach_norm(params)).clamp_(max=group["max_weight_norm"] or math.inf)
        norms = torch.stack(torch._foreach_norm(updates))
        ratios = torch.where((weights > 0) & (norms > 0), weights / norms, 1.0)
        if ratios.is_cpu:  # reading the ratios needs no synchronization and saves a pass over the updates
            for parameter, update, ratio in zip(params, updates, ratios.tolist(), strict=True):
                parameter.add_(update, alpha=-lr * ratio)
        else:
            torch._foreach_mul_(updates, list(ratios.unbind()))
            torch._foreach_add_(params, updates, alpha=-lr)


class NAdam(torch.optim.NAdam):
    """torch's NAdam, which resumes exactly also in float64.

    Its running product of momenta is a float32 tensor. torch's `load_state_dict` converts it to the parameters' dtype,
    after which the products are rounded differently.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.002,
        betas: tuple[Fraction, Fraction] = (0.9, 0.999),
        eps: NonNegative = 1e-8,
        momentum_decay: NonNegative = 0.004,
        weight_decay: NonNegative = 0.0,
        decoupled_weight_decay: bool = True,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, momentum_decay, decoupled_weight_decay)

    @property
    def traits(self) -> OptimizerTraits:
        return replace(ADAPTIVE, decoupled_decay=is_decoupled(self.param_groups))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "mu_product" in state:
                wide = torch.get_default_dtype() == torch.float64
                # Back to the host, where torch creates and reads it: torch loads it to the device of the parameter.
                state["mu_product"] = state["mu_product"].to("cpu", torch.float64 if wide else torch.float32)


class Adan(RealOptimizer):
    """Adaptive Nesterov momentum (Xie et al. 2022, algorithm 1).

    m, v and n average the gradient g, its change d since the previous update, and (g + beta2 * d)^2;
    theta <- (theta - lr * (m^ + beta2 * v^) / (sqrt(n^) + eps)) / (1 + lr * weight_decay). The averages start at zero
    and are corrected for it, as in the authors' code. `betas` are the decays: 1 - beta in the paper's notation. The
    paper's restarts are not included. (pytorch-optimizer's Adan, AdaBelief and AdEMAMix count the updates of a whole
    group: the first update of a parameter without an earlier gradient comes out too short.)
    """

    traits: ClassVar[OptimizerTraits] = AS_ADAMW

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.001,
        betas: tuple[Fraction, Fraction, Fraction] = (0.98, 0.92, 0.99),
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.02,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, (beta1, beta2, beta3) = float(group["lr"]), group["betas"]
        grads, counts = gradients(params), count_steps(self, params)
        averages, changes = buffers(self, params, "exp_avg"), buffers(self, params, "exp_avg_diff")
        squares, difference = buffers(self, params, "exp_avg_sq"), _gradient_changes(self, params, grads, counts)
        torch._foreach_lerp_(averages, grads, 1 - beta1)
        torch._foreach_lerp_(changes, difference, 1 - beta2)
        torch._foreach_mul_(difference, beta2)
        torch._foreach_add_(difference, grads)
        torch._foreach_mul_(squares, beta3)
        torch._foreach_addcmul_(squares, difference, difference, 1 - beta3)
        # _adam_updates divides all of its first argument by 1 - beta1^t
        weights = [beta2 * (1 - beta1**t) / (1 - beta2**t) for t in counts]
        mixed = torch._foreach_add(averages, torch._foreach_mul(changes, weights))
        updates = adam_updates(mixed, squares, counts, (beta1, beta3), group["eps"])
        torch._foreach_add_(params, updates, alpha=-lr)
        torch._foreach_div_(params, 1 + lr * group["weight_decay"])


class AdEMAMix(RealOptimizer):
    """AdamW with a second, slow average of gradients (Pagliardini et al. 2024, algorithm 1).

    theta <- theta - lr * ((m1^ + alpha * m2) / (sqrt(v^) + eps) + weight_decay * theta), where m2 decays by beta3 and
    is not corrected for its start at zero. Over the first `warmup` updates alpha grows linearly from 0 and beta3 from
    beta1, the latter linearly in its half-life (schedulers f_alpha and f_beta3). The paper sets `warmup` to the length
    of the run.
    """

    traits: ClassVar[OptimizerTraits] = AS_ADAMW

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.001,
        betas: tuple[Fraction, Fraction, OpenFraction] = (0.9, 0.999, 0.9999),
        alpha: NonNegative = 5.0,
        warmup: Count | None = None,
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "alpha": alpha, "warmup": warmup, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        beta1, _, beta3 = group["betas"]
        grads, counts = gradients(params), count_steps(self, params)
        fast, squares = moments(self, params, grads, group["betas"])
        slow = buffers(self, params, "exp_avg_slow")
        progress = [min(1.0, t / group["warmup"]) if group["warmup"] else 1.0 for t in counts]
        for average, grad, fraction in zip(slow, grads, progress, strict=True):
            average.lerp_(grad, 1 - _slow_decay(beta1, beta3, fraction))
        # _adam_updates divides all of its first argument by 1 - beta1^t
        weights = [group["alpha"] * fraction * (1 - beta1**t) for fraction, t in zip(progress, counts, strict=True)]
        mixed = torch._foreach_mul(slow, weights)
        torch._foreach_add_(mixed, fast)
        move(group, params, adam_updates(mixed, squares, counts, group["betas"], group["eps"]))


def _slow_decay(beta1: float, beta3: float, progress: float) -> float:
    """Returns f_beta3 of the paper: the decay after the fraction `progress` of the warmup, from beta1 to beta3."""
    start, end = math.log(beta1) if beta1 else -math.inf, math.log(beta3)
    return min(beta3, math.exp(1 / ((1 - progress) / start + progress / end)))


class ADOPT(RealOptimizer):
    """Adam that converges with any beta2 (Taniguchi et al. 2024, algorithm 2), with decoupled weight decay.

    The gradient is divided by the second moment of the gradients before it, and the momentum averages the result:
    m <- beta1 * m + (1 - beta1) * clip(g / max(sqrt(v), eps), t^(1/4)); theta <- theta - lr * m;
    v <- beta2 * v + (1 - beta2) * g^2. The first gradient of a parameter only initializes v = g^2; t counts the
    updates after it. (pytorch-optimizer's ADOPT clips at (t + 1)^(1/4) and has one count for all parameters.)
    """

    traits: ClassVar[OptimizerTraits] = AS_ADAMW

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.001,
        betas: tuple[Fraction, Fraction] = (0.9, 0.9999),
        eps: Positive = 1e-6,
        weight_decay: NonNegative = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        counts = dict(zip(params, count_steps(self, params), strict=True))
        for p in params:
            # Adam divides a gradient by a second moment that contains it, and their correlation is why it does not
            # converge for some betas (section 3). So the first gradient moves nothing here, and each later one is
            # divided by the squares of older ones only.
            if counts[p] == 1:
                assert p.grad is not None
                self.state[p]["exp_avg_sq"] = p.grad.square()
        params = [p for p in params if counts[p] > 1]
        if not params:
            return
        (beta1, beta2), limits = group["betas"], [(counts[p] - 1) ** 0.25 for p in params]
        grads, averages = gradients(params), buffers(self, params, "exp_avg")
        squares = buffers(self, params, "exp_avg_sq")
        roots = torch._foreach_sqrt(squares)
        torch._foreach_clamp_min_(roots, group["eps"])
        normalized = torch._foreach_div(grads, roots)
        for update, limit in zip(normalized, limits, strict=True):
            update.clamp_(-limit, limit)  # torch 2.11 has no foreach function with a limit for each DTensor
        torch._foreach_lerp_(averages, normalized, 1 - beta1)
        move(group, params, averages)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)


class MARS(RealOptimizer):
    """AdamW on gradients with reduced variance (MARS-AdamW, Yuan et al. 2024, algorithm 2).

    c = g + gamma * beta1 / (1 - beta1) * (g - g_previous), scaled down to norm 1 where it is longer, replaces the
    gradient in AdamW. This is the approximate version: g_previous is the gradient of the previous batch, not of
    the previous weights on this batch. The norm is taken per tensor, as in the authors' code. In contrast to it, MARS
    also updates kernels and vectors, as in the algorithm, and the first gradient counts as unchanged.
    """

    traits: ClassVar[OptimizerTraits] = replace(AS_ADAMW, scope="tensor")

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.003,
        betas: tuple[Fraction, Fraction] = (0.95, 0.99),
        gamma: NonNegative = 0.025,
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "gamma": gamma, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        beta1 = group["betas"][0]
        grads, counts = gradients(params), count_steps(self, params)
        corrected = _gradient_changes(self, params, grads, counts)
        torch._foreach_mul_(corrected, group["gamma"] * beta1 / (1 - beta1))
        torch._foreach_add_(corrected, grads)
        norms = torch._foreach_norm(corrected)
        torch._foreach_clamp_min_(norms, 1.0)
        torch._foreach_div_(corrected, norms)
        averages, squares = moments(self, params, corrected, group["betas"])
        move(group, params, adam_updates(averages, squares, counts, group["betas"], group["eps"]))


class Adafactor(torch.optim.Adafactor):
    """Adam without momentum and with a factored second moment (Shazeer & Stern 2018, algorithm 4): torch's class.

    The second moment of a matrix is the product of the averages of its rows and of its columns over their mean; of a
    kernel [out, in, height, width] this holds for each [height, width]; a vector has its own (algorithm 5). Its decay
    is 1 - t^beta2_decay. theta <- theta - max(eps[1], RMS(theta)) * min(lr, 1 / sqrt(t)) * u / max(1, RMS(u) / d):
    relative steps, which d clips. eps[0]^2 bounds the second moment from below, where the paper adds it to g^2. The
    weight decay is decoupled. torch's own default for eps[0], machine epsilon, is far from the paper's 1e-15: it also
    bounds the mean of the averages, and changes the second moment of gradients below 3e-4 in float32.
    """

    traits: ClassVar[OptimizerTraits] = replace(ELEMENTWISE, scope="tensor", decoupled_decay=True)

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.01,
        beta2_decay: Annotated[float, Le(0)] = -0.8,
        eps: tuple[Positive, NonNegative] = (1e-15, 0.001),
        d: Annotated[float, Ge(1)] = 1.0,
        weight_decay: NonNegative = 0.0,
    ) -> None:
        super().__init__(params, lr, beta2_decay, eps, d, weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        refuse_complex("adafactor", self.param_groups[-1]["params"])

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        # torch divides by the number of elements
        return super()._init_group({**group, "params": [p for p in group["params"] if p.numel()]}, *lists)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        fill_defaults(self)
