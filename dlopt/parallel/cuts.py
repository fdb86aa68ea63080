"""Which part of a tensor a rank has, where each has another one."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """The positions `index` of `size` along dimension `dim`: one part of the whole, or of each of so many `pieces`."""

    dim: int
    index: slice | Tensor
    size: int
    pieces: int = 1

    def of(self, whole: Tensor) -> Tensor:
        """The part of a whole tensor."""
        if isinstance(self.index, slice):
            return whole[(slice(None),) * self.dim + (self.index,)]
        return whole.index_select(self.dim, self.index.to(whole.device))

    def put(self, whole: Tensor, part: Tensor) -> Tensor:
        """The whole tensor with this part in its place."""
        positions = torch.arange(self.size)[self.index] if isinstance(self.index, slice) else self.index
        return whole.index_copy(self.dim, positions.to(whole.device), part)
