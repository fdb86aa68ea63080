"""The paths of optimizers on functions of two variables, through the same `step(closure)` as in a training."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlopt.functions import Function
from dlopt.optim import LossClosure
from dlopt.random import generator
from dlopt.schedules import Factor, Scheduler
from dlopt.train.averaging import at_evaluation_point

Build = Callable[[Sequence[nn.Parameter]], Optimizer]

# The series of preferred numbers that electronics knows as E12: steps of a fifth.
_DIGITS = (1.0, 1.2, 1.5, 1.8, 2.2, 2.7, 3.3, 3.9, 4.7, 5.6, 6.8, 8.2)
RATES = tuple(float(f"{digit}e{power}") for power in range(-4, 2) for digit in _DIGITS)
"""Learning rates among which `best_rate` chooses."""

_COARSE = 4  # every fourth is tried, and then the neighbours of the best

REACHED = 1e-3
"""Distance at which a minimum counts as reached, as a share of the distance at the start."""

_FAR = 1e6  # who is so far away has diverged


@dataclass(frozen=True)
class Path:
    """Where an optimizer was before its first and after each update.

    `evaluations[i]` counts those of the loss, with or without its gradient, that led to point i; products with a
    Hessian are not among them.
    """

    points: Tensor  # [steps + 1, 2]
    losses: Tensor  # [steps + 1], of the function itself, without noise
    distances: Tensor  # [steps + 1], to the nearest minimum
    evaluations: list[int]
    diverged: bool

    def reached(self) -> int | None:
        """The first update after which the path stays within `REACHED` of a minimum."""
        outside = (~(self.distances <= REACHED * self.distances[0])).nonzero()
        last = int(outside[-1]) if len(outside) else -1
        return None if last == len(self.distances) - 1 else last + 1

    def turns(self) -> float:
        """The share of moves that lead back, at more than a right angle to the move before."""
        moves = self.points.diff(dim=0)
        moves = moves[moves.norm(dim=1) > 1e-6 * self.distances[0]]
        if len(moves) < 2:
            return 0.0
        return float(((moves[1:] * moves[:-1]).sum(1) < 0).double().mean())


def follow(function: Function, build: Build, *, steps: int, seed: int, factor: Factor) -> Path:
    """At most `steps` updates from the function's start, in float64; fewer where the optimizer diverges.

    `factor` is the schedule. Every optimizer sees the same noise in the same update.
    """
    point = nn.Parameter(torch.tensor(function.start, dtype=torch.float64))
    optimizer = build([point])
    schedule = Scheduler(optimizer, factor)
    points, evaluations = [point.detach().clone()], [0]
    count = 0
    diverged = False
    for t in range(steps):
        sampled = function.sample(generator("cpu", seed, t))

        def loss() -> Tensor:
            nonlocal count
            count += 1
            return sampled(point)  # noqa: B023 - called within this update only

        optimizer.step(LossClosure(optimizer, loss))  # type: ignore[arg-type]
        schedule.step()
        with at_evaluation_point(optimizer):
            reached = point.detach().clone()
        diverged = not bool(reached.abs().max() < _FAR)
        if diverged:
            break
        points.append(reached)
        evaluations.append(count)
    path = torch.stack(points)
    distances = torch.cdist(path, torch.tensor(function.minima, dtype=torch.float64)).min(1).values
    return Path(path, function(path).detach(), distances, evaluations, diverged)


def best_rate(trial: Callable[[float], Path], least: float) -> float:
    """The learning rate of `RATES` with which the loss falls fastest: of which the mean logarithm of its height above
    `least` is the smallest. Raises ValueError where all of them diverge."""

    def best(indices: Iterable[int]) -> int:
        for i in indices:
            scores.setdefault(i, _score(trial(RATES[i]), least))
        return min(scores, key=lambda i: scores[i])

    scores: dict[int, float] = {}
    middle = best(range(0, len(RATES), _COARSE))
    if math.isinf(scores[middle]):
        raise ValueError(f"every learning rate from {RATES[0]:g} to {RATES[-1]:g} diverges")
    return RATES[best(range(max(middle - _COARSE + 1, 0), min(middle + _COARSE, len(RATES))))]


def _score(path: Path, least: float) -> float:
    if path.diverged:
        return math.inf
    heights = (path.losses - least).clamp(min=0) / max(float(path.losses[0]) - least, 1e-300)
    return float((heights + 1e-10).log().mean())
