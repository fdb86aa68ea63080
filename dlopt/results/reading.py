"""Reads run folders into records, finds the keys in which runs differ, selects runs by conditions.

Run folders are untrusted: all content is checked.
"""

import contextlib
import json
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from dlopt.basics.errors import UserError
from dlopt.basics.folders import ENDED, SPACE, RunFolder, short_path
from dlopt.basics.formats import format_value as text
from dlopt.basics.formats import printable
from dlopt.basics.names import Names
from dlopt.basics.plain_values import choices_of_groups, flatten, load_json, load_yaml, parse_numbers, regular_lines
from dlopt.config.keys import LABELS
from dlopt.config.older import with_moved
from dlopt.metrics.measures import MEASURES, derived
from dlopt.metrics.names import column_of, direction_of, monitored_directions, resolve_monitor, selection_key, split_of
from dlopt.results.history import History, columns
from dlopt.results.leaderboard import FOLDS, Record, Search, canonical, distinguishes, is_number
from dlopt.tracking.metrics import DIAGNOSTICS, MAX_METRICS, METRICS, SUMMARY, read_metrics

OPEN = ("running", "interrupted", "unfinished")
"""Statuses of runs whose training has not ended; all but `running` can be resumed."""
STATUSES = (*ENDED, "pruned", *OPEN, "failed")
"""Statuses of summary.json, and `pruned` (by its sweep), `running` (has a live process), `unfinished` (has none)."""

_RUN_FILES = ("config.yaml", SUMMARY, METRICS)
_OWN_FILES = ("overrides.yaml", "environment.json")
_RUN_SUBFOLDERS = ("checkpoints", "tensorboard", "wandb")  # wandb writes its own config.yaml
_NO_KEYS = Names("key", ())
_LARGEST_LOG = 100_000_000  # bytes of train.log, whose first line is read
_DEEPEST = 3  # folders of a job below that of its sweep: hydra.sweep.subdir may have several parts
_STATE = [name for name, each in MEASURES.items() if each.is_state]
_GAPS = [name for name, each in MEASURES.items() if each.of_line is not None]


@dataclass(frozen=True)
class Damaged:
    """A run folder that cannot be read, with the reason."""

    path: Path
    reason: str


class RunReader:
    """Reads runs below folders; caches runs that have not changed since the last read."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[object, Record | Damaged]] = {}

    def read(self, folders: Iterable[Path]) -> tuple[list[Record], list[Damaged]]:
        """Reads the runs in and below `folders` without duplicates, sorted by path."""
        known, self._known = self._known, {}
        for path in dict.fromkeys(run for folder in folders for run in find(folder)):
            state = _fingerprint(path)
            cached = known.get(path)
            self._known[path] = cached if cached is not None and cached[0] == state else (state, read(path))
        search_of = cache(_search_of)
        for path, (state, result) in self._known.items():
            if isinstance(result, Record):
                of_run = next((found for each in path.parents[:_DEEPEST] if (found := search_of(each))), None)
                if of_run != result.search:
                    self._known[path] = state, replace(result, search=of_run)
        results = [cached for _, cached in self._known.values()]
        records = [result for result in results if isinstance(result, Record)]
        return records, [result for result in results if isinstance(result, Damaged)]


def _search_of(folder: Path) -> Search | None:
    """Reads what the sweep.yaml of a search says of its trials; None without one, or for a grid."""
    try:
        space = load_yaml(folder / SPACE)
    except (OSError, ValueError):
        return None
    facts = space.get("facts") if isinstance(space, dict) else None
    if not isinstance(facts, dict):
        return None
    seeds, names, goals = facts.get("seeds"), facts.get("objective"), space.get("directions")
    objective = names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else None
    goal = goals[0] if isinstance(goals, list) and goals and goals[0] in ("minimize", "maximize") else None
    return Search(objective, goal, len(seeds.split(",")) if isinstance(seeds, str) else 1)


def find(folder: Path) -> Iterator[Path]:
    """Yields run folders in and below `folder` in natural order (9 before 10), without following links."""
    waiting = [os.path.abspath(folder)]  # a stack, because a tree may be deeper than Python's calls
    while waiting:
        path = waiting.pop()
        try:
            entries = list(os.scandir(path))
        except OSError:
            continue
        is_run = any(entry.name in _RUN_FILES for entry in entries)
        if is_run:
            yield Path(path)
        names = [each.name for each in entries if each.is_dir(follow_symlinks=False) and not each.name.startswith(".")]
        names = [name for name in names if not (is_run and name in _RUN_SUBFOLDERS)]
        names.sort(key=lambda name: (len(name) if name.isdigit() else 0, name), reverse=True)
        waiting += [os.path.join(path, name) for name in names]


def read(path: Path) -> Record | Damaged:
    """Reads one run folder."""
    try:
        return _read(path)
    except _DamageError as error:
        return Damaged(path, str(error))
    except OSError as error:
        return Damaged(path, f"{Path(str(error.filename)).name} cannot be read: {error.strerror}")


def read_intact(path: Path, consequence: str = "") -> Record:
    """Reads one run folder. Raises `UserError`, which ends with `consequence`, for one that is not a readable run."""
    record = read(path)
    if isinstance(record, Damaged):
        raise UserError(f"{printable(short_path(path))}: {record.reason}{consequence}")
    return record


class _DamageError(Exception):
    pass


def _read(path: Path) -> Record:
    if (reason := RunFolder(path).other_format()) is not None:
        raise _DamageError(reason)
    config = _mapping(path / "config.yaml", load_yaml)
    if config is None:
        raise _DamageError("config.yaml is missing")
    config = with_moved(config)
    if not any((path / name).exists() for name in (*_OWN_FILES, SUMMARY, METRICS)):
        raise _DamageError("has a config.yaml, but no other file of a run; another tool may have written it")
    environment = _mapping(path / "environment.json", load_json) or {}
    summary = _mapping(path / SUMMARY, load_json)
    history = History(_lines(path / METRICS))
    overrides = tuple(RunFolder(path).typed())
    status = _status(path, summary)
    if status == "running" or summary is None:  # the summary of a resumed, running run is outdated
        summary = {}
    choices, reason, commit = environment.get("choices"), summary.get("reason"), environment.get("git_commit")
    flat, metrics = _flat(config, choices if isinstance(choices, dict) else {}), _metrics(summary, history, config)
    reason, commit = (each if isinstance(each, str) else None for each in (reason, commit))
    return Record(path, status, flat, metrics, history, overrides, reason, commit, _origin(environment, config))


def _origin(environment: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `Record.origin`; without folders, which may have moved."""
    data, packages = environment.get("data"), environment.get("allow_packages")
    code = {
        name: {key: value for key, value in package.items() if key != "folder"}
        for name, package in (packages.items() if isinstance(packages, dict) else ())
        if isinstance(package, dict)
    }
    names = ("dlopt", "git_commit", "torch")
    versions = {name: environment[name] for name in names if isinstance(environment.get(name), str)}
    facts = data if isinstance(data, dict) else {}
    validation = _validation(facts.get("validation"))
    device = environment.get("processor") if config.get("device") == "cpu" else environment.get("gpu")
    return {
        "data": facts.get("identity"), "code": code, "versions": versions, "validation": validation,
        "device": next((each for each in (device, environment.get("processor")) if isinstance(each, str)), ""),
    }  # fmt: skip


def _validation(found: object) -> dict[str, Any] | None:
    """Returns what a validation counts: `count` and `unit`; None if it is unknown."""
    if not isinstance(found, dict):
        return None
    count, unit = found.get("count"), found.get("unit")
    is_known = isinstance(count, int) and not isinstance(count, bool) and count > 0 and isinstance(unit, str)
    return {"count": count, "unit": unit} if is_known else None


def _mapping(path: Path, load: Callable[[Path], Any]) -> dict[str, Any] | None:
    """Reads a file with a mapping; None if the file is missing."""
    try:
        content = load(path)
    except FileNotFoundError:
        return None
    except (UnicodeError, json.JSONDecodeError):
        raise _DamageError(f"{path.name} is damaged") from None
    except ValueError as error:
        raise _DamageError(f"{path.name} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise _DamageError(f"{path.name} is damaged: it holds no keys")
    return {str(key): value for key, value in content.items()}


def _lines(path: Path) -> Iterator[dict[str, float]]:
    """Yields the evaluated epochs, without an incomplete last line of a running or killed run."""
    try:
        lines = regular_lines(path, MAX_METRICS)
    except FileNotFoundError:
        return
    except ValueError as error:
        raise _DamageError(f"{path.name} {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            entry = parse_numbers(line)
        except ValueError:
            if not line.endswith(b"\n") and next(lines, None) is None:
                return
            raise _DamageError(f"{path.name} is damaged in line {number}") from None
        if not isinstance(entry, dict) or not {"epoch", "step"} <= (numbers := _numbers(entry)).keys():
            raise _DamageError(f"{path.name} is damaged in line {number}: no epoch and step")
        yield numbers | derived(numbers)


def diagnostics(record: Record) -> History:
    """Reads diagnostics.jsonl of a run: values by TensorBoard tag.

    Adds to the `step` of each line its `epoch` and `seconds`, interpolated between evaluations. Empty without one.
    """
    import numpy as np

    lines: list[dict[str, float]] = []
    with contextlib.suppress(OSError):
        lines = [_numbers(line) for line in read_metrics(record.path, DIAGNOSTICS)]
    lines = [line for line in lines if "step" in line]
    if not lines or not record.history:
        return History()
    evaluated = columns(record.history, ("step", "epoch", "seconds"))
    if (last := evaluated[-1, 0]) <= 0:  # of a stranger
        return History()
    steps = np.array([line["step"] for line in lines])
    end = max(steps.max(), last + 1)  # of a run that trains on after its last evaluation
    known = np.concatenate([np.zeros((1, 3)), evaluated, evaluated[-1:] * end / last])
    epochs, seconds = (np.interp(steps, known[:, 0], values).round(6) for values in known.T[1:])
    positions = zip(epochs, seconds, strict=True)
    return History({"epoch": e, "seconds": s} | line for (e, s), line in zip(positions, lines, strict=True))


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    return {str(key): value for key, value in entry.items() if is_number(value)}


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
    """Flattens a config to dotted keys in its order, each group's choice before its keys."""
    flat: dict[str, Any] = {}
    chosen = choices_of_groups(config, choices)
    for key, value in config.items():
        if key in chosen:
            flat[key] = chosen[key]
        if isinstance(value, Mapping):
            inner = {name: item for name, item in flatten(value, key).items() if not name.endswith("._target_")}
            flat |= {name: canonical(item) for name, item in inner.items() if not isinstance(item, Mapping)}
        elif key not in flat:
            flat[key] = canonical(value)
    return flat


def _metrics(summary: Mapping[str, Any], history: History, config: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of the best epoch, and the costs of the whole run: a gap fits the metrics beside it.

    Training metrics and gaps are those of the last epoch if no epoch is known to be the best one. With `data.folds`,
    metrics of validation and training are those of the last evaluation: the fold that reports them would choose the
    best one.
    """
    has_folds = flatten(config).get(FOLDS) is not None
    metrics: dict[str, Any] = {}
    if history:
        found = (i for i, epoch in enumerate(history.values("epoch")) if epoch == summary.get("best_epoch"))
        at = next(found, None)
        last, best = history[-1], _best_line(history, config) if at is None else history[at]
        costs = {k: v for k, v in last.items() if split_of(k) is None and k not in (*_STATE, *_GAPS)}
        metrics = costs | {"epochs": last["epoch"], "steps": last["step"]}
        chosen = {k: v for k, v in last.items() if split_of(k) != "val"} if best is None else best
        if has_folds:
            chosen = next((line for line in reversed(history) if any(split_of(k) == "val" for k in line)), last)
        metrics |= {k: v for k, v in chosen.items() if split_of(k) is not None or k in _GAPS}
        metrics |= {} if best is None else {"best_epoch": best["epoch"]}
    for key, value in summary.items():
        if key not in ("epochs", "steps") or is_number(value):
            column = column_of(key)
            if split_of(column) != "val":
                metrics[key] = value
            elif not (has_folds and history):
                metrics[column] = value
    return _numbers(metrics)


def _best_line(history: History, config: Mapping[str, Any]) -> Mapping[str, float] | None:
    """Returns the epoch of the best model, as training selects it, for runs without a summary. `config`: of the run."""
    logged = history.latest()
    monitor = resolve_monitor(str(config.get("monitor", "auto")), logged)
    directions = monitored_directions(flatten(config))
    if direction_of(monitor, directions) is None:
        return None
    known = [line for line in history if monitor in line]
    return min(known, key=lambda line: selection_key(line, monitor, directions), default=None)


def _fingerprint(path: Path) -> object:
    """Returns a value that changes whenever the run's files or liveness change."""
    states = []
    for name in (*_RUN_FILES, *_OWN_FILES, ".lock"):
        try:
            status = (path / name).stat()
            states.append((status.st_mtime_ns, status.st_size, status.st_ino))
        except OSError:
            states.append((0, 0, 0))
    # A killed run touches no file: without a summary, its status depends on whether its process lives.
    has_summary = states[1] != (0, 0, 0)
    return (*states, None if has_summary else RunFolder(path).is_live())


# -- keys in which runs differ


def varying_keys(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the keys with several values except seeds, in the configs' order.

    Omits keys of a group that the group's choice determines, such as defaults of different optimizers.
    """
    keys = dict.fromkeys(key for config in configs for key in config)
    known = [key for key in keys if key == "device" or distinguishes(key)]
    several = [key for key in known if len({text(config.get(key)) for config in configs}) > 1]
    return [key for key in several if not _is_determined_by_choice(key, configs)]


def _is_determined_by_choice(key: str, configs: Iterable[Mapping[str, Any]]) -> bool:
    group, _, inner = key.partition(".")
    pairs = {(text(config.get(group)), text(config.get(key))) for config in configs}
    return inner != "" and len(pairs) == len({choice for choice, _ in pairs})


def short_key(key: str, keys: Iterable[str]) -> str:
    """Returns the last component of a key (`lr` for `optimizer.lr`) if it is unique among `keys`."""
    name = key.rpartition(".")[2]
    return name if sum(other.rpartition(".")[2] == name for other in keys) == 1 else key


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
        actual = value_of(record, self.key)
        if self.key == "tags" and self.sign in ("=", "!=") and not self.value.startswith("["):
            return any(fnmatchcase(tag, self.value) for tag in tags_of(record)) == (self.sign == "=")
        number = number_in(self.value)
        if self.sign in _ORDER:
            return is_number(actual) and number is not None and _ORDER[self.sign](actual, number)
        if is_number(actual) and number is not None:
            equal = actual == number
        else:
            equal = fnmatchcase(text(actual), _pattern(self.value))
        return equal == (self.sign == "=")


def condition(line: str) -> Condition | None:
    """Parses a condition; returns None if `line` is not one. Raises `UserError` if its value must be a number."""
    if (match := _LINE.fullmatch(line)) is None:
        return None
    parsed = Condition(**match.groupdict(), line=line)
    if parsed.sign in _ORDER and number_in(parsed.value) is None:
        raise UserError(f"{line}: {parsed.sign} requires a number")
    return parsed


def select(records: Sequence[Record], conditions: Sequence[Condition], of_command: Names = _NO_KEYS) -> list[Record]:
    """Returns the runs that satisfy all conditions. Raises `UserError` for a key that no run has; see `check_key`."""
    for condition in conditions:
        check_key(condition.key, condition.line, records, of_command)
        if condition.key == "status" and not any(fnmatchcase(status, _pattern(condition.value)) for status in STATUSES):
            raise Names("status", STATUSES, prefix="status=").unknown(condition.value, condition.line)
    return [record for record in records if all(condition.holds(record) for condition in conditions)]


def is_known(key: str, records: Sequence[Record]) -> bool:
    """Returns whether a run has this key or metric; `tags` and `note` are keys of every run."""
    known = {"status", *LABELS, *(k for r in records for k in (*r.metrics, *r.config))}
    return key in known or column_of(key) in known


def check_key(key: str, line: str, records: Sequence[Record], of_command: Names = _NO_KEYS) -> None:
    """Raises `UserError` if no run has this key or metric. `of_command`: its keys, one of which may be misspelled."""
    if records and not is_known(key, records):
        metrics = dict.fromkeys(name for record in records for name in record.metrics)
        of_config = {name: name for record in records for name in record.config}
        known = [*of_command.known, "status", "a key of the config", *metrics]
        raise replace(of_command, known=known, forms=of_config).unknown(key, line)


def tags_of(record: Record) -> tuple[str, ...]:
    """Returns the tags of a run; () if it has none."""
    tags = record.config.get("tags")
    return tuple(map(str, tags)) if isinstance(tags, tuple) else ()


def value_of(record: Record, key: str) -> Any:
    """Returns a metric, a config value, or the status; None if the run has none."""
    if key == "status":
        return record.status
    metric = record.metrics.get(key, record.metrics.get(column_of(key)))
    return record.config.get(key) if metric is None else metric


def date_of(record: Record) -> str:
    """Returns when the run started, to the minute, as its log says: 2026-12-01 10:57; "" if unknown."""
    try:
        line = next(regular_lines(record.path / "train.log", _LARGEST_LOG), b"")[:16].decode(errors="replace")
    except (OSError, ValueError):
        return ""
    return line if re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", line) else ""


def number_in(value: str) -> float | None:
    """Parses a finite number; None for other text."""
    try:
        number = float(value)
    except ValueError:
        return None
    return number if is_number(number) else None


def _pattern(value: str) -> str:
    """Returns an fnmatch pattern with literal brackets (model.widths=[64,64]); * and ? are wildcards."""
    return value.replace(" ", "").replace("[", "[[]") if "[" in value else value
