"""Targets of a tier, from the trials of the baselines."""

from pathlib import Path

from dlopt.analysis.benchmark.protocol import BASELINES, Trial, target_of
from dlopt.analysis.benchmark.reading import Manifest, full_length, has_ended, read_curve
from dlopt.folders import RunFolder
from dlopt.metric_names import lower_is_better


def targets(folder: Path, manifest: Manifest) -> dict[str, float]:
    """Returns the target of each workload, see `target_of`."""
    found = {}
    for name, spec in manifest.workloads.items():
        studies, updates = [], 0
        for optimizer in BASELINES:
            for study in range(manifest.studies):
                trials = [Trial(name, optimizer, study, number) for number in range(manifest.trials)]
                runs = [run for trial in trials if has_ended(run := RunFolder(folder / trial.subfolder))]
                curves = [read_curve(run, spec.metric)[0] for run in runs]
                updates = max([updates, *map(full_length, runs, curves)])
                studies.append(curves)
        found[name] = target_of(studies, updates, lower_is_better(spec.metric))
    return found
