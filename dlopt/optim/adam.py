"""Variants of Adam."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.optim.common import RealOptimizer, buffers, count_steps, gradients, make_cautious
from dlopt.ranges import Fraction, NonNegative, Positive


def adamw(
    params: ParamsT,
    *,
    lr: Positive = 0.001,
    betas: tuple[Fraction, Fraction] = (0.9, 0.999),
    eps: NonNegative = 1e-8,
    weight_decay: NonNegative = 0.01,
    amsgrad: bool = False,
    cautious: bool = False,
    fused: bool | None = None,
) -> torch.optim.Optimizer:
    """Builds torch's AdamW (Loshchilov & Hutter 2019), or its cautious variant, for which torch has no kernel.

    `fused` is passed at run time: whether torch's fused kernel fits the parameters.
    """
    if cautious:
        return CautiousAdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)
    return torch.optim.AdamW(params, lr, betas, eps, weight_decay, amsgrad, fused=fused)


class CautiousAdamW(RealOptimizer):
    """AdamW whose update moves no weight against its gradient (C-AdamW, Liang et al. 2024, algorithm 1).

    u = m^ / (sqrt(v^) + eps); theta <- (1 - lr * weight_decay) theta - lr * d / (nnz + 1) * mask * u, where the mask
    u * g > 0 keeps nnz of a tensor's d entries. The weight decay is not masked.
    """

    elementwise: ClassVar[bool] = False  # nnz is that of the whole tensor
    normalizes_entries: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.001,
        betas: tuple[Fraction, Fraction] = (0.9, 0.999),
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.01,
        amsgrad: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, defaults)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        grads, counts = gradients(params), count_steps(self, params)
        averages, squares = buffers(self, params, "exp_avg"), buffers(self, params, "exp_avg_sq")
        torch._foreach_lerp_(averages, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        if group["amsgrad"]:
            maxima = buffers(self, params, "max_exp_avg_sq")
            torch._foreach_maximum_(maxima, squares)
            squares = maxima
        updates = adam_updates(averages, squares, counts, (beta1, beta2), group["eps"])
        make_cautious(updates, grads)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, updates, alpha=-lr)


def adam_updates(
    averages: list[Tensor],
    squares: list[Tensor],
    counts: list[int],
    betas: tuple[float, float],
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


class AdaBelief(RealOptimizer):
    """Adam with the variance of the gradient around its average in place of its square (Zhuang et al. 2020,
    algorithm 2), with decoupled weight decay.

    s <- beta2 * s + (1 - beta2) * (g - m)^2 + eps; theta <- theta - lr * m^ / (sqrt(s^) + eps). As in the algorithm,
    eps is added twice; the first one accumulates to eps / (1 - beta2) in s.
    """

    normalizes_entries: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.001,
        betas: tuple[Fraction, Fraction] = (0.9, 0.999),
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, (beta1, beta2), eps = float(group["lr"]), group["betas"], group["eps"]
        grads, counts = gradients(params), count_steps(self, params)
        averages, variances = buffers(self, params, "exp_avg"), buffers(self, params, "exp_avg_var")
        torch._foreach_lerp_(averages, grads, 1 - beta1)
        differences = torch._foreach_sub(grads, averages)
        torch._foreach_mul_(variances, beta2)
        torch._foreach_addcmul_(variances, differences, differences, 1 - beta2)
        torch._foreach_add_(variances, eps)
        updates = adam_updates(averages, variances, counts, (beta1, beta2), eps)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, updates, alpha=-lr)


class LAMB(RealOptimizer):
    """Adam for large batches: scales the update of each tensor to the tensor's norm (You et al. 2020, algorithm 2).

    u = m^ / (sqrt(v^) + eps) + weight_decay * theta; theta <- theta - lr * min(|theta|, max_weight_norm) / |u| * u.
    The decay is not part of the moments; in this sense it is decoupled. The ratio is 1 if a norm is zero.
    `bias_correction=False` corresponds to the authors' code.
    """

    elementwise: ClassVar[bool] = False

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
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        grads, counts = gradients(params), count_steps(self, params)
        averages, squares = buffers(self, params, "exp_avg"), buffers(self, params, "exp_avg_sq")
        torch._foreach_lerp_(averages, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        updates = adam_updates(
            averages, squares, counts, (beta1, beta2), group["eps"], bias_correction=group["bias_correction"]
        )
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

    evaluations: ClassVar[str] = "once"

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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "mu_product" in state:
                wide = torch.get_default_dtype() == torch.float64
                state["mu_product"] = state["mu_product"].to(torch.float64 if wide else torch.float32)
