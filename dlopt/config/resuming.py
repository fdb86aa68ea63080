"""Decides which run resumes under which config: which keys must be equal, and which may have changed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlopt.errors import UserError
from dlopt.folders import RunFolder, newest
from dlopt.plain import flatten

# Keys that a resumed run may change: where and how long it runs and what it writes, not what it computes.
FREE = (
    "name", "dry_run", "resume", "init_from", "allow_packages", "epochs", "steps", "max_time", "schedule_epochs",
    "device", "compile", "threads", "checkpoint", "tracking", "log_every_steps", "parallel", "data.workers",
    "data.memory", "check", "on_divergence", "recovery", "on_out_of_memory",
)  # fmt: skip


def newest_unfinished(parent: Path, config: Mapping[str, Any]) -> RunFolder | None:
    """Returns the newest unfinished run of this config below `parent` that no process is working on."""

    def fits(folder: RunFolder) -> bool:
        saved = folder.config()
        if saved is None or folder.is_finished() or folder.is_live():
            return False
        return not differences(saved, config)

    return newest(parent, fits)


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the dotted keys in which two configs differ beyond `FREE`: (saved, wanted)."""
    old, new = flatten(saved), flatten(wanted)
    keys = [key for key in old | new if not any(key == free or key.startswith(f"{free}.") for free in FREE)]
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def refuse_other_config(old: Mapping[str, Any], new: Mapping[str, Any], place: str, typed: list[str]) -> None:
    """Raises `UserError` where a run is to be resumed under a config that computes something else."""
    different = differences(old, new)
    if not different:
        return
    shown = "; ".join(f"{key}: {_shown(a)} there, {_shown(b)} now" for key, (a, b) in different.items())
    command = " ".join(["dlopt train", *(line for line in typed if not line.startswith("resume="))])
    raise UserError(f"resume: {place} belongs to another config ({shown}); that run was started with: {command}")


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
