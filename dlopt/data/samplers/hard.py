"""Loss-aware sampler: draws samples with a large loss more often."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.basics.random import generator
from dlopt.basics.ranges import PositiveFraction


class HardExamples:
    """Draws each sample in proportion to its latest loss, between a floor and a ceiling.

    An epoch has as many draws as there are samples; the first epoch draws each sample once. Rounding the expected draws
    of a sample to an integer leaves a credit, which is carried over to the next epoch. Therefore

    - a sample's total draws differ from the expected ones by a rounding that does not grow with the epochs, and
    - no sample is skipped for more than 2 / `floor` epochs.

    Repetitions of a sample are spread over the epoch. The state (in the checkpoint) has the draws of the current epoch;
    losses observed during an epoch affect the next one.

    Args:
        floor: draws per epoch of a sample without loss.
        max_draws: average draws per epoch of a sample with a large loss, which may be mislabelled.
    """

    def __init__(
        self, *, targets: Tensor, seed: int, floor: PositiveFraction, max_draws: Annotated[float, Ge(1)]
    ) -> None:
        count = len(targets)
        self.maximum: Callable[[Tensor], Tensor] = lambda values: values
        self._seed = seed
        self._floor = floor
        self._max_draws = max_draws
        self._losses = torch.zeros(count)
        self._updates = torch.full((count,), -1, dtype=torch.int32)  # update of the latest loss; -1: none
        self._credit = torch.zeros(count, dtype=torch.float64)  # draws still due; the sum is 0
        self._draws = torch.ones(count, dtype=torch.int32)  # in the current epoch
        self._epoch = -1
        self._served: list[tuple[int, Tensor]] = []

    def __len__(self) -> int:
        return len(self._losses)

    def order(self, epoch: int) -> Tensor:
        """Returns the order of the current or a later epoch, which becomes the current one. All ranks call together."""
        if epoch < self._epoch:
            raise ValueError(f"epoch {epoch} is over: epoch {self._epoch} is the current one")
        rng = generator("cpu", self._seed, epoch)
        permutation = torch.randperm(len(self), generator=rng)
        if epoch > self._epoch:
            self._plan(permutation)
            self._epoch = epoch
        counts = self._draws.long()
        indices = torch.arange(len(self)).repeat_interleave(counts)
        copy = torch.arange(len(indices)) - (counts.cumsum(0) - counts)[indices]
        # Copy c of n falls into [c/n, (c + 1)/n) of the epoch.
        time = (copy + torch.rand(len(indices), generator=rng, dtype=torch.float64)) / counts[indices]
        return indices[time.argsort()]

    def _plan(self, permutation: Tensor) -> None:
        """Sets the draws of the next epoch. `permutation` breaks ties."""
        # Not before the first epoch: there are no losses, and rank 0 may call this alone, so a collective would hang.
        if self._epoch >= 0:
            self._merge()
        known = self._updates >= 0
        losses = self._losses.double()
        if not known.all():
            losses[~known] = losses[known].mean() if known.any() else 1.0
        credit = self._credit + expected_draws(losses, self._floor, self._max_draws)
        draws = credit.floor().clamp_min(0).long()
        left = len(self) - int(draws.sum())
        if left > 0:
            most_due = permutation[(credit - draws)[permutation].argsort(descending=True, stable=True)]
            draws[most_due[:left]] += 1
        while left < 0:  # too many draws: the samples with the most lose one each, but keep their first
            largest = permutation[draws[permutation].argsort(descending=True, stable=True)]
            reduced = largest[draws[largest] > 1][:-left]
            draws[reduced] -= 1
            left += len(reduced)
        self._credit, self._draws = credit - draws, draws.int()

    def begin(self) -> None:
        self._served = []

    def serve(self, step: int, indices: Tensor) -> None:
        self._served.append((step, indices))

    def observe(self, losses: Tensor) -> None:
        """Keeps each sample's latest loss (the largest of several in one batch). Ignores non-finite losses."""
        if not len(losses):
            return
        samples, steps = self._next_served(len(losses))
        # Waits for the device, but only once for all updates that `MetricSum` flushes together.
        values = losses.detach().float().cpu().numpy()
        finite = np.isfinite(values)
        samples, steps, values = samples[finite], steps[finite], values[finite]
        # Sorts by sample, update, loss; the last entry of each sample is the largest loss of its latest update.
        by = np.lexsort((values, steps, samples))
        by = by[np.append(samples[by][1:] != samples[by][:-1], True)[: len(by)]]
        indices, updates, latest = (torch.from_numpy(array[by]) for array in (samples, steps, values))
        # The losses of one batch may arrive in several calls (micro-batches).
        same_batch = self._updates[indices] == updates
        self._losses[indices] = torch.where(same_batch, torch.maximum(latest, self._losses[indices]), latest)
        self._updates[indices] = updates

    def _next_served(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Removes the next `count` served samples from the queue; returns (samples, updates)."""
        samples, steps = [], []
        while count:
            step, indices = self._served.pop(0)
            if len(indices) > count:
                self._served.insert(0, (step, indices[count:]))
                indices = indices[:count]
            samples.append(indices)
            steps.append(np.full(len(indices), step, dtype=np.int32))
            count -= len(indices)
        return torch.cat(samples).numpy(), np.concatenate(steps)

    def _merge(self) -> None:
        """Gives all ranks the latest loss of every sample: from the latest update, and the largest of several."""
        updates = self.maximum(self._updates)
        self._losses = self.maximum(torch.where(self._updates == updates, self._losses, -torch.inf))
        self._updates = updates

    def state_dict(self) -> dict[str, Any]:
        """Returns the state. All ranks call it together, after all losses have been observed."""
        self._merge()
        return {
            "epoch": self._epoch,
            "draws": self._draws.clone(),
            "credit": self._credit.clone(),
            "losses": self._losses.clone(),
            "seen": self._updates.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if len(state["losses"]) != len(self):
            raise UserError(
                f"sampler=hard_examples: the checkpoint has losses of {len(state['losses'])} training samples, but the "
                f"data has {len(self)}; resume with the original data, or use init_from"
            )
        self._epoch = state["epoch"]
        self._draws, self._credit = state["draws"].clone(), state["credit"].clone()
        self._losses, self._updates = state["losses"].clone(), state["seen"].clone()


def expected_draws(losses: Tensor, floor: float, ceiling: float) -> Tensor:
    """Returns floor + (1 - floor) min(ceiling, s * losses), float64 [N], with the s for which the values sum to N.

    `losses` [N]; negative ones count as 0.
    """
    count = len(losses)
    weights = losses.double().clamp_min(0)
    weights = weights + weights.mean() * 1e-9 if weights.any() else torch.ones_like(weights)
    ordered, positions = weights.sort(descending=True)
    rest = ordered.flip(0).cumsum(0).flip(0)  # sum of the k-th largest value and all smaller ones
    at_ceiling = torch.arange(count)  # k = number of values at the ceiling; take the smallest k that is consistent
    scales = (count - ceiling * at_ceiling) / rest
    k = int((scales * ordered <= ceiling * (1 + 1e-9)).nonzero()[0])
    draws = torch.where(at_ceiling < k, ceiling, scales[k] * ordered)
    return floor + (1 - floor) * torch.empty_like(draws).scatter_(0, positions, draws)
