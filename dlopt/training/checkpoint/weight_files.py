"""Reads weights by name from checkpoints and from files of other tools."""

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlopt.basics.errors import FileError, UserError
from dlopt.basics.files import reason, refuse_compressed, refuse_special
from dlopt.training.checkpoint.checkpoints import load
from dlopt.training.checkpoint.content import is_checkpoint

_UNSUPPORTED = re.compile(r"GLOBAL (\S+) was not an allowed global|Unsupported (?:class|global)[: ]+(?:GLOBAL )?(\S+)")


def read_weights(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """Reads weights by name, and the names of the classes of a checkpoint; None if unknown.

    The file is a checkpoint (reads the EMA, if any), a safetensors file, or a file of torch.save. Joins the names of
    nested dicts by slashes: "state_dict/model.head.weight". Unpickles only tensors and plain values. Raises `UserError`
    if there are no tensors.
    """
    try:
        refuse_special(path)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            refuse_compressed(path)
            # timm's training script saves its arguments as a Namespace, which only holds attributes.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileError(f"init_from={path}: no such file") from None
    except Exception as error:
        if (match := _UNSUPPORTED.search(str(error))) is not None:
            raise UserError(
                f"init_from={path}: cannot be loaded as weights: it contains {match[1] or match[2]}, and only tensors "
                "and plain values are read; save its state dict in a file of its own"
            ) from None
        raise UserError(f"init_from={path}: cannot be loaded as weights: {reason(error)}") from None
    if is_checkpoint(content):
        checkpoint = load(path)  # again, to verify the checksum and to load shards
        return checkpoint.merged_weights, checkpoint.classes
    weights = dict(_flattened(content))
    if not weights:
        keys = f" (its keys: {', '.join(map(str, list(content)[:5]))})" if isinstance(content, Mapping) else ""
        raise UserError(f"init_from={path}: contains no weights by name (a dict of tensors){keys}")
    return weights, None


def _flattened(content: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors in nested dicts, in their order. Yields a dict that occurs several times only once."""
    # Lightning's `WeightAveraging` and MMEngine's `EMAHook` (which swaps the two) save the last weights beside their
    # average, which is `state_dict`.
    last = set()
    if isinstance(content, Mapping) and "state_dict" in content:
        meta = content.get("meta")
        is_mmengine = isinstance(meta, Mapping) and "mmengine_version" in meta
        last = {"current_model_state", *(["ema_state_dict"] if is_mmengine else [])}
    seen: set[int] = set()
    pending: list[tuple[str, Any]] = [("", content)]
    while pending:
        name, value = pending.pop()
        if isinstance(value, Tensor) and name:
            yield name, value
        elif isinstance(value, Mapping) and id(value) not in seen:
            seen.add(id(value))
            if name not in last:
                # Other keys than strings number the parameters of an optimizer.
                inner = [(f"{name}/{key}" if name else key, value[key]) for key in value if isinstance(key, str)]
                pending += reversed(inner)  # the first one is popped first
