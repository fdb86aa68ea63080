"""Gathers what a ladder shows, with its uncertainty; findings.txt has the sentences."""

import math
from pathlib import Path
from typing import Any

from dlopt.extend import key_of
from dlopt.lab.benchmark.formats import interval, names
from dlopt.lab.benchmark.scores import Interval
from dlopt.lab.ladder.analysis import FEWEST, HELD_OUT, Analysis
from dlopt.lab.ladder.results import Results
from dlopt.lab.report import Observation, observations

_NO_CONSTANT = 0.01  # E relative to the smallest loss below which it counts as 0
_FAR = 3.0  # times the compute of the largest rung, to which a speed-up may extrapolate without a warning
_LARGE_ERROR = 1.5  # of an extrapolated rate, from which the report warns


def findings(results: Results) -> list[Observation]:
    """Returns the results, then the warnings."""
    ladder, analysis = results.ladder, results.analysis
    return observations(
        Path(__file__).with_name("findings.txt"),
        analysis=analysis, **({} if analysis is None else _doubts(analysis)), missing=results.missing,
        **_stated(results), untrained=results.untrained,
        rates=[_rate(results, name) for name in ladder.optimizers
               if ladder.optimizers[name].lr is not None or results.searches[name].fit is not None],
        decays=results.decays,
        arms=[each for analysis in results.arms.values() for each in _changes(results, analysis)],
        searches=[_search(results, name) for name in results.searches], searched=len(ladder.searched),
        fewest=FEWEST, held_out=HELD_OUT, far=_FAR, large_error=_LARGE_ERROR,
        names=names, interval=interval, times=times, signed=signed, short=_short,
    )  # fmt: skip


def times(value: Interval) -> str:
    """Formats 1.4 [1.2, 1.6]."""
    return interval(value, _short)


def signed(value: Interval, pattern: str = "+.2f") -> str:
    """Formats +0.10 [-0.02, +0.22]."""
    return interval(value, lambda each: format(min(max(each, -99.0), 99.0), pattern))


def _short(value: float) -> str:
    return "> 1000" if value > 1000 else "< 0.001" if value < 0.001 else f"{value:.3g}"


def _doubts(analysis: Analysis) -> dict[str, Any]:
    """Returns the speed-ups between measured losses, and reasons to distrust the laws."""
    pairs = {
        name: zip(analysis.measured.rungs, each.interpolated, strict=True) for name, each in analysis.gains.items()
    }
    smallest = min(map(min, analysis.mean.values()))
    return {
        "between": {name: [pair for pair in each if not math.isnan(pair[1].value)] for name, each in pairs.items()},
        "missed": [name for name, each in analysis.predictions.items() if not each.holds],
        "has_no_constant": analysis.scaling_laws.irreducible < _NO_CONSTANT * smallest,
    }


def _stated(results: Results) -> dict[str, Any]:
    """Returns the speed-ups to state, and for the others the optimizers whose rates were found by one search."""
    if results.analysis is None:
        return {"stated": {}, "unstated": {}}
    stated, base = results.stated(results.analysis), results.analysis.measured.baseline
    unstated = {name: results.searched_once(base, name) for name in results.analysis.gains if name not in stated}
    return {"stated": stated, "unstated": unstated}


def _changes(results: Results, analysis: Analysis) -> list[dict[str, Any]]:
    """Returns how the speed-ups over the baseline of an arm change with size."""
    found = []
    for name, gain in results.stated(analysis).items():
        known = [rung for rung, each in zip(analysis.measured.rungs, gain.interpolated, strict=True)
                 if not math.isnan(each.value)]  # fmt: skip
        if not math.isnan(gain.change.value):
            pair = {"first": known[0], "last": known[-1], "change": gain.change}
            found.append({"name": name, "base": analysis.measured.baseline, **pair})
    return found


def _rate(results: Results, name: str) -> dict[str, Any]:
    contestant = results.ladder.optimizers[name]
    return {
        "name": name, "lr": contestant.lr, "fit": results.searches[name].fit,
        "typed": [each for each in contestant.overrides if key_of(each) != "optimizer.lr"],
        "moved": [key.removeprefix("optimizer.") for key in contestant.rates if key != "optimizer.lr"],
    }  # fmt: skip


def _search(results: Results, name: str) -> dict[str, Any]:
    """Returns the missing parts of a search, and why its learning rates may be wrong."""
    search = results.searches[name]
    has_fit = search.fit is not None
    return {
        "name": name, "failed": results.failed(name),
        "is_unfinished": results.ladder.optimizers[name].lr is None and not has_fit,
        "at_end": [rung for rung, best in search.optima.items() if best.at_end],
        "lost": [rung for rung, each in search.losses.items() if each and not any(map(math.isfinite, each.values()))],
        "error": (search.fit.error if search.fit is not None else None) or 1.0,
    }  # fmt: skip
