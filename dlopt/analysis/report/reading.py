"""Reads run folders into records, names the keys in which runs differ, and selects runs by conditions.

The content of a run folder is data: it is checked, never trusted.
"""

import json
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from dlopt.analysis.leaderboard import ENDED, HOUSEKEEPING, direction_of, is_number, is_one_of, is_seed
from dlopt.errors import UserError
from dlopt.folders import RunFolder
from dlopt.plain import flatten
from dlopt.tracking.metrics import METRICS, SUMMARY

STATUSES = (*ENDED, "pruned", "running", "interrupted", "unfinished", "failed")
"""As in summary.json, and `pruned` (by its sweep), `running` (a process is at work there), `unfinished` (none is)."""

_MARKS = ("config.yaml", SUMMARY, METRICS)
_OURS = ("checkpoints", "tensorboard")  # of a run
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is five times as fast


@dataclass(frozen=True)
class Record:
    """One run: `config` has dotted keys, a group's own name holds its choice; `history` holds the evaluated epochs.

    `metrics`: of the best epoch (`val_loss`, `val_accuracy`), of the run (`epochs`, `steps`, `seconds`,
    `parameters`) and of the test (`test_loss`, `test_accuracy`); what is not there, or not finite, is left out.
    """

    path: Path
    status: str
    config: Mapping[str, Any]
    metrics: Mapping[str, float]
    history: tuple[Mapping[str, float], ...]
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
    history = tuple(_lines(path / METRICS))
    overrides = tuple(RunFolder(path).history())
    status = _status(path, summary)
    if status == "running" or summary is None:  # the summary of a running one is of an earlier part of the run
        summary = {}
    choices, reason, commit = environment.get("choices"), summary.get("reason"), environment.get("git_commit")
    return Record(
        path=path,
        status=status,
        config=_flat(config, choices if isinstance(choices, dict) else {}),
        metrics=_metrics(summary, history, config),
        history=history,
        overrides=overrides,
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


def _status(path: Path, summary: Mapping[str, Any] | None) -> str:
    status = None if summary is None else summary.get("status")
    if summary is not None and status in ENDED:
        return "pruned" if summary.get("pruned") is True else str(status)
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
        target = value.get("_target_") if isinstance(value, Mapping) else None
        if choice := choices.get(key) or str(target or "").rpartition(".")[2]:
            flat[key] = str(choice)
        if isinstance(value, Mapping):
            inner = {name: item for name, item in flatten(value, key).items() if not name.endswith("._target_")}
            flat |= {name: tidy(item) for name, item in inner.items() if not isinstance(item, Mapping)}
        elif key not in flat:
            flat[key] = tidy(value)
    return flat


def tidy(value: Any) -> Any:
    """Plain values: lists as tuples, mappings as tuples of pairs, YAML's other types (dates) as text."""
    if isinstance(value, list | tuple):
        return tuple(tidy(item) for item in value)
    if isinstance(value, Mapping):
        return tuple((str(key), tidy(item)) for key, item in value.items())
    return value if isinstance(value, str | bool | int | float) or value is None else str(value)


def _metrics(
    summary: Mapping[str, Any], history: tuple[Mapping[str, float], ...], config: Mapping[str, Any]
) -> dict[str, float]:
    metrics: dict[str, Any] = {}
    if history:
        last, best = history[-1], best_line(history, str(config.get("monitor", "auto")))
        metrics = {k: v for k, v in last.items() if not k.startswith("val_") and k not in ("epoch", "step", "lr")}
        metrics |= {"epochs": last["epoch"], "steps": last["step"]}
        if best is not None:
            metrics |= {k: v for k, v in best.items() if k.startswith("val_")} | {"best_epoch": best["epoch"]}
    for key, value in summary.items():
        if key not in ("epochs", "steps") or is_number(value):
            metrics[str(key).removeprefix("best_") if str(key).startswith("best_val_") else str(key)] = value
    return _numbers(metrics)


def best_line(history: Iterable[Mapping[str, float]], monitor: str) -> Mapping[str, float] | None:
    """The first of the epochs with the best monitored metric (`auto`: val_accuracy, or val_loss without it)."""
    lines = list(history)
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


# -- keys in which runs differ, and how their values are written


def varying(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys with several values, in the configs' order, seeds aside.

    A key of a group is left out where the group's choice says its value: optimizers differ in more than their names.
    """
    keys = dict.fromkeys(key for config in configs for key in config)
    found = [key for key in keys if not _is_aside(key) and len({text(config.get(key)) for config in configs}) > 1]
    return [key for key in found if not _follows(key, configs)]


def _is_aside(key: str) -> bool:
    return is_seed(key) or (key != "device" and is_one_of(key, (*HOUSEKEEPING, "max_time")))


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
    return "".join(character if character.isprintable() else "�" for character in value)


# -- conditions: optimizer=adamw, val_accuracy>0.9, optimizer.lr<=0.1, model=resnet*

_LINE = re.compile(r"(?P<key>[\w./-]+?)(?P<sign>!=|>=|<=|=|>|<)(?P<value>.*)", re.DOTALL)
_ORDER: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le,
}  # fmt: skip


@dataclass(frozen=True)
class Condition:
    key: str
    sign: str  # = != > >= < <=
    value: str
    line: str

    def holds(self, record: Record) -> bool:
        found = value_of(record, self.key)
        number = number_in(self.value)
        if self.sign in _ORDER:
            return is_number(found) and number is not None and _ORDER[self.sign](found, number)
        if is_number(found) and number is not None:
            equal = found == number
        else:
            equal = fnmatchcase(text(found), _pattern(self.value))
        return equal == (self.sign == "=")


def condition(line: str) -> Condition | None:
    """What was typed, taken apart; None where it is no condition. Raises `UserError` for one that cannot be."""
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    found = Condition(match["key"], match["sign"], match["value"], line)
    if found.sign in _ORDER and number_in(found.value) is None:
        raise UserError(f"{line}: a number is needed behind {found.sign}")
    return found


def select(records: Sequence[Record], conditions: Sequence[Condition]) -> list[Record]:
    """The runs that fulfil all of them. Raises `UserError` for a key that none of the runs has."""
    for each in conditions:
        check_key(each.key, each.line, records)
        if each.key == "status" and not any(fnmatchcase(status, _pattern(each.value)) for status in STATUSES):
            raise UserError(f"{each.line}: unknown status; allowed: {', '.join(STATUSES)}")
    return [record for record in records if all(each.holds(record) for each in conditions)]


def check_key(key: str, line: str, records: Sequence[Record]) -> None:
    """Raises `UserError` where none of the runs has such a key or metric."""
    known = dict.fromkeys(["status", *(k for r in records for k in (*r.metrics, *r.config))])
    if not records or key in known or key.removeprefix("best_") in known:
        return
    ends = [each for each in known if each.rpartition(".")[2] == key]
    close = ends or get_close_matches(key, list(known), n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}? " if close else ""
    metrics = ", ".join(dict.fromkeys(name for record in records for name in record.metrics))
    raise UserError(f"{line}: none of the runs has {key}; {hint}allowed: status, a key of the config, {metrics}")


def value_of(record: Record, key: str) -> Any:
    """A metric, a value of the config, or the status; None where the run has none."""
    if key == "status":
        return record.status
    metric = record.metrics.get(key, record.metrics.get(key.removeprefix("best_")))
    return record.config.get(key) if metric is None else metric


def number_in(value: str) -> float | None:
    """The finite number that a text says; None where it says none."""
    try:
        number = float(value)
    except ValueError:
        return None
    return number if is_number(number) else None


def _pattern(value: str) -> str:
    """Brackets stand for themselves: model.widths=[64,64]; * and ? are wild."""
    return value.replace(" ", "").replace("[", "[[]") if "[" in value else value
