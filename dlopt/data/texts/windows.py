"""Windows of a sequence of tokens: the samples of a text."""

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlopt.data.samples import Content, Samples


class Shards:
    """Memory-mapped arrays [N_i] that are indexed like one array [sum of N_i], without a copy of them."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = arrays
        self._ends = np.cumsum([len(array) for array in arrays])
        self.dtype = np.result_type(*arrays)
        self.nbytes = len(self) * self.dtype.itemsize

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """Returns a copy of a range, or of the elements at positions int64 of any shape."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            index = np.arange(start, stop, step)
        shards = np.searchsorted(self._ends, index, side="right")
        values = np.empty(index.shape, self.dtype)
        for shard in np.unique(shards):
            array, chosen = self._arrays[shard], shards == shard
            values[chosen] = array[index[chosen] - (self._ends[shard] - len(array))]
        return values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self._arrays, dtype=dtype or self.dtype)


class Windows(Samples):
    """Windows of `length` + 1 tokens: the first `length` are inputs, the last `length` are targets.

    Window i starts at token i * stride. By default stride = `length`: neighbours share one token, and every token but
    the first is a target once; up to `length` - 1 tokens at the end are left out. The windows are never copied: they
    are views of the tokens.

    Args:
        tokens: uint8, uint16 or int32 [N]; may be memory maps.
    """

    uses_workers = False

    def __init__(self, tokens: np.ndarray | Shards, length: int, stride: int | None = None) -> None:
        self.tokens = tokens
        self.length = length
        self._stride = length if stride is None else stride
        self._count = max((len(tokens) - length - 1) // self._stride + 1, 0)
        # Zeros: a text has no labels.
        super().__init__(torch.zeros(1, dtype=torch.int64).expand(self._count), (length + 1,))

    @property
    def kind(self) -> str:
        return "text"

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes

    def size(self) -> dict[str, int]:
        return {"tokens": len(self.tokens)}  # the number of windows depends on their length

    def content(self) -> Content:
        return Content.of_array(self.tokens)

    def starts(self, indices: Tensor) -> Tensor:
        """Returns the first tokens of windows `indices`."""
        return self.rows_of(indices) * self._stride

    def read(self, rows: Tensor) -> Tensor:
        positions = (rows * self._stride).numpy()[:, None] + np.arange(self.length + 1)
        return torch.from_numpy(np.ascontiguousarray(self.tokens[positions]))

    def predicted(self) -> np.ndarray:
        """Returns the tokens that are targets of a window, [len * length]; without a copy if all windows are used."""
        if self.rows is None and self._stride == self.length:
            return self.tokens[1 : self._count * self.length + 1]
        return super().predicted()

    def at_every_token(self) -> "Windows":
        """Returns the windows that start at each token: sample i starts at token i."""
        return Windows(self.tokens, self.length, stride=1)

    def loaded(self) -> "Windows":
        """Returns the windows of the tokens in main memory."""
        windows = copy(self)
        windows.tokens = np.array(self.tokens)
        return windows

    def on(self, device: torch.device) -> Tensor:
        """Returns all windows [len, length + 1] on the device, as a view of its copy of the tokens."""
        tokens = torch.from_numpy(np.asarray(self.tokens))
        if tokens.dtype == torch.uint16 and device.type != "cpu":
            tokens = tokens.to(torch.int32)  # accelerators have few operations for uint16
        view = tokens.to(device).as_strided((self._count, self.length + 1), (self._stride, 1))
        return view if self.rows is None else view.index_select(0, self.rows.to(device))
