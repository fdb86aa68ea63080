"""Bounds what the interpolations of a config expand to, before OmegaConf resolves them."""

import re
from collections.abc import Mapping
from typing import Any

from dlopt.config.trust import leaves
from dlopt.errors import UserError

_MAX_VALUES = 10_000
_REFERENCE = re.compile(r"\$\{\s*(\.*)([\w./-]+)\s*\}")  # ${a.b}, ${.a}; references inside resolvers count as well


def check_expansion(config: Mapping[str, Any]) -> None:
    """Raises `UserError` for a value whose interpolations expand to very many values.

    `a: ${b}${b}`, `b: ${c}${c}`, ... doubles with every line.
    """
    texts = {key: value for key, value in leaves(config) if isinstance(value, str) and "${" in value}
    sizes: dict[str, int] = {}

    def size(key: str) -> int:
        """Counts the values that the text of `key`, or the texts below it, expand to."""
        if key not in sizes:
            sizes[key] = 1  # met again: a cycle, which OmegaConf reports
            below = [key] if key in texts else [other for other in texts if other.startswith(f"{key}.")]
            references = [_target(each, *match) for each in below for match in _REFERENCE.findall(texts[each])]
            sizes[key] = min(1 + sum(map(size, references)), _MAX_VALUES + 1)
        return sizes[key]

    for key, text in texts.items():
        if size(key) > _MAX_VALUES:
            shown = text if len(text) <= 60 else f"{text[:60]}..."
            raise UserError(f"{key}={shown}: its interpolations expand to more than {_MAX_VALUES} values")


def _target(key: str, dots: str, path: str) -> str:
    """Returns the absolute key of a reference in `key`: ${.x} is a sibling, ${..x} one level higher."""
    parents = key.split(".")[: -len(dots)] if dots else []
    return ".".join([*parents, path])
