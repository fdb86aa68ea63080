"""A sequential test on paired differences: it may be looked at after every pair, and may stop at any of them.

The test bets on the signs of the differences. If they are symmetric about `center`, the sign s_i of x_i = d_i - center
is a fair coin whatever the sizes |x_1|, ..., |x_i| and the earlier signs are, so that

    M_n = 1/2 prod_i (1 + tanh(k |z_i|) s_i) + 1/2 prod_i (1 - tanh(k |z_i|) s_i),   z_i = x_i / rms(x_1, ..., x_i),

is a martingale that starts at 1. By Ville's inequality, P(M_n >= 1/a for some n) <= a. Source: Vovk and Wang,
Nonparametric e-tests of symmetry (New England Journal of Statistics in Data Science, 2024; arXiv:2208.08925). The
factor is the likelihood ratio 2 f(x) / (f(x) + f(-x)) of a normal f with the mean of `SIZE` standard deviations, for
which rms(x) = sd sqrt(1 + SIZE^2) and thus k = SIZE sqrt(1 + SIZE^2); the two products bet on a gain and on a loss.

The differences need not be normal: ties, rounded accuracies and outliers keep the error rate, where a sequential t-test
(Wang and Ramdas, arXiv:2310.03722) exceeds it with few distinct values. A change that does nothing exchanges the two
runs of a pair, which makes the differences symmetric about 0.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dlopt.lab.comparison.intervals import pseudomedian

SIZE = 1.0
"""The size of change, in standard deviations of the differences, on which the test bets."""
_SLOPE = SIZE * math.sqrt(1 + SIZE**2)
_GRID = 64

Verdict = Literal["better", "worse", "equal", "undecided"]


def evidence(differences: ArrayLike, center: ArrayLike = 0.0) -> NDArray[np.float64]:
    """Returns log M_n after each pair, against differences that are symmetric about `center`: [..., n] -> [..., n].

    An infinite difference, of a run that diverged, is larger than all others. It does not count in the rms.
    """
    x = np.asarray(differences, dtype=float) - np.asarray(center)
    finite = np.isfinite(x)
    count = np.maximum(np.cumsum(finite, axis=-1), 1)
    largest = np.maximum.accumulate(np.where(finite, np.abs(x), 0.0), axis=-1)
    unit = np.where(largest > 0, largest, 1.0)[..., -1:]  # squares of tiny differences would be 0
    scaled = np.where(finite, x, 0.0) / unit
    rms = np.sqrt(np.cumsum(scaled**2, axis=-1) / count)
    z = np.where(finite, scaled / np.where(rms > 0, rms, 1.0), np.sign(x) * np.sqrt(np.arange(1, x.shape[-1] + 1)))
    gain, loss = (
        np.cumsum(math.log(2) - np.logaddexp(0.0, -2 * _SLOPE * each), axis=-1) for each in (z, -z)
    )  # log(1 + tanh(y)) = log(2 / (1 + exp(-2 y)))
    return np.asarray(np.logaddexp(gain, loss) - math.log(2))


def interval(differences: Sequence[float], rate: float, *centers: float) -> tuple[float, float]:
    """Returns the smallest and largest center that is not rejected at `rate`; infinite with few pairs.

    They are found on a grid that contains the differences, where ties weaken the evidence and the evidence jumps, and
    `centers`. An end at such a jump is this number exactly, and may itself be rejected. Over all n, the intervals
    contain the center of symmetry with probability 1 - `rate`: a confidence sequence.
    """
    finite = sorted(each for each in differences if math.isfinite(each)) or [0.0]
    reach = max(finite[-1] - finite[0], abs(finite[0]) * 1e-9, 1e-300)
    exact = np.array([*finite, *centers])
    inner = np.linspace(finite[0] - 2 * reach, finite[-1] + 2 * reach, _GRID)
    inner = inner[(np.abs(inner[:, None] - exact) > 1e-9 * reach).all(axis=1)]  # rounded, they would hide the jump
    grid = np.sort([finite[0] - 1e6 * reach, *inner, *exact, finite[-1] + 1e6 * reach])
    kept = _is_kept(differences, grid, rate)
    if not kept.any():  # all of them are infinite
        return differences[0], differences[0]
    first, last = int(kept.argmax()), len(grid) - 1 - int(kept[::-1].argmax())
    low = -math.inf if first == 0 else _edge(differences, rate, float(grid[first - 1]), float(grid[first]))
    is_open = last == len(grid) - 1
    return low, math.inf if is_open else _edge(differences, rate, float(grid[last + 1]), float(grid[last]))


def _is_kept(differences: Sequence[float], centers: NDArray[np.float64], rate: float) -> NDArray[np.bool_]:
    if not differences:
        return np.ones(len(centers), dtype=bool)
    return np.asarray(evidence(differences, centers[:, None])[:, -1] < math.log(1 / rate))


def _edge(differences: Sequence[float], rate: float, rejected: float, kept: float) -> float:
    """Returns the end of the interval between a rejected center and one that is not, by finer and finer grids.

    An end that no grid tells from `rejected` is this center: all centers next to it are kept, and it alone is not.
    """
    start = rejected
    for _ in range(6):
        grid = np.linspace(rejected, kept, _GRID)
        first = int(np.append(_is_kept(differences, grid[:-1], rate), True).argmax())
        rejected, kept = float(grid[max(first - 1, 0)]), float(grid[first])
    return start if rejected == start else kept


@dataclass(frozen=True)
class Look:
    """The result of the first `pairs` differences.

    Attributes:
        estimate: the pseudomedian of the differences.
        low, high: the interval, see `interval`.
        verdict: better or worse: the interval is beyond the margin; equal: it is within a margin > 0; or undecided.
    """

    pairs: int
    estimate: float
    low: float
    high: float
    verdict: Verdict


def looks(differences: Sequence[float], rate: float, margin: float = 0.0, first: int = 1) -> Iterator[Look]:
    """Yields a look after each pair from the `first` on, until one decides. Positive differences are gains.

    The probability of a wrong verdict is at most `rate`, however many pairs there are and whenever they end.
    """
    for pairs in range(first, len(differences) + 1):
        low, high = interval(differences[:pairs], rate, margin, -margin)
        verdict: Verdict = "undecided"
        loss_is_kept, gain_is_kept = _is_kept(differences[:pairs], np.array([-margin, margin]), rate)
        if low >= margin and not gain_is_kept:
            verdict = "better"
        elif high <= -margin and not loss_is_kept:
            verdict = "worse"
        elif margin and -margin <= low and high <= margin:
            verdict = "equal"
        yield Look(pairs, pseudomedian(differences[:pairs], 0.0), low, high, verdict)
        if verdict != "undecided":
            return


def rate_of(proposal: int, rate: float) -> float:
    """Returns the error rate of proposal 1, 2, ... of a ledger, which sum to `rate`: 6 rate / (pi proposal)^2.

    By the union bound, a false verdict among all of them, however many follow, has at most the probability `rate`
    (alpha spending: Foster and Stine, Journal of the Royal Statistical Society B 70, 2008, section 2).
    """
    return 6 * rate / (math.pi * proposal) ** 2


def fewest_pairs(rate: float) -> int:
    """Returns the number of pairs without which no verdict is possible: equal gains in all of them."""
    pairs = 1
    while evidence(np.ones(pairs))[-1] < math.log(1 / rate):
        pairs += 1
    return pairs
