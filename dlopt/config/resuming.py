"""Decides whether a run can be resumed with a config: which keys must be equal, which may have changed."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from dlopt.basics.errors import UserError
from dlopt.basics.folders import SPACE, RunFolder, newest
from dlopt.basics.formats import format_count
from dlopt.basics.plain_values import flatten
from dlopt.basics.roles import Role
from dlopt.basics.secrets import redacted
from dlopt.config.keys import role_of
from dlopt.config.overrides import without
from dlopt.data.settings import DataSettings
from dlopt.metrics.names import former_mode
from dlopt.tracking.metrics import read_metrics
from dlopt.tracking.terminal_text import short_path

_TEACHER = "loss.teacher_sha256"
_FREE = (Role.LENGTH, Role.PLACE, Role.WATCH, Role.COMMAND)


def may_change(key: str) -> bool:
    """Returns whether a run can be resumed with another value of this key, which does not decide what it computes."""
    return role_of(key) in _FREE


NEWER_GROUPS: Mapping[str, Mapping[str, Any]] = {
    "adapt": {"_target_": "dlopt.adapt.none"},
    "decay": {"_target_": "dlopt.schedules.decay.constant", "cautious": False, "width": "none"},
}
"""What configs mean that were saved before these groups existed."""

# Keys that a config may lack: those that mean nothing for its data set (older configs have them), and newer ones.
UNUSED: Mapping[str, Any] = {
    **{f"data.{each.name}": each.default for each in fields(DataSettings) if each.default is not MISSING},
    **flatten(NEWER_GROUPS),
    "ema_warmup": False,
}


def how_to_resume(folder: RunFolder, is_ranks: bool = False) -> str:
    """Returns the command that resumes the run. `is_ranks`: torchrun or srun has started its processes."""
    if (folder.path.parent / SPACE).is_file():
        return "add resume=auto to the command of the sweep"
    launcher = "the same launcher, and " if is_ranks else ""
    words = without(folder.typed(), "resume")
    return f"resume with: {launcher}{shlex.join(['dlopt', 'train', *words, 'resume=auto'])}"


def refuse_longer(done: RunFolder, config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Raises `UserError` with the command that extends a finished run, if `config` is longer and nothing else differs.

    The command stretches the schedule, which has ended with the run. `overrides`: the command line.
    """
    if done.is_done(config):
        return
    key = "epochs" if config["steps"] is None else "steps"
    words = without(overrides, "resume", "hydra.run.dir")
    evaluated = read_metrics(done.path)
    epochs = config["epochs"]
    if key == "steps":  # the last epoch may be incomplete
        epochs = config["steps"] * evaluated[0]["epoch"] / evaluated[0]["step"] if len(evaluated) > 1 else None
    if epochs is not None and config["schedule_epochs"] is None:
        words.append(f"schedule_epochs={epochs:.6g}")
    command = shlex.join(["dlopt", "train", *words, f"output={short_path(done.path)}", "resume=auto"])
    length = format_count(key, (done.summary() or {})[key])
    raise UserError(
        f"{key}={config[key]}: the run of this config has finished after {length}; to extend it, type: {command} "
        "(for a new run, leave out resume=auto)"
    )


def shortened(done: RunFolder, config: Mapping[str, Any]) -> str | None:
    """Returns the length of a run that has finished after more epochs, or updates, than `config` asks for, or None."""
    summary, key = done.summary() or {}, "epochs" if config["steps"] is None else "steps"
    length = summary.get(key)
    if summary.get("status") != "finished" or not isinstance(length, int) or config[key] >= length:
        return None
    return format_count(key, length)


def newest_unfinished(parent: Path, config: Mapping[str, Any]) -> RunFolder | None:
    """Returns the newest unfinished run of this config below `parent` that no process is working on."""
    return newest(parent, lambda run: not (run.is_finished() or run.is_live()) and _has_config(run, config))


def newest_finished(parent: Path, config: Mapping[str, Any]) -> RunFolder | None:
    """Returns the newest finished run below `parent` that `resume=auto` in its folder would extend to this config."""
    return newest(parent, lambda run: run.is_finished() and _has_config(run, config))


def _has_config(run: RunFolder, config: Mapping[str, Any]) -> bool:
    saved = run.config()
    return saved is not None and not differences(saved, config)


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns by dotted key the (saved, current) values that differ, without those of keys that `may_change`.

    Both are compared redacted: a secret may have become one since the config was saved.
    """
    old, new = {**UNUSED, **flatten(redacted(saved))}, {**UNUSED, **flatten(redacted(current))}
    for config in (old, new):  # absent in older configs
        config.setdefault("monitor_mode", former_mode(config))
    if old.get("ema") is None:
        new["ema_warmup"] = old["ema_warmup"]  # there is no average, whose warmup could differ
    if new.get(_TEACHER) is None:
        new[_TEACHER] = old.get(_TEACHER)  # planned before the teacher is trained
    keys = [key for key in old | new if not may_change(key)]
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def refuse_other_config(old: Mapping[str, Any], new: Mapping[str, Any], path: str, overrides: list[str]) -> None:
    """Raises `UserError` if the run at `path`, started with `overrides`, cannot be resumed with the config `new`."""
    different = differences(old, new)
    if not different:
        return
    command = shlex.join(["dlopt", "train", *without(overrides, "resume")])
    raise UserError(f"resume: {path} has another config ({describe(different)}); that run was started with: {command}")


def describe(different: Mapping[str, tuple[Any, Any]], none: str = "null") -> str:
    """Lists (saved, current) values by key as `key: saved a, now b`; None is shown as `none`."""
    pairs = {key: [none if value is None else value for value in values] for key, values in different.items()}
    return "; ".join(f"{key}: saved {old}, now {new}" for key, (old, new) in pairs.items())
