"""Measurements in an HDF5 file that may be larger than memory, of which a model predicts numbers (pip install h5py).

The file has a group train, and may have val and test, each with inputs [N, F] or [N, C, L], and targets [N] or [N, K].
This module as mine/hdf5.py, and the data set as conf/data/measurements.yaml:

    defaults: [_values, _self_]
    _target_: mine.hdf5.measurements
    file: ???

    dlopt train --config-dir conf data=measurements data.file=FILE loss=mse model=mlp allow_packages=[mine]
"""

from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from dlopt.extend import Dataset, Samples, UserError


class Measurements(Samples):
    """One group of the file, which each read opens: processes must not share an open file of HDF5."""

    def __init__(self, path: Path, group: str) -> None:
        self.path, self.group = path, group
        with h5py.File(path) as file:
            inputs, targets = file[group]["inputs"], file[group]["targets"][:]
            if len(inputs) != len(targets) or inputs.ndim not in (2, 3):
                raise UserError(f"data.file={path}: {group} must have inputs [N, F] or [N, C, L], and N targets")
            super().__init__(torch.from_numpy(targets).float(), inputs.shape[1:])

    def read(self, rows: Tensor) -> Tensor:
        unique, inverse = np.unique(rows.numpy(), return_inverse=True)  # HDF5 reads increasing places
        with h5py.File(self.path) as file:
            inputs = file[self.group]["inputs"][unique]
        return torch.from_numpy(inputs[inverse]).float()

    def place(self, index: int) -> str:
        return f"{self.group}, row {int(self.rows_of(torch.tensor(index)))}"


def measurements(*, file: str) -> Dataset:
    """Reads the groups of a file. Raises `UserError`."""
    path = Path(file).expanduser()
    try:
        with h5py.File(path) as opened:
            groups = [name for name in ("train", "val", "test") if name in opened]
    except OSError as error:
        raise UserError(f"data.file={file}: is no HDF5 file ({error})") from None
    if "train" not in groups:
        raise UserError(f"data.file={file}: has no group train")
    splits = {name: Measurements(path, name) for name in groups}
    return Dataset(splits["train"], splits.get("val"), splits.get("test"), None, source=f"measurements of {path.name}")
