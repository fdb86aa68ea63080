"""Data sets of lecture recipes: class counts, the covered region, the fixed validation set, refusals."""

import pytest
import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.data.images.digits import digits
from dlopt.lab.data import Digit, unrepresentative_curve, unrepresentative_digits

RARE: list[Digit] = [7, 8, 9]


def draw(fraction: float, *, train_size: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns the labels for training and the images for validation."""
    dataset = unrepresentative_digits(train_size=train_size, val_size=438, rare=RARE, fraction=fraction, draw_seed=seed)
    assert dataset.val is not None
    return dataset.train.targets, dataset.val.fetch(torch.arange(438))


@pytest.mark.parametrize(("fraction", "common", "rare"), [(1.0, 30, 30), (0.3, 38, 11), (0.1, 41, 4), (0.0, 43, 0)])
def test_rare_classes_have_a_fraction_of_the_others_in_sets_of_one_size(
    fraction: float, common: int, rare: int
) -> None:
    labels, _ = draw(fraction)
    counts = labels.bincount(minlength=10).tolist()
    assert sum(counts) == 300
    assert all(abs(count - common) <= 1 for count in counts[:7]) and all(abs(count - rare) <= 1 for count in counts[7:])


def test_the_validation_set_is_stratified_and_depends_on_nothing() -> None:
    first, other = draw(1.0)[1], draw(0.1, seed=3)[1]
    assert torch.equal(first, other)
    labels = unrepresentative_digits(train_size=10, val_size=438, rare=[], fraction=1.0, draw_seed=0).val
    assert labels is not None and set(labels.targets.bincount().tolist()) <= {42, 43, 44, 45}


def test_training_samples_are_others_and_depend_on_the_seed() -> None:
    sets = [unrepresentative_digits(train_size=300, val_size=438, rare=RARE, fraction=0.1, draw_seed=s) for s in (0, 1)]
    rows = [
        {tuple(row) for row in part.fetch(torch.arange(len(part))).flatten(1).tolist()}
        for each in sets
        for part in (each.train, each.val)
        if part is not None
    ]
    assert not rows[0] & rows[1] and len(rows[0] & rows[2]) < 150
    assert sets[0].test is not None and digits().test is not None and len(sets[0].test) == 359


def test_too_many_samples_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.train_size=900: needs 129 digits 0, of which there are 9"):
        draw(0.0, train_size=900)


def test_a_curve_trains_on_a_part_of_the_interval_and_validates_on_all_of_it() -> None:
    keys: dict[str, object] = {"train_size": 400, "val_size": 400, "test_size": 0, "seed": 3}

    def inputs(low: float, high: float) -> list[Tensor]:
        dataset = unrepresentative_curve(
            covered=(low, high),
            function="sine",
            interval=(-2.0, 2.0),
            noise=0.3,
            **keys,  # type: ignore[arg-type]
        )
        assert dataset.val is not None and dataset.test is None
        return [samples.fetch(torch.arange(400)) for samples in (dataset.train, dataset.val)]

    part, val = inputs(-2.0, 1.0)
    whole, same = inputs(-2.0, 2.0)
    assert -2 <= part.min() < -1.9 and 0.9 < part.max() <= 1 and whole.max() > 1.9
    assert torch.equal(val, same) and val.max() > 1.9
    with pytest.raises(UserError, match=r"data\.covered=\[-3\.0, 1\.0\]: must be a part of"):
        inputs(-3.0, 1.0)
