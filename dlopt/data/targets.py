"""Standardizes the values of a regression (`data.standardize_target`)."""

from dataclasses import replace
from typing import Any

import torch

from dlopt.data.feature_columns import FeatureColumns
from dlopt.data.normalization import moments
from dlopt.data.samples import Dataset, InMemory


def standardized(dataset: Dataset, saved: FeatureColumns | None, *, is_enabled: bool = True) -> Dataset:
    """Returns a dataset of numbers whose targets have mean 0 and standard deviation 1 in the training set.

    Several values per sample have one mean and one deviation; a constant only becomes 0. Loss and outputs are then in
    these units, and the columns of the dataset have the constants, with which predictions are in the unit of the label.

    Args:
        saved: columns of the training data, whose constants hold for other data, too; None to compute them.
        is_enabled: otherwise targets are only scaled if those of the training data are; all become float32.
    """
    if dataset.classes is not None or dataset.layout is not None:
        return dataset
    present: list[Any] = [each for each in (dataset.train, dataset.val, dataset.test) if each is not None]
    if not is_enabled and (saved is None or saved.scale == 1.0):
        for samples in present:
            if samples.targets.dtype == torch.float64:
                samples.targets = samples.targets.float()
        return dataset
    if saved is None:
        known = dataset.train.targets.to(torch.float64, copy=True).reshape(-1, 1)  # which `moments` overwrites
        center, deviation = moments(InMemory(known, known))
        saved = FeatureColumns((), "", mean=center.item(), scale=deviation.item())
    mean, scale = saved.mean, saved.scale
    for samples in present:
        samples.targets = ((samples.targets.double() - mean) / scale).float()
    note = f"targets and outputs: (value - {mean:.6g}) / {scale:.6g} (data.standardize_target)"
    columns = dataset.columns or FeatureColumns((), "target")
    return replace(dataset, columns=replace(columns, mean=mean, scale=scale), notes=(*dataset.notes, note))
