"""Parameter groups: frozen parameters, learning rates and weight decay per group."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dlopt.errors import UserError
from dlopt.ranges import NonNegative, PositiveFraction

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
ADAPTERS = ("lora_a", "lora_b")  # names of the matrices of an adapter, which belong to the layer of the weight
_WITHOUT_DECAY = (*NORMS, nn.Embedding)


def real_views(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns the tensors, complex ones as views of their real and imaginary parts: [..., 2]."""
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Settings for the parameters whose name `match`es (a shell pattern: `head.*`, `*.bias`, `*`).

    `lr` and `weight_decay` multiply those of the optimizer; `horizon` is the fraction of the run over which the
    schedule runs for these parameters, whose learning rate then stays at its final value; `rest` updates matrices with
    the optimizer's method for other parameters (`optimizer.rest`). null: keep the value of earlier rules.
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
    """The keys that all optimizers have in common."""

    groups: list[Rule]
    layer_decay: PositiveFraction | None
    state_dtype: Literal["bf16"] | None = None  # absent in older configs; see `dlopt.training.state_dtype`


def freeze(model: nn.Module, grouping: Grouping) -> None:
    """Sets `requires_grad` by the rules. Call before parallelizing the model: DDP waits for all required gradients."""
    for name, parameter in model.named_parameters():
        flags = [rule.freeze for rule in grouping.groups if rule.freeze is not None and fnmatchcase(name, rule.match)]
        if flags:
            parameter.requires_grad_(not flags[-1])


def parameter_groups(
    model: nn.Module, grouping: Grouping, arguments: Mapping[str, Any], *, decay_norm_and_bias: bool
) -> list[dict[str, Any]]:
    """Groups the trainable parameters for an optimizer with these `arguments`; equal settings share a group.

    Rules apply in order: multipliers accumulate, later rules override other settings. `layer_decay` d multiplies the
    learning rate of the i-th of n weight layers, counted from the input, by d^(n-1-i) (layer-wise decay; Howard & Ruder
    2018, Clark et al. 2020). `decay_norm_and_bias=False` excludes normalization parameters, biases and embeddings
    (also where the output layer uses their weights) from decay, for every optimizer. Frozen parameters do not require
    gradients. Raises `UserError` for rules without effect.
    """
    rate, decay = _layer_rates(model, grouping.layer_decay), _decays(model, decay_norm_and_bias)
    names = dict(model.named_parameters())
    extra: dict[str, dict[str, Any]] = {name: {} for name in names}  # other keys of a parameter's group
    for number, rule in enumerate(grouping.groups):
        matched = [name for name in names if fnmatchcase(name, rule.match)]
        key = f"optimizer.groups.{number}"
        if not matched:
            examples = ", ".join(list(names)[:3])
            raise UserError(f"{key}.match={rule.match}: matches no parameter; the model has {examples}, ...")
        for name in matched:
            rate[name] *= 1.0 if rule.lr is None else rule.lr
            decay[name] *= 1.0 if rule.weight_decay is None else rule.weight_decay
            if rule.horizon is not None:
                extra[name]["horizon"] = rule.horizon
            if rule.rest is not None:
                extra[name]["use_muon"] = not rule.rest
        if rule.rest is not None and not {"rest", "rest_radius"} & set(arguments):
            flag = str(rule.rest).lower()
            raise UserError(f"{key}.rest={flag}: this optimizer has a single method for matrices; use muon or scion")
    freeze(model, grouping)
    trainable = {name: p for name, p in names.items() if p.requires_grad}
    if not trainable:
        raise UserError("optimizer.groups: all parameters are frozen; exclude some from freeze")
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in trainable.items():
        kind = rate[name], decay[name], *extra[name].items()
        group = groups.setdefault(kind, {"params": [], **_scaled(arguments, rate[name], decay[name]), **extra[name]})
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
    layers = [module for module in model.modules() if isinstance(module, _WITHOUT_DECAY)]
    without_decay = {parameter for layer in layers for parameter in layer.parameters(recurse=False)}
    decays = {}
    for name, parameter in model.named_parameters():
        exempt = parameter in without_decay or "bias" in name.rpartition(".")[2]
        decays[name] = 0.0 if exempt and not decay_norm_and_bias else 1.0
    return decays


def _layer_rates(model: nn.Module, layer_decay: float | None) -> dict[str, float]:
    """Returns multipliers by name. A weight of two or more dimensions starts a layer, with its bias and norm."""
    layer, layers = -1, {}
    for name, parameter in model.named_parameters():
        layer += parameter.ndim > 1 and name.rpartition(".")[2] not in ADAPTERS
        layers[name] = max(layer, 0)
    decay = 1.0 if layer_decay is None else layer_decay
    return {name: decay ** (max(layer, 0) - depth) for name, depth in layers.items()}
