"""`dlopt benchmark --check`: repeats trials of the shipped results."""

import math
import random

from dlopt.analysis.benchmark.protocol import Trial, load_tier
from dlopt.analysis.benchmark.reading import Manifest, collect
from dlopt.analysis.benchmark.reference import load_reference
from dlopt.analysis.benchmark.results import Record
from dlopt.commands.benchmark_trials import MACHINE, group_of, launch
from dlopt.commands.command import Line, output_folder
from dlopt.commands.sweep import is_hydra
from dlopt.errors import DONE, FAILED, INTERRUPTED, UserError

_COUNT = 2  # trials to repeat
_UPDATES = 0.05  # of a full run: tolerance of the updates to the target
_FIRST = 0.1  # relative tolerance of the first validation: later, training amplifies how a processor rounds


def check(line: Line, *, tier: str = "small", seed: int | None = None, output: str | None = None) -> int:
    """Repeats two random trials of the shipped results; returns `FAILED` if one of them differs."""
    from dlopt.sweeps.benchmark import Request, candidate

    for override in line.overrides:
        if group_of(override) not in MACHINE:
            raise UserError(f"{override}: --check repeats shipped trials; only {', '.join(MACHINE)} can be set")
    shipped = load_reference(tier)
    if shipped is None:
        raise UserError(f"tier={tier}: has no shipped results to check")
    # Only trials that reach the target: others would agree without saying much.
    reached = {
        Trial(workload, name, record.study, record.trial): record
        for (name, workload), cell in sorted(shipped.cells.items())
        for record in cell.records
        if record.reached
    }
    chosen = {trial: reached[trial] for trial in random.Random(seed).sample(list(reached), min(_COUNT, len(reached)))}
    overrides = [each for each in line.overrides if not is_hydra(each)]
    candidates = {trial.optimizer: candidate(line.composer, trial.optimizer, overrides) for trial in chosen}
    workloads = load_tier(tier, None).select([trial.workload for trial in chosen]).workloads
    folder = output_folder(output, "benchmark-check").absolute()
    request = Request(folder, workloads, candidates, list(chosen), overrides, full=True)
    try:
        launch(line, request, line.overrides)
    except KeyboardInterrupt:
        return INTERRUPTED
    spaces = {name: each.describe() for name, each in candidates.items()}
    manifest = Manifest(tier, shipped.studies, shipped.trials, workloads, spaces, overrides, full=True)
    measured = collect(folder, manifest, {})
    agree = True
    for trial, expected in chosen.items():
        records = measured.cell(trial.optimizer, trial.workload).study(trial.study)
        record = next((each for each in records if each.trial == trial.number), None)
        name = f"{trial.optimizer} on {trial.workload}, study {trial.study}, trial {trial.number}"
        verdict = "differs" if record is None else compare(record, expected, shipped.workloads[trial.workload].updates)
        agree = agree and verdict != "differs"
        reached_now = "has not ended" if record is None else _to_target(record)
        print(f"{name}: {reached_now}; shipped: {_to_target(expected)}: {verdict}")
    return DONE if agree else FAILED


def compare(record: Record, expected: Record, full: int) -> str:
    """Compares the repetition of a trial with the shipped record; `full`: updates of a full run."""
    if record.reached and abs(record.updates - expected.updates) <= _UPDATES * full:
        return "agrees"
    if record.first is None or expected.first is None or not math.isclose(record.first, expected.first, rel_tol=_FIRST):
        return "differs"
    return f"agrees at first ({record.first:.4g}; shipped: {expected.first:.4g}), then rounding separates the runs"


def _to_target(record: Record) -> str:
    updates = f"{record.updates:.0f} updates to the target" if record.reached else "target not reached"
    return updates if record.best is None else f"{updates}, best {record.best:.4g}"
