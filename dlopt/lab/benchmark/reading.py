"""Reads the folder of a benchmark: the manifest, which states what is compared, and the trials' run folders."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from dlopt.basics.locks import locked
from dlopt.basics.plain_values import parse_json
from dlopt.extend import (
    Record,
    RunFolder,
    Stored,
    UserError,
    key_of,
    lower_is_better,
    read_run,
    value_of,
    write_json,
)
from dlopt.lab.benchmark.protocol import BASELINES, Track, Trial, WorkloadSpec, target_of
from dlopt.lab.benchmark.results import Cell, Results, TrialRecord, UpdateCost, WorkloadTarget, best_trial
from dlopt.lab.stored import MOST_RUNS, Name, Number
from dlopt.results.leaderboard import is_number
from dlopt.results.reading import Damaged

MANIFEST = "benchmark.json"
COST = "cost.json"  # in the folder of an optimizer and a workload
TEST = "test.json"  # in the folder of a trial
_TRIAL = re.compile("(0|[1-9][0-9]{0,6})-(0|[1-9][0-9]{0,6})")  # the folder of a trial

Curve = tuple[tuple[int, float], ...]
_Tests = dict[str, Any] | None  # None: of an interrupted test


@dataclass(frozen=True)
class Manifest:
    """What a folder compares.

    Attributes:
        workloads: name -> experiment, metric, target.
        optimizers: name -> key -> search space in Hydra's notation, or the fixed value.
        overrides: of all trials, from the command line.
        full: trials train to the end, instead of stopping at the target.
        commands: that have run the trials, without `output`.
    """

    tier: str
    studies: Number
    trials: Number
    workloads: Mapping[Name, WorkloadSpec]
    optimizers: Mapping[Name, Mapping[str, str]]
    overrides: Sequence[str]
    full: bool
    commands: Sequence[str] = ()
    track: Track = "external_tuning"

    def merged(self, other: "Manifest", folder: Path) -> "Manifest":
        """Returns the manifest of the trials of both. Raises `UserError` if they contradict each other."""
        mine, theirs = asdict(self), asdict(other)
        different = [key for key in ("tier", "track", "overrides", "full") if mine[key] != theirs[key]]
        for key in ("workloads", "optimizers"):
            shared = mine[key].keys() & theirs[key].keys()
            different += [f"{key}.{name}" for name in sorted(shared) if mine[key][name] != theirs[key][name]]
        if different:
            raise UserError(
                f"output={folder}: has trials of another benchmark (different: {', '.join(different)}); use another "
                "folder"
            )
        return replace(
            other,
            studies=max(self.studies, other.studies),
            trials=max(self.trials, other.trials),
            workloads={**self.workloads, **other.workloads},
            optimizers={**self.optimizers, **other.optimizers},
            commands=list(dict.fromkeys([*self.commands, *other.commands])),
        )


def read_manifest(folder: Path) -> Manifest | None:
    """Reads the manifest; None if there is none. Raises `UserError` for a damaged one."""
    stored = Stored(folder / MANIFEST, Manifest)
    manifest = stored.read()
    if manifest is not None:
        cells = len(manifest.workloads) * len(manifest.optimizers)
        if not cells or manifest.studies * manifest.trials * cells > MOST_RUNS:
            raise stored.damaged(f"must plan 1 to {MOST_RUNS:,} trials")
        for spec in manifest.workloads.values():
            lower_is_better(spec.metric)
    return manifest


def update_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Merges `manifest` into the folder's and returns the result. Raises `UserError` if they contradict each other."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".manifest.lock"):  # several processes may share the trials, each adds what it was given
        former = read_manifest(folder)
        merged = manifest if former is None else former.merged(manifest, folder)
        write_json(folder / MANIFEST, asdict(merged), indent=1)
    return merged


# -- trials


def collect(folder: Path, manifest: Manifest, facts: Mapping[str, Any]) -> Results:
    """Reads all trials of the manifest that have ended. Raises `UserError` for an unreadable one."""
    workloads, cells = {}, {}
    for name, spec in manifest.workloads.items():
        updates = 0
        for optimizer, space in manifest.optimizers.items():
            runs = dict(_ended(folder, manifest, name, optimizer))
            updates = updates or next(filter(None, (_full_length(run) for run in runs.values())), 0)
            records = [_record(run, trial, space, spec) for trial, run in runs.items()]
            best = best_trial(records, spec.metric)
            tests = {
                study: Stored[dict[str, Any]](
                    folder / Trial(name, optimizer, study, record.trial).subfolder / TEST, _Tests
                ).read()
                for study, record in best_trials(records, spec.metric).items()
            }
            cells[optimizer, name] = Cell(
                tuple(records),
                Stored(folder / optimizer / name / COST, UpdateCost).read(),
                () if best is None else _curve(runs[Trial(name, optimizer, best.study, best.trial)], spec.metric),
                {
                    study: {k: v for k, v in test.items() if is_number(v)}
                    for study, test in tests.items()
                    if test is not None
                },
            )
        workloads[name] = WorkloadTarget(spec.metric, math.nan if spec.target is None else spec.target, updates)
    spaces = {name: dict(space) for name, space in manifest.optimizers.items()}
    return Results(
        manifest.tier, manifest.studies, manifest.trials, workloads, cells, spaces, facts=facts, track=manifest.track
    )


def _numbers(test: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in test.items() if is_number(value)}


def targets(folder: Path, manifest: Manifest) -> dict[str, float]:
    """Returns the target of each workload from the trials of the baselines, see `target_of`."""
    found = {}
    for name, spec in manifest.workloads.items():
        curves: dict[tuple[str, int], list[Curve]] = {key: [] for key in product(BASELINES, range(manifest.studies))}
        updates = 0
        for optimizer in BASELINES:
            for trial, run in _ended(folder, manifest, name, optimizer):
                updates = max(updates, _full_length(run))
                curves[optimizer, trial.study].append(_curve(run, spec.metric))
        found[name] = target_of([*curves.values()], updates, lower_is_better(spec.metric))
    return found


def _ended(folder: Path, manifest: Manifest, workload: str, optimizer: str) -> Iterator[tuple[Trial, Record]]:
    """Yields the trials that have ended, study by study."""
    names = [_TRIAL.fullmatch(path.name) for path in (folder / optimizer / workload).glob("*-*")]
    for study, number in sorted((int(name[1]), int(name[2])) for name in names if name):
        trial = Trial(workload, optimizer, study, number)
        path = folder / trial.subfolder
        if study >= manifest.studies or number >= manifest.trials or not RunFolder(path).has_ended(or_failed=True):
            continue
        run = read_run(path)
        if isinstance(run, Damaged):
            raise UserError(f"{path}: {run.reason}; remove the folder and repeat the command")
        yield trial, run


def _curve(run: Record, metric: str) -> Curve:
    """Returns the curve of a metric against updates; NaN where it is not finite."""
    return tuple((int(line["step"]), line.get(metric, math.nan)) for line in run.history)


def _full_length(run: Record) -> int:
    """Returns the updates of a run without early end; 0 if it failed before its first validation."""
    if is_number(steps := run.config.get("steps")):
        return int(steps)
    epochs, every = run.config.get("epochs"), run.config.get("evaluate.every_epochs", 1)
    if not (run.history and is_number(epochs) and is_number(every) and every):
        return 0
    return round(min(epochs / every * run.history[0]["step"], 1e300))


def _record(run: Record, trial: Trial, space: Mapping[str, str], spec: WorkloadSpec) -> TrialRecord:
    lower, metric = lower_is_better(spec.metric), spec.metric
    target = math.nan if spec.target is None else spec.target
    known = [line for line in run.history if metric in line]
    reached = [line for line in known if (line[metric] <= target if lower else line[metric] >= target)]
    steps = (reached[0]["step"], reached[0].get("evaluations", reached[0]["step"])) if reached else (math.inf, math.inf)
    values = [line[metric] for line in known]
    failure = " ".join((run.reason or "failed").split()) if run.status == "failed" else ""
    best = (min if lower else max)(values, default=None)
    last = None if failure or not run.history else run.history[-1].get(metric)
    return TrialRecord(
        trial.study, trial.number, _values(run, space), *steps, next(iter(values), None), best, last, failure
    )


def _values(run: Record, space: Mapping[str, str]) -> dict[str, Any]:
    """Returns the drawn values of a trial, from its overrides."""
    typed = {key_of(line): value_of(line) for line in run.overrides}
    return {key: _value(typed[key]) for key, text in space.items() if key in typed and typed[key] != text}


def _value(text: str) -> Any:
    """Returns a drawn value: a number, true, false, a list, or else a text."""
    with suppress(ValueError):
        value = parse_json(text)
        return value if is_number(value) or isinstance(value, bool | list) else text
    return text


def best_trials(records: Sequence[TrialRecord], metric: str) -> dict[int, TrialRecord]:
    """Returns the best trial of each study; a study whose trials all failed before their first validation has none."""
    studies = sorted({record.study for record in records})
    chosen = {study: best_trial([each for each in records if each.study == study], metric) for study in studies}
    return {study: record for study, record in chosen.items() if record is not None}
