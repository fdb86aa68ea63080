"""Muon and Scion: steps by orthogonalized momenta."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import compress
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Count, Fraction, NonNegative, Positive
from dlopt.optim.adam import CautiousAdamW
from dlopt.optim.common import (
    Closure,
    RealOptimizer,
    as_groups,
    buffers,
    gradients,
    is_dense,
    loss_of,
    make_cautious,
    refuse_complex,
    signs,
    without_global_step_hooks,
)
from dlopt.optim.hyperball import check_hyperball, move_on_sphere, radius, refuse_with_hyperball
from dlopt.optim.orthogonalize import QUINTIC, Coefficients, as_matrix, normalize_rows, orthogonalize
from dlopt.optim.traits import ELEMENTWISE, OptimizerTraits, Shape, StepSize, entrywise_growth


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum for matrices (Jordan et al. 2024), and AdamW or SGD for the other parameters.

    Matrices are the parameters with two or more dimensions; a convolution kernel counts as [out, in * height * width].
    In a group with `use_muon=False`, as is advised for embeddings and the last layer, matrices count as other
    parameters. These are updated by torch's AdamW, or SGD with Nesterov momentum, with the learning rate `rest_lr`.
    Weight decay is decoupled, except with SGD, where it is torch's L2 penalty. `normalize_weights` scales each matrix
    to the norm sqrt(rows) before its update (Jordan's airbench94_muon), which makes the learning rate relative to the
    weights. `cautious` moves no weight against its gradient (Liang et al. 2024), neither in matrices nor in the AdamW
    of the others; it masks the orthogonalized update, so that this holds (the authors' code masks the momentum before
    the orthogonalization, after which entries may again move against the gradient). `rest_lr=None` is lr.

    `row_beta` normalizes the rows of an orthogonalized update (NorMuon, Li et al. 2025): see `normalize_rows`. Rows of
    a kernel are its output channels; the authors' code takes the rows of each [height, width]. `hyperball` keeps the
    norms of the matrices (MuonH, Wen et al. 2026): see `move_on_sphere`; `adjust_lr_fn` then has no effect.

    Each parameter group is split in two: matrices and other parameters. The learning rate of a group is relative to
    `lr`: its other parameters get `rest_lr` * group lr / `lr`.
    """

    _is_built = False  # `Optimizer.__init__` adds groups that are split already

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.02,
        weight_decay: NonNegative = 0.01,
        momentum: Fraction = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = QUINTIC,
        ns_steps: Count = 5,
        eps: Positive = 1e-7,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original",
        row_beta: Fraction | None = None,
        normalize_weights: bool = False,
        hyperball: bool = False,
        cautious: bool = False,
        rest: Literal["adamw", "sgd"] = "adamw",
        rest_lr: Positive | None = 0.001,
        rest_momentum: Fraction = 0.9,
        rest_betas: tuple[Fraction, Fraction] = (0.9, 0.999),
        rest_eps: Positive = 1e-8,
    ) -> None:
        keys: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "eps": eps, "adjust_lr_fn": adjust_lr_fn}
        keys |= {"ns_coefficients": ns_coefficients, "ns_steps": ns_steps, "normalize_weights": normalize_weights}
        keys |= {"row_beta": row_beta, "hyperball": hyperball}
        if hyperball:
            refuse_with_hyperball(cautious=cautious, normalize_weights=normalize_weights)
        if cautious and rest == "sgd":
            raise UserError("optimizer.cautious=true: optimizer.rest=sgd has no such variant; use optimizer.rest=adamw")
        self._keys = {**keys, "lr": lr, "weight_decay": weight_decay, "cautious": cautious}
        self._rest_lr = lr if rest_lr is None else rest_lr
        self._rest_keys: dict[str, Any] = {"betas": rest_betas, "eps": rest_eps}
        self._rest_class: Callable[..., torch.optim.Optimizer] = CautiousAdamW if cautious else torch.optim.AdamW
        if rest == "sgd":
            self._rest_keys = {"momentum": rest_momentum, "nesterov": rest_momentum > 0}
            self._rest_class = torch.optim.SGD
        self._rest: torch.optim.Optimizer | None = None
        muon_groups, rest_groups = self._split(as_groups(params))
        rest_groups = self._add_to_rest(rest_groups)
        super().__init__([*muon_groups, *rest_groups], {"lr": lr})
        self._is_built = True

    def _split(self, groups: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Splits each group into matrices and other parameters."""
        muon_groups, rest_groups = [], []
        for given in groups:
            group = {"lr": self._keys["lr"], "weight_decay": self._keys["weight_decay"], **given}
            refuse_complex("muon", group["params"])
            use_muon = group.pop("use_muon", True)
            takes = [use_muon and p.ndim > 1 for p in group["params"]]
            if any(takes):
                muon_groups.append({**self._keys, **group, **_selected(group, takes), "use_muon": True})
                check_hyperball(muon_groups[-1])
            if not all(takes):
                # A group's learning rate is relative to `lr`; here it has the same ratio to `rest_lr`.
                rest_lr = group["lr"] / self._keys["lr"] * self._rest_lr
                others = _selected(group, [not taken for taken in takes])
                rest_groups.append({**group, **others, "lr": rest_lr, "use_muon": False})
        return muon_groups, rest_groups

    def _add_to_rest(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Adds groups to the optimizer of the other parameters; returns these groups, with its defaults."""
        if not groups:
            return []
        # torch's fused kernels go wrong on parameters with gaps in memory (2.15: neighbours are overwritten).
        fused = all(p.device.type in ("cpu", "cuda") and is_dense(p) for group in groups for p in group["params"])
        implementation: dict[str, Any] = {} if self._keys["cautious"] else {"fused": fused or None}
        if self._rest is None:
            self._rest = self._rest_class(groups, lr=self._rest_lr, **implementation, **self._rest_keys)
        else:
            for group in groups:
                self._rest.add_param_group({**group, **implementation})
        return self._rest.param_groups[-len(groups) :]

    @property
    def traits(self) -> OptimizerTraits:
        # torch's SGD adds the decay to the gradient, and `normalize_weights` rescales the weights after the decay.
        decoupled = self._rest_class is not torch.optim.SGD and not self._keys["normalize_weights"]
        traits = replace(ELEMENTWISE, scope="tensor", capturable=not self._keys["cautious"], decoupled_decay=decoupled)
        if decoupled and not self._keys["hyperball"]:  # not for SGD, nor relative to the norm of the weights
            traits = replace(traits, step_size=StepSize(_muon_growth))
        return replace(traits, rests_at_zero_lr=not self._keys["hyperball"])  # which sets the norm again

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if not self._is_built:
            super().add_param_group(param_group)
            return
        muon_groups, rest_groups = self._split(as_groups([param_group]))
        for group in [*muon_groups, *self._add_to_rest(rest_groups)]:
            super().add_param_group(group)

    def __getstate__(self) -> dict[str, Any]:
        names = ("_keys", "_rest_lr", "_rest_keys", "_rest_class", "_rest", "_is_built")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}  # for copy and pickle

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Loads a copy or a state, whose groups the inner optimizer shares."""
        super().__setstate__(state)
        if self._rest is not None:  # torch adds its keys
            groups = [group for group in self.param_groups if not group["use_muon"]]
            self._rest.__setstate__({"param_groups": groups, "state": self.state})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        loss = loss_of(closure)
        for group in self.param_groups:
            if group["use_muon"]:
                self._step_matrices(group)
        if self._rest is not None:
            # Two optimizers with one interface: schedules, checkpoints and parameter groups see this one only. The
            # inner one shares groups and state, so that nothing has to be copied between them, in either direction.
            self._rest.state = self.state  # one state, which is saved
            for group in self._rest.param_groups:
                # torch's fused SGD fails if only some parameters of a group have a momentum.
                if self._rest_class is torch.optim.SGD and group["momentum"]:
                    buffers(self, [p for p in group["params"] if p.grad is not None], "momentum_buffer")
            with without_global_step_hooks():
                self._rest.step()
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        # No value is read on the host (float(lr), .item()): a CUDA graph captures a learning rate that is a tensor.
        params = [p for p in group["params"] if p.grad is not None and p.numel()]
        if not params:
            return
        grads, averages = gradients(params), buffers(self, params, "momentum_buffer")
        torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
        moves = torch._foreach_lerp(grads, averages, group["momentum"]) if group["nesterov"] else averages
        if group["normalize_weights"]:
            for p in params:
                p.mul_(math.sqrt(len(p)) / p.norm().clamp(min=group["eps"]))  # zero weights stay zero
        if group["weight_decay"]:
            # A captured rate is a tensor, which a product with bf16 weights would round to bf16.
            precise = [p.to(torch.promote_types(p.dtype, torch.float32)) for p in params]
            torch._foreach_mul_(precise, 1 - group["lr"] * group["weight_decay"])
            for p, decayed in zip(params, precise, strict=True):
                if p is not decayed:
                    p.copy_(decayed)
        # Matrices of the same shape are orthogonalized together, in one batched product per iteration.
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, p in enumerate(params):
            by_shape.setdefault((len(p), p.numel() // len(p)), []).append(index)
        for shape, indices in by_shape.items():
            stacked = torch.stack([as_matrix(moves[index], params[index]) for index in indices])
            update = orthogonalize(stacked, group["ns_coefficients"], group["ns_steps"], group["eps"])
            update = update.to(torch.promote_types(stacked.dtype, torch.float32))
            if group["row_beta"] is not None:
                update = normalize_rows(update, self._row_squares([params[i] for i in indices]), group["row_beta"])
            if group["hyperball"]:
                for index, move in zip(indices, update, strict=True):
                    p = params[index]
                    move_on_sphere(as_matrix(p, p), move, group["lr"], radius(self, p))
                continue
            scaled = update * (group["lr"] * _lr_factor(shape, group["adjust_lr_fn"]))
            if group["cautious"]:
                make_cautious(scaled, [as_matrix(grads[index], params[index]) for index in indices])
            for index, move in zip(indices, scaled, strict=True):
                as_matrix(params[index], params[index]).sub_(move)

    def _row_squares(self, params: list[Tensor]) -> list[Tensor]:
        """Returns the averages [rows, 1] of the mean square of each row, initially zero."""
        for p in params:
            if "row_square" not in self.state[p]:
                self.state[p]["row_square"] = p.new_zeros(len(p), 1)
        return [self.state[p]["row_square"] for p in params]


def _selected(group: dict[str, Any], chosen: list[bool]) -> dict[str, Any]:
    """Returns the chosen parameters of a group, with their names, if any."""
    keys = {"params", "param_names"} & group.keys()
    return {key: list(compress(group[key], chosen)) for key in keys}


def _lr_factor(shape: Shape, adjust_lr_fn: str) -> float:
    """Adjusts the learning rate to a matrix's shape: as Jordan does, or so that updates have the RMS of AdamW's (Liu et
    al. 2025, "Muon is scalable for LLM training", section 2.2)."""
    rows, columns = shape
    return math.sqrt(max(1.0, rows / columns)) if adjust_lr_fn == "original" else 0.2 * math.sqrt(max(rows, columns))


def _muon_growth(group: Mapping[str, Any], shape: Shape, base: Shape) -> float:
    if not group["use_muon"]:  # AdamW
        return entrywise_growth(group, shape, base)
    now, before = (_lr_factor((each[0], math.prod(each[1:])), group["adjust_lr_fn"]) for each in (shape, base))
    return now / before


def _scion_growth(group: Mapping[str, Any], shape: Shape, base: Shape) -> float:
    if len(shape) > 1 and group["use_muon"]:
        return _scion_scale(shape) / _scion_scale(base)
    signs = entrywise_growth(group, shape, base)
    return signs * math.prod(base[1:]) / math.prod(shape[1:])


def _scion_scale(shape: Shape) -> float:
    return math.sqrt(shape[0] / shape[1]) / math.prod(shape[2:])


class Scion(RealOptimizer):
    """Stochastic conditional gradient over norm balls (Pethick et al. 2025, algorithms 1 and 2).

    d <- momentum * d + (1 - momentum) * g; theta <- (1 - lr) * theta - lr * radius * lmo(d) keeps the weights of each
    tensor in a ball of that radius; `constrained=False` (uSCG) leaves out the factor 1 - lr, which is the weight decay.

    lmo, by the number of dimensions: a matrix [out, in] takes the spectral norm: sqrt(out / in) * U V^T of d = U S V^T;
    a kernel [out, in, height, width] the same of [out, in * height * width], with sqrt(out / in) / (height * width);
    a vector d / RMS(d). Matrices in a group with `use_muon=False` (`rest: true`), as is advised for the last layer and
    for embeddings that share its weights, take the sign norm: sign(d) / in, with `rest_radius`.
    U V^T is computed by Newton-Schulz iterations, see `orthogonalize`. The paper initializes the
    weights on the balls; dlopt's `init` stays as it is.
    """

    # The radii: with `constrained`, lr also sets the decay.
    traits: ClassVar[OptimizerTraits] = replace(
        ELEMENTWISE, scope="tensor", step_size=StepSize(_scion_growth, ("radius", "rest_radius"))
    )

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.000244140625,
        momentum: Fraction = 0.9,
        radius: Positive = 50.0,
        rest_radius: Positive = 3000.0,
        constrained: bool = True,
        ns_coefficients: Coefficients = QUINTIC,
        ns_steps: Count = 5,
        eps: Positive = 1e-8,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "momentum": momentum, "radius": radius, "rest_radius": rest_radius}
        defaults |= {"constrained": constrained, "ns_coefficients": ns_coefficients, "ns_steps": ns_steps, "eps": eps}
        super().__init__(params, {**defaults, "use_muon": True})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, averages = float(group["lr"]), buffers(self, params, "momentum_buffer")
        torch._foreach_lerp_(averages, gradients(params), 1 - group["momentum"])
        if group["constrained"]:
            torch._foreach_mul_(params, 1 - lr)
        for p, average in zip(params, averages, strict=True):
            if p.ndim < 2:
                p.sub_(average / (average.square().mean().sqrt() + group["eps"]), alpha=lr * group["radius"])
            elif not group["use_muon"]:
                p.sub_(signs(average), alpha=lr * group["rest_radius"] * len(p) / p.numel())
            else:
                matrix = as_matrix(average, p).unsqueeze(0)
                move = orthogonalize(matrix, group["ns_coefficients"], group["ns_steps"], group["eps"])[0]
                as_matrix(p, p).sub_(move.to(p.dtype), alpha=lr * group["radius"] * _scion_scale(p.shape))
