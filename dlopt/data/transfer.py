"""Copies to a GPU that go on while it computes: the next batch travels while the present one is used."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class Lane(Protocol):
    """The way to a device; `CudaLane` is the one, tests have another."""

    def send(self, batch: Tensor) -> tuple[Tensor, Any]:
        """Starts copying a batch from page-locked memory: (where it will be, a mark to wait for)."""
        ...

    def receive(self, batch: Tensor, mark: Any) -> Tensor:
        """The batch; what is computed from here on comes after its arrival."""
        ...


class CudaLane:
    """A stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def send(self, batch: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device, non_blocking=True)
            mark = torch.cuda.Event()
            mark.record(self._stream)
        return moved, mark

    def receive(self, batch: Tensor, mark: torch.cuda.Event) -> Tensor:
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(mark)
        batch.record_stream(computing)  # its memory is not for the next copy before it has been used
        return batch


def ahead(batches: Iterable[Tensor], lane: Lane) -> Iterator[Tensor]:
    """The batches on the device; each copy is started before the batch in front of it is given out."""
    under_way: tuple[Tensor, Any] | None = None
    for batch in batches:
        sent = lane.send(batch)
        if under_way is not None:
            yield lane.receive(*under_way)
        under_way = sent
    if under_way is not None:
        yield lane.receive(*under_way)
