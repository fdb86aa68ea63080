"""Results of a ladder: the content of the folder, its analysis, and the JSON file."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from statistics import median
from typing import Any

import numpy as np

from dlopt.lab.ladder.analysis import Analysis, Measured, analyze
from dlopt.lab.ladder.arms import SEARCHED, DecaySearch
from dlopt.lab.ladder.ladder import Ladder, LadderRequest, Outcome, Search, Trial
from dlopt.run import environment

FORMAT = 1


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
    """

    ladder: Ladder
    searches: Mapping[str, Search]
    searched: Mapping[Trial, Outcome]
    outcomes: Mapping[Trial, Outcome]
    analysis: Analysis | None
    facts: Mapping[str, Any]
    decays: Mapping[str, DecaySearch] = field(default_factory=dict)
    arms: Mapping[str, Analysis] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        """Number of runs at the best rates that have not ended, of the optimizers and rungs with some that have."""
        return len({(trial.optimizer, trial.rung) for trial in self.outcomes}) * self.ladder.seeds - len(self.outcomes)

    @property
    def untrained(self) -> dict[tuple[str, ...], list[str]]:
        """Returns optimizers without a run at the best rates -> the rungs at which they have none."""
        found: dict[tuple[str, ...], list[str]] = {}
        for rung in self.ladder.rungs:
            trained = {trial.optimizer for trial in self.outcomes if trial.rung == rung}
            if absent := tuple(name for name in self.ladder.optimizers if name not in trained):
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
        lr, decay = self.lr(optimizer, rung), self.decay(optimizer, rung)
        return None if lr is None or decay is None else lr / 2 * decay * self.ladder.rungs[rung].updates

    def failed(self, optimizer: str) -> int:
        return sum(trial.optimizer == optimizer and bool(each.failure) for trial, each in self.outcomes.items())


def collect(request: LadderRequest) -> Results:
    """Reads all runs of the ladder that have ended, and analyzes them."""
    ladder = request.ladder
    searches = {name: request.search(name) for name in ladder.optimizers}
    trials = [trial for name in ladder.optimizers for trial in request.finals(name)]
    found = {trial: request.outcome(trial) for trial in trials}
    outcomes = {trial: each for trial, each in found.items() if each is not None}
    known = request.known()
    searched = {trial: each for trial, each in known.items() if trial.index is not None}
    facts = _facts(ladder, sum(each.seconds for each in known.values()))
    whole, decays = measured(ladder, outcomes), {name: request.decay_search(name) for name in ladder.joint}
    return Results(ladder, searches, searched, outcomes, analyze(whole), facts, decays, _by_arm(ladder, whole))


def _by_arm(ladder: Ladder, whole: Measured) -> dict[str, Analysis]:
    """Compares the optimizers of each arm."""
    found = {}
    for arm in dict.fromkeys(each.arm for each in ladder.optimizers.values()):
        losses = {name: each for name, each in whole.losses.items() if ladder.optimizers[name].arm == arm}
        analysis = analyze(replace(whole, losses=losses)) if arm is not None and len(losses) > 1 else None
        if arm is not None and analysis is not None and analysis.gains:
            found[arm] = analysis
    return found


def measured(ladder: Ladder, outcomes: Mapping[Trial, Outcome]) -> Measured:
    """Returns the losses of the runs at the best rates as tables [rungs, seeds]."""
    losses, times = {}, {}
    for name in ladder.optimizers:
        rows = [[outcomes.get(Trial(name, rung, seed)) for seed in range(ladder.seeds)] for rung in ladder.rungs]
        table = [[math.nan if each is None or each.failure else each.loss for each in row] for row in rows]
        losses[name] = np.array(table, dtype=float)
        ended = [[each.seconds for each in row if each is not None and not each.failure] for row in rows]
        times[name] = [median(each) if each else math.nan for each in ended]
    return Measured([*ladder.rungs], [each.compute for each in ladder.rungs.values()], losses, times)


def _facts(ladder: Ladder, seconds: float) -> dict[str, Any]:
    """Returns how the results were made, without what identifies the user or the host."""
    versions, machine = environment.versions(), environment.machine()
    return {
        "command": "; ".join(ladder.commands),
        "date": date.today().isoformat(),
        "hours": float(f"{seconds / 3600:.3g}"),
        **{name: versions[name] for name in ("dlopt", "python", "torch")},
        **{name: machine[name] for name in ("processor", "cpu_count", "gpu") if machine[name]},
    }


def to_json(results: Results) -> str:
    """Returns the results as JSON; NaN and infinity become null."""
    content = {
        "format": FORMAT,
        "facts": dict(results.facts),
        "ladder": asdict(results.ladder),
        "searches": {name: _search(each) for name, each in results.searches.items()},
        "runs": [
            {**asdict(trial), "lr": results.lr(trial.optimizer, trial.rung), **asdict(each)}
            for trial, each in results.outcomes.items()
        ],
        "search_runs": [{**asdict(trial), **asdict(each)} for trial, each in results.searched.items()],
        "analysis": None if results.analysis is None else _analysis(results.analysis),
    }
    if results.decays:
        content["decays"] = {name: _decays(each) for name, each in results.decays.items()}
    if results.arms:
        content["arms"] = {arm: _analysis(each) for arm, each in results.arms.items()}
    return json.dumps(_plain(content), indent=1, allow_nan=False) + "\n"


def _search(search: Search) -> dict[str, Any]:
    losses = {rung: {f"{lr:g}": loss for lr, loss in each.items()} for rung, each in search.losses.items()}
    return {
        "losses": losses,
        "optima": {rung: asdict(each) for rung, each in search.optima.items()},
        "fit": None if search.fit is None else asdict(search.fit),
    }


def _decays(search: DecaySearch) -> dict[str, Any]:
    losses = {rung: {f"{decay:g}": loss for decay, loss in each.items()} for rung, each in search.losses.items()}
    optima = {
        rung: {"decay": each.lr, "loss": each.loss, "at_end": each.at_end} for rung, each in search.optima.items()
    }
    return {"losses": losses, "optima": optima, "constant": search.constant, "per_width": search.per_width}


def _analysis(analysis: Analysis) -> dict[str, Any]:
    return {
        "baseline": analysis.measured.baseline,
        "irreducible": asdict(analysis.irreducible),
        "laws": {
            name: {"scale": math.exp(curve.log_scale), "exponent": asdict(analysis.exponents[name])}
            for name, curve in analysis.laws.curves.items()
        },
        "mean": {name: [*each] for name, each in analysis.mean.items()},
        "gains": {name: asdict(each) for name, each in analysis.gains.items()},
        "predictions": {name: asdict(each) for name, each in analysis.predictions.items()},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
