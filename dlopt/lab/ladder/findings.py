"""Says what a ladder shows in sentences, with its uncertainty."""

import math
from collections.abc import Iterator, Sequence

from dlopt.basics.formats import printable
from dlopt.config.overrides import key_of
from dlopt.lab.benchmark.findings import Observation
from dlopt.lab.benchmark.formats import NONE, names
from dlopt.lab.benchmark.scores import Interval
from dlopt.lab.ladder.analysis import FEWEST, HELD_OUT, Analysis, Gain
from dlopt.lab.ladder.results import Results

_NO_CONSTANT = 0.01  # E relative to the smallest loss below which it counts as 0
_FAR = 3.0  # times the compute of the largest rung, to which a speed-up may extrapolate without a warning
_LARGE_ERROR = 1.5  # of an extrapolated rate, from which the report warns


def findings(results: Results) -> list[Observation]:
    """Returns the results, then the warnings."""
    analysis = results.analysis
    shown = [] if analysis is None else [*_results(results, analysis)]
    warnings = [*_warnings(results), *([] if analysis is None else _doubts(analysis))]
    return [
        *(Observation(printable(text)) for text in [*shown, *_rates(results)]),
        *(Observation(printable(text), is_warning=True) for text in warnings),
    ]


def times(value: Interval) -> str:
    """Formats 1.4 [1.2, 1.6]."""
    return f"{_short(value.value)}" + ("" if math.isnan(value.low) else f" [{_short(value.low)}, {_short(value.high)}]")


def signed(value: Interval, pattern: str = "+.2f") -> str:
    """Formats +0.10 [-0.02, +0.22]."""
    if math.isnan(value.value):
        return NONE
    texts = [format(min(max(each, -99.0), 99.0), pattern) for each in (value.value, value.low, value.high)]
    return texts[0] + ("" if math.isnan(value.low) else f" [{texts[1]}, {texts[2]}]")


def _short(value: float) -> str:
    if math.isnan(value):
        return NONE
    return "> 1000" if value > 1000 else "< 0.001" if value < 0.001 else f"{value:.3g}"


def _results(results: Results, analysis: Analysis) -> Iterator[str]:
    base = analysis.measured.baseline
    for name, gain in analysis.gains.items():
        yield _gain(name, base, gain, analysis.measured.rungs)
    for name, each in analysis.predictions.items():
        verdict = "inside" if each.holds else "outside"
        interval = f"{each.predicted.value:.4g} [{each.predicted.low:.4g}, {each.predicted.high:.4g}]"
        yield (
            f"Held out: without {analysis.measured.rungs[-1]}, the law of {name} predicts its loss as {interval}; "
            f"measured: {each.measured:.4g}, {verdict} the interval."
        )


def _gain(name: str, base: str, gain: Gain, rungs: Sequence[str]) -> str:
    first, last = gain.speed_up[0], gain.speed_up[-1]
    text = (
        f"{base} needs {times(first)} times the compute of {name} for the same loss at {rungs[0]}, and {times(last)} "
        f"times at {rungs[-1]}."
    )
    measured = [(rung, each) for rung, each in zip(rungs, gain.interpolated, strict=True) if not math.isnan(each.value)]
    if len(measured) > 1:
        (start, smallest), (end, largest) = measured[0], measured[-1]
        text += f" Between its measured losses: {times(smallest)} times at {start}, {times(largest)} at {end}."
    if math.isnan(last.low):
        return text + f" Neither has an interval, and nothing follows: that needs {FEWEST} rungs."
    if not gain.is_distinguishable:
        return text + f" By the laws, {name} and {base} are not distinguishable: the intervals include 1."
    trend = gain.trend
    if trend.high < 0:
        text += " By the laws, the speed-up shrinks as models grow"
    elif trend.low > 0:
        text += " By the laws, the speed-up grows with the models"
    else:
        text += " By the laws, whether it changes with size is open"
    return text + f" (exponent {signed(trend)})."


def _rates(results: Results) -> Iterator[str]:
    for name, contestant in results.ladder.optimizers.items():
        fit = results.searches[name].fit
        typed = [each for each in contestant.overrides if key_of(each) != "optimizer.lr"]
        others = f" Set: {names(typed)}." if typed else ""
        if contestant.lr is not None:
            yield f"{name}: the same rate at all sizes (optimizer.lr={contestant.lr:g}), not tuned per rung.{others}"
        elif fit is not None:
            moved = [key.removeprefix("optimizer.") for key in contestant.rates if key != "optimizer.lr"]
            error = "" if fit.error is None else f"; left out, a searched rung is predicted within {fit.error:.2g}x"
            constant = "; one searched rung: the same at all sizes" if len(results.ladder.searched) == 1 else ""
            together = f" {names(moved)} moves with it in a constant ratio." if moved else ""
            yield f"{name}: best lr proportional to parameters^{fit.exponent:+.2f}{error}{constant}.{together}{others}"


def _warnings(results: Results) -> Iterator[str]:
    """Yields what is missing, and learning rates that may be wrong."""
    if results.missing:
        yield f"{results.missing} runs at the best rates have not ended: the results are preliminary."
    for name, search in results.searches.items():
        for rung, best in search.optima.items():
            if best.at_end and search.fit is not None:
                yield f"{name}: the best rate of {rung} is at the end of the searched range."
        if search.losses and search.fit is None:
            lost = [rung for rung in search.losses if rung not in search.optima and search.losses[rung]]
            why = f"all runs of {names(lost)} failed so far" if lost else "its search has not ended"
            yield f"{name}: no learning rates yet: {why}."
        if search.fit is not None and (search.fit.error or 1.0) > _LARGE_ERROR:
            yield f"{name}: learning rates are extrapolated poorly ({search.fit.error:.2g}x); search more rungs."
        if failed := results.failed(name):
            yield f"{name}: {failed} runs failed or diverged, and count in no fit."


def _doubts(analysis: Analysis) -> Iterator[str]:
    """Yields reasons to distrust the laws."""
    count = len(analysis.measured.rungs)
    for name, gain in analysis.gains.items():
        if gain.speed_up[-1].value > _FAR:
            yield (
                f"{name}: its speed-up at {analysis.measured.rungs[-1]} extrapolates the law of "
                f"{analysis.measured.baseline} to {_short(gain.speed_up[-1].value)} times the largest compute "
                "measured; compare the losses instead."
            )
    if missed := [name for name, each in analysis.predictions.items() if not each.holds]:
        yield (
            f"The laws miss the loss held out for {names(missed)}. Prefer the speed-up between the measured losses: of "
            "the laws, it needs only E."
        )
    if count < HELD_OUT:
        yield f"No held-out prediction: it needs {HELD_OUT} rungs, here are {count}."
    if count == 2:
        yield "Two rungs do not identify an irreducible loss: E = 0, and extrapolations are worth little."
    elif analysis.laws.irreducible < _NO_CONSTANT * min(map(min, analysis.mean.values())):
        yield "The fit finds no irreducible loss (E = 0), and extrapolates powers of compute alone; add larger rungs."
    if count < FEWEST:
        yield f"With {count} rungs, speed-ups and laws have no intervals: two equal optimizers may look different."
