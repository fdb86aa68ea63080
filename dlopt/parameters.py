"""Parameter groups: which parameters are trained, how fast, and with how much decay."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from dlopt.errors import UserError
from dlopt.ranges import NonNegative, PositiveFraction

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What holds for the parameters whose name `match`es (a shell pattern: `head.*`, `*.bias`, `*`).

    `lr` and `weight_decay` are multipliers of the optimizer's own; `horizon` is the share of the run over which the
    schedule runs for them, after which they stay at its end; `rest` hands matrices to the method that an optimizer has
    for what is no matrix (`optimizer.rest`). null leaves a thing to the rules before.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    match: str
    lr: NonNegative | None = None
    weight_decay: NonNegative | None = None
    freeze: bool | None = None
    horizon: PositiveFraction | None = None
    rest: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """The keys that every optimizer has besides its own."""

    groups: list[Rule]
    layer_decay: PositiveFraction | None


def freeze(model: nn.Module, grouping: Grouping) -> None:
    """Parameters that are not to be trained ask for no gradients. Before a model is spread over processes: some modes
    wait for the gradients of all parameters that ask for them."""
    for name, parameter in model.named_parameters():
        said = [rule.freeze for rule in grouping.groups if rule.freeze is not None and fnmatchcase(name, rule.match)]
        if said:
            parameter.requires_grad_(not said[-1])


def parameter_groups(
    model: nn.Module, grouping: Grouping, arguments: Mapping[str, Any], *, decay_norm_and_bias: bool
) -> list[dict[str, Any]]:
    """The trainable parameters as groups for an optimizer with those `arguments`; parameters alike share a group.

    Rules apply in order, so that a later one wins. `layer_decay` d multiplies the learning rate of the i-th of n weight
    layers, counted from the input, by d^(n-1-i) (layer-wise decay; Howard & Ruder 2018, Clark et al. 2020).
    `decay_norm_and_bias=False` takes normalization parameters and biases out of weight decay, whatever the optimizer.
    Frozen parameters no longer ask for gradients. Raises `UserError` for rules that fit nothing.
    """
    rate, decay = _layer_rates(model, grouping.layer_decay), _decays(model, decay_norm_and_bias)
    names = dict(model.named_parameters())
    further: dict[str, dict[str, Any]] = {name: {} for name in names}  # keys of a parameter's group besides
    for number, rule in enumerate(grouping.groups):
        matched = [name for name in names if fnmatchcase(name, rule.match)]
        key = f"optimizer.groups.{number}"
        if not matched:
            some = ", ".join(list(names)[:3])
            raise UserError(f"{key}.match={rule.match}: no parameter has such a name; the model has {some}, ...")
        for name in matched:
            rate[name] *= 1.0 if rule.lr is None else rule.lr
            decay[name] *= 1.0 if rule.weight_decay is None else rule.weight_decay
            if rule.horizon is not None:
                further[name]["horizon"] = rule.horizon
            if rule.rest is not None:
                further[name]["use_muon"] = not rule.rest
        if rule.rest is not None and "rest" not in arguments:
            raise UserError(f"{key}.rest={str(rule.rest).lower()}: this optimizer has one method for all; use muon")
    freeze(model, grouping)
    trainable = {name: p for name, p in names.items() if p.requires_grad}
    if not trainable:
        raise UserError("optimizer.groups: every parameter is frozen; leave some to train")
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in trainable.items():
        kind = rate[name], decay[name], *further[name].items()
        group = groups.setdefault(kind, {"params": [], **_scaled(arguments, rate[name], decay[name]), **further[name]})
        group["params"].append(parameter)
    return list(groups.values())


def _scaled(arguments: Mapping[str, Any], rate: float, decay: float) -> dict[str, Any]:
    scaled: dict[str, Any] = {}
    for name, factor in (("lr", rate), ("weight_decay", decay)):
        if factor == 1.0:
            continue
        if name in arguments:
            scaled[name] = arguments[name] * factor
        elif name == "lr" or factor != 0.0:
            raise UserError(f"optimizer.groups: this optimizer has no {name} to multiply by {factor:g}")
    return scaled


def _decays(model: nn.Module, decay_norm_and_bias: bool) -> dict[str, float]:
    norms = {p for module in model.modules() if isinstance(module, _NORMS) for p in module.parameters(recurse=False)}
    decays = {}
    for name, parameter in model.named_parameters():
        exempt = parameter in norms or name.rpartition(".")[2].startswith("bias")
        decays[name] = 0.0 if exempt and not decay_norm_and_bias else 1.0
    return decays


def _layer_rates(model: nn.Module, layer_decay: float | None) -> dict[str, float]:
    """Each weight (of two dimensions or more) begins a layer; what follows it, such as its norm, belongs to it."""
    layer, layers = -1, {}
    for name, parameter in model.named_parameters():
        layer += parameter.ndim > 1
        layers[name] = max(layer, 0)
    decay = 1.0 if layer_decay is None else layer_decay
    return {name: decay ** (max(layer, 0) - depth) for name, depth in layers.items()}
