import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dlopt.data.loading import Loader
from dlopt.data.samples import InMemory


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_larger_than_a_worker_chunk(numbered: Callable[..., InMemory], workers: int) -> None:
    samples = numbered(250)
    order = torch.randperm(250, generator=torch.Generator().manual_seed(0))
    loader = Loader(samples, workers)
    for size in (100, 32, 33, 7, 250):
        parts = list(order.split(size))
        for indices, inputs in zip(parts, loader.run(parts), strict=True):
            assert torch.equal(inputs[:, 0, 0, 0].long(), indices)
    assert list(loader.run([])) == []
    loader.close()


class Large:
    """Images of 256 x 256, each with small persistent allocations, like a decoder's tables."""

    shape = (3, 256, 256)
    targets = torch.zeros(100_000, dtype=torch.int64)

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.targets)

    def fetch(self, indices: Tensor) -> Tensor:
        result = torch.zeros(len(indices), *self.shape, dtype=torch.uint8)
        self._kept = [*self._kept[-500:], *(torch.zeros(200) for _ in indices)]
        return result

    def select(self, indices: Tensor) -> "Large":
        return self


def private_mib(process: int) -> float:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat() -> None:
    """No process grows by more than the prefetched batches (24 MiB each) while a gigabyte is loaded."""
    import multiprocessing

    loader = Loader(Large(), workers=2)
    kept: list[Tensor] = []
    grown: list[list[float]] = []
    for _ in loader.run(torch.arange(6_000).split(128)):
        kept = [*kept[-500:], *(torch.zeros(200) for _ in range(20))]
        processes = [os.getpid(), *(child.pid or 0 for child in multiprocessing.active_children())]
        grown.append([private_mib(process) for process in processes])
    loader.close()
    assert len(grown[0]) == 3
    of_process = torch.tensor(grown)  # a busy machine has more batches waiting at one moment than at another
    assert (of_process[-15:].median(0).values - of_process[5:20].median(0).values).max() < 4 * 24
