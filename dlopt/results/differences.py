"""Compares two runs: the keys of their configs that differ, and their metrics."""

from dlopt.basics.formats import format_value as text
from dlopt.metrics.shown import format_metric, words
from dlopt.results.leaderboard import Record

Row = tuple[str, str, str]
"""A key, and its values in both runs."""


def config_rows(first: Record, second: Record) -> list[Row]:
    """Returns the keys with different values except the runs' ids, in the configs' order; "-" without such a key."""

    def cell(key: str, record: Record) -> str:
        return text(record.config[key]) if key in record.config else "-"

    keys = [key for key in dict.fromkeys([*first.config, *second.config]) if key != "run_id"]
    rows = [(key, cell(key, first), cell(key, second)) for key in keys]
    return [row for row in rows if row[1] != row[2]]


def metric_rows(first: Record, second: Record, *, brief: bool) -> list[Row]:
    """Returns the metrics of both runs, the main ones first; "-" where a run has no such metric.

    `brief`: named and rounded as on the page of a report; otherwise by their keys, with all digits.
    """
    from dlopt.results.columns import FIRST  # imports NumPy, which the help of `dlopt runs` does not need

    known = dict.fromkeys([*first.metrics, *second.metrics])
    names = dict.fromkeys([*(name for name in FIRST if name in known), *known])

    def cell(name: str, record: Record) -> str:
        value = record.metrics.get(name)
        return "-" if value is None else format_metric(name, value) if brief else text(value)

    return [(words(name) if brief else name, cell(name, first), cell(name, second)) for name in names]
