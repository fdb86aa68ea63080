"""Samples with a large loss more often."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from dlopt.errors import UserError
from dlopt.random import generator
from dlopt.ranges import PositiveFraction


class HardExamples:
    """An epoch draws each sample in proportion to its last seen loss, between a floor and a ceiling.

    An epoch has as many draws as there are samples; the first one draws each sample once. What a sample is due and
    does not get (or gets too much) is carried over to the next epoch, so that

    - a sample is drawn as often as its losses say, up to a rounding that does not grow with the number of epochs, and
    - no sample is left out for more than 2 / `floor` epochs.

    The repetitions of a sample are spread over the epoch. The state, which belongs to the checkpoint, holds the
    draws of the epoch under way, so losses that are seen meanwhile change the next one.

    Args:
        floor: draws per epoch of a sample without any loss.
        max_draws: draws per epoch, on average, of a sample with a large loss, which may be mislabelled.

    `maximum` is the elementwise maximum over ranks, each of which sees the losses of its own samples.
    """

    def __init__(
        self, *, targets: Tensor, seed: int, floor: PositiveFraction, max_draws: Annotated[float, Ge(1)]
    ) -> None:
        count = len(targets)
        self.maximum: Callable[[Tensor], Tensor] = _own
        self._seed = seed
        self._floor = floor
        self._max_draws = max_draws
        self._losses = torch.zeros(count)
        self._seen = torch.full((count,), -1, dtype=torch.int32)  # update of the last seen loss
        self._credit = torch.zeros(count, dtype=torch.float64)  # draws due, in total 0
        self._draws = torch.ones(count, dtype=torch.int32)  # in the epoch under way
        self._epoch = -1
        self._served: list[tuple[int, Tensor]] = []

    def __len__(self) -> int:
        return len(self._losses)

    def order(self, epoch: int) -> Tensor:
        """The epoch under way, or a later one, which then is. On many ranks all call this together."""
        if epoch < self._epoch:
            raise ValueError(f"epoch {epoch} is gone: epoch {self._epoch} is under way")
        draws = generator("cpu", self._seed, epoch)
        permutation = torch.randperm(len(self), generator=draws)
        if epoch > self._epoch:
            self._plan(permutation)
            self._epoch = epoch
        counts = self._draws.long()
        indices = torch.arange(len(self)).repeat_interleave(counts)
        copy = torch.arange(len(indices)) - (counts.cumsum(0) - counts)[indices]
        time = (copy + torch.rand(len(indices), generator=draws, dtype=torch.float64)) / counts[indices]
        return indices[time.argsort()]

    def _plan(self, permutation: Tensor) -> None:
        """Sets the draws of the next epoch. `permutation` decides between equals."""
        if self._epoch >= 0:  # before the first one nothing is known, and rank 0 alone may look into it
            self._merge()
        known = self._seen >= 0
        losses = self._losses.double()
        if not known.all():
            losses[~known] = losses[known].mean() if known.any() else 1.0
        credit = self._credit + expected_draws(losses, self._floor, self._max_draws)
        draws = credit.floor().clamp_min(0).long()
        left = len(self) - int(draws.sum())
        if left > 0:
            most_due = permutation[(credit - draws)[permutation].argsort(descending=True, stable=True)]
            draws[most_due[:left]] += 1
        while left < 0:  # some had more than their due: others wait, but for their first draw
            largest = permutation[draws[permutation].argsort(descending=True, stable=True)]
            waiting = largest[draws[largest] > 1][:-left]
            draws[waiting] -= 1
            left += len(waiting)
        self._credit, self._draws = credit - draws, draws.int()

    def begin(self) -> None:
        self._served = []

    def serve(self, step: int, indices: Tensor) -> None:
        self._served.append((step, indices))

    def observe(self, losses: Tensor) -> None:
        """A sample's last loss counts; of several in one batch the largest, in whatever parts they come."""
        if not len(losses):
            return
        own, steps = self._take(len(losses))
        values = losses.detach().float().cpu().numpy()
        finite = np.isfinite(values)
        own, steps, values = own[finite], steps[finite], values[finite]
        by = np.lexsort((values, steps, own))
        by = by[np.append(own[by][1:] != own[by][:-1], True)[: len(by)]]  # the last one of each sample
        indices, seen, latest = (torch.from_numpy(each[by]) for each in (own, steps, values))
        same_batch = self._seen[indices] == seen
        self._losses[indices] = torch.where(same_batch, torch.maximum(latest, self._losses[indices]), latest)
        self._seen[indices] = seen

    def _take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The next `count` samples that were served, and their updates."""
        parts, steps = [], []
        while count:
            step, indices = self._served.pop(0)
            if len(indices) > count:
                self._served.insert(0, (step, indices[count:]))
                indices = indices[:count]
            parts.append(indices)
            steps.append(np.full(len(indices), step, dtype=np.int32))
            count -= len(indices)
        return torch.cat(parts).numpy(), np.concatenate(steps)

    def _merge(self) -> None:
        seen = self.maximum(self._seen)
        self._losses = self.maximum(torch.where(self._seen == seen, self._losses, -torch.inf))
        self._seen = seen

    def state_dict(self) -> dict[str, Any]:
        """On many ranks all call this together, when all losses have been observed."""
        self._merge()
        return {
            "epoch": self._epoch,
            "draws": self._draws.clone(),
            "credit": self._credit.clone(),
            "losses": self._losses.clone(),
            "seen": self._seen.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if len(state["losses"]) != len(self):
            raise UserError(
                f"sampler=hard_examples: the checkpoint has losses of {len(state['losses'])} training samples and the "
                f"data have {len(self)}; resume with the data of the first run, or use init_from"
            )
        self._epoch = state["epoch"]
        self._draws, self._credit = state["draws"].clone(), state["credit"].clone()
        self._losses, self._seen = state["losses"].clone(), state["seen"].clone()


def _own(values: Tensor) -> Tensor:
    return values


def expected_draws(losses: Tensor, floor: float, ceiling: float) -> Tensor:
    """floor + (1 - floor) min(ceiling, s losses) with the s for which the N values sum to N; float64 [N].

    `losses` [N]; negative ones count as 0.
    """
    count = len(losses)
    weights = losses.double().clamp_min(0)
    weights = weights + weights.mean() * 1e-9 if weights.any() else torch.ones_like(weights)
    ordered, positions = weights.sort(descending=True)
    rest = ordered.flip(0).cumsum(0).flip(0)  # sum of the k-th largest and of all below
    at_ceiling = torch.arange(count)  # the first k of them
    scales = (count - ceiling * at_ceiling) / rest
    k = int((scales * ordered <= ceiling * (1 + 1e-9)).nonzero()[0])
    shares = torch.where(at_ceiling < k, ceiling, scales[k] * ordered)
    return floor + (1 - floor) * torch.empty_like(shares).scatter_(0, positions, shares)
