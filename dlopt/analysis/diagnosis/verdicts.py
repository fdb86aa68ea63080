"""Naming in words what is wrong with a layer, by the numbers that say so, and what to try."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dlopt.analysis.diagnosis.layers import LayerStatistics, TimeLag

Word = Literal["healthy", "vanishing", "exploding", "saturated", "dead"]

SMALL, LARGE = 0.01, 100.0
"""Signals and gradients beyond these ratios to the net's other end are called vanishing and exploding."""
SATURATED = 0.5
"""Fraction of saturated values from which on a layer is called saturated."""
DEAD = 0.5
"""Fraction of dead units from which on a layer is called dead."""


@dataclass(frozen=True)
class Verdict:
    word: Word
    reason: str  # with the number behind it

    def __str__(self) -> str:
        return self.word if self.word == "healthy" else f"{self.word}: {self.reason}"


@dataclass(frozen=True)
class Facts:
    """What is known of the experiment, so that nothing is recommended that is there already."""

    init: str  # the choice
    norm: str | None  # model.norm; None: the model has no such key
    activation: str | None  # of most layers
    has_skips: bool
    is_recurrent: bool
    is_gated: bool  # an LSTM
    clip: str
    gradient_norms: Sequence[float]  # observed, of all parameters together, before clipping


def verdicts(layers: Sequence[LayerStatistics], lags: Sequence[TimeLag] = ()) -> list[Verdict]:
    """One per layer, in the order of the forward pass.

    The gradient's norm is set against that of the last layer with an activation (of the last layer where there is
    none), the signal's root mean square against that of the first. Of a recurrent layer, for which there is one of
    `lags`, the gradient at the first state is set against that at the last.
    """
    active = [layer for layer in layers if layer.activation is not None]
    last = (active or list(layers))[-1:]
    first = (active or list(layers))[:1]
    gradient = last[0].gradients.norm if last else math.nan
    signal = first[0].inputs.rms if first else math.nan
    over_time = {lag.name: lag for lag in lags}
    found = [_verdict(layer, gradient, signal) for layer in layers]
    for i, layer in enumerate(layers):
        if found[i].word == "healthy" and layer.name in over_time:
            found[i] = _over_time(over_time[layer.name]) or found[i]
    return found


def _over_time(lag: TimeLag) -> Verdict | None:
    steps = len(lag.states) - 1
    ratio = _ratio(lag.states[-1], lag.states[0]) if lag.states else 1.0
    told = f"gradient x {ratio:.2g} over {steps} steps back"
    return Verdict("exploding", told) if ratio > LARGE else Verdict("vanishing", told) if ratio < SMALL else None


def _verdict(layer: LayerStatistics, last_gradient: float, first_signal: float) -> Verdict:
    if not math.isfinite(layer.outputs.rms) or (layer.gradients.count and not math.isfinite(layer.gradients.norm)):
        return Verdict("exploding", "values that are not finite")
    if layer.saturated is not None and layer.saturated > SATURATED:
        return Verdict("saturated", f"{layer.saturated:.0%} of the values")
    if layer.dead is not None and layer.dead > DEAD:
        return Verdict("dead", f"{layer.dead:.0%} of the units")
    signal = _ratio(layer.inputs.rms, first_signal) if layer.activation is not None else 1.0
    gradient = _ratio(layer.gradients.norm, last_gradient) if layer.gradients.count else 1.0
    if last_gradient == 0 and layer.gradients.count:
        return Verdict("vanishing", "no gradient at all")
    if gradient > LARGE or signal > LARGE:
        return Verdict("exploding", _told("gradient", gradient) if gradient > LARGE else _told("signal", signal))
    if gradient < SMALL or signal < SMALL:
        return Verdict("vanishing", _told("gradient", gradient) if gradient < SMALL else _told("signal", signal))
    return Verdict("healthy", _told("gradient", gradient) if layer.gradients.count else "no gradient is asked for")


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference > 0 else math.inf if value > 0 else 1.0


def _told(what: str, ratio: float) -> str:
    return f"{what} {ratio:.2g} x that of the {'last' if what == 'gradient' else 'first'} layer"


def advice(found: Sequence[Verdict], facts: Facts) -> list[str]:
    """What to try, a line per kind of trouble; one line that says so where all is well."""
    remedies = {
        "saturated": ["model.activation=relu"],
        "dead": ["a smaller optimizer.lr", "model.activation=leaky_relu"],
        "vanishing": [_shorter_ways(facts)],
        "exploding": [_shorter_ways(facts), _clip(facts)],
    }
    lines = []
    for word, others in remedies.items():
        if number := sum(verdict.word == word for verdict in found):
            tried = [each for each in (_init(facts), _norm(facts), *others) if each] or ["a smaller optimizer.lr"]
            lines.append(f"{word} ({number} of {len(found)} layers): try {', '.join(tried)}")
    return lines or ["healthy"]


def recommended_init(activation: str | None) -> str:
    """The scheme whose variance suits an activation, by its class's name."""
    if activation == "SELU":
        return "fan_in_normal"
    return "xavier_normal" if activation in (None, "Tanh", "Sigmoid", "Softsign", "Identity") else "kaiming_normal"


def _init(facts: Facts) -> str:
    wanted = recommended_init(facts.activation)
    same = facts.init.rpartition("_")[0] == wanted.rpartition("_")[0] or facts.init in ("lsuv", "orthogonal")
    return "" if same else f"init={wanted}"


def _norm(facts: Facts) -> str:
    if facts.norm != "none":
        return ""
    return "model.norm=layer" if facts.is_recurrent else "model.norm=batch"


def _shorter_ways(facts: Facts) -> str:
    """For gradients that pass through many layers or steps."""
    if facts.is_recurrent:
        return "" if facts.is_gated else "model=lstm"
    return "" if facts.has_skips else "skip connections (a ResNet)"


def _clip(facts: Facts) -> str:
    usual = clipping_norm(facts.gradient_norms)
    return "" if facts.clip != "none" or usual is None else f"clip=norm clip.max_norm={typed(usual)}"


def typed(value: float) -> str:
    """Two significant digits, as one types them."""
    return f"{float(f'{value:.2g}'):g}"


def clipping_norm(observed: Sequence[float]) -> float | None:
    """The median of the observed gradient norms: half of the updates stay as they are (Pascanu et al. 2013, section
    3.2, take the mean over many updates). None where nothing finite was seen."""
    finite = sorted(norm for norm in observed if math.isfinite(norm) and norm > 0)
    return finite[len(finite) // 2] if finite else None
