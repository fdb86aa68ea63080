"""Nested mappings of plain values, as read from YAML and written to JSON."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_MAX_NODES = 100_000
_MAX_BYTES = 10_000_000


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to dotted keys, in order. Lists and empty mappings are values."""
    if not isinstance(node, Mapping) or (prefix and not node):
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def without_nan(value: Any) -> Any:
    """Replaces non-finite numbers in nested mappings and lists by None, because JSON has no NaN.

    Converts 0-dim tensors and NumPy scalars to numbers.
    """
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_yaml(path: Path) -> None:
    """Raises ValueError for a YAML file that is too large, as it is or with its aliases expanded.

    Nested aliases expand exponentially ("billion laughs"): `a: [*b, *b]`, `b: [*c, *c]`.
    """
    if not path.is_file():
        raise ValueError("is not a regular file")
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"has more than {_MAX_BYTES} bytes")
    text = path.read_bytes()
    if b"&" in text and b"*" in text and expanded_size(text.decode("utf-8", "replace")) > _MAX_NODES:
        raise ValueError(f"has aliases that expand to more than {_MAX_NODES} values")


def expanded_size(text: str) -> int:
    """Counts the values of a YAML text with all aliases expanded; recursive aliases exceed any limit."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = _MAX_NODES + 1  # seen again before its size is known: a recursive alias
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            items = node.value if isinstance(node, yaml.SequenceNode) else [item for pair in pairs for item in pair]
            sizes[id(node)] = 1 + sum(map(size, items))
        return sizes[id(node)]

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return 0  # loading the file reports the error
    try:
        return 0 if root is None else size(root)
    except RecursionError:
        return _MAX_NODES + 1
