"""Runs gathered into configurations, ranked by a validation figure."""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dlopt.analysis.leaderboard import Difference, Entry, Row, Statistic, direction_of, leaderboard
from dlopt.analysis.report.keys import brief, printable, varying
from dlopt.analysis.report.reading import Damaged, Record
from dlopt.errors import UserError
from dlopt.tracking.layout import short_path

_NOT_RANKED = ("epochs", "steps", "best_epoch", "parameters", "processes")
_OVERRIDE = re.compile(r"[+~]{0,2}\w[\w./@-]*(=.*)?")
_NOT_REPEATED = ("hydra.", "hydra/", "resume=", "dry_run=", "name=")  # where a run stands, not what it computes


@dataclass(frozen=True)
class Configuration:
    """A row of the leaderboard: runs that differ in their seeds only."""

    label: str
    values: Mapping[str, Any]  # of the keys in which configurations differ
    runs: tuple[Record, ...]
    row: Row

    @property
    def value(self) -> Statistic | None:
        """Of the figure that ranks, over the runs that have ended."""
        return self.row.value

    @property
    def difference(self) -> Difference | None:
        """To the first row, paired over seeds."""
        return self.row.difference

    def statistic(self, figure: str) -> Statistic | None:
        return self.row.statistic(figure)

    @property
    def command(self) -> str | None:
        """What to type for these runs again, quoted for the shell; None where that is not known."""
        typed = [_repeatable(run.overrides) for run in self.runs]
        lines = [None if each is None else [line for line in each if not line.startswith("seed=")] for each in typed]
        seeds = sorted({seed for run in self.runs if isinstance(seed := run.config.get("seed"), int)})
        if lines[0] is None or any(each != lines[0] for each in lines) or not 1 < len(seeds) == len(self.runs):
            return command(self.runs[0])
        return _shell(["-m", *lines[0], f"seed={','.join(map(str, seeds))}"])


@dataclass(frozen=True, eq=False)
class Table:
    """All that the pictures and the page show. Rows without a value (failed, or still running) stand last."""

    by: str
    keys: Sequence[str]
    rows: Sequence[Configuration]
    records: Sequence[Record]
    damaged: Sequence[Damaged]

    @property
    def lower(self) -> bool:
        return direction_of(self.by) == "minimize"

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.records if record.status in ("failed", "unfinished")]

    @property
    def ranked(self) -> list[Configuration]:
        return [row for row in self.rows if row.value is not None]

    def counts(self) -> dict[str, int]:
        """Runs by status, in the order of their number."""
        found: dict[str, int] = {}
        for record in self.records:
            found[record.status] = found.get(record.status, 0) + 1
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def gather(records: Sequence[Record], damaged: Sequence[Damaged], by: str | None = None) -> Table:
    """Groups and ranks. `by` None: val_accuracy, or val_loss where no run has it. Raises `UserError`."""
    by = _figure(records, by)
    keys = varying([record.config for record in records])
    known = {str(record.path): record for record in records}
    rows = []
    for row in leaderboard([_entry(record) for record in records], figure=by).rows:
        runs = tuple(known[run.name] for run in row.runs)
        values = {key: runs[0].config[key] for key in keys if key in runs[0].config}
        label = " ".join(f"{short_key(key, keys)}={brief(value)}" for key, value in values.items())
        rows.append(Configuration(printable(label) or runs[0].path.name, values, runs, row))
    return Table(by, keys, rows, records, damaged)


def _figure(records: Sequence[Record], by: str | None) -> str:
    names = dict.fromkeys(name for record in records for name in record.figures)
    allowed = [name for name in names if name not in _NOT_RANKED and not name.startswith("test_")]
    if by is None:
        return "val_accuracy" if "val_accuracy" in names or "val_loss" not in names else "val_loss"
    by = by.removeprefix("best_")
    if by.startswith("test_"):
        raise UserError(f"by={by}: ranked by a test figure, runs would be chosen on the test set; by=val_accuracy")
    if by not in allowed:
        raise UserError(f"by={by}: the runs have no such figure; allowed: {', '.join(allowed) or 'none'}")
    return by


def _entry(record: Record) -> Entry:
    status = "stopped_early" if record.status == "pruned" else record.status
    figures = {**record.figures, "status": status, "pruned": record.status == "pruned"}
    return Entry(str(record.path), record.config, figures, record.overrides)


def short_key(key: str, keys: Iterable[str]) -> str:
    """`lr` for `optimizer.lr`, where no other key ends so."""
    name = key.rpartition(".")[2]
    return name if sum(each.rpartition(".")[2] == name for each in keys) == 1 else key


def command(run: Record) -> str | None:
    """What to type for this run again, quoted for the shell; None where that is not known."""
    lines = _repeatable(run.overrides)
    return None if lines is None else _shell(lines)


def command_from(run: Record) -> str | None:
    """The same by the run's folder, whatever has become of the defaults meanwhile."""
    return _shell([f"from={short_path(run.path)}"])


def _repeatable(overrides: Iterable[str]) -> list[str] | None:
    """Without where the run stood; None where a line is no override, so that the run cannot be told."""
    lines = list(overrides)
    if not lines or not all(_OVERRIDE.fullmatch(line) for line in lines):
        return None
    return [line for line in lines if not line.lstrip("+").startswith(_NOT_REPEATED)]


def _shell(words: Sequence[str]) -> str | None:
    line = shlex.join(["dlopt", "train", *words])
    return line if printable(line) == line else None
