"""Adapters for fine-tuning: callables (model, generator) that change a model in place. Config group `adapt`.

Parameters of the model keep their names. `merged` adds adapters to the weights of their layers: a model that is loaded,
exported or trained further has no adapters.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Self

import torch
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Count, Fraction, Positive
from dlopt.models.linear import Linear
from dlopt.optim.parameters import ADAPTERS

_A, _B = ADAPTERS
_SCALE = "lora_scale"
_SHOWN = 4  # names in an error message


class LoRALinear(Linear):
    """W x + b + alpha / r * B A x on [..., inputs], with frozen W and b (Hu et al. 2021, equation 3).

    A [r, inputs] is normal with variance 1 / inputs. B [outputs, r] is zero, so that the initial outputs equal those of
    the layer without an adapter. alpha / r is in float64 (MPS has none: in float32), whatever the dtype of the layer.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_scale: Tensor
    _base: Callable[..., Tensor]
    dropout: nn.Module | None

    @classmethod
    def adapt(cls, layer: nn.Linear, rank: int, alpha: float, dropout: float, generator: torch.Generator) -> None:
        """Changes the class of `layer`, in place: its hooks, and references to it outside of modules, remain valid."""
        base, weight = type(layer).forward, layer.weight
        layer.__class__ = cls
        assert isinstance(layer, cls)
        layer._base = base  # of nn.Linear or Linear, whose products differ by rounding
        a = torch.randn(rank, layer.in_features, generator=generator) / math.sqrt(layer.in_features)
        layer.lora_a = nn.Parameter(a.to(weight))
        layer.lora_b = nn.Parameter(weight.new_zeros(layer.out_features, rank))
        layer.register_buffer(_SCALE, _exact(torch.tensor(alpha / rank, dtype=torch.float64), weight.device))
        # None instead of a dropout of zero: a layer without children counts as one layer in diagnostics.
        layer.dropout = nn.Dropout(dropout) if dropout > 0 else None

    def forward(self, input: Tensor) -> Tensor:
        kept = input if self.dropout is None else self.dropout(input)
        low_rank = nn.functional.linear(kept, self.lora_a) * self.lora_scale
        outputs: Tensor = self._base(self, input) + nn.functional.linear(low_rank, self.lora_b)
        return outputs

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scale = self.lora_scale
        super()._apply(fn, recurse)
        self.lora_scale = _exact(scale, self.lora_scale.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={len(self.lora_a)}"


def _exact(scale: Tensor, device: torch.device) -> Tensor:
    return scale.to(device, torch.float32 if device.type == "mps" else torch.float64)


def none(*, model: nn.Module) -> None:
    """Adds no adapters."""


def lora(
    *,
    model: nn.Module,
    generator: torch.Generator,
    rank: Count,
    alpha: Positive,
    dropout: Fraction,
    targets: list[str],
    train: list[str],
) -> None:
    """Freezes `model` and makes linear layers `LoRALinear`: those that match `targets`, except those in `train`.

    Parameters that match `train` stay trainable. A pattern matches a layer or parameter and everything within it.
    Leaves out layers whose weight another layer uses as well (tied embeddings), and subclasses of torch's layer, whose
    weight may be read without a call. Rules of `optimizer.groups` may freeze or unfreeze parameters afterwards.

    Raises `UserError` for a pattern without a match.
    """
    # Also of a layer that has several names.
    modules = (module for _, module in model.named_modules(remove_duplicate=False))
    uses = Counter(id(parameter) for module in modules for parameter in module._parameters.values())
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Linear) and uses[id(module.weight)] == 1
    }
    parameters = dict(model.named_parameters())
    _check("targets", targets, layers, "linear layer with weights of its own")
    _check("train", train, parameters, "parameter")
    chosen = {n: layer for n, layer in layers.items() if _matches(n, targets) and not _matches(f"{n}.weight", train)}
    if not chosen:
        shown = "[" + ",".join(targets) + "]"
        raise UserError(f"adapt.targets={shown}: no layer to adapt is left; choose layers that are not in adapt.train")
    for name, parameter in parameters.items():
        parameter.requires_grad_(_matches(name, train))
    for layer in chosen.values():
        LoRALinear.adapt(layer, rank, alpha, dropout, generator)
    _avoid_fused_kernels(model)


def _avoid_fused_kernels(model: nn.Module) -> None:
    """Makes torch's transformer encoders call their adapted layers in evaluation, too.

    Without gradients their fused kernels read the weights. Sets what torch itself sets where it has no such kernel.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and adapted_layers(module):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and adapted_layers(module):
            module.use_nested_tensor = False


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in patterns)


def _check(key: str, patterns: Sequence[str], allowed: Mapping[str, object], what: str) -> None:
    """Raises `UserError` for a pattern that matches none of the `allowed` names."""
    for pattern in patterns:
        if not any(_matches(name, [pattern]) for name in allowed):
            names = ", ".join(list(allowed)[:_SHOWN]) or "none"
            more = ", ..." if len(allowed) > _SHOWN else ""
            raise UserError(f"adapt.{key}=[{pattern}]: matches no {what}; the model has {names}{more}")


def adapted_layers(model: nn.Module) -> list[LoRALinear]:
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def describe(model: nn.Module) -> str | None:
    """Returns a line for the header of a run: adapted layers and trainable parameters; None without adapters."""
    layers = adapted_layers(model)
    if not layers:
        return None
    parameters = list(model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    rank, count = len(layers[0].lora_a), f"{len(layers)} linear layer{'s' if len(layers) > 1 else ''}"
    return f"LoRA of rank {rank} in {count}: trains {trainable:,} of {total:,} parameters ({trainable / total:.2%})"


def without_adapters(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights except the tensors of adapters."""
    return {name: value for name, value in weights.items() if name.rpartition(".")[2] not in (_A, _B, _SCALE)}


def has_adapters(weights: Mapping[str, Tensor]) -> bool:
    """Returns whether the weights are of a model with adapters that are not merged."""
    return any(name.rpartition(".")[2] == _SCALE for name in weights)


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of the model without adapters: W + alpha / r * B A, computed in float64.

    Their dtype is that of W, but at least float32: bf16 would round a small update.
    """
    result = without_adapters(weights)
    for name in weights.keys() - result.keys():
        prefix = name.removesuffix(_A)
        if prefix == name:
            continue
        a, b, scale = (weights[f"{prefix}{part}"].double() for part in (_A, _B, _SCALE))
        key = f"{prefix}weight"
        dtype = torch.promote_types(weights[key].dtype, torch.float32)
        result[key] = (weights[key].double() + scale * (b @ a)).to(dtype)
    return result
