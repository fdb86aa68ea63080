"""Standardizes the values of a regression (`data.standardize_target`)."""

from dataclasses import replace
from typing import Any

from dlopt.data.feature_columns import FeatureColumns
from dlopt.data.normalization import moments
from dlopt.data.samples import Dataset, InMemory


def standardized(dataset: Dataset, name: str, saved: FeatureColumns | None) -> Dataset:
    """Returns a dataset of numbers whose targets have mean 0 and standard deviation 1 in the training set.

    Several values per sample have one mean and one deviation. Loss and outputs are then in these units, and the
    columns of the dataset have the constants, with which predictions are in the unit of the label.

    Args:
        name: of the label.
        saved: columns of the training data, whose constants hold for other data, too; None to compute them.
    """
    if dataset.classes is not None or dataset.layout is not None:
        return dataset
    if saved is None:
        known = dataset.train.targets.double().reshape(-1, 1)
        center, deviation = moments(InMemory(known, known))
        mean, scale = center.item(), deviation.item()
    else:
        mean, scale = saved.mean, saved.scale
    present: list[Any] = [each for each in (dataset.train, dataset.val, dataset.test) if each is not None]
    for samples in present:
        samples.targets = ((samples.targets.double() - mean) / scale).float()
    note = f"targets and outputs: (value - {mean:.6g}) / {scale:.6g} (data.standardize_target)"
    columns = replace(dataset.columns or FeatureColumns((), name), mean=mean, scale=scale)
    return replace(dataset, columns=columns, notes=(*dataset.notes, note))
