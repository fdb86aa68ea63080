"""Run folders read into records. Whatever stands in them is data: it is checked, never trusted."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from dlopt.analysis.leaderboard import direction_of
from dlopt.folders import RunFolder
from dlopt.tracking.layout import settings
from dlopt.tracking.metrics import METRICS, SUMMARY

ENDED = ("finished", "stopped_early")
STATUSES = (*ENDED, "pruned", "running", "interrupted", "unfinished", "failed")
"""As in summary.json, and `pruned` (by its sweep), `running` (a process is at work there), `unfinished` (none is)."""

_MARKS = ("config.yaml", SUMMARY, METRICS)
_OURS = ("checkpoints", "tensorboard")  # of a run
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is five times as fast


@dataclass(frozen=True)
class Record:
    """One run: `config` has dotted keys, a group's own name holds its choice; `metrics` are the evaluated epochs.

    `figures`: of the best epoch (`val_loss`, `val_accuracy`), of the run (`epochs`, `steps`, `seconds`,
    `parameters`) and of the test (`test_loss`, `test_accuracy`); what is not there, or not finite, is left out.
    """

    path: Path
    status: str
    config: Mapping[str, Any]
    figures: Mapping[str, float]
    metrics: tuple[Mapping[str, float], ...]
    overrides: tuple[str, ...]
    reason: str | None
    commit: str | None


@dataclass(frozen=True)
class Damaged:
    """A run folder that cannot be read, and why."""

    path: Path
    reason: str


class Reader:
    """Reads runs below folders; those that have not changed since the last time are not read again."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[object, Record | Damaged]] = {}

    def read(self, folders: Iterable[Path]) -> tuple[list[Record], list[Damaged]]:
        """Runs in and below `folders`, each once, in the order of their paths."""
        known, self._known = self._known, {}
        for path in dict.fromkeys(run for folder in folders for run in find(folder)):
            state = _state(path)
            found = known.get(path)
            self._known[path] = found if found is not None and found[0] == state else (state, read(path))
        results = [found for _, found in self._known.values()]
        records = [each for each in results if isinstance(each, Record)]
        return records, [each for each in results if isinstance(each, Damaged)]


def find(folder: Path) -> Iterator[Path]:
    """Run folders in and below `folder`, by the order of their names (9 before 10); links are not followed."""
    folder = Path(os.path.abspath(folder))
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    is_run = any(entry.name in _MARKS for entry in entries)
    if is_run:
        yield folder
    below = [each for each in entries if each.is_dir(follow_symlinks=False) and not each.name.startswith(".")]
    below = [each for each in below if not (is_run and each.name in _OURS)]
    for entry in sorted(below, key=lambda each: (len(each.name) if each.name.isdigit() else 0, each.name)):
        yield from find(folder / entry.name)


def read(path: Path) -> Record | Damaged:
    """One run folder."""
    try:
        return _read(path)
    except _DamageError as error:
        return Damaged(path, str(error))
    except OSError as error:
        return Damaged(path, f"{Path(str(error.filename)).name} cannot be read: {error.strerror}")


class _DamageError(Exception):
    pass


def _read(path: Path) -> Record:
    if (reason := RunFolder(path).newer_format()) is not None:
        raise _DamageError(reason)
    config = _mapping(path / "config.yaml", _yaml)
    if config is None:
        raise _DamageError("config.yaml is missing")
    environment = _mapping(path / "environment.json", json.loads) or {}
    summary = _mapping(path / SUMMARY, json.loads)
    metrics = tuple(_lines(path / METRICS))
    choices = environment.get("choices")
    overrides = RunFolder(path).history()
    status = _status(path, summary)
    if status == "running":
        summary = None  # of an earlier part of the run
    reason = (summary or {}).get("reason")
    commit = environment.get("git_commit")
    return Record(
        path=path,
        status=status,
        config=_flat(config, choices if isinstance(choices, dict) else {}),
        figures=_figures(summary or {}, metrics, config),
        metrics=metrics,
        overrides=tuple(overrides),
        reason=reason if isinstance(reason, str) else None,
        commit=commit if isinstance(commit, str) else None,
    )


def _yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _mapping(path: Path, parse: Any) -> dict[str, Any] | None:
    """None where there is no such file."""
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):  # UnicodeDecodeError is one
        raise _DamageError(f"{path.name} is damaged") from None
    if not isinstance(found, dict):
        raise _DamageError(f"{path.name} is damaged: it holds no keys")
    return {str(key): value for key, value in found.items()}


def _lines(path: Path) -> Iterator[dict[str, float]]:
    """The evaluated epochs. A last line that is torn, of a run that is being written or was killed, is left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                return
            raise _DamageError(f"{path.name} is damaged in line {number}") from None
        if not isinstance(found, dict) or not {"epoch", "step"} <= (numbers := _numbers(found)).keys():
            raise _DamageError(f"{path.name} is damaged in line {number}: no epoch and step")
        yield numbers


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    return {str(key): value for key, value in found.items() if is_number(value)}


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _status(path: Path, summary: Mapping[str, Any] | None) -> str:
    status = (summary or {}).get("status")
    if status in ENDED:
        return "pruned" if (summary or {}).get("pruned") is True else str(status)
    if RunFolder(path).is_live():
        return "running"
    if summary is None:
        return "unfinished"
    if status not in STATUSES:
        raise _DamageError(f"{SUMMARY} is damaged: its status is {str(status)[:40]!r}")
    return str(status)


def _flat(config: Mapping[str, Any], choices: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys in the config's order, a group's choice before its keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) or key in choices:
            target = value.get("_target_") if isinstance(value, Mapping) else None
            choice = choices.get(key) or str(target or "").rpartition(".")[2]
            flat |= {key: str(choice)} if choice else {}
        if isinstance(value, Mapping):
            flat |= {name: _tidy(item) for name, item in settings({key: value}).items()}
        elif key not in flat:
            flat[key] = _tidy(value)
    return flat


def _tidy(value: Any) -> Any:
    """Plain values; what YAML knows besides (dates) as text."""
    if isinstance(value, list | tuple):
        return tuple(_tidy(item) for item in value)
    if isinstance(value, Mapping):
        return tuple((str(key), _tidy(item)) for key, item in value.items())
    return value if isinstance(value, str | bool | int | float) or value is None else str(value)


def _figures(
    summary: Mapping[str, Any], metrics: tuple[Mapping[str, float], ...], config: Mapping[str, Any]
) -> dict[str, float]:
    figures: dict[str, Any] = dict(metrics[-1]) if metrics else {}
    for key in [key for key in figures if key.startswith("val_") or key in ("epoch", "step", "lr")]:
        figures.pop(key)
    if metrics:
        figures |= {"epochs": metrics[-1]["epoch"], "steps": metrics[-1]["step"]}
        best = best_line(metrics, str(config.get("monitor", "auto")))
        figures |= {} if best is None else {k: v for k, v in best.items() if k.startswith("val_")}
        figures |= {} if best is None else {"best_epoch": best["epoch"]}
    for key, value in summary.items():
        if key not in ("epochs", "steps") or is_number(value):
            figures[str(key).removeprefix("best_") if str(key).startswith("best_val_") else str(key)] = value
    return _numbers(figures)


def best_line(metrics: Iterable[Mapping[str, float]], monitor: str) -> Mapping[str, float] | None:
    """The first of the epochs with the best monitored figure (`auto`: val_accuracy, or val_loss without it)."""
    lines = list(metrics)
    if monitor == "auto":
        monitor = "val_accuracy" if any("val_accuracy" in line for line in lines) else "val_loss"
    known = [line for line in lines if monitor in line]
    sign = 1 if direction_of(monitor) == "minimize" else -1
    return min(known, key=lambda line: sign * line[monitor], default=None)


def _state(path: Path) -> object:
    """What changes when the run does."""
    found = []
    for name in (*_MARKS, "overrides.yaml", "environment.json", ".lock"):
        try:
            status = (path / name).stat()
            found.append((status.st_mtime_ns, status.st_size, status.st_ino))
        except OSError:
            found.append((0, 0, 0))
    ended = found[1] != (0, 0, 0)
    return (*found, None if ended else RunFolder(path).is_live())
