"""Random numbers of a task of the user's own, that do not depend on how a batch is split."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """Draws random numbers for the samples of a batch.

    The numbers of a sample depend on the seed, on the update, and on the sample's position in the batch of all
    processes: they are the same for any number of micro-batches and processes, in every evaluation of the loss in an
    update, and after a resume. For that, each process draws for the whole batch, and keeps the rows of its samples.
    """

    generator: torch.Generator  # on the device of the batch; seeded for this update
    total: int  # samples of the batch on all processes
    positions: slice  # of the samples of this call among them
    dtype: torch.dtype = torch.float32  # of `normal` and `uniform`

    @classmethod
    def of_update(
        cls, device: torch.device, seed: int, total: int, dtype: torch.dtype, positions: slice | None = None
    ) -> "Draws":
        """Returns the draws of the samples at `positions`, of a whole batch for None."""
        generator = torch.Generator(device).manual_seed(seed)
        return cls(generator, total, slice(0, total) if positions is None else positions, dtype)

    def at(self, positions: slice) -> "Draws":
        """Returns the draws of some of the samples, from the first number on."""
        generator = torch.Generator(self.device).manual_seed(self.generator.initial_seed())
        return replace(self, generator=generator, positions=positions)

    @property
    def device(self) -> torch.device:
        return self.generator.device

    def __len__(self) -> int:
        """Returns the number of samples of this call."""
        return self.positions.stop - self.positions.start

    def normal(self, *size: int) -> Tensor:
        """Draws from N(0, 1): [samples, *size]."""
        drawn = torch.randn(self.total, *size, generator=self.generator, device=self.device, dtype=self.dtype)
        return drawn[self.positions]

    def uniform(self, *size: int) -> Tensor:
        """Draws from [0, 1): [samples, *size]."""
        drawn = torch.rand(self.total, *size, generator=self.generator, device=self.device, dtype=self.dtype)
        return drawn[self.positions]

    def integers(self, high: int, *size: int) -> Tensor:
        """Draws from 0, ..., high - 1: int64 [samples, *size]."""
        drawn = torch.randint(high, (self.total, *size), generator=self.generator, device=self.device)
        return drawn[self.positions]
