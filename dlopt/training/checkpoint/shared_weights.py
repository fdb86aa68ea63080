"""Parameters and buffers that a model has under several names: tied weights, shared layers, views of one tensor."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.parallel.shards import is_sharded_tensor

_ROUNDING = 4  # units in the last place by which two copies of a shared tensor may differ


@dataclass(frozen=True)
class _Span:
    """The elements of a storage that a name of the model denotes: a view with `size`, `stride` and `offset`."""

    name: str
    memory: tuple[str, int]
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.offset + 1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))

    def view(self, memory: Tensor, start: int) -> Tensor:
        return memory.as_strided(self.size, self.stride, self.offset - start)


def shared_spans(tensors: Mapping[str, Tensor]) -> list[list[_Span]]:
    """Returns the names of overlapping tensors, such as [embedding, head], in groups; others are left out."""
    memories: dict[tuple[str, int], list[_Span]] = {}
    for name, tensor in tensors.items():
        if not tensor.numel():
            continue
        if tensor.is_meta or is_sharded_tensor(tensor) or not tensor.untyped_storage().data_ptr():
            # Without a memory of its full shape. Shared ones are one object.
            size = tuple(map(int, tensor.shape))
            span = _Span(name, ("object", id(tensor)), 0, size, torch.empty(size, device="meta").stride())
        else:
            memory = ("storage", tensor.untyped_storage().data_ptr())
            span = _Span(name, memory, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())
        memories.setdefault(span.memory, []).append(span)
    groups: list[list[_Span]] = []
    for spans in memories.values():
        # Names with disjoint parts of one storage, such as the weights of a recurrent layer on a GPU, are not shared.
        end = -1
        for span in sorted(spans, key=lambda each: each.offset):
            if span.offset >= end:
                groups.append([])
            groups[-1].append(span)
            end = max(end, span.end)
    return [group for group in groups if len(group) > 1]


def complete_shared(
    tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], others: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Returns `weights`, by the names of the model's `tensors`, with every name of a shared tensor that they determine.

    Loading them in any order then gives the same model. Of copies that are equal up to rounding, returns the one with
    the finest dtype. `others`: names in the file whose tensors do not fit. Raises `UserError` if two names of a shared
    tensor have different tensors.
    """
    result, others = dict(weights), set(others)
    for group in shared_spans(tensors):
        # The finest copy last: it overwrites the others.
        present = sorted((s for s in group if s.name in weights), key=lambda s: -_resolution(weights[s.name]))
        if not present:
            continue
        if unfit := [span.name for span in group if span.name in others]:
            _refuse([present[0].name, *unfit])
        dtype = weights[present[0].name].dtype
        for span in present:
            dtype = torch.promote_types(dtype, weights[span.name].dtype)
        start, end = min(span.offset for span in group), max(span.end for span in group)
        memory, is_set = torch.zeros(end - start, dtype=dtype), torch.zeros(end - start, dtype=torch.bool)
        for span in present:
            span.view(memory, start).copy_(weights[span.name])
            span.view(is_set, start).fill_(True)
        coarsest = max(_resolution(weights[span.name]) for span in present)
        for span in present:
            if not _are_equal(span.view(memory, start), weights[span.name], coarsest):
                _refuse([span.name, *(other.name for other in present if other is not span)])
        for span in group:
            if span.view(is_set, start).all():
                result[span.name] = span.view(memory, start).clone()
    return result


def _resolution(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps if tensor.is_floating_point() or tensor.is_complex() else 0.0


def _are_equal(stored: Tensor, copy: Tensor, resolution: float) -> bool:
    if not resolution:
        return torch.equal(stored, copy.to(stored.dtype))
    tolerance = _ROUNDING * resolution
    atol = tolerance * copy.abs().max().item()
    return torch.allclose(stored, copy.to(stored.dtype), rtol=tolerance, atol=atol, equal_nan=True)


def _refuse(names: list[str]) -> None:
    raise UserError(f"{' and '.join(names)} are one shared tensor in this model, but different ones in the file")
