"""Mean and variance of many tensors taken together, and a few of their values for a histogram."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of all values added (merged as in Chan, Golub & LeVeque 1983).

    Nothing waits for the device before a figure is read. `keep`: so many values of each tensor, drawn evenly at random
    from a generator of their own, stay for `values`; 20,000 look in a histogram like all of them.
    """

    keep: int = 0
    count: int = 0
    _mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    _deviations: Tensor = field(default_factory=lambda: torch.zeros(()))
    _kept: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def add(self, tensor: Tensor) -> None:
        values = tensor.detach()
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        count = values.numel()
        if not count:
            return
        variance, mean = torch.var_mean(values, correction=0)
        total = self.count + count
        if self.count:
            delta = mean - self._mean
            self._deviations = self._deviations + variance * count + delta.square() * (self.count * count / total)
            self._mean = self._mean + delta * (count / total)
        else:
            self._deviations, self._mean = variance * count, mean
        self.count = total
        if self.keep:
            self._kept.append(_some(values, self.keep).cpu())

    @property
    def mean(self) -> float:
        return float(self._mean) if self.count else math.nan

    @property
    def variance(self) -> float:
        """Divided by the count, not by one less."""
        return float(self._deviations) / self.count if self.count else math.nan

    @property
    def std(self) -> float:
        return math.sqrt(self.variance) if self.variance >= 0 else math.nan

    @property
    def rms(self) -> float:
        """Root of the mean square."""
        square = self.variance + self.mean**2
        return math.sqrt(square) if square >= 0 else math.nan

    @property
    def norm(self) -> float:
        """The 2-norm of all values added, as one vector."""
        return self.rms * math.sqrt(self.count)

    @property
    def values(self) -> Tensor:
        """[n] of the values, on the CPU."""
        return torch.cat(self._kept) if self._kept else torch.empty(0)


def _some(values: Tensor, number: int) -> Tensor:
    flat = values.flatten()
    if flat.numel() <= number:
        return flat.clone()
    generator = torch.Generator(flat.device).manual_seed(0)
    return flat[torch.randint(flat.numel(), (number,), generator=generator, device=flat.device)]
