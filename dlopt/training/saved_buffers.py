"""A copy of a model's buffers."""

import torch
from torch import nn

from dlopt.parallel.shards import local


class SavedBuffers:
    """A copy of the buffers of a model (batch-norm statistics), to undo a forward pass."""

    def __init__(self, module: nn.Module) -> None:
        self._buffers = [local(buffer) for buffer in module.buffers() if not buffer.is_meta]
        self._saved = [buffer.clone() for buffer in self._buffers]

    def save(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._saved, self._buffers)

    def restore(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._saved)
