"""Images with two targets, a class and an age, which one model predicts and one loss reads.

A folder has train_images.npy, uint8 [N, C, H, W], train_labels.npy, integers [N] from 0, and train_ages.npy, numbers
[N]; a test set likewise. This module as mine/two_targets.py, and the data set as conf/data/faces.yaml:

    defaults: [_common, _self_]
    _target_: mine.two_targets.faces
    root: ???

    dlopt train --config-dir conf data=faces data.root=FOLDER allow_packages=[mine] model=mine.two_targets.TwoHeads \
        model.width=64 loss=mine.two_targets.ClassAndAge loss.factor=0.1
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.extend import Dataset, NonNegative, Samples, UserError


class Faces(Samples):
    """Images of one split, whose age is a further tensor of each sample."""

    def __init__(self, folder: Path, split: str) -> None:
        self.path = folder / f"{split}_images.npy"
        labels, ages = (np.load(folder / f"{split}_{name}.npy") for name in ("labels", "ages"))
        if labels.shape != ages.shape:
            raise UserError(f"data.root={folder}: {len(labels)} labels, but {len(ages)} ages of {split}")
        further = {"age": torch.from_numpy(ages).float()}
        super().__init__(torch.from_numpy(labels), np.load(self.path, mmap_mode="r").shape[1:], further)

    def read(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(np.load(self.path, mmap_mode="r")[rows.numpy()])


def faces(*, root: str) -> Dataset:
    """Reads the images of a folder; the test set may be missing. Raises `UserError`."""
    path = Path(root).expanduser()
    if not (path / "train_images.npy").is_file():
        raise UserError(f"data.root={root}: has no train_images.npy")
    train = Faces(path, "train")
    test = Faces(path, "test") if (path / "test_images.npy").is_file() else None
    return Dataset(train, None, test, tuple(map(str, range(int(train.targets.max()) + 1))))


class TwoHeads(nn.Sequential):
    """Returns [N, classes + 1]: the logits of the classes first, of which dlopt computes metrics, then the age."""

    def __init__(self, *, input_shape: tuple[int, ...], classes: int, width: int) -> None:
        super().__init__(nn.Flatten(), nn.LazyLinear(width), nn.ReLU(), nn.Linear(width, classes + 1))


class ClassAndAge(nn.Module):
    """Cross-entropy of the class + factor x squared error of the age, mean over samples."""

    def __init__(self, *, factor: NonNegative) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, outputs: Tensor, targets: Tensor, *, age: Tensor) -> Tensor:
        return F.cross_entropy(outputs[:, :-1], targets) + self.factor * F.mse_loss(outputs[:, -1], age)
