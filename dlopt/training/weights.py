"""Reads the weights for `init_from`: of checkpoints, and of files as other tools save them."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlopt.errors import UserError
from dlopt.files import reason
from dlopt.training.checkpoint import load

# Keys under which training scripts nest the weights; as in timm, averaged weights come first.
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net", "weights", "params")
_PREFIXES = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile, Lightning


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads weights by name: of a checkpoint (the EMA, if any), a state dict (possibly nested), or safetensors.

    Raises `UserError` if there are none. Nothing but tensors and plain values is unpickled.
    """
    if not path.is_file():
        raise UserError(f"init_from={path}: no such file")
    try:
        state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"init_from={path}: cannot be loaded as weights: {reason(error)}") from None
    if isinstance(state, Mapping) and "format" in state:
        state = load(path)  # again, to verify the checksum and to load shards
        return dict(state["ema"] or state["model"])
    if (weights := _find(state)) is not None:
        return weights
    keys = f" (its keys: {', '.join(map(str, list(state)[:5]))})" if isinstance(state, Mapping) else ""
    raise UserError(f"init_from={path}: contains no weights by name (a dict of tensors){keys}")


def _read_torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"init_from={path}: needs safetensors: pip install 'dlopt[export]'") from None
    return load_file(path)


def _find(state: Any) -> dict[str, Tensor] | None:
    """Returns the dict of tensors in `state`, or nested in it under one of the usual keys."""
    if not isinstance(state, Mapping):
        return None
    if state and all(isinstance(value, Tensor) for value in state.values()):
        return dict(state)
    nested = (_find(state.get(key)) for key in _NESTED)
    return next((weights for weights in nested if weights is not None), None)


def strip_prefixes(weights: dict[str, Tensor], names: Collection[str]) -> tuple[dict[str, Tensor], str]:
    """Removes the prefixes that wrappers add to all names, as long as more of the model's `names` match.

    Returns the weights and the removed prefix.
    """
    removed = ""
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in weights)), None):
        stripped = {name.removeprefix(prefix): value for name, value in weights.items()}
        if not weights or len(stripped.keys() & set(names)) < len(weights.keys() & set(names)):
            break
        weights, removed = stripped, removed + prefix
    return weights, removed
