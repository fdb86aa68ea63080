"""Classifies each layer as healthy, vanishing, exploding, saturated or dead, and recommends overrides."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dlopt.instruments.layers import LayerStatistics
from dlopt.lab.diagnosis.probes import TimeLag

Label = Literal["healthy", "vanishing", "exploding", "saturated", "dead"]
Compared = tuple[Literal["gradient", "signal"], str]
"""What is compared, and the name of the layer that it is compared with."""

SMALL, LARGE = 0.01, 100.0
"""Ratios to the other end of the network below and above which a signal or gradient is vanishing or exploding."""
SATURATED = 0.5
"""Fraction of saturated values above which a layer is saturated."""
DEAD = 0.5
"""Fraction of dead units above which a layer is dead."""
_EXPLODED = 1e3
"""Gradient norm above which the first update of a network is not healthy; 0.1 to 100 are usual."""
_BORDER = 10.0
"""Factor to `SMALL` or `LARGE` within which a layer between two vanishing or exploding ones gets their label."""


@dataclass(frozen=True)
class Verdict:
    label: Label
    reason: str  # with the measured value

    def __str__(self) -> str:
        return self.label if self.label == "healthy" else f"{self.label}: {self.reason}"


@dataclass(frozen=True)
class Cause:
    """What broke the layers, with its values, and what to change: an override, or in words."""

    reason: str
    change: str


@dataclass(frozen=True)
class Facts:
    """Context used to suppress redundant advice. `cause`: what to blame before the layers, if anything is wrong."""

    init: str  # the choice
    norm: str | None  # model.norm; None if the model has no such key
    activation: str | None  # of most layers
    has_skips: bool
    is_recurrent: bool
    is_gated: bool  # an LSTM
    clip: str
    gradient_norms: Sequence[float]  # observed, of all parameters together, before clipping
    cause: Cause | None = None


def verdicts(layers: Sequence[LayerStatistics], lags: Sequence[TimeLag] = ()) -> list[Verdict]:
    """Returns one verdict per layer, in the order of the forward pass.

    Compares the norm of the gradient with the last layer that has an activation (the last layer if none has), without
    frozen layers, which receive no gradient, and the root mean square of the signal with the first one; a signal of
    exactly 0 comes from weights that are initialized with 0 on purpose. For a recurrent
    layer with an entry in `lags`, also compares the gradient at the first state with the gradient at the last state. A
    layer close to a threshold, between two vanishing or two exploding layers, is not healthy: the ratio of a single
    layer varies with its width and activation.
    """
    active = [layer for layer in layers if layer.activation is not None]
    trained = [layer for layer in layers if layer.gradients.count]  # not frozen
    last = ([layer for layer in trained if layer.activation is not None] or trained)[-1:]
    first = (active or list(layers))[:1]
    ratios = [_ratios(layer, first, last) for layer in layers]
    over_time = {lag.name: lag for lag in lags}
    is_zero = bool(last) and last[0].gradients.norm == 0
    results = [_verdict(layer, own, is_zero) for layer, own in zip(layers, ratios, strict=True)]
    for i, layer in enumerate(layers):
        if results[i].label == "healthy" and layer.name in over_time:
            results[i] = _over_time(over_time[layer.name]) or results[i]
    for i in range(len(layers)):
        if results[i].label == "healthy":
            results[i] = _between(results[:i], results[i + 1 :], ratios[i]) or results[i]
    return results


def _ratios(
    layer: LayerStatistics, first: Sequence[LayerStatistics], last: Sequence[LayerStatistics]
) -> dict[Compared, float]:
    """Compares the gradient of a layer with the last one, and its signal with the first one."""
    gradient = _ratio(layer.gradients.norm, last[0].gradients.norm) if layer.gradients.count else 1.0
    is_compared = layer.inputs.rms != 0 or layer.activation is not None
    signal = _ratio(layer.inputs.rms, first[0].inputs.rms) if is_compared else 1.0
    return {("gradient", last[0].name if last else ""): gradient, ("signal", first[0].name): signal}


def _between(before: Sequence[Verdict], after: Sequence[Verdict], ratios: Mapping[Compared, float]) -> Verdict | None:
    """Returns the label of the nearest layers with a problem on both sides, if one of the ratios is close to it."""
    sides = (before[::-1], after)
    neighbours = {next((each.label for each in side if each.label != "healthy"), None) for side in sides}
    what = min(ratios, key=lambda each: ratios[each])
    if neighbours == {"vanishing"} and ratios[what] < _BORDER * SMALL:
        return Verdict("vanishing", f"{_reason(what, ratios[what])}, between vanishing layers")
    what = max(ratios, key=lambda each: ratios[each])
    if neighbours == {"exploding"} and ratios[what] > LARGE / _BORDER:
        return Verdict("exploding", f"{_reason(what, ratios[what])}, between exploding layers")
    return None


def _over_time(lag: TimeLag) -> Verdict | None:
    steps = len(lag.states) - 1
    ratio = _ratio(lag.states[-1], lag.states[0]) if lag.states else 1.0
    reason = f"gradient {ratio:.2g}x over {steps} steps back in time"
    return Verdict("exploding", reason) if ratio > LARGE else Verdict("vanishing", reason) if ratio < SMALL else None


def _verdict(layer: LayerStatistics, ratios: Mapping[Compared, float], is_zero: bool) -> Verdict:
    """Judges a layer alone. `is_zero`: whether the gradient that it is compared with is 0."""
    if not math.isfinite(layer.outputs.rms) or (layer.gradients.count and not math.isfinite(layer.gradients.norm)):
        return Verdict("exploding", "non-finite values")
    if layer.saturated is not None and layer.saturated > SATURATED:
        return Verdict("saturated", f"{100 * layer.saturated:.0f} % of the values")
    if layer.dead is not None and layer.dead > DEAD:
        return Verdict("dead", f"{100 * layer.dead:.0f} % of the units")
    if is_zero and layer.gradients.count:
        return Verdict("vanishing", "the gradient is zero")
    for what, ratio in ratios.items():
        if ratio > LARGE:
            return Verdict("exploding", _reason(what, ratio))
    for what, ratio in ratios.items():
        if ratio < SMALL:
            return Verdict("vanishing", _reason(what, ratio))
    return Verdict("healthy", _reason(*next(iter(ratios.items()))) if layer.gradients.count else "requires no gradient")


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference > 0 else math.inf if value > 0 else 1.0


def _reason(what: Compared, ratio: float) -> str:
    return f"{what[0]} {ratio:.2g}x that of {what[1]}"


def advice(results: Sequence[Verdict], facts: Facts) -> list[str]:
    """Returns recommendations, one line per kind of problem, or ["healthy"]."""
    lines = []
    for label, found in remedies(results, facts).items():
        count = sum(verdict.label == label for verdict in results)
        lines.append(f"{label} ({count} of {len(results)} layers): try {', '.join(found)}")
    return lines or ["healthy"]


def remedies(results: Sequence[Verdict], facts: Facts) -> dict[Label, list[str]]:
    """Returns what to try against each kind of problem: overrides, and changes in words.

    Clipping is the last recommendation, with a norm from the healthy updates: clipping bounds single large updates. A
    threshold from gradients that explode in every update would bound nothing.
    """
    if facts.cause is not None:
        return {verdict.label: [facts.cause.change] for verdict in results if verdict.label != "healthy"}
    init = recommended_init(facts.activation)
    if facts.init.rpartition("_")[0] == init.rpartition("_")[0] or facts.init in ("lsuv", "orthogonal"):
        initialization = ""
    else:
        initialization = f"init={init}"
    normalization = f"model.norm={'layer' if facts.is_recurrent else 'batch'}" if facts.norm == "none" else ""
    # An architecture with shorter gradient paths through time steps or layers.
    if facts.is_recurrent:
        shorter_paths = "" if facts.is_gated else "model=lstm"
    else:
        shorter_paths = "" if facts.has_skips else "skip connections (a ResNet)"
    specific: dict[Label, list[str]] = {
        "saturated": ["model.activation=relu"],
        "dead": ["a smaller optimizer.lr", "model.activation=leaky_relu"],
        "vanishing": [shorter_paths],
        "exploding": [shorter_paths, _clip(facts)],
    }
    found = {}
    for label in specific:
        if any(verdict.label == label for verdict in results):
            applicable = [remedy for remedy in (initialization, normalization, *specific[label]) if remedy]
            found[label] = applicable or ["a smaller optimizer.lr"]
    return found


def recommended_init(activation: str | None) -> str:
    """Returns the initialization whose variance fits the activation (a class name)."""
    if activation == "SELU":
        return "fan_in_normal"
    return "xavier_normal" if activation in (None, "Tanh", "Sigmoid", "Softsign", "Identity") else "kaiming_normal"


def _clip(facts: Facts) -> str:
    if facts.clip != "none":
        return ""
    usual = clipping_norm(healthy(facts.gradient_norms))
    if usual is None:
        return "then clip=norm with the clip.max_norm that `dlopt diagnose` prints for the healthy network"
    return f"clip=norm clip.max_norm={typed(usual)}"


def typed(value: float) -> str:
    """Formats a value for the command line with two significant digits."""
    return f"{float(f'{value:.2g}'):g}"


def healthy(norms: Sequence[float]) -> list[float]:
    """Returns the gradient norms before the first one that is not finite or more than `LARGE` times the lowest so far;
    none if the first one exceeds `_EXPLODED`: such gradients explode from the first update on."""
    limit = _EXPLODED
    for i, norm in enumerate(norms):
        if not norm <= limit:
            return list(norms[:i])
        limit = min(limit, LARGE * norm) if norm > 0 else limit
    return list(norms)


def clipping_norm(observed: Sequence[float]) -> float | None:
    """Returns the median of the finite gradient norms, which clips half of the updates (Pascanu et al. 2013, section
    3.2, take the mean over many updates); None if there is none."""
    finite = [norm for norm in observed if math.isfinite(norm) and norm > 0]
    return statistics.median(finite) if finite else None
