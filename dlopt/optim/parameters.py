"""Parameter groups: frozen parameters, learning rates and weight decay per group."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dlopt.basics.errors import UserError
from dlopt.basics.plain_values import is_below
from dlopt.basics.ranges import NonNegative, PositiveFraction

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
ADAPTERS = ("lora_a", "lora_b")  # names of the matrices of an adapter, which belong to the layer of the weight
_METHODS_FOR_MATRICES = ("rest", "rest_radius", "hyperball", "orthogonalize")  # keys of optimizers that have two
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


_CHANGES_NOTHING = "all parameters that it matches are frozen; it changes nothing"


def freeze(model: nn.Module, grouping: Grouping) -> list[str]:
    """Sets `requires_grad` by the rules. Call before parallelizing the model: DDP waits for all required gradients.

    Returns a line for each rule that freezes frozen parameters only, such as those beside adapters.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        flags = [rule.freeze for rule in grouping.groups if rule.freeze is not None and fnmatchcase(name, rule.match)]
        if flags:
            parameter.requires_grad_(not flags[-1])
    return [line for rule, line in _idle(grouping, trained) if rule.freeze]


def idle_rules(model: nn.Module, grouping: Grouping) -> list[str]:
    """Returns a line for each rule that sets something else of frozen parameters only."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return [line for rule, line in _idle(grouping, trained) if rule.freeze is None]


def _idle(grouping: Grouping, trained: Iterable[str]) -> Iterator[tuple[Rule, str]]:
    """Yields the rules that match no trained parameter, with what to say about them."""
    for number, rule in enumerate(grouping.groups):
        if not any(fnmatchcase(name, rule.match) for name in trained):
            yield rule, f"optimizer.groups.{number}.match={rule.match}: {_CHANGES_NOTHING}"


def parameter_groups(
    model: nn.Module,
    grouping: Grouping,
    arguments: Mapping[str, Any],
    *,
    decay_norm_and_bias: bool,
    normalized: Collection[str] = (),
    uses: Sequence[str] | None = None,
    factors: Mapping[str, Mapping[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """Groups the trainable parameters for an optimizer with these `arguments`; equal settings share a group.

    Rules apply in order: multipliers accumulate, later rules override other settings. `layer_decay` d multiplies the
    learning rate of the i-th of n layers, counted from the input, by d^(n-1-i) (layer-wise decay; Howard & Ruder 2018,
    Clark et al. 2020); see `_layers`. `uses` is the order in which the model computes (`dlopt.models.order`), None that
    of registration. `decay_norm_and_bias=False` excludes parameters from decay, for every optimizer; see `_decays`.
    Groups of the names `normalized` are marked by a key. `factors`, by name and then by key, multiply `arguments`.
    Frozen parameters do not require gradients. Raises `UserError` for rules without effect.
    """
    rate, decay = _layer_rates(model, grouping.layer_decay, uses), _decays(model, decay_norm_and_bias)
    names = dict(model.named_parameters())
    # other keys of a parameter's group
    extra: dict[str, dict[str, Any]] = {name: {"normalized": True} if name in normalized else {} for name in names}
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
        if rule.rest is not None and not any(arguments.get(name) for name in _METHODS_FOR_MATRICES):
            flag = str(rule.rest).lower()
            raise UserError(
                f"{key}.rest={flag}: this optimizer has a single method for matrices; use muon or scion, or one with "
                "optimizer.hyperball=true"
            )
    freeze(model, grouping)
    trainable = {name: p for name, p in names.items() if p.requires_grad}
    if not trainable:
        raise UserError("optimizer.groups: all parameters are frozen; exclude some from freeze")
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in trainable.items():
        scales = {"lr": rate[name], "weight_decay": decay[name]}
        for key, factor in (factors or {}).get(name, {}).items():
            scales[key] = scales.get(key, 1.0) * factor
        kind = *scales.items(), *extra[name].items()
        group = groups.setdefault(kind, {"params": [], **_scaled(arguments, scales), **extra[name]})
        group["params"].append(parameter)
    return list(groups.values())


def _scaled(arguments: Mapping[str, Any], scales: Mapping[str, float]) -> dict[str, Any]:
    scaled: dict[str, Any] = {}
    for name, factor in scales.items():
        if factor == 1.0:
            continue
        if name in arguments:
            scaled[name] = arguments[name] * factor
        elif name == "lr" or factor != 0.0:
            raise UserError(
                f"optimizer.groups: this optimizer has no {name} to multiply by {factor:g}; if its class has one, set "
                f"optimizer.{name}"
            )
    return scaled


def _decays(model: nn.Module, decay_norm_and_bias: bool) -> dict[str, float]:
    """Returns multipliers of the decay by name.

    The rule is timm's (`param_groups_weight_decay`): no decay for parameters of at most one dimension (biases, gains of
    norms of any package, scalars, `gamma` of LayerScale, slopes of PReLU), and none for those that the model, or a part
    of it, lists by `no_weight_decay()` (names or patterns). Nor for the parameters of norm layers and of embeddings:
    tokens and positions of a GPT, also where the output layer uses their weights, as in minGPT; nanoGPT and Hugging
    Face's trainer decay these. In models without a list, neither biases, positions and class tokens by their usual
    names, nor vectors in a shape that broadcasts ([1, 1, 1, C] of a global response norm) decay.
    """
    names = dict(model.named_parameters())
    if decay_norm_and_bias:
        return dict.fromkeys(names, 1.0)
    exempt = {p for module in model.modules() if isinstance(module, _WITHOUT_DECAY) for p in module.parameters(False)}
    lists = _no_decay_lists(model)
    decays = {}
    for name, parameter in names.items():
        own = [(prefix, patterns) for prefix, patterns in lists.items() if name.startswith(prefix)]
        is_listed = any(fnmatchcase(name, f"{prefix}{pattern}") for prefix, patterns in own for pattern in patterns)
        is_named = not own and is_usually_exempt(model, name, parameter)
        is_bias = "bias" in name.rpartition(".")[2]
        is_exempt = parameter.ndim <= 1 or is_bias or parameter in exempt or is_listed or is_named
        decays[name] = 0.0 if is_exempt else 1.0
    return decays


def _no_decay_lists(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Returns the lists of `no_weight_decay` by module prefix; a list applies to the module and its submodules."""
    lists: dict[str, tuple[str, ...]] = {}
    for path, module in model.named_modules():
        listed, prefix = getattr(module, "no_weight_decay", None), f"{path}." if path else ""
        if listed is not None and not any(prefix.startswith(other) for other in lists):
            lists[prefix] = tuple(map(str, (listed() if callable(listed) else listed) or ()))
    return lists


def registration_order(model: nn.Module) -> list[str]:
    """Returns the paths of modules, each before the names of its parameters, in the order of registration."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        each for path, module in model.named_modules() for each in (path, *map(names.get, module.parameters(False)))
    ]


def normalized_weights(model: nn.Module, uses: Sequence[str] | None = None) -> set[str]:
    """Returns the trainable matrices and kernels that a normalization layer follows.

    Not embeddings: neither tokens, positions nor class tokens. `uses`: see `parameter_groups`.
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    exempt = {p for module in modules.values() if isinstance(module, _WITHOUT_DECAY) for p in module.parameters(False)}
    found: set[str] = set()
    waiting: list[str] = []  # for a normalization layer
    for name in registration_order(model) if uses is None else uses:
        if isinstance(modules.get(name), NORMS):
            found.update(waiting)
            waiting.clear()
        elif (p := parameters.get(name)) is not None and p.requires_grad and p.ndim > 1 and p not in exempt:
            waiting += [name] if "weight" in name.rpartition(".")[2] else []
    return found


_POSITIONS_AND_TOKENS = (
    "pos_embed", "pos_embedding", "position_embedding", "position_embeddings", "positional_embedding", "positions",
    "cls_token", "class_token", "class_embedding", "dist_token", "mask_token", "reg_token", "register_tokens",
)  # fmt: skip
_MATRICES = (nn.Linear, nn.modules.conv._ConvNd)


def is_usually_exempt(model: nn.Module, name: str, parameter: Tensor) -> bool:
    """Returns whether the name or the shape is that of positions, a token or a vector, not of a layer's matrix."""
    path, _, last = name.rpartition(".")
    if last in _POSITIONS_AND_TOKENS:
        return True
    is_vector = parameter.ndim > 2 and parameter.numel() == max(parameter.shape)
    return is_vector and not isinstance(model.get_submodule(path), _MATRICES)


def _layer_rates(model: nn.Module, layer_decay: float | None, uses: Sequence[str] | None) -> dict[str, float]:
    """Returns multipliers of the learning rate by name."""
    if layer_decay is None:
        return {name: 1.0 for name, _ in model.named_parameters()}
    layers = _layers(model, uses)
    last = max(layers.values())
    return {name: layer_decay ** (last - layer) for name, layer in layers.items()}


def _layers(model: nn.Module, uses: Sequence[str] | None) -> dict[str, int]:
    """Returns the layer of each parameter, from 0 at the input.

    Models with a `group_matcher`, such as timm's, have the layers of timm's `param_groups_layer_decay`, as in BEiT
    and MAE. Otherwise a weight of two or more dimensions starts a layer, with its bias and norm, and a module with
    `is_one_layer` is one layer: patches, positions and class token, a block of a transformer, a recurrent layer.
    """
    if has_own_layers(model):
        from timm.models import group_parameters

        matcher: Any = model.group_matcher
        layers: dict[str, int] = group_parameters(model, matcher(coarse=False), reverse=True)
        last = max(layers.values(), default=0)
        return {name: layers.get(name, last) for name, _ in model.named_parameters()}
    units = [prefix for prefix, module in model.named_modules() if getattr(module, "is_one_layer", False)]
    numbers: dict[str, int] = {}  # of the units
    layer, found = -1, dict.fromkeys((name for name, _ in model.named_parameters()), 0)
    for name in in_order(model, uses):
        owner = next((prefix for prefix in units if is_below(name, (prefix,))), "")
        if owner:
            layer += owner not in numbers
            found[name] = numbers.setdefault(owner, layer)
        else:
            is_matrix = model.get_parameter(name).ndim > 1 and name.rpartition(".")[2] not in ADAPTERS
            layer += is_matrix
            found[name] = max(layer, 0)
    return found


def has_own_layers(model: nn.Module) -> bool:
    """Returns whether the model itself groups its parameters by layer, as timm's models do."""
    return hasattr(model, "group_matcher") and find_spec("timm") is not None


def in_order(model: nn.Module, uses: Sequence[str] | None) -> list[str]:
    """Returns the names of the parameters in the order of their first use.

    A parameter that no function of torch takes (weights of recurrent layers) is where its module is called. Unused ones
    and adapters follow the parameter that is registered before them.
    """
    names = [name for name, _ in model.named_parameters()]
    if uses is None:
        return names
    first: dict[str, int] = {}
    for number, each in enumerate(uses):
        first.setdefault(each, number)
    ranks, latest = dict[str, int](), -1
    for name in names:
        path, _, last = name.rpartition(".")
        if last not in ADAPTERS:
            latest = first.get(name, first.get(path, latest))
        ranks[name] = latest
    return sorted(names, key=lambda name: ranks[name])  # stable


def unused_parameters(model: nn.Module, uses: Sequence[str]) -> list[str]:
    """Returns the names of the trainable parameters that are not used, and whose module is not called."""
    known = set(uses)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    return [name for name in trainable if not {name, name.rpartition(".")[0]} & known]
