"""Nested mappings of plain values, as read from YAML and written to JSON, and the readers of small untrusted files.

Folders of runs and sweeps may come from strangers. Whatever is read from them is read here, or by a library after
`refuse_special`: a FIFO never blocks, a device is never read, and size, depth and kinds of values are limited
(`tests/packaging/test_reading.py` lists the exceptions).
"""

import errno
import io
import json
import math
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_MAX_NODES = 100_000
_MAX_BYTES = 1_000_000
_MAX_DEPTH = 100
_MAX_DIGITS = 100
_INTEGER = re.compile(r"[-+]?(0x[0-9a-fA-F_]+|0b[01_]+|[0-9][0-9_]*(:[0-5]?[0-9])*(\.[0-9_]*)?)")  # of YAML; 59:59 and
# 59:59.5 are sexagesimal: the time for converting one is quadratic in its length
_TYPED = re.compile(  # numbers and truth values that the command line reads as YAML does; .inf, ~, = and << are YAML's
    r"(?i:null|true|false)|[~=]?|<<|[-+]?\.(?i:inf)|\.(?i:nan)|"
    r"[-+]?((0|[1-9](_?\d)*)(\.(\d(_?\d)*)?)?|\.\d(_?\d)*)([eE][-+]?\d(_?\d)*)?"
)
_EXPONENT = re.compile(r"[-+]?\d+(_\d+)*(\.[\d_]*)?[eE][-+]?\d+")  # a float for OmegaConf, a text for YAML 1.1
_EXACT = re.compile(r"-?(0|[1-9]\d*)|null|~?")  # the text of such a number is as it is written
_TEXT_TAGS = ("!", "tag:yaml.org,2002:str")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's loader is 5x faster


class _Loader(_SafeLoader):
    """Reads dates as texts, as OmegaConf does."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:timestamp"]
        for first, pairs in _SafeLoader.yaml_implicit_resolvers.items()
    }


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


def check_plain(value: Any, nodes: int = _MAX_NODES) -> None:
    """Applies the limits of `check_yaml` to a value from a file of another format. Raises ValueError."""
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
        if count > nodes:
            raise ValueError(f"has more than {nodes} values")
        if depth > _MAX_DEPTH:
            raise ValueError(f"is nested more than {_MAX_DEPTH} levels deep")
        waiting += [(item, depth + 1) for item in inner]


def read_regular(path: Path | str, limit: int = _MAX_BYTES) -> bytes:
    """Reads a regular file of at most `limit` bytes; never waits for a FIFO or a device. Raises ValueError, OSError."""
    descriptor, size = _open_regular(path, limit)
    try:
        data = os.read(descriptor, size)  # leaves data that is appended meanwhile to the next read
        while len(data) < size and (rest := os.read(descriptor, size - len(data))):
            data += rest
        return data
    finally:
        os.close(descriptor)


def regular_lines(path: Path, limit: int) -> Iterator[bytes]:
    """Opens a file as `read_regular` does, and returns its lines, which are read one by one."""
    file = open_regular(path, limit)

    def lines() -> Iterator[bytes]:
        with file:
            while line := file.readline(_MAX_BYTES):  # the parts of a longer line
                yield line

    return lines()


def regular_tail(path: Path, count: int) -> bytes:
    """Reads the last `count` bytes of a regular file of any size. Raises ValueError, OSError."""
    with open_regular(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - count))
        return file.read(count)


def open_regular(path: Path, limit: int = sys.maxsize) -> io.BufferedReader:
    """Opens a regular file of at most `limit` bytes for reading. Raises ValueError, OSError."""
    return open(_open_regular(path, limit)[0], "rb")


def _open_regular(path: Path | str, limit: int) -> tuple[int, int]:
    """Returns the descriptor and the size of a file; see `open_regular`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link to itself, a socket
            raise ValueError("is not a regular file") from None
        raise
    status = os.fstat(descriptor)
    reason = f"has more than {limit} bytes" if status.st_size > limit else None
    reason = reason if stat.S_ISREG(status.st_mode) else "is not a regular file"
    if reason is not None:
        os.close(descriptor)
        raise ValueError(reason)
    return descriptor, status.st_size


def load_json(path: Path, limit: int = _MAX_BYTES) -> Any:
    """Loads a JSON file of at most `limit` bytes that `parse_json` accepts. Raises ValueError and OSError."""
    return parse_json(read_regular(path, limit))


def parse_json(text: bytes | str) -> Any:
    """Parses JSON in UTF-8 as `json.dumps` writes it for finite numbers.

    Raises ValueError for anything else: NaN, Infinity and numbers beyond float64, integers of more than 100 digits, a
    key that is given twice, deep nesting, lone surrogates other than those of Python's file names.
    """
    return _parse(text, _STRICT)


def parse_numbers(text: bytes | str) -> Any:
    """Parses JSON as `parse_json`, in half the time: numbers are not checked, and of equal keys the last counts."""
    return _parse(text, _FAST)


def _parse(text: bytes | str, decoder: json.JSONDecoder) -> Any:
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    try:
        value = decoder.decode(text)
    except RecursionError:
        raise ValueError(f"is nested more than {_MAX_DEPTH} levels deep") from None
    if text.count("[") + text.count("{") > _MAX_DEPTH:
        check_plain(value, sys.maxsize)
    if "\\u" in text and _SURROGATE.search(text) is not None:
        json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")  # UnicodeEncodeError is a ValueError
    return value


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"has an integer of more than {_MAX_DIGITS} digits")
    return int(text)


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"has the number {text[:20]}, which is not finite")
    return value


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError("has a key twice")
    return mapping


_STRICT = json.JSONDecoder(parse_int=_integer, parse_float=_float, parse_constant=_float, object_pairs_hook=_mapping)
_FAST = json.JSONDecoder()


def load_yaml(path: Path, limit: int = _MAX_BYTES, nodes: int = _MAX_NODES, texts: Sequence[str] = ()) -> Any:
    """Loads a YAML file that `check_yaml` accepts, of plain values and without a key that is given twice.

    Raises ValueError and OSError.
    """
    text = check_yaml(path, limit, nodes, texts).decode("utf-8")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, LookupError, AttributeError, TypeError, ArithmeticError) as error:  # of tags: !!int ''
        raise ValueError(f"is not valid YAML: {' '.join(str(error).split())}") from None
    check_plain(value, nodes)
    return value


def check_yaml(path: Path, limit: int = _MAX_BYTES, nodes: int = _MAX_NODES, texts: Sequence[str] = ()) -> bytes:
    """Returns the content of a YAML file that is safe to load.

    Raises OSError, and ValueError for a file that is not regular, for one that is too large, as it is or with its
    aliases expanded, for deep nesting, on which libyaml's loader crashes, for integers of more than 100 digits, and
    for a value that means something else on the command line: 010 (8 in YAML 1.1), 1:30 (90), no (false).
    Nested aliases expand exponentially ("billion laughs"): `a: [*b, *b]`, `b: [*c, *c]`.

    Args:
        texts: keys whose values are texts, also where a file has only their last parts; YAML reads 2024_11_26 as
            20241126, and 1.10 as 1.1.
    """
    content = read_regular(path, limit)
    if expanded_size(content.decode("utf-8", "replace"), nodes, texts) > nodes:
        raise ValueError(f"has aliases that expand to more than {nodes} values, or is too large")
    return content


def expanded_size(text: str, nodes: int = _MAX_NODES, texts: Sequence[str] = ()) -> int:
    """Counts the values of a YAML text with all aliases expanded; recursive aliases exceed any limit.

    Stops counting above `nodes` and at a syntax error, which loading the file reports. Raises ValueError for deep
    nesting, long integers, a key that is given twice, of which loading would take the last, and values that the command
    line reads otherwise. `texts`: see `check_yaml`.
    """
    anchors: dict[str | None, int] = {}
    open_nodes: list[_OpenNode] = []
    total = 0
    try:
        for event in yaml.parse(text, Loader=_SafeLoader):
            anchor = getattr(event, "anchor", None)
            if open_nodes and isinstance(event, yaml.NodeEvent):
                open_nodes[-1].add(event)
            if isinstance(event, yaml.AliasEvent):
                total += anchors.get(anchor, 0)
            elif isinstance(event, yaml.ScalarEvent):
                is_plain = not event.style or event.tag is not None
                if is_plain and len(event.value) > _MAX_DIGITS and _INTEGER.fullmatch(event.value):
                    raise ValueError(f"has an integer of more than {_MAX_DIGITS} digits")
                if is_plain and event.tag not in _TEXT_TAGS:
                    _refuse_misread(event, [node.key for node in open_nodes if node.key], texts)
                total += 1
                anchors[anchor] = 1
            elif isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append(
                    _OpenNode(anchor, total, set() if isinstance(event, yaml.MappingStartEvent) else None)
                )
                anchors[anchor] = nodes + 1  # used inside of itself: a recursive alias
                total += 1
                if len(open_nodes) > _MAX_DEPTH:
                    raise ValueError(f"is nested more than {_MAX_DEPTH} levels deep")
            elif isinstance(event, yaml.CollectionEndEvent):
                closed = open_nodes.pop()
                anchors[closed.anchor] = total - closed.before
            if total > nodes:
                return total
    except yaml.YAMLError:
        return 0
    return total


def _refuse_misread(event: Any, keys: list[str], texts: Sequence[str]) -> None:
    """Raises ValueError for a value that YAML reads otherwise than the command line. `keys`: those that lead to it."""
    text = event.value
    is_text = bool(keys) and keys[-1].rpartition(".")[2] in [key.rpartition(".")[2] for key in texts]
    patterns = [pattern for _, pattern in _Loader.yaml_implicit_resolvers.get(text[:1], [])]
    is_number = bool(texts) and _EXPONENT.fullmatch(text) is not None  # OmegaConf reads config files, and no others
    if (_EXACT if is_text else _TYPED).fullmatch(text) or not (is_number or any(each.match(text) for each in patterns)):
        return
    value = float(text.replace("_", "")) if is_number else yaml.load(text, Loader=_Loader)
    form = "true or false" if isinstance(value, bool) else "the number in decimal digits, without leading zeros"
    written = "" if is_text else f"{form}, or "
    raise ValueError(
        f"line {event.start_mark.line + 1}: {'.'.join(keys)}: {text} is {json.dumps(value)} in YAML; "
        f"write {written}a text in quotes: '{text}'"
    )


@dataclass
class _OpenNode:
    """A list or mapping that is being parsed. `before`: values before it; `keys`: so far; None for a list."""

    anchor: str | None
    before: int
    keys: set[str] | None
    is_at_key: bool = False
    key: str = ""  # the last one

    def add(self, event: yaml.NodeEvent) -> None:
        if self.keys is None:
            return
        self.is_at_key = not self.is_at_key
        if self.is_at_key and isinstance(event, yaml.ScalarEvent) and event.value != "<<":
            if event.value in self.keys:
                raise ValueError(f"has the key {event.value[:40]!r} twice")
            self.keys.add(event.value)
            self.key = event.value


def choices_of_groups(config: Mapping[str, Any], choices: Mapping[str, str]) -> dict[str, str]:
    """Returns the choice of each group; where `choices` has none, the last part of the group's `_target_`."""
    groups = {key: value if isinstance(value, Mapping) else {} for key, value in config.items()}
    targets = {key: str(group.get("_target_") or "").rpartition(".")[2] for key, group in groups.items()}
    return {key: str(choice) for key, target in targets.items() if (choice := choices.get(key) or target)}
