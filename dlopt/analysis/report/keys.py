"""In which keys runs differ, and how their values are written."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dlopt.analysis.leaderboard import is_seed

# Beside the seeds, keys of where a run stands and what it writes.
_ASIDE = (
    "name", "resume", "allow_packages", "tracking", "log_every_steps", "checkpoint", "max_time", "threads", "dry_run",
    "data.root", "data.workers", "data.memory", "published",
)  # fmt: skip


def varying(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys with several values, in the configs' order, seeds aside.

    A key of a group is left out where the group's choice says its value: optimizers differ in more than their names.
    """
    keys = dict.fromkeys(key for config in configs for key in config)
    found = [key for key in keys if not _is_aside(key) and len({text(config.get(key)) for config in configs}) > 1]
    return [key for key in found if not _follows(key, configs)]


def _is_aside(key: str) -> bool:
    return is_seed(key) or any(key == aside or key.startswith(f"{aside}.") for aside in _ASIDE)


def _follows(key: str, configs: Iterable[Mapping[str, Any]]) -> bool:
    group, _, inner = key.partition(".")
    if not inner:
        return False
    values: dict[str, set[str]] = {}
    for config in configs:
        if key in config:
            values.setdefault(text(config.get(group)), set()).add(text(config[key]))
    return len(values) > 0 and all(len(each) == 1 for each in values.values())


def text(value: Any) -> str:
    """As it is typed: true, null, [64,64]."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple | list):
        return f"[{','.join(map(text, value))}]"
    return "null" if value is None else str(value)


def brief(value: Any) -> str:
    """The same with four significant digits, for labels."""
    return f"{value:.4g}" if isinstance(value, float) else text(value)


def printable(value: str) -> str:
    """Without what would steer a terminal, or break a line of a table."""
    if value.isprintable():
        return value
    return "".join(character if character.isprintable() else "�" for character in value)
