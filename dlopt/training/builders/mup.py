"""muP: which weights grow with the width of a model, and their learning rates (Yang et al. 2022, "Tensor Programs V").

With these rates and `init=mup`, narrow and wide models have the same best learning rate. They follow from the
spectral condition (Yang, Simon & Bernstein 2023, arXiv 2310.17813): the spectral norm of a step is proportional to
sqrt(outputs / inputs). For m times the base width, it has to grow by 1 for hidden weights, 1 / sqrt(m) for output
weights and sqrt(m) for all others. The rate corrects what the step of the optimizer does not (`StepSize`):

                                   hidden      output      others
    Adam                           1 / m       1 / m       1           table 3 of Tensor Programs V
    SOAP                           1/sqrt(m)   1 / m       1           also with `orthogonalize`
    Shampoo                        1           1/sqrt(m)   sqrt(m)     eps: times inputs / outputs
    Distributed Shampoo            1 / m       1 / m       1           the length of Adam's step
    Muon                           1           1/sqrt(m)   sqrt(m)     divided by its factor of the shape
    Scion                          1           1           1           its radii for embeddings: m

Qiu et al. 2025 (arXiv 2512.05620) use the same rates, except that they give SOAP the rates of Shampoo: their SOAP
computes the eigenbasis from the gradient that it then rotates. Ours, like the authors', uses earlier gradients.
"""

from collections import Counter
from collections.abc import Mapping
from math import isclose, sqrt
from typing import Any

import torch
from torch import nn

from dlopt.basics.errors import UserError
from dlopt.config.schema import Component
from dlopt.init import WidthGrowth, weights
from dlopt.models.airbench import Divide
from dlopt.optim.traits import optimizer_traits
from dlopt.training.builders.model_check import build_on_meta

_WIDTH_KEYS = {"width": 1, "widths": 1, "widen": 16, "hidden": 1}  # features or channels of the first layer per unit


def width_growth(model: Component, runtime: dict[str, Any]) -> WidthGrowth:
    """Compares the shapes of the model's weights with a model of twice the width. `runtime`: arguments of its `build`.

    Raises `UserError` for a model without a key for its width, and for one that divides its outputs by the width, as
    table 3 does with the output weights.
    """
    key = next((key for key in _WIDTH_KEYS if model.arguments.get(key)), None)
    if key is None:
        raise UserError(
            f"init=mup: {model.choice} has no key for its width (width, widths, widen, hidden); "
            "use another init or another model"
        )
    width = model.arguments[key]
    doubled = [2 * each for each in width] if isinstance(width, list | tuple) else 2 * width
    narrow, wide = build_on_meta(model, runtime), build_on_meta(model.partial(**{key: doubled}), runtime)
    if any(isinstance(module, Divide) for module in narrow.modules()):
        raise UserError(
            f"init=mup: {model.choice} already divides its outputs by its width, so they would "
            "shrink with it; use another init or another model"
        )
    fans = {weight.name: (weight.fan_in, weight.fan_out) for weight in weights(wide)}
    growing = {weight.name: weight.fan_out for weight in weights(narrow) if fans[weight.name][0] != weight.fan_in}
    hidden = frozenset(name for name, fan_out in growing.items() if fans[name][1] != fan_out)
    shapes = {name: p.shape for name, p in wide.named_parameters()}
    dimensions = {
        name: tuple(i for i, (old, new) in enumerate(zip(p.shape, shapes[name], strict=True)) if old != new)
        for name, p in narrow.named_parameters()
    }
    first = width[0] if isinstance(width, list | tuple) else width
    return WidthGrowth(first * _WIDTH_KEYS[key], hidden, frozenset(growing) - hidden, dimensions)


def width_factors(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    growth: WidthGrowth,
    base_width: int,
    arguments: Mapping[str, Any],
    *,
    independent: bool = False,
    inverse: bool = False,
) -> dict[str, dict[str, float]]:
    """Returns the factors of the optimizer's keys, by parameter name and then by key; leaves out factors of 1.

    Divides the weight decay by the factor of the rate, so that the decay per update, lr * weight_decay, does not depend
    on the width (as the authors' package `mup` does). With `inverse`, the decay per update of hidden and output weights
    is divided by m, which Qiu et al. 2025 find close to the best for compute-optimal training.

    Args:
        optimizer: of the parameters of `module`, with the keys of the base width, or with these factors already.
        arguments: of the optimizer.
        independent: the decay of an update does not contain the learning rate (`decay=independent`).
        inverse: `decay.width=inverse`.

    Raises:
        UserError: the step size of the optimizer is not known.
    """
    traits, m = optimizer_traits(optimizer), growth.width / base_width
    if traits.step_size is None and not traits.normalizes_entries:
        raise UserError(
            f"init=mup: sets learning rates for Adam and its relatives, Muon, SOAP, Shampoo and Scion, not for "
            f"{type(optimizer).__name__} with these keys; use optimizer=adamw, adopt, lion, muon, dmuon, soap, "
            "shampoo, distributed_shampoo, scion, ..., without hyperball, or another init"
        )
    step = None if traits.normalizes_entries else traits.step_size  # None: table 3
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    factors: dict[str, dict[str, float]] = {}
    for name, p in module.named_parameters():
        if p not in groups:  # frozen
            continue
        is_weight = name in growth.hidden | growth.outputs
        inputs = m if is_weight else 1.0
        outputs = m if growth.dimensions.get(name) and name not in growth.outputs else 1.0
        factor = 1 / inputs
        if step is not None:
            base = tuple(n / m if i in growth.dimensions.get(name, ()) else n for i, n in enumerate(p.shape))
            factor = sqrt(outputs / inputs) / step.growth(groups[p], tuple(p.shape), base)
        found = dict.fromkeys(("lr",) if step is None else step.keys, factor)
        if "weight_decay" in arguments:
            kept = 1.0 if independent else 1 / found.get("lr", 1.0)
            found["weight_decay"] = kept / m if inverse and is_weight else kept
        if step is not None and step.damping is not None:
            found[step.damping] = inputs / outputs
        factors[name] = {key: value for key, value in found.items() if not isclose(value, 1.0)}
    return {name: found for name, found in factors.items() if found}


def describe_rates(module: nn.Module, optimizer: torch.optim.Optimizer, growth: WidthGrowth, base_width: int) -> str:
    """Returns a line about muP for the header of a run."""
    kinds: dict[tuple[str, float], Counter[str]] = {}
    for name, factors in width_factors(module, optimizer, growth, base_width, {}).items():
        kind = "hidden" if name in growth.hidden else "output" if name in growth.outputs else "other"
        for key, factor in factors.items():
            if key != "weight_decay":
                kinds.setdefault((key, round(factor, 6)), Counter())[kind] += 1
    parts = []
    for (key, factor), found in sorted(kinds.items()):
        what = " and ".join(sorted(found)) + (" parameter" if "other" in found else " weight")
        plural = "s" if found.total() > 1 else ""
        scaled = f"/ {1 / factor:g}" if factor < 1 else f"* {factor:g}"
        parts.append(f"optimizer.{key} {scaled} for {found.total()} {what}{plural}")
    described = ", ".join(parts) or "optimizer.lr for all parameters"
    return f"muP: {described} (width {growth.width}, init.base_width={base_width})"
