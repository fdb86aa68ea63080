"""Reads the weights for `init_from`: of checkpoints, and of files as other tools save them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlopt.adapt import without_adapters
from dlopt.errors import UserError
from dlopt.files import reason
from dlopt.models.foreign import differences, fold_biases, translations
from dlopt.training.checkpoint import evaluated_weights, load

# Keys under which training scripts nest the weights; as in timm, averaged weights come first.
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net", "weights", "params")
_PREFIXES = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile, Lightning


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads weights by name: of a checkpoint (the EMA, if any), a state dict (possibly nested), or safetensors.

    Raises `UserError` if there are none. Nothing but tensors and plain values is unpickled.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"init_from={path}: no such file") from None
    except ImportError:
        raise UserError(f"init_from={path}: needs safetensors: pip install 'dlopt[export]'") from None
    except Exception as error:
        raise UserError(f"init_from={path}: cannot be loaded as weights: {reason(error)}") from None
    if isinstance(state, Mapping) and {"format", "model", "progress"} <= state.keys():
        return evaluated_weights(load(path))  # again, to verify the checksum and to load shards
    if (weights := _find(state)) is not None:
        return weights
    keys = f" (its keys: {', '.join(map(str, list(state)[:5]))})" if isinstance(state, Mapping) else ""
    raise UserError(f"init_from={path}: contains no weights by name (a dict of tensors){keys}")


def _find(state: Any) -> dict[str, Tensor] | None:
    """Returns the dict of tensors in `state`, or nested in it under one of the usual keys."""
    if not isinstance(state, Mapping):
        return None
    if state and all(isinstance(value, Tensor) for value in state.values()):
        return dict(state)
    nested = (_find(state.get(key)) for key in _NESTED)
    return next((weights for weights in nested if weights is not None), None)


@dataclass(frozen=True)
class Match:
    """The weights of a file that fit a model, by the model's names, and lines that describe the match."""

    weights: dict[str, Tensor]
    missing: list[str]  # parameters and buffers of the model that the file lacks, except batch norm's counters
    lines: list[str]


def match_weights(path: Path, module: nn.Module) -> Match:
    """Reads a file of weights and matches them to the model by name and shape.

    Removes the prefixes of wrappers, and translates the names of torchvision, timm and others where the architecture is
    the same. Raises `UserError` if no parameter matches.
    """
    current = {name: value.shape for name, value in without_adapters(module.state_dict()).items()}
    saved, notes = strip_prefixes(read_weights(path), current)
    saved, origin = _translate(saved, current)
    matching = {name: value for name, value in saved.items() if current.get(name) == value.shape}
    if not any(name in matching for name, _ in module.named_parameters()):
        raise UserError(
            f"init_from={path}: none of its {len(saved)} weights matches this model by name and shape; weights of "
            "torchvision or timm also fit model=torchvision or model=timm with their model.name"
        )
    notes += [f"from the names of {origin}"] if origin else []
    note = f" ({'; '.join(notes)})" if notes else ""
    # PyTorch counts batches since version 0.4.1; older files have no counts, which do not change the outputs.
    missing = [name for name in current if name not in matching and not name.endswith("num_batches_tracked")]
    lines = [f"weights from {path}: {len(matching)} of {len(matching) + len(missing)} tensors loaded{note}"]
    if missing:
        sizes = {name: "x".join(map(str, tensor.shape)) or "one number" for name, tensor in saved.items()}
        shown = [f"{name} ({sizes[name]} in the file)" if name in saved else name for name in missing]
        lines.append(f"  missing or with another shape, newly initialized: {', '.join(shown)}")
    if unused := [name for name in saved if name not in current]:
        lines.append(f"  not used: {', '.join(unused)}")
    if origin:
        lines += [f"  {line}" for line in differences(module)]
    return Match(matching, missing, lines)


def strip_prefixes(weights: dict[str, Tensor], names: Collection[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Removes the prefixes that wrappers add to all names, as long as more of the model's `names` match.

    Of a file that `dlopt export` wrote, takes the model without its normalization. Returns the weights and notes.
    """
    notes = []
    exported = {name: value for name, value in weights.items() if not name.startswith("normalize.")}
    if len(exported) < len(weights) and all(name.startswith("model.") for name in exported):
        weights = exported
        notes.append("without its normalization: this run has its own")
    removed = ""
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in weights)), None):
        stripped = {name.removeprefix(prefix): value for name, value in weights.items()}
        if not weights or len(stripped.keys() & set(names)) < len(weights.keys() & set(names)):
            break
        weights, removed = stripped, removed + prefix
    if removed:
        notes.append(f"without the prefix {removed} of their names")
    return weights, notes


def _translate(weights: dict[str, Tensor], shapes: Mapping[str, torch.Size]) -> tuple[dict[str, Tensor], str]:
    """Returns the weights under the names that fit `shapes` best, and the origin of these names if it is foreign."""

    def fitting(named: Mapping[str, Tensor]) -> int:
        return sum(shapes.get(name) == value.shape for name, value in named.items())

    best, best_origin = weights, ""
    for origin, names in translations(weights):
        translated = {names[name]: _flattened(value, shapes.get(names[name])) for name, value in weights.items()}
        if fitting(translated) > fitting(best):
            best, best_origin = translated, origin
    return (fold_biases(best, shapes) if best_origin else best), best_origin


def _flattened(weight: Tensor, shape: torch.Size | None) -> Tensor:
    """Returns a convolution over a whole map [O, I, H, W] as the linear layer [O, I * H * W] of `shape`."""
    is_linear = shape is not None and len(shape) == 2 and weight.ndim == 4 and weight.numel() == shape.numel()
    return weight.flatten(1) if is_linear else weight
