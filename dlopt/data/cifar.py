"""CIFAR-10 and CIFAR-100, read by torchvision."""

from typing import Literal

import torch

from dlopt.data.idx import call_torchvision, data_root
from dlopt.data.samples import Dataset, InMemory


def cifar10(*, root: str | None, download: bool) -> Dataset:
    """CIFAR-10: 50,000 training and 10,000 test images [3, 32, 32] of ten classes (Krizhevsky 2009)."""
    return _load("CIFAR10", root, download)


def cifar100(*, root: str | None, download: bool) -> Dataset:
    """CIFAR-100: 50,000 training and 10,000 test images [3, 32, 32] of a hundred classes (Krizhevsky 2009)."""
    return _load("CIFAR100", root, download)


def _load(name: Literal["CIFAR10", "CIFAR100"], root: str | None, download: bool) -> Dataset:
    import torchvision.datasets

    source = getattr(torchvision.datasets, name)
    folder = data_root(root)
    if folder.name == source.base_folder:  # data.root is the batches' own folder
        folder = folder.parent
    splits = []
    for train in (True, False):
        # Safe to unpickle: torchvision compares checksums first.
        source_split = call_torchvision(
            f"data={name.lower()}",
            folder,
            download,
            lambda train=train: source(folder, train=train, download=download),  # type: ignore[misc]
        )
        inputs = torch.from_numpy(source_split.data).permute(0, 3, 1, 2).contiguous()
        splits.append(InMemory(inputs, torch.tensor(source_split.targets, dtype=torch.int64)))
    return Dataset(splits[0], None, splits[1], tuple(source_split.classes))
