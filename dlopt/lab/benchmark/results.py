"""Results of a benchmark: what each trial reached, and the JSON file that holds them.

A trial is one training run of an optimizer on a workload, with hyperparameters drawn from the optimizer's search space.
A study is a sample of trials, from which the best is chosen, as if you had tuned the optimizer once.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from dlopt.extend import NonNegative, Positive, Stored, UserError, lower_is_better
from dlopt.lab.benchmark.protocol import Track

FORMAT = 1
_MAX_BYTES = 1 << 26  # of a file of results: 20,000 trials have 1 MB
REFERENCE = Path(__file__).with_name("reference")  # results of `dlopt benchmark ... full=true`, which come with dlopt
Measure = Literal["updates", "evaluations", "time"]
MEASURES: tuple[Measure, ...] = get_args(Measure)


@dataclass(frozen=True)
class WorkloadTarget:
    """What decides on a workload: the validation metric, its target, and the updates of a full run."""

    metric: str
    target: float
    updates: int


@dataclass(frozen=True)
class TrialRecord:
    """Result of one trial.

    Attributes:
        values: drawn hyperparameters by key.
        updates: to the target; infinity: not reached.
        evaluations: of the loss until the target; more than updates for optimizers with several evaluations per update.
        best: best value of the metric; None if the trial failed before its first validation.
        last: value at its end; None if the trial diverged or failed.
        first: value of the first validation.
        failure: why the trial failed; "": it did not.
    """

    study: int
    trial: int
    values: Mapping[str, Any]
    updates: float
    evaluations: float
    first: float | None
    best: float | None
    last: float | None
    failure: str = ""

    @property
    def reached(self) -> bool:
        return math.isfinite(self.updates)


def best_trial(records: Sequence[TrialRecord], metric: str) -> TrialRecord | None:
    """Returns the trial with the fewest updates to the target; if none reached it, the one with the best metric."""
    sign = 1 if lower_is_better(metric) else -1
    validated = [(record.updates, sign * record.best, record) for record in records if record.best is not None]
    return min(validated, key=lambda each: each[:2])[2] if validated else None


@dataclass(frozen=True)
class UpdateCost:
    """Cost of an optimizer on a workload, measured in pairs with SGD in one process.

    Attributes:
        time: time of an update relative to SGD's: median of the pairs, `low` and `high` their quartiles.
        state: memory of the optimizer's state relative to the parameters.
    """

    time: Positive
    low: Positive
    high: Positive
    state: NonNegative


@dataclass(frozen=True)
class Cell:
    """All trials of an optimizer on a workload.

    Attributes:
        curve: (updates, metric) at each validation of the fastest trial of all studies; if none reached the target, of
            the trial with the best metric.
        tests: test metrics of each study's best trial, by study; a study without a test is missing.
    """

    records: tuple[TrialRecord, ...]
    cost: UpdateCost | None = None
    curve: tuple[tuple[int, float], ...] = ()
    tests: Mapping[int, Mapping[str, float]] = field(default_factory=dict)

    def study(self, number: int) -> list[TrialRecord]:
        return [record for record in self.records if record.study == number]

    def truncated(self, studies: int, trials: int, metric: str) -> "Cell":
        """Returns the cell of a smaller budget: the first trials of the first studies.

        Omits the curve and the tests of best trials that are not among them, for which it has no replacement.
        """
        records = tuple(each for each in self.records if each.study < studies and each.trial < trials)
        tests = {study: each for study, each in self.tests.items() if best_trial(self.study(study), metric) in records}
        curve = self.curve if best_trial(self.records, metric) in records else ()
        return replace(self, records=records, curve=curve, tests=tests)


@dataclass(frozen=True)
class Results:
    """Results of a benchmark.

    Attributes:
        studies: of each optimizer; shipped results may have more of the optimizers that three cannot tell apart.
        cells: by (optimizer, workload).
        spaces: optimizer -> key -> search space in Hydra's notation, or the fixed value.
        shipped: optimizers whose results were not measured here, but come with dlopt.
        facts: how the results were made: command, versions, machine, date.
    """

    tier: str
    studies: int
    trials: int
    workloads: Mapping[str, WorkloadTarget]
    cells: Mapping[tuple[str, str], Cell]
    spaces: Mapping[str, Mapping[str, str]]
    shipped: frozenset[str] = frozenset()
    facts: Mapping[str, Any] = field(default_factory=dict)
    track: Track = "external_tuning"

    @property
    def optimizers(self) -> list[str]:
        return list(dict.fromkeys(optimizer for optimizer, _ in self.cells))

    @property
    def has_targets(self) -> bool:
        return not all(math.isnan(workload.target) for workload in self.workloads.values())

    def cell(self, optimizer: str, workload: str) -> Cell:
        return self.cells.get((optimizer, workload), Cell(()))

    def records(self, optimizer: str) -> list[TrialRecord]:
        return [record for workload in self.workloads for record in self.cell(optimizer, workload).records]

    def studies_of(self, optimizer: str) -> int:
        """Returns the number of studies of an optimizer; own ones count also before they have begun."""
        begun = max((record.study + 1 for record in self.records(optimizer)), default=0)
        return begun if optimizer in self.shipped else max(begun, self.studies)

    def missing(self) -> int:
        """Returns the number of own trials that have not ended yet."""
        own = [name for name in self.optimizers if name not in self.shipped]
        return sum(
            self.studies_of(name) * self.trials - len(self.cell(name, workload).records)
            for name in own
            for workload in self.workloads
        )

    def with_reference(self, reference: "Results") -> "Results":
        """Adds the optimizers of `reference` that are missing here, with the budget of these results."""
        own = set(self.optimizers)
        added = {
            key: cell.truncated(self.studies, self.trials, self.workloads[key[1]].metric)
            for key, cell in reference.cells.items()
            if key[0] not in own and key[1] in self.workloads
        }
        return replace(
            self,
            cells={**self.cells, **added},
            spaces={**reference.spaces, **self.spaces},
            shipped=frozenset(optimizer for optimizer, _ in added),
            facts={
                **self.facts,
                "reference": {"studies": reference.studies, "trials": reference.trials, **reference.facts},
            },
        )


# -- the file


_COLUMNS = ("study", "trial", "updates", "evaluations", "first", "best", "last", "failure")  # then the drawn values


def to_json(results: Results) -> str:
    """Returns the results as JSON, a list per trial whose entries `columns` names; infinity becomes null."""
    content = {
        "format": FORMAT,
        "tier": results.tier,
        "track": results.track,
        "studies": results.studies,
        "trials": results.trials,
        "facts": dict(results.facts),
        "workloads": {name: vars(workload) for name, workload in results.workloads.items()},
        "spaces": {name: dict(space) for name, space in results.spaces.items() if name not in results.shipped},
    }
    lines = [f'  "{key}": {json.dumps(value)}' for key, value in content.items()]
    cells = []
    for (optimizer, workload), cell in results.cells.items():
        if optimizer not in results.shipped:
            cells.append(_cell_to_json(optimizer, workload, cell))
    lines.append('  "cells": [\n' + ",\n".join(cells) + "\n  ]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _cell_to_json(optimizer: str, workload: str, cell: Cell) -> str:
    """Returns a cell as JSON, with a line per trial."""
    drawn = list(dict.fromkeys(key for record in cell.records for key in record.values))
    content = {
        "optimizer": optimizer,
        "workload": workload,
        "cost": None if cell.cost is None else _rounded_values(vars(cell.cost)),
        "curve": [[updates, _rounded(metric)] for updates, metric in cell.curve],
        "tests": {str(study): _rounded_values(metrics) for study, metrics in cell.tests.items()},
        "columns": [*_COLUMNS, *drawn],
    }
    head = json.dumps(content).removesuffix("}")
    trials = [json.dumps(_row(record, drawn), separators=(",", ":")) for record in cell.records]
    lines = ",\n      ".join(trials)
    return f'    {head}, "trials": [\n      {lines}]}}'


def _row(record: TrialRecord, drawn: Sequence[str]) -> list[Any]:
    """Returns a trial in the order of `_COLUMNS`, then its values of the keys `drawn`."""
    reached = [record.updates, record.evaluations] if record.reached else [None, None]
    metrics = [_rounded(record.first), _rounded(record.best), _rounded(record.last)]
    values = [record.values.get(key) for key in drawn]
    return [record.study, record.trial, *reached, *metrics, record.failure, *values]


def _rounded_values(values: Mapping[str, float]) -> dict[str, float | None]:
    return {key: _rounded(value) for key, value in values.items()}


def _rounded(value: float | None) -> float | None:
    """Returns five digits of a value; None for NaN and infinity."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")


def read(path: Path) -> Results | None:
    """Reads the results written by `to_json`; None if there is no file. Raises `UserError`."""
    stored = Stored[dict[str, Any]](path, dict, _MAX_BYTES)
    content = stored.read()
    if content is None:
        return None
    try:
        if content["format"] != FORMAT:
            raise UserError(f"{path}: format {content['format']} is not supported; this dlopt reads {FORMAT}")
        cells = {(each["optimizer"], each["workload"]): _cell(each) for each in content["cells"]}
        return Results(
            content["tier"],
            content["studies"],
            content["trials"],
            {key: WorkloadTarget(**value) for key, value in content["workloads"].items()},
            cells,
            content["spaces"],
            facts=content["facts"],
            track=content["track"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise stored.damaged(f"not the results of a benchmark ({type(error).__name__}: {error})") from None


def _cell(content: Mapping[str, Any]) -> Cell:
    cost = content["cost"]
    return Cell(
        tuple(_record(dict(zip(content["columns"], row, strict=True))) for row in content["trials"]),
        None if cost is None else UpdateCost(**cost),
        tuple((updates, math.nan if value is None else value) for updates, value in content["curve"]),
        {int(study): test for study, test in content["tests"].items()},
    )


def _record(row: Mapping[str, Any]) -> TrialRecord:
    reached = {key: math.inf if row[key] is None else row[key] for key in ("updates", "evaluations")}
    columns = {key: row[key] for key in _COLUMNS}
    values = {key: value for key, value in row.items() if key not in _COLUMNS and value is not None}
    return TrialRecord(**(columns | reached), values=values)


def load_reference(tier: str, track: Track = "external_tuning") -> Results | None:
    """Returns the shipped results of a tier; None if there are none. Raises `UserError` for a damaged file."""
    return read(REFERENCE / (f"{tier}.json" if track == "external_tuning" else f"{tier}_{track}.json"))
