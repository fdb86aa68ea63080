"""YAML's aliases make of a few lines a config of any size (`a: [*b, *b]`, `b: [*c, *c]`): such files are refused."""

from pathlib import Path

import yaml

_MAX_NODES = 100_000
_MAX_BYTES = 10_000_000


def check_file(path: Path) -> None:
    """Raises ValueError, which says why, for a file that is too large, written out or as it stands."""
    if not path.is_file():
        raise ValueError("is no regular file")
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"has more than {_MAX_BYTES} bytes")
    text = path.read_bytes()
    if b"&" in text and b"*" in text and written_out(text.decode("utf-8", "replace")) > _MAX_NODES:
        raise ValueError(f"has aliases that stand for more than {_MAX_NODES} values")


def written_out(text: str) -> int:
    """The number of values with every alias written out; infinitely many are more than allowed."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return 0  # whoever reads it will say so
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = _MAX_NODES + 1  # while under way: an alias within itself
            children: list[yaml.Node] = []
            if isinstance(node, yaml.SequenceNode):
                children = node.value
            elif isinstance(node, yaml.MappingNode):
                children = [each for pair in node.value for each in pair]
            sizes[id(node)] = 1 + sum(map(size, children))
        return sizes[id(node)]

    try:
        return 0 if root is None else size(root)
    except RecursionError:
        return _MAX_NODES + 1
