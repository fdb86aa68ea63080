"""Arms of a ladder: how the weight decay of an optimizer follows the width of the model. Pure functions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dlopt.lab.ladder.rates import Optimum, missing, optimum, rate

Arm = Literal["constant", "inverse", "zero", "hyperball"]
SEARCHED = ("constant", "inverse")
"""Arms with a weight decay, which is searched together with the rates."""
OVERRIDES: Mapping[str, Sequence[str]] = {
    "zero": ["optimizer.weight_decay=0"],
    "hyperball": ["optimizer.weight_decay=0", "optimizer.hyperball=true"],
}
KEYS = ("optimizer.weight_decay", "optimizer.hyperball")
"""Keys that arms set."""
CENTRE = 0.1
"""Of the search of the decay: usual for decoupled decay of language models."""
RUNGS = 2
"""Number of rungs, the smallest, on which decay and rate are searched together."""


def missing_decays(losses: Mapping[int, float]) -> list[int]:
    """Returns the indices of the decays to measure next; [] if the search is complete.

    Uses the grid of the rates and its extension. Does not refine: the loss is flat around the best decay.

    `losses`: at the best rate of each decay, by index; infinity where all rates failed.
    """
    return [index for index in missing(losses) if index % 2 == 0]


@dataclass(frozen=True)
class DecaySearch:
    """The search of an optimizer's weight decay, which its arms share.

    Attributes:
        losses: rung -> weight decay -> loss at its best rate.
        optima: by rung; their `lr` is a weight decay.
        constant: geometric mean of the best decays; None if the search is not complete, or all runs of a rung failed.
        per_width: geometric mean of decay * width; None also without a width.
    """

    losses: Mapping[str, Mapping[float, float]]
    optima: Mapping[str, Optimum]
    constant: float | None = None
    per_width: float | None = None

    def decay(self, arm: str, width: float | None) -> float | None:
        """Returns the decay of a rung of that width; None if not known yet."""
        value = self.constant if arm == "constant" else self.per_width
        if value is None:
            return None
        return float(f"{value if arm == 'constant' or width is None else value / width:.4g}")


def decay_search(losses: Mapping[str, Mapping[int, float]], widths: Sequence[float | None]) -> DecaySearch:
    """Returns the search with these losses. `losses`: rung -> index -> loss; `widths`: of the rungs."""
    by_decay: dict[str, dict[float, float]] = {}
    optima: dict[str, Optimum] = {}
    for rung, by_index in losses.items():
        by_decay[rung] = {rate(CENTRE, index): by_index[index] for index in sorted(by_index)}
        best = optimum(by_decay[rung]) if by_index else None
        if best is not None:
            optima[rung] = best
    is_complete = not any(missing_decays(by_index) for by_index in losses.values())
    if not is_complete or len(optima) < len(losses):
        return DecaySearch(by_decay, optima)

    decays = [best.lr for best in optima.values()]
    scaled = []
    for decay, width in zip(decays, widths, strict=True):
        if width is not None:
            scaled.append(decay * width)
    per_width = _mean(scaled) if len(scaled) == len(decays) else None
    return DecaySearch(by_decay, optima, _mean(decays), per_width)


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
