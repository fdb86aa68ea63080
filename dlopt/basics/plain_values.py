"""Nested mappings of plain values, as read from YAML and written to JSON."""

import math
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import yaml

_MAX_NODES = 100_000
_MAX_BYTES = 1_000_000
_MAX_DEPTH = 100
_MAX_DIGITS = 100
_INTEGER = re.compile(r"[-+]?(0x[0-9a-fA-F_]+|0b[01_]+|[0-9][0-9_]*(:[0-5]?[0-9])*)")  # of YAML; 59:59 is sexagesimal
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's loader is 5x faster


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to dotted keys, in order. Lists and empty mappings are values."""
    if not isinstance(node, Mapping) or (prefix and not node):
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= flatten(value, join(prefix, str(key)))
    return flat


def join(prefix: str, key: str) -> str:
    """Joins the parts of a dotted key."""
    return f"{prefix}.{key}" if prefix else key


def is_below(key: str, parents: Iterable[str]) -> bool:
    """Returns whether a dotted key is one of `parents` or below one."""
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


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


def check_plain(value: Any) -> None:
    """Checks a value of a file that is not YAML by the limits for YAML: see `check_yaml`. Raises ValueError."""
    waiting, count = [(value, 0)], 0
    while waiting:
        node, depth = waiting.pop()
        inner: list[Any] = []
        if isinstance(node, dict):
            if not all(isinstance(key, str | int) for key in node):
                raise ValueError("has a key that is not a text")
            inner = list(node.values())
        elif isinstance(node, list | tuple):
            inner = list(node)
        elif not (node is None or isinstance(node, str | int | float)):
            raise ValueError(f"has a value of type {type(node).__name__}")
        count += len(inner)
        if count > _MAX_NODES:
            raise ValueError(f"has more than {_MAX_NODES} values")
        if depth > _MAX_DEPTH:
            raise ValueError(f"is nested more than {_MAX_DEPTH} levels deep")
        waiting += [(item, depth + 1) for item in inner]


def read_regular(path: Path, limit: int = _MAX_BYTES) -> bytes:
    """Reads a regular file of at most `limit` bytes; never waits for a FIFO or a device. Raises ValueError, OSError."""
    with _open_regular(path, limit) as file:
        return file.read(limit)


def regular_lines(path: Path, limit: int) -> Iterator[bytes]:
    """Opens a file as `read_regular` does, and returns its lines, which are read one by one."""
    file = _open_regular(path, limit)

    def lines() -> Iterator[bytes]:
        with file:
            while line := file.readline(_MAX_BYTES):  # the parts of a longer line
                yield line

    return lines()


def regular_tail(path: Path, count: int) -> bytes:
    """Reads the last `count` bytes of a regular file of any size. Raises ValueError, OSError."""
    with _open_regular(path, sys.maxsize) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - count))
        return file.read(count)


def _open_regular(path: Path, limit: int) -> BinaryIO:
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # noqa: SIM115
    status = os.fstat(file.fileno())
    reason = f"has more than {limit} bytes" if status.st_size > limit else None
    reason = reason if stat.S_ISREG(status.st_mode) else "is not a regular file"
    if reason is not None:
        file.close()
        raise ValueError(reason)
    return file


def load_yaml(path: Path) -> Any:
    """Loads a YAML file that `check_yaml` accepts. Raises ValueError and OSError."""
    text = check_yaml(path).decode("utf-8")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"is not valid YAML: {' '.join(str(error).split())}") from None


def check_yaml(path: Path) -> bytes:
    """Returns the content of a YAML file that is safe to load.

    Raises OSError, and ValueError for a file that is not regular, for one that is too large, as it is or with its
    aliases expanded, for deep nesting, on which libyaml's loader crashes, and for integers of more than 100 digits.
    Nested aliases expand exponentially ("billion laughs"): `a: [*b, *b]`, `b: [*c, *c]`.
    """
    try:
        content = read_regular(path)
    except IsADirectoryError:
        raise ValueError("is not a regular file") from None
    if expanded_size(content.decode("utf-8", "replace")) > _MAX_NODES:
        raise ValueError(f"has aliases that expand to more than {_MAX_NODES} values, or is too large")
    return content


def expanded_size(text: str) -> int:
    """Counts the values of a YAML text with all aliases expanded; recursive aliases exceed any limit.

    Stops counting above the limit and at a syntax error, which loading the file reports. Raises ValueError for deep
    nesting and long integers.
    """
    anchors: dict[str | None, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and values before this node
    total = 0
    try:
        for event in yaml.parse(text, Loader=_Loader):
            anchor = getattr(event, "anchor", None)
            if isinstance(event, yaml.AliasEvent):
                total += anchors.get(anchor, 0)
            elif isinstance(event, yaml.ScalarEvent):
                if not event.style and len(event.value) > _MAX_DIGITS and _INTEGER.fullmatch(event.value):
                    raise ValueError(f"has an integer of more than {_MAX_DIGITS} digits")
                total += 1
                anchors[anchor] = 1
            elif isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((anchor, total))
                anchors[anchor] = _MAX_NODES + 1  # used inside of itself: a recursive alias
                total += 1
                if len(open_nodes) > _MAX_DEPTH:
                    raise ValueError(f"is nested more than {_MAX_DEPTH} levels deep")
            elif isinstance(event, yaml.CollectionEndEvent):
                opened, before = open_nodes.pop()
                anchors[opened] = total - before
            if total > _MAX_NODES:
                return total
    except yaml.YAMLError:
        return 0
    return total
