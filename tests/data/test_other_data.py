"""Samples of other data with the class numbers of a trained model."""

from typing import Any

import pytest
import torch

from dlopt.basics.errors import UserError
from dlopt.data.other_data import with_classes
from dlopt.data.samples import InMemory

KNOWN = ("low", "True", "mid", "é")


def samples(targets: Any) -> InMemory:
    return InMemory(torch.arange(float(len(targets)))[:, None], torch.tensor(targets))


def test_classes_are_matched_by_name_or_form() -> None:
    names = ("MID", "TRUE", "odd", "low", "unused")
    found, notes = with_classes(samples([0, 1, 2, 3, 2, 0]), names, KNOWN, leaves_out=True)
    assert found.targets.tolist() == [KNOWN.index(name) for name in ("mid", "True", "low", "mid")]
    assert found.fetch(torch.arange(4))[:, 0].tolist() == [0, 1, 3, 5]
    assert notes == (
        "warning: MID is read as the class mid",
        "warning: TRUE is read as the class True",
        "left out: 2 of 6 samples, of classes that the model does not know (odd)",
    )
    for leaves_out, kept in ((False, [0, 1, 2]), (True, [2, 2])):
        with pytest.raises(UserError, match=r"the data have the classes .*odd, those of the training are low, True, "):
            with_classes(samples(kept), names, KNOWN, leaves_out=leaves_out)
    same, notes = with_classes(samples([1, 0]), ("mid", "low", "odd"), KNOWN)  # no sample is odd
    assert same.targets.tolist() == [0, 2] and notes == ()


def test_several_labels_per_sample() -> None:
    names = ("mid", "odd", "low", "LOW")
    rows = [[1.0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]]
    found, notes = with_classes(samples(rows), names, KNOWN, leaves_out=True)
    labels = [{KNOWN[i] for i, flag in enumerate(row) if flag} for row in found.targets.tolist()]
    assert labels == [{"mid"}, {"low"}, set()] and set(found.targets.unique().tolist()) == {0.0, 1.0}
    assert notes[-1] == "left out: 1 of 4 samples, of classes that the model does not know (odd)"
