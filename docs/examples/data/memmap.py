"""Images in NumPy files that may be larger than memory: each batch is read from the disk.

A folder has train_images.npy, uint8 [N, C, H, W], and train_labels.npy, integers [N] from 0; a test set likewise.
This module as mine/memmap.py, and the data set as conf/data/arrays.yaml:

    defaults: [_common, _self_]
    _target_: mine.memmap.arrays
    root: ???

    dlopt train --config-dir conf data=arrays data.root=FOLDER allow_packages=[mine]

`data.memory`, `data.workers`, `data.image_size`, `data.val_split`, `data.label_noise` and all other keys of data then
mean what they mean for the data sets of dlopt.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dlopt.extend import Dataset, Samples, UserError


class Arrays(Samples):
    """Images of one split. The file is opened for each batch: an open one would be copied into every worker."""

    def __init__(self, folder: Path, split: str) -> None:
        self.path, labels = folder / f"{split}_images.npy", np.load(folder / f"{split}_labels.npy")
        images = self.opened()
        if images.ndim != 4 or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
            raise UserError(f"data.root={folder}: {self.path.name} must be uint8 [N, C, H, W], with a label for each")
        super().__init__(torch.from_numpy(labels.astype(np.int64)), images.shape[1:])

    def opened(self) -> np.ndarray:
        images: np.ndarray = np.load(self.path, mmap_mode="r")
        return images

    def read(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(self.opened()[rows.numpy()])

    def place(self, index: int) -> str:
        return f"{self.path.name}, image {int(self.rows_of(torch.tensor(index)))}"


def arrays(*, root: str) -> Dataset:
    """Reads the images of a folder; the test set may be missing. Raises `UserError`."""
    path = Path(root).expanduser()
    if not (path / "train_images.npy").is_file():
        raise UserError(f"data.root={root}: has no train_images.npy")
    train = Arrays(path, "train")
    test = Arrays(path, "test") if (path / "test_images.npy").is_file() else None
    count = int(train.targets.max()) + 1
    return Dataset(train, None, test, tuple(map(str, range(count))), source=f"{len(train):,} images of {path.name}")
