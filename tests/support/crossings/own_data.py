"""The numbers of values.csv as a data set of a user's package."""

import csv
from pathlib import Path

import torch
from torch import Tensor


class Numbers(torch.utils.data.Dataset[tuple[Tensor, float]]):
    """The rows of one split: the features, in single precision, and the target."""

    def __init__(self, *, file: str, split: str) -> None:
        with Path(file).open(newline="") as text:
            self.rows = [row for row in csv.DictReader(text) if row["split"] == split]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        row = self.rows[index]
        return torch.tensor([float(row[f"x{place}"]) for place in range(4)]), float(row["target"])
