"""The tensors of a sample that has several, as one row of bytes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """A tensor of a record: its key, or its number in a tuple; its type; its shape without the batch."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass(frozen=True)
class Layout:
    """The entries of a record. A record travels as one row of bytes, which is exact for all types."""

    kind: Literal["dict", "tuple"]
    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, values: Mapping[str, Tensor], kind: Literal["dict", "tuple"]) -> "Layout":
        return cls(kind, tuple(Entry(name, each.dtype, tuple(each.shape)) for name, each in values.items()))

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]] | tuple[tuple[int, ...], ...]:
        shapes = {each.name: each.shape for each in self.entries}
        return shapes if self.kind == "dict" else tuple(shapes.values())

    def __str__(self) -> str:
        return ", ".join(map(str, self.entries))

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Returns the bytes of a record: uint8 [bytes]."""
        rows = [torch.empty(0, dtype=torch.uint8)]
        for entry in self.entries:
            flat = values[entry.name].contiguous().reshape(-1)
            if len(flat):  # torch views no empty tensor as another type
                rows.append(flat.view(torch.uint8))
        return torch.cat(rows)

    def unpack(self, rows: Tensor, dtype: torch.dtype) -> dict[str, Tensor] | tuple[Tensor, ...]:
        """Returns the records of uint8 rows [B, bytes], stacked [B, ...], with floating-point entries in `dtype`."""
        parts = rows.split([each.bytes for each in self.entries], dim=1)
        tensors = {}
        for entry, part in zip(self.entries, parts, strict=True):
            # A copy begins at the start of its memory, as types of several bytes require.
            copy = part.clone(memory_format=torch.contiguous_format)
            flat = copy.view(entry.dtype) if entry.bytes else copy.to(entry.dtype)
            values = flat.reshape(len(rows), *entry.shape)
            tensors[entry.name] = values.to(dtype) if entry.dtype.is_floating_point else values
        return tensors if self.kind == "dict" else tuple(tensors.values())
