"""Nested mappings of plain values, as they come from YAML and go to JSON."""

import math
from collections.abc import Mapping
from typing import Any


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested mappings by dotted key, in order. Lists and empty mappings are values."""
    if not isinstance(node, Mapping) or (prefix and not node):
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def without_nan(value: Any) -> Any:
    """Replaces non-finite numbers in nested mappings and lists by None: JSON has no NaN.

    0-dim tensors and NumPy scalars become numbers.
    """
    if isinstance(value, Mapping):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
