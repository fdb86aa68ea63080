"""Whether the loss curves of an optimizer's rungs collapse when they are normalized. Pure functions.

Qiu et al. (Scaling collapse reveals universal dynamics in compute-optimally trained neural networks, 2025) divide the
time of a training by its length, and its loss above an irreducible loss E by that at the end. Where hyperparameters are
scaled rightly, the curves of all sizes then are one curve. They measure the spread of the curves beside the noise of
seeds; so does Bergsma et al. (Scaling with collapse, 2025) for training losses.

Here a curve has ten points, each the mean training loss of a tenth of the run, because the losses of single batches
are noisy. The logarithms of normalized curves are compared from the third tenth on: earlier, they depend on the warmup
and on the loss at the start. E is the value at which the curves of the optimizer collapse best: a few rungs do not
identify it by their losses at the end.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dlopt.lab.ladder.curve import interval
from dlopt.lab.ladder.scaling_laws import Array

TENTHS = 10
FIRST = 2
"""Tenths of a run that are not compared."""
FEWEST = 3
"""Rungs from which on there is a verdict: two right rungs and two wrong ones have similar spreads."""
THRESHOLD = 2.0
"""Ratio of the spread to what seeds explain, above which curves do not collapse.

Chosen on simulated ladders (`tests/lab/ladder/test_collapse.py`), where right rates exceed it in at most 5 %.
"""
_FLOORS = 19  # values of E
_LARGEST = 0.9  # E as a fraction of the smallest loss


@dataclass(frozen=True)
class Collapse:
    """The normalized curves of an optimizer.

    Attributes:
        rungs: with curves of at least two seeds.
        irreducible: the E of the normalization.
        curves: [rungs, TENTHS], normalized, geometric mean over seeds.
        spread: of the rungs around their common curve: relative, root mean square.
        noise: what seeds alone contribute to the spread.
        deviation: of each rung from the common curve: relative, mean over the run.
    """

    rungs: Sequence[str]
    irreducible: float
    curves: Array
    spread: float
    noise: float
    deviation: Sequence[float]

    @property
    def farthest(self) -> str:
        """The rung with the largest deviation."""
        return self.rungs[int(np.argmax(np.abs(self.deviation)))]

    @property
    def holds(self) -> bool:
        return self.spread <= THRESHOLD * self.noise


def tenths(curve: Sequence[float], updates: int) -> Array:
    """Returns the mean loss of each tenth of a run. `curve`: see `read_curve`."""
    steps = np.minimum(np.arange(len(curve) + 1) * interval(updates), updates)
    sums = np.concatenate([[0.0], np.cumsum(np.diff(steps) * curve)])
    ends = np.linspace(0, updates, TENTHS + 1)
    return np.diff(np.interp(ends, steps, sums)) / np.diff(ends)


def collapse(rungs: Sequence[str], curves: Sequence[Array]) -> Collapse | None:
    """Compares the curves of an optimizer; None with fewer than `FEWEST` rungs that have curves of two seeds.

    `curves`: of each rung, [seeds, TENTHS].
    """
    known = [(rung, each) for rung, each in zip(rungs, curves, strict=True) if len(each) > 1]
    if len(known) < FEWEST:
        return None
    smallest = min(float(each.min()) for _, each in known)
    if not smallest > 0:
        return None
    floors = np.linspace(0, _LARGEST * smallest, _FLOORS)
    found = [_compare([rung for rung, _ in known], [each for _, each in known], float(floor)) for floor in floors]
    return min(found, key=lambda each: each.spread / each.noise)


def _compare(rungs: Sequence[str], curves: Sequence[Array], irreducible: float) -> Collapse:
    """Compares the curves normalized with this E. A rung counts by the inverse of the variance of its mean."""
    logs = [np.log((each - irreducible) / (each[:, -1:] - irreducible)) for each in curves]
    means = np.array([each.mean(axis=0) for each in logs])
    compared = means[:, FIRST:-1]  # the last tenth is 1 by definition
    variances = np.array([each[:, FIRST:-1].var(axis=0, ddof=1).mean() / len(each) for each in logs])
    variances = np.maximum(variances, 1e-12)  # equal seeds
    weights = 1 / variances / (1 / variances).sum()
    deviations = compared - weights @ compared
    spread = math.sqrt(float(weights @ (deviations**2).mean(axis=1)))
    # The expected spread of rungs whose curves are equal but for the noise of seeds.
    noise = math.sqrt(float(weights * (1 - weights) @ variances))
    return Collapse(rungs, irreducible, np.exp(means), spread, noise, deviations.mean(axis=1).tolist())
