"""Which run goes on under which config: what has to be equal, and what may have changed."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlopt.errors import UserError
from dlopt.folders import RunFolder, newest

# Keys that a resumed run may change: where and how long it runs and what it writes, not what it computes.
FREE = (
    "name", "dry_run", "resume", "init_from", "allow_packages", "epochs", "steps", "max_time", "schedule_epochs",
    "device", "compile", "threads", "checkpoint", "tracking", "log_every_steps", "parallel", "data.workers",
    "data.memory", "check", "on_divergence", "recovery", "on_out_of_memory",
)  # fmt: skip


def newest_unfinished(parent: Path, config: Mapping[str, Any]) -> RunFolder | None:
    """The newest unfinished run of this config below `parent` that has no process at work in it."""

    def fits(folder: RunFolder) -> bool:
        saved = folder.config()
        if saved is None or folder.is_finished() or folder.is_live():
            return False
        return not differences(saved, config)

    return newest(parent, fits)


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two configs differ beyond `FREE`: (saved, wanted).

    Keys that have come since an older dlopt saved its config count with the values that they have now.
    """
    found = _different(saved, wanted)
    known = _flat(saved)
    if all(key in known for key in found):
        return found
    from dlopt.config.older import completed  # brings torch along

    with contextlib.suppress(UserError):  # it names what is not here any more: that is a difference, too
        found = _different(completed(saved, wanted.get("allow_packages") or [])[0], wanted)
    return found


def _different(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    flat_saved, flat_wanted = _flat(saved), _flat(wanted)
    keys = [key for key in (*flat_saved, *flat_wanted) if not _is_free(key)]
    pairs = {key: (flat_saved.get(key), flat_wanted.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, Mapping):
        return {prefix: list(config) if isinstance(config, tuple) else config}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def refuse_other_config(old: Mapping[str, Any], new: Mapping[str, Any], place: str, typed: list[str]) -> None:
    """Raises `UserError` where a run is to be resumed under a config that computes something else."""
    different = differences(old, new)
    if not different:
        return
    shown = "; ".join(f"{key}: {_show_value(a)} there, {_show_value(b)} now" for key, (a, b) in different.items())
    command = " ".join(["dlopt train", *(line for line in typed if not line.startswith("resume="))])
    raise UserError(f"resume: {place} belongs to another config ({shown}); that run was started with: {command}")


def _show_value(value: object) -> str:
    return "null" if value is None else str(value)
