"""muP: which weights grow with the width of a model, and their learning rates (Yang et al. 2022, "Tensor Programs V").

With these rates and `init=mup`, the best learning rate of a narrow model is that of a wide one.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from dlopt.basics.errors import UserError
from dlopt.config.schema import Component
from dlopt.init import WidthGrowth, weights
from dlopt.models.airbench import Divide
from dlopt.optim.parameters import Grouping, Rule
from dlopt.optim.traits import optimizer_traits
from dlopt.training.builders.model_check import build_on_meta

_WIDTH_KEYS = {"width": 1, "widths": 1, "widen": 16, "hidden": 1}  # features or channels of the first layer per unit


def width_growth(model: Component, runtime: dict[str, Any]) -> WidthGrowth:
    """Compares the shapes of the model's weights with those of a model of twice the width.

    `runtime`: the arguments of `model.build`. Raises `UserError` for a model without a key for its width, and for one
    that divides its outputs by the width, as table 3 does with the output weights.
    """
    key = next((key for key in _WIDTH_KEYS if model.arguments.get(key)), None)
    if key is None:
        raise UserError(
            f"init=mup: {model.choice} has no key for its width (width, widths, widen, hidden); "
            "use another init or another model"
        )
    width = model.arguments[key]
    doubled = [2 * each for each in width] if isinstance(width, list | tuple) else 2 * width
    wide = {weight.name: weight for weight in weights(build_on_meta(model.partial(**{key: doubled}), runtime))}
    narrow = build_on_meta(model, runtime)
    if any(isinstance(module, Divide) for module in narrow.modules()):
        raise UserError(
            f"init=mup: {model.choice} already divides its outputs by its width, so they would "
            "shrink with it; use another init or another model"
        )
    hidden: set[str] = set()
    outputs: set[str] = set()
    for weight in weights(narrow):
        if wide[weight.name].fan_in != weight.fan_in:
            is_hidden = wide[weight.name].fan_out != weight.fan_out
            (hidden if is_hidden else outputs).add(weight.name)
    first = width[0] if isinstance(width, list | tuple) else width
    return WidthGrowth(first * _WIDTH_KEYS[key], frozenset(hidden), frozenset(outputs))


def with_rates(
    grouping: Grouping,
    growth: WidthGrowth,
    base_width: int,
    arguments: Mapping[str, Any],
    *,
    independent: bool = False,
    inverse: bool = False,
) -> Grouping:
    """Adds a rule for each hidden and output weight: lr / m with m = width / base_width (table 3, row "Adam LR").

    Multiplies the weight decay by m, so that the decay per update, lr * weight_decay, does not depend on the width (as
    the authors' package `mup` does). With `inverse` the decay per update is 1 / m of that at the base width, which Qiu
    et al. 2025 (arXiv 2512.05620) find close to the best for compute-optimal training.

    Args:
        arguments: of the optimizer.
        independent: the decay of an update is that of `decay=independent`, without the rate.
        inverse: `decay.width=inverse`.
    """
    m = growth.width / base_width
    if m == 1:
        return grouping
    factor = (1.0 if independent else m) / (m if inverse else 1.0)
    decay = factor if "weight_decay" in arguments else None
    rules = [Rule(match=name, lr=1 / m, weight_decay=decay) for name in sorted(growth.hidden | growth.outputs)]
    return replace(grouping, groups=[*grouping.groups, *rules])


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raises `UserError` for an optimizer for which table 3's rates of Adam are not defined."""
    if not optimizer_traits(optimizer).normalizes_entries:
        raise UserError(
            f"init=mup: sets learning rates for Adam and its relatives, not for {type(optimizer).__name__}; "
            "use optimizer=adamw, adopt, ademamix, lion, ..., or another init"
        )


def describe_rates(growth: WidthGrowth, base_width: int) -> str:
    """Returns a line for the header of a run."""
    m = growth.width / base_width
    scaled = f"optimizer.lr / {m:g}" if m >= 1 else f"optimizer.lr * {1 / m:g}"
    count = len(growth.hidden | growth.outputs)
    return f"muP: {scaled} for {count} hidden and output weights (width {growth.width}, init.base_width={base_width})"
