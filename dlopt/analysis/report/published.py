"""Runs of a paper's recipe beside what the paper says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dlopt.analysis.leaderboard import Statistic
from dlopt.analysis.report.table import Configuration, Table


@dataclass(frozen=True)
class Beside:
    """Test errors in %: of a configuration's runs (None where none has ended), and the published one."""

    row: Configuration
    measured: Statistic | None
    published: float


def published_error(config: Mapping[str, Any]) -> float | None:
    """The test error (%) that a config gives for what its run did: the first of `published` whose `when` holds.

    `config` has dotted keys."""
    entries = config.get("published")
    for entry in entries if isinstance(entries, list | tuple) else ():
        found = _mapping(entry)
        error, when = found.get("error"), found.get("when")
        if not isinstance(error, int | float) or when is None:
            continue
        if all(key in config and _plain(config[key]) == _plain(value) for key, value in _mapping(when).items()):
            return float(error)
    return None


def _mapping(value: Any) -> dict[str, Any]:
    """A mapping, or the pairs that a record keeps of one; of anything else nothing."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple) and all(isinstance(each, tuple) and len(each) == 2 for each in value):
        return dict(value)
    return {}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def beside_published(table: Table) -> list[Beside]:
    """The configurations of which a published figure is known, in the table's order.

    Their test figures are all shown: they are no candidates among which one is chosen.
    """
    found = []
    for row in table.rows:
        error = published_error(row.runs[0].config)
        if error is None:
            continue
        accuracy = row.statistic("test_accuracy")
        measured = None
        if accuracy is not None:
            std = None if accuracy.std is None else 100 * accuracy.std
            measured = Statistic(100 * (1 - accuracy.mean), std, accuracy.count)
        found.append(Beside(row, measured, error))
    return found


def name_of(beside: Beside, table: Table) -> str:
    """The recipe's name, and in what it differs from the other rows of that name."""
    name = str(beside.row.runs[0].config.get("name", beside.row.label))
    alike = [row for row in table.rows if row.runs[0].config.get("name") == name]
    if len(alike) == 1:
        return name
    keys = [key for key, value in beside.row.values.items() if any(row.values.get(key) != value for row in alike)]
    return " ".join([name, *(f"{key.rpartition('.')[2]}={beside.row.values[key]}" for key in keys)])
