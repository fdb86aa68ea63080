"""Runs the trials of a benchmark: each is a job, and several processes may share them through one folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlopt.config.overrides import is_hydra, parse_axes, storable
from dlopt.config.parameters import parameters_of
from dlopt.config.resolve import to_plain
from dlopt.config.schema import resolve_target, trusted_packages
from dlopt.extend import Composer, RunFolder, UserError, key_of, value_of, without
from dlopt.lab.benchmark.protocol import (
    SELF_TUNING_LENGTH,
    Track,
    Trial,
    WorkloadSpec,
    has_space,
    load_fixed,
    load_space,
)
from dlopt.lab.claimed_trials import UNRECORDED, ClaimedTrials
from dlopt.sweeps import pool as pools
from dlopt.sweeps.jobs import PlanJob
from dlopt.sweeps.pool import Pool
from dlopt.sweeps.samplers import draw
from dlopt.sweeps.space import Space, parse_space


@dataclass(frozen=True)
class Candidate:
    """An optimizer to be benchmarked: the overrides that choose it, and its search space."""

    name: str
    overrides: Sequence[str]
    space: Space

    def values(self, study: int, number: int) -> dict[str, Any]:
        """Draws the hyperparameters of a trial, rounded to four digits. Each study has its own Halton sequence."""
        if not self.space.searched:  # of self-tuning
            return {}
        return draw(self.space, study, number)

    def describe(self) -> dict[str, str]:
        """Returns the space by key, in Hydra's notation, and the fixed values."""
        fixed = {key_of(line): value_of(line) for line in self.space.fixed}
        return {**fixed, **self.space.describe()}


def candidate(composer: Composer, name: str, overrides: Sequence[str], track: Track = "external_tuning") -> Candidate:
    """Returns an optimizer given by a choice of the group or by the dotted name of a class. Raises `UserError`.

    `overrides`: of all trials. The default space is reduced to the keys that the optimizer has.
    """
    chosen = [f"optimizer={name}"]
    if track == "self_tuning":
        return Candidate(name, chosen, _fixed_space(composer, name))
    return Candidate(name, chosen, parse_space(parse_axes(space_of(composer, name, overrides), composer)))


def space_of(composer: Composer, name: str, overrides: Sequence[str]) -> list[str]:
    """Returns the search space of an optimizer as overrides; the default space is reduced to the optimizer's keys."""
    lines = load_space(name, composer.config_dir)
    if has_space(name, composer.config_dir):
        return lines
    chosen = [f"optimizer={name}", *overrides]
    plain, _ = to_plain(composer.compose(chosen))
    packages = trusted_packages(plain["allow_packages"])
    names = parameters_of(resolve_target("optimizer._target_", str(plain["optimizer"]["_target_"]), packages))
    own = [line for line in lines if key_of(line).removeprefix("optimizer.") in names]
    if not own:
        raise UserError(
            f"optimizer={name}: has none of the keys of the default search space ({', '.join(map(key_of, lines))}); "
            f"write its own: benchmark/space/{name}.yaml in a folder given by --config-dir"
        )
    return own


def _fixed_space(composer: Composer, name: str) -> Space:
    parsed = composer.parse(load_fixed(name, composer.config_dir))
    for override in parsed:
        if override.is_sweep_override():
            raise UserError(
                f"benchmark/space/{name}_self_tuning.yaml: {override.get_key_element()}: has a range, but "
                "track=self_tuning searches nothing; set one value"
            )
    return Space({}, tuple(f"{each.get_key_element()}={each.get_value_element_as_str()}" for each in parsed))


def lengths_of(composer: Composer, workloads: Mapping[str, WorkloadSpec], track: Track) -> dict[str, str]:
    """Returns an override of the length of each workload's runs; none where the experiment sets it."""
    found = {}
    for name, spec in workloads.items() if track == "self_tuning" else ():
        config = composer.compose([f"experiment={spec.experiment}", *spec.overrides])
        key = "epochs" if config.steps is None else "steps"
        found[name] = f"{key}={SELF_TUNING_LENGTH * config[key]}"
    return found


@dataclass(frozen=True)
class TrialRequest:
    """The trials of a benchmark and how each is composed.

    `full`: train to the end, instead of stopping at the target. `overrides`: of all trials, from the command line.
    `lengths`: workload -> override of its length, if it differs from the experiment's.
    """

    folder: Path
    workloads: Mapping[str, WorkloadSpec]
    candidates: Mapping[str, Candidate]
    trials: Sequence[Trial]
    overrides: Sequence[str]
    full: bool
    lengths: Mapping[str, str] = field(default_factory=dict)

    def line(self, trial: Trial) -> list[str]:
        """Returns the overrides of a trial. All trials of a study have its number as their seed."""
        chosen = self.candidates[trial.optimizer]
        drawn = chosen.space.overrides(chosen.values(trial.study, trial.number))
        return self.compose_line(trial.workload, chosen, drawn, trial.study)

    def compose_line(self, workload: str, chosen: Candidate, drawn: Sequence[str], seed: int) -> list[str]:
        """Returns the overrides of a run with the hyperparameters `drawn`."""
        spec = self.workloads[workload]
        stopping = ["stopping=target", f"stopping.value={spec.target}", f"stopping.monitor={spec.metric}"]
        return [
            f"experiment={spec.experiment}",
            *spec.overrides,
            *([self.lengths[workload]] if workload in self.lengths else []),
            *chosen.overrides,
            *drawn,
            *self.overrides,
            *([] if self.full else stopping),
            f"monitor={spec.metric}",
            f"seed={seed}",
            *UNRECORDED,
        ]

    def waiting(self) -> list[Trial]:
        """Returns the trials without a result."""
        return [trial for trial in self.trials if not self.run_folder(trial).has_ended(or_failed=True)]

    def refuse_foreign(self) -> None:
        """Raises `UserError` if a run in the folder of a trial had other overrides: it would count as the trial."""
        for trial in self.trials:
            if not (folder := self.run_folder(trial)).has_run():
                continue
            found, expected = (
                {each for each in without(lines, "allow_packages") if not (each.startswith("-") or is_hydra(each))}
                for lines in (folder.typed(), storable(self.line(trial)))
            )
            if different := sorted(found ^ expected):
                raise UserError(
                    f"output={self.folder}: {trial.subfolder} is no trial of this benchmark (different: "
                    f"{', '.join(different)}); use another folder"
                )

    def run_folder(self, trial: Trial) -> RunFolder:
        return RunFolder(self.folder / trial.subfolder)

    def label(self, trial: Trial) -> str:
        values = self.candidates[trial.optimizer].values(trial.study, trial.number)
        drawn = ", ".join(f"{key.removeprefix('optimizer.')}={value}" for key, value in values.items())
        return f"{trial.optimizer} on {trial.workload}, study {trial.study}, trial {trial.number}: {drawn}"


def run_trials(request: TrialRequest, plan_job: PlanJob, pool: Pool) -> int:
    """Runs the trials that wait for a result; returns how many of them other processes are running.

    On a signal, stops the running trials with checkpoints and raises KeyboardInterrupt.
    """
    # Only the best model is needed later, for the test; the others serve to resume.
    source = ClaimedTrials(request, plan_job, kept=lambda path: path.name.startswith("b"))
    pools.run(source, pool, source.overview)
    return len(source.waiting)
