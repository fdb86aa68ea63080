"""Generated tasks: recall of the first symbol, and a linear function of features with different ranges."""

from typing import Any

import pytest
import torch

from dlopt.data.copying import copying, recall
from dlopt.data.linear import linear
from dlopt.data.samples import InMemory
from dlopt.errors import UserError

SIZES = {"train_size": 300, "val_size": 20, "test_size": 0, "seed": 0}


def tensors(samples: Any) -> tuple[torch.Tensor, torch.Tensor]:
    assert isinstance(samples, InMemory)
    return samples.inputs, samples.targets


def test_copying_hides_the_label_in_the_first_step() -> None:
    keys = {"length": 7, "symbols": 3, "noise": 0.5}
    dataset = copying(**keys, **SIZES)  # type: ignore[arg-type]
    inputs, labels = tensors(dataset.train)
    assert inputs.shape == (300, 1, 7, 3) and dataset.classes == ("0", "1", "2") and dataset.test is None
    assert torch.equal(inputs[:, 0, 0].argmax(1), labels) and torch.equal(inputs[:, 0, 0].sum(1), torch.ones(300))
    rest = inputs[:, 0, 1:]
    assert float(rest.std()) == pytest.approx(0.5, rel=0.03)
    means = torch.stack([rest[labels == k].mean(0) for k in range(3)])
    assert float(means.abs().max()) < 0.2  # about 4 standard errors: the rest does not depend on the label
    again, other = (copying(**keys, **{**SIZES, "seed": seed}) for seed in (0, 1))  # type: ignore[arg-type]
    assert torch.equal(tensors(again.train)[0], inputs) and not torch.equal(tensors(other.train)[0], inputs)
    longer = copying(**keys, **{**SIZES, "train_size": 400})  # type: ignore[arg-type]
    assert torch.equal(tensors(longer.val)[0], tensors(dataset.val)[0])


def test_recall_labels_the_marked_symbol() -> None:
    inputs, labels = tensors(recall(length=12, symbols=3, **SIZES).train)
    assert inputs.shape == (300, 1, 12, 4)
    symbols, marks = inputs[:, 0, :, :3], inputs[:, 0, :, 3]
    assert torch.equal(symbols.sum(2), torch.ones(300, 12)) and torch.equal(marks.sum(1), torch.ones(300))
    assert torch.equal((symbols * marks.unsqueeze(2)).sum(1).argmax(1), labels)
    assert set(marks.argmax(1).tolist()) == {0, 1, 2}  # the first quarter
    agreement = (symbols.argmax(2) == labels.unsqueeze(1)).float().mean(0)
    assert float(agreement[3:].max()) < 0.45  # chance is 1/3; later symbols do not reveal the label


def test_linear_features_have_their_ranges_and_equal_weight() -> None:
    intervals = ((1.0, 2.0), (100.0, 200.0))
    dataset = linear(intervals=intervals, noise=0.0, **SIZES)
    x, y = tensors(dataset.train)
    for column, (low, high) in zip(x.T, intervals, strict=True):
        assert low <= float(column.min()) < low + 0.05 * (high - low)
        assert high >= float(column.max()) > high - 0.05 * (high - low)
    torch.testing.assert_close(y, (2 * x[:, 0] - 3) + (x[:, 1] - 150) / 50, rtol=1e-4, atol=1e-4)
    noisy = tensors(linear(intervals=intervals, noise=0.3, **{**SIZES, "train_size": 5000}).train)
    residual = noisy[1] - (2 * noisy[0][:, 0] - 3) - (noisy[0][:, 1] - 150) / 50
    assert float(residual.std()) == pytest.approx(0.3, rel=0.04)


@pytest.mark.parametrize(("intervals", "message"), [(((2.0, 2.0),), "is empty"), ((), "at least one feature")])
def test_linear_refuses_empty_intervals(intervals: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        linear(intervals=intervals, noise=0.0, **SIZES)
