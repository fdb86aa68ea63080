"""Compares runs with published results: the `published` entries of a recipe (a file of `experiment=`)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlopt.basics.roles import Role
from dlopt.config.keys import ROUNDING, role_of
from dlopt.config.overrides import key_of
from dlopt.results.intervals import Statistic
from dlopt.results.leaderboard import canonical
from dlopt.results.ranking import Configuration, Ranking


@dataclass(frozen=True)
class PublishedRow:
    """Measured test error (%) of a configuration (None if no run has ended), and the published one."""

    row: Configuration
    measured: Statistic | None
    median: float | None  # of the measured errors: papers report it for few runs
    published: float


def published_error(config: Mapping[str, Any], overrides: Sequence[str]) -> float | None:
    """Returns the published test error (%) for a flat config: the first entry of `published` that applies.

    Its `when` holds, and no other key of the recipe was overridden, except where runs execute and what they write.
    """
    entries = canonical(config.get("published"))
    for entry in map(_mapping, entries if isinstance(entries, tuple) else ()):
        error, when = entry.get("error"), entry.get("when")
        if not isinstance(error, int | float) or when is None:
            continue
        conditions = _mapping(when)
        holds = all(key in config and canonical(config[key]) == value for key, value in conditions.items())
        if holds and not any(_changes_the_config(line, conditions) for line in overrides):
            return float(error)
    return None


def _changes_the_config(override: str, conditions: Iterable[str]) -> bool:
    """Returns whether an override departs from the published experiment; `conditions` are checked by their values."""
    key = key_of(override)
    if role_of(key) not in (Role.IDENTITY, Role.PROTOCOL, Role.LENGTH) or key in ROUNDING:
        return False
    return not any(name == key or name.startswith(f"{key}.") for name in conditions)


def _mapping(pairs: Any) -> dict[str, Any]:
    """Converts the pairs of `canonical` back to a mapping; returns {} for anything else."""
    is_pairs = isinstance(pairs, tuple) and all(isinstance(each, tuple) and len(each) == 2 for each in pairs)
    return dict(pairs) if is_pairs else {}


def against_published(ranking: Ranking) -> list[PublishedRow]:
    """Returns the configurations with a published result, in the ranking's order.

    Shows all their test metrics, because no configuration is selected by them.
    """
    rows = []
    for row in ranking.rows:
        run, accuracy = row.runs[0], row.statistic("test_accuracy")
        error = published_error(run.config, run.overrides)
        if error is None:
            continue
        measured, median = None, None
        if accuracy is not None:
            std = None if accuracy.std is None else 100 * accuracy.std
            measured = Statistic(100 * (1 - accuracy.mean), std, accuracy.count)
            median = 100 * (1 - float(np.median([*row.by_seeds("test_accuracy").values()])))
        rows.append(PublishedRow(row, measured, median, error))
    return rows


def recipe_label(published: PublishedRow, ranking: Ranking) -> str:
    """Returns the recipe's name with the keys in which it differs from other rows with the same name."""
    name = str(published.row.runs[0].config.get("name", published.row.label))
    same_name = [row for row in ranking.rows if row.runs[0].config.get("name") == name]
    if len(same_name) == 1:
        return name
    values = published.row.values
    keys = [key for key, value in values.items() if any(row.values.get(key) != value for row in same_name)]
    return " ".join([name, *(f"{key.rpartition('.')[2]}={values[key]}" for key in keys)])
