"""Decides whether a run can be resumed with a config: which keys must be equal, which may have changed."""

import os
import re
import shlex
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlopt.basics.errors import StateError
from dlopt.basics.folders import SPACE, RunFolder, newest
from dlopt.basics.formats import format_count
from dlopt.basics.plain_values import flatten, is_below
from dlopt.basics.roles import Role
from dlopt.basics.secrets import redacted
from dlopt.config.keys import LABELS, role_of
from dlopt.config.older import moved, of_today
from dlopt.config.overrides import OUTPUT, quoted_plain, without
from dlopt.tracking.metrics import read_metrics

_TEACHER = "loss.teacher_sha256"
_NO_AXES = (*LABELS, "loss.teacher")  # `dlopt runs tag` changes a run's; `loss.teacher_sha256` says which one it is
_FILES = (
    "data.file",
    "data.val_file",
    "data.test_file",
)  # the identity of the data tells whether their content is equal
_FREE = (Role.LENGTH, Role.PLACE, Role.WATCH, Role.COMMAND)


def with_counted_updates(config: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `config` with the updates that a run has counted for the same epochs=5min: it counts once."""
    is_same = isinstance(config.get("epochs"), str) and config["epochs"] == saved.get("epochs")
    return {**config, "steps": saved.get("steps")} if is_same and config.get("steps") is None else {**config}


def may_change(key: str) -> bool:
    """Returns whether a resumed run may have another value of this key, by the key's role."""
    return role_of(key) in _FREE


def in_folder(folder: Path) -> list[str]:
    """Returns the overrides that resume the run or sweep in this folder, and no other of the same config."""
    return [f"{OUTPUT}={_typed_path(folder)}", "resume=auto"]


def _typed_path(path: Path) -> str:
    """Returns the absolute path as the value of an override."""
    text = os.path.abspath(path)
    return text if re.fullmatch(r"[\w./-]+", text, re.ASCII) else quoted_plain(text)


def how_to_resume(folder: RunFolder, is_ranks: bool = False) -> str:
    """Returns the command that resumes the run. `is_ranks`: torchrun or srun has started its processes."""
    if ((sweep := folder.path.parent) / SPACE).is_file():
        return f"add {shlex.join(in_folder(sweep))} to the command of the sweep"
    launcher = "the same launcher, and " if is_ranks else ""
    words = without(folder.typed(), "resume", OUTPUT, "hydra.run.dir")
    return f"resume with: {launcher}{shlex.join(['dlopt', 'train', *words, *in_folder(folder.path)])}"


def with_smaller_lr(folder: RunFolder) -> str:
    """Returns the command that starts a run from the last checkpoint of a diverged one, with half its learning rate.

    '' for a run whose config sets no learning rate: a resumed run could not have another one.
    """
    optimizer, last = (folder.config() or {}).get("optimizer", {}), folder.checkpoints / "last.pt"
    lr = optimizer.get("lr") or optimizer.get("base", {}).get("lr")  # SAM has that of its base
    if not isinstance(lr, int | float):  # auto, or none
        return ""
    words = without(folder.typed(), "resume", OUTPUT, "hydra.run.dir", "optimizer.lr")
    start = "again"
    if last.is_file():
        words, start = [*without(words, "init_from"), f"init_from={_typed_path(last)}"], "from its last checkpoint"
    command = shlex.join(["dlopt", "train", *words, f"optimizer.lr={lr / 2:g}"])
    return f"; to start {start} with half the rate: {command}"


def refuse_longer(done: RunFolder, config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Raises `UserError` with the command that extends a finished run, if `config` is longer and nothing else differs.

    The command stretches the schedule, which has ended with the run. `overrides`: the command line.
    """
    if done.is_done(config):
        return
    key = "epochs" if config["steps"] is None else "steps"
    words = without(overrides, "resume", OUTPUT, "hydra.run.dir")
    evaluated = read_metrics(done.path)
    epochs = config["epochs"]
    if key == "steps":  # the last epoch may be incomplete
        epochs = config["steps"] * evaluated[0]["epoch"] / evaluated[0]["step"] if len(evaluated) > 1 else None
    if epochs is not None and config["schedule_epochs"] is None:
        words.append(f"schedule_epochs={epochs:.6g}")
    command = shlex.join(["dlopt", "train", *words, *in_folder(done.path)])
    length = format_count(key, (done.summary() or {})[key])
    raise StateError(
        f"{key}={config[key]}: the run of this config has finished after {length}; to extend it, type: {command} "
        "(for a new run, leave out resume=auto)"
    )


def shortened(done: RunFolder, config: Mapping[str, Any]) -> str | None:
    """Returns the length of a run that has finished after more epochs, or updates, than `config` asks for, or None."""
    summary, key = done.summary() or {}, "epochs" if config["steps"] is None else "steps"
    length, most = summary.get(key), config[key]
    if summary.get("status") != "finished" or not isinstance(length, int) or isinstance(most, str) or most >= length:
        return None
    return format_count(key, length)


def newest_unfinished(parent: Path, config: Mapping[str, Any]) -> RunFolder | None:
    """Returns the unfinished run of this config below `parent` that no process is working on; see `distance`."""
    return newest(parent, lambda run: None if run.has_ended() or run.is_live() else distance(run.config(), config))


def newest_finished(parent: Path, config: Mapping[str, Any]) -> RunFolder | None:
    """Returns the newest finished run below `parent` that `resume=auto` in its folder would extend to this config."""
    return newest(parent, lambda run: distance(run.config(), config) if run.has_ended() else None)


def distance(saved: Mapping[str, Any] | None, current: Mapping[str, Any]) -> int | None:
    """Returns the distance of a saved config from that of a run to resume; None if it is the config of another run.

    0 if equal. A command prefers to resume a run of the same length, then a run with the same other keys, then a run
    with the same labels.
    """
    if saved is None or differences(saved, current):
        return None
    old, new = flatten(redacted(saved)), flatten(redacted(with_counted_updates(current, saved)))
    changed = {key for key in old | new if old.get(key) != new.get(key) and role_of(key) is not Role.COMMAND}
    lengths = {key for key in changed if role_of(key) is Role.LENGTH}
    return 4 * bool(lengths) + 2 * bool(changed - lengths - {*LABELS}) + bool(changed & {*LABELS})


def differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], axes: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Returns the (saved, current) values that differ, by dotted key, except for keys that `may_change`.

    Both are compared redacted: a secret may have become one since the config was saved.

    Args:
        axes: keys and groups that count whatever their role, but for `_NO_AXES`: the jobs of a sweep differ in them.
    """
    old, new = flatten(redacted(saved)), flatten(redacted(current))
    if old.get("ema") is None:
        new["ema_warmup"] = old.get("ema_warmup")  # there is no average, whose warmup could differ
    if new.get(_TEACHER) is None:
        new[_TEACHER] = old.get(_TEACHER)  # planned before the teacher is trained
    as_today(old, new)
    if isinstance(new.get("epochs"), str) and new.get("steps") is None:  # another time is one that nobody has counted
        axes = {*axes, "epochs"} - {"steps"}
    keys = [key for key in old | new if _tells_apart(key, axes)]
    pairs = {key: (old.get(key), new.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and not _is_same_path(key, *pair)}


def comparable(saved: Mapping[str, Any], axes: Collection[str] = ()) -> Hashable:
    """Returns the part of a config that tells runs apart: equal where `differences` finds none."""
    config = flatten(redacted(of_today(saved, trains=True)))
    config = {key: value for key, value in config.items() if not (key.endswith(".test_split") and not value)}
    if config.get("ema") is None:
        config.pop("ema_warmup", None)
    for key in config.keys() & {"data.root", *_FILES}:
        config[key] = config[key] and os.path.abspath(os.path.expanduser(config[key]))
    kept = [key for key in sorted(config) if key != _TEACHER and _tells_apart(key, axes)]
    return tuple((key, repr(value) if isinstance(value := config[key], list | dict) else value) for key in kept)


def _tells_apart(key: str, axes: Collection[str]) -> bool:
    return not may_change(key) or (is_below(key, axes) and key not in _NO_AXES)


def as_today(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Makes configs by dotted key comparable that different versions have saved: callables of data have moved, and
    data.test_split was a key of fewer data, but also of validation sets."""
    for config in (old, new):
        config |= {key: moved(config[key]) for key in config if key.endswith("data._target_") and config[key]}
    for key in old.keys() ^ new.keys():
        if key.endswith(".test_split"):
            old.setdefault(key, 0.0)
            new.setdefault(key, 0.0)


def _is_same_path(key: str, old: Any, new: Any) -> bool:
    """Returns whether two values of a key are one path, relative or absolute."""
    paths = [os.path.abspath(os.path.expanduser(each)) for each in (old, new) if isinstance(each, str)]
    return key in ("data.root", *_FILES) and len(paths) == 2 and paths[0] == paths[1]


def refuse_other_config(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    path: str,
    overrides: list[str],
    axes: Collection[str] = (),
    *,
    has_identity: bool = False,
    free: Collection[str] = (),
) -> None:
    """Raises `UserError` if the run at `path`, started with `overrides`, cannot be resumed with the config `new`.

    Args:
        axes: of the sweep; see `differences`.
        has_identity: the identity of the data will be compared, so their files may have moved.
        free: groups that may differ.
    """
    old = of_today(old, trains=True)
    different = {key: pair for key, pair in differences(old, new, axes).items() if not is_below(key, free)}
    if has_identity:
        different = {key: pair for key, pair in different.items() if key not in _FILES}
    if not different:
        return
    command = shlex.join(["dlopt", "train", *without(overrides, "resume")])
    raise StateError(f"resume: {path} has another config ({describe(different)}); that run was started with: {command}")


def describe(different: Mapping[str, tuple[Any, Any]], none: str = "null") -> str:
    """Lists (saved, current) values by key as `key: saved a, now b`; None is shown as `none`."""
    pairs = {key: [none if value is None else value for value in values] for key, values in different.items()}
    return "; ".join(f"{key}: saved {old}, now {new}" for key, (old, new) in pairs.items())
