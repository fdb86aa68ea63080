"""Results of a ladder: the content of the folder, its analysis, and the JSON file."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlopt.lab.ladder.analysis import Analysis, Gain, RungLosses, analyze
from dlopt.lab.ladder.arms import SEARCHED, DecaySearch
from dlopt.lab.ladder.ladder import FORMAT, Ladder, LadderRequest, Outcome, Search, Trial
from dlopt.run import environment


@dataclass(frozen=True)
class Results:
    """Results of a ladder.

    Attributes:
        searches: by optimizer.
        searched: trials of the searches that have ended.
        outcomes: of the runs at the best rates that have ended.
        analysis: None if too few runs have ended.
        decays: searches of the weight decay, by optimizer.
        arms: analyses of the optimizers of each arm, whose first is the baseline; arms with results of two only.
        branches: the outcomes of shorter runs that have ended; `shorter`: analyses by tokens per parameter.
    """

    ladder: Ladder
    searches: Mapping[str, Search]
    searched: Mapping[Trial, Outcome]
    outcomes: Mapping[Trial, Outcome]
    analysis: Analysis | None
    facts: Mapping[str, Any]
    decays: Mapping[str, DecaySearch] = field(default_factory=dict)
    arms: Mapping[str, Analysis] = field(default_factory=dict)
    branches: Mapping[Trial, Outcome] = field(default_factory=dict)
    shorter: Mapping[float, Analysis] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        """Number of runs at the best rates that have not ended, of the optimizers and rungs with some that have."""
        begun = {(trial.optimizer, trial.rung) for trial in self.outcomes}
        planned = len(begun) * self.ladder.seeds * len(self.ladder.lengths)
        return planned - len(self.outcomes) - len(self.branches)

    @property
    def untrained(self) -> dict[tuple[str, ...], list[str]]:
        """Optimizers without a run at the best rates -> the rungs at which they have none."""
        found: dict[tuple[str, ...], list[str]] = {}
        for rung in self.ladder.rungs:
            trained = {trial.optimizer for trial in self.outcomes if trial.rung == rung}
            absent = tuple(name for name in self.ladder.optimizers if name not in trained)
            if absent:
                found.setdefault(absent, []).append(rung)
        return found

    def lr(self, optimizer: str, rung: str) -> float | None:
        return self.searches[optimizer].lr(rung, self.ladder.rungs[rung].parameters)

    def decay(self, optimizer: str, rung: str) -> float | None:
        """Returns the weight decay of an arm; None if it has none yet, or the norm of matrices is fixed."""
        contestant = self.ladder.optimizers[optimizer]
        search = self.decays.get(contestant.choice or "")
        if contestant.arm in SEARCHED and search is not None:
            return search.decay(contestant.arm, self.ladder.rungs[rung].width)
        return 0.0 if contestant.arm == "zero" else None

    def summed_decay(self, optimizer: str, rung: str) -> float | None:
        """Returns half the peak rate * weight decay * updates: the sum over a run with a cosine schedule."""
        lr = self.lr(optimizer, rung)
        decay = self.decay(optimizer, rung)
        if lr is None or decay is None:
            return None
        return lr / 2 * decay * self.ladder.rungs[rung].updates

    def searched_once(self, *optimizers: str) -> list[str]:
        """Returns those of the optimizers whose rates, of all rungs, were found by a single search."""
        if len(self.ladder.searched) > 1:
            return []
        return [name for name in optimizers if self.ladder.optimizers[name].lr is None]

    def stated(self, analysis: Analysis) -> dict[str, Gain]:
        """Returns the gains of the optimizers whose speed-ups can be stated: a bad rate would explain the others."""
        base = analysis.measured.baseline
        return {name: each for name, each in analysis.gains.items() if not self.searched_once(base, name)}

    def failed(self, optimizer: str) -> int:
        """Returns the number of failed runs at the best rates."""
        runs = {**self.outcomes, **self.branches}
        own = [outcome for trial, outcome in runs.items() if trial.optimizer == optimizer]
        return sum(bool(outcome.failure) for outcome in own)


def collect(request: LadderRequest) -> Results:
    """Reads all runs of the ladder that have ended, and analyzes them."""
    ladder = request.ladder
    searches = {name: request.search(name) for name in ladder.optimizers}
    outcomes: dict[Trial, Outcome] = {}
    branches: dict[Trial, Outcome] = {}
    for name in ladder.optimizers:
        for found, trials in ((outcomes, request.finals(name)), (branches, request.branches(name))):
            for trial in trials:
                outcome = request.outcome(trial)
                if outcome is not None:
                    found[trial] = outcome
    known = request.known()  # the trials of the searches, and the runs at the best rates
    whole = measured(ladder, outcomes)
    analyses = {length: analyze(measured(ladder, branches, length)) for length in ladder.shorter}
    return Results(
        ladder,
        searches,
        searched={trial: outcome for trial, outcome in known.items() if trial.index is not None},
        outcomes=outcomes,
        analysis=analyze(whole),
        facts=_facts(ladder, sum(_own_seconds(ladder, *each) for each in known.items())),
        decays={name: request.decay_search(name) for name in ladder.joint},
        arms=_by_arm(ladder, whole),
        branches=branches,
        shorter={length: each for length, each in analyses.items() if each is not None},
    )


def _own_seconds(ladder: Ladder, trial: Trial, outcome: Outcome) -> float:
    """Returns the seconds of a run without those of its stem: a branch counts the time since the first update."""
    branch = ladder.branch(trial)
    return outcome.seconds if branch is None else outcome.seconds * (1 - ladder.start(trial) / branch.updates)


def measured(ladder: Ladder, outcomes: Mapping[Trial, Outcome], length: float | None = None) -> RungLosses:
    """Returns the losses of the runs at the best rates as tables [rungs, seeds].

    `length`: of branches, in tokens per parameter; None: of the longest runs.
    """
    losses: dict[str, NDArray[np.float64]] = {}
    seconds: dict[str, list[float]] = {}
    for name in ladder.optimizers:
        losses[name] = np.full((len(ladder.rungs), ladder.seeds), math.nan)
        seconds[name] = []
        for row, rung in enumerate(ladder.rungs):
            times = []
            for seed in range(ladder.seeds):
                outcome = outcomes.get(Trial(name, rung, seed, length=length))
                if outcome is not None and not outcome.failure:
                    losses[name][row, seed] = outcome.loss
                    times.append(outcome.seconds)
            seconds[name].append(median(times) if times else math.nan)
    compute = []
    for rung, size in ladder.rungs.items():
        branch = ladder.branch(Trial("", rung, 0, length=length))
        compute.append((size if branch is None else size.of_length(branch.updates)).compute)
    return RungLosses([*ladder.rungs], compute, losses, seconds)


def _by_arm(ladder: Ladder, whole: RungLosses) -> dict[str, Analysis]:
    """Compares the optimizers of each arm."""
    found: dict[str, Analysis] = {}
    for arm in dict.fromkeys(each.arm for each in ladder.optimizers.values()):
        losses = {name: each for name, each in whole.losses.items() if ladder.optimizers[name].arm == arm}
        if arm is None or len(losses) < 2:
            continue
        analysis = analyze(replace(whole, losses=losses))
        if analysis is not None and analysis.gains:
            found[arm] = analysis
    return found


def _facts(ladder: Ladder, seconds: float) -> dict[str, Any]:
    """Returns how the results were made, without what identifies the user or the host."""
    facts = {
        "command": "; ".join(ladder.commands),
        "date": date.today().isoformat(),
        "hours": float(f"{seconds / 3600:.3g}"),
    }
    versions = environment.versions()
    for name in ("dlopt", "python", "torch"):
        facts[name] = versions[name]
    machine = environment.machine()
    for name in ("processor", "cpu_count", "gpu"):
        if machine[name]:
            facts[name] = machine[name]
    return facts


# -- the file


def to_json(results: Results) -> str:
    """Returns the results as JSON; NaN and infinity become null."""
    content = {
        "format": FORMAT,
        "facts": dict(results.facts),
        "ladder": asdict(results.ladder),
        "searches": {name: _search(each) for name, each in results.searches.items()},
        "runs": _runs(results),
        "search_runs": [asdict(trial) | asdict(outcome) for trial, outcome in results.searched.items()],
        "analysis": None if results.analysis is None else _analysis(results.analysis),
    }
    if results.decays:
        content["decays"] = {name: _decays(each) for name, each in results.decays.items()}
    if results.shorter:
        content["shorter"] = {f"{length:g}": _analysis(each) for length, each in results.shorter.items()}
    if results.arms:
        content["arms"] = {arm: _analysis(each) for arm, each in results.arms.items()}
    return json.dumps(_plain(content), indent=1, allow_nan=False) + "\n"


def _search(search: Search) -> dict[str, Any]:
    return {
        "losses": _with_text_keys(search.losses),
        "optima": {rung: asdict(each) for rung, each in search.optima.items()},
        "fit": None if search.fit is None else asdict(search.fit),
    }


def _runs(results: Results) -> list[dict[str, Any]]:
    """Returns the runs at the best rates, each with its rate."""
    runs = []
    for trial, outcome in [*results.outcomes.items(), *results.branches.items()]:
        lr = results.lr(trial.optimizer, trial.rung)
        runs.append(asdict(trial) | {"lr": lr} | asdict(outcome))
    return runs


def _decays(search: DecaySearch) -> dict[str, Any]:
    optima = {}
    for rung, best in search.optima.items():
        optima[rung] = {"decay": best.lr, "loss": best.loss, "at_end": best.at_end}
    return {
        "losses": _with_text_keys(search.losses),
        "optima": optima,
        "constant": search.constant,
        "per_width": search.per_width,
    }


def _with_text_keys(losses: Mapping[str, Mapping[float, float]]) -> dict[str, dict[str, float]]:
    """Returns rung -> value -> loss with the values, learning rates or weight decays, as texts."""
    found = {}
    for rung, by_value in losses.items():
        found[rung] = {f"{value:g}": loss for value, loss in by_value.items()}
    return found


def _analysis(analysis: Analysis) -> dict[str, Any]:
    laws = {}
    for name, curve in analysis.scaling_laws.curves.items():
        laws[name] = {"scale": math.exp(curve.log_scale), "exponent": asdict(analysis.exponents[name])}
    return {
        "baseline": analysis.measured.baseline,
        "irreducible": asdict(analysis.irreducible),
        "laws": laws,
        "mean": {name: [*each] for name, each in analysis.mean.items()},
        "gains": {name: asdict(each) for name, each in analysis.gains.items()},
        "predictions": {name: asdict(each) for name, each in analysis.predictions.items()},
    }


def _plain(value: Any) -> Any:
    """Returns a value of JSON: lists for tuples, None for NaN and infinity."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
